"""The page of a search for blocks to skip: its plot, and the table of the best splits."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from pocketune.atomic import write_text
from pocketune.plan.blocks import number_to_skip
from pocketune.plan.selection import Selection
from pocketune.report import fill_template


def write_selection_report(selection: Selection, path: Path) -> None:
    """Write the page: no script, no reference to anything outside, all text escaped."""
    # Here and not at the top: neither library is needed before a search ends.
    from markupsafe import Markup

    from pocketune.plots import ACCENT, distance_plot

    first, last = selection.mean_distances()
    rows = [
        {
            "skipped": skipped,
            "share": skipped / selection.blocks,
            "split": split,
            "blocks": split.plan(selection.blocks).describe(),
            "first_only": first[skipped],
            "last_only": last[skipped],
            "half": skipped == number_to_skip(selection.blocks, 0.5),
        }
        for skipped, split in enumerate(selection.splits(), start=1)
    ]
    sides = ([m.first for m in selection.models], [m.last for m in selection.models])
    text = fill_template(
        files("pocketune.selection") / "report.html.j2",
        selection=selection,
        accent=ACCENT,
        images=len(selection.seeds) * len(selection.models[0].prompts),
        plot=Markup(distance_plot(*sides)),  # drawn from numbers alone
        rows=rows,
    )
    write_text(path, text)
