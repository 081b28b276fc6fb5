"""The page of a search for blocks to skip: its plot, and the table of the best splits."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from pocketune.atomic import write_text
from pocketune.plan.blocks import number_to_skip
from pocketune.plan.select import Selection


def write_selection_report(selection: Selection, path: Path) -> None:
    """Write the page: no script, no reference to anything outside, all text escaped."""
    # Here and not at the top: neither library should count in the memory that a training is measured by.
    import jinja2
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
    template = files("pocketune").joinpath("selection.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    sides = ([m.first for m in selection.models], [m.last for m in selection.models])
    text = environment.from_string(template).render(
        selection=selection,
        accent=ACCENT,
        images=len(selection.seeds) * len(selection.models[0].prompts),
        plot=Markup(distance_plot(*sides)),  # drawn from numbers alone
        rows=rows,
    )
    write_text(path, text)
