"""The report of a run: `run.json` for programs and `report.html`, one self-contained page, for people."""

from __future__ import annotations

import base64
import io
import shlex
from datetime import UTC, datetime
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from PIL import Image

from pocketune.atomic import write_text
from pocketune.errors import RunError
from pocketune.plan.blocks import ranges_text
from pocketune.record import RunRecord
from pocketune.runfolder import RECORD_FILE, REPORT_FILE
from pocketune.sampling.choices import Choice
from pocketune.units import duration, readable_size

_SAMPLE_SIDE = 512
_THUMBNAIL_SIDE = 160
_MAX_THUMBNAILS = 24
_PLAN_SHOWN_ELSEWHERE = frozenset({"blocks", "skipped", "trained_blocks", "residuals", "choices"})


def write_report(record: RunRecord, folder: Path) -> None:
    """Write `report.html`, and then `run.json`, whose presence says that the run is complete.

    Args:
        record: what was measured.
        folder: the RUN folder, which holds the images of `record.samples`, and thumbnails of the photos in `photos/*.jpg`.

    Raises:
        RunError: an image is missing or damaged, or the folder cannot be written.
    """
    write_text(folder / REPORT_FILE, render_report(record, folder))
    write_text(folder / RECORD_FILE, record.to_text())


def render_report(record: RunRecord, folder: Path) -> str:
    """Give the page as text: no script, no reference to anything outside, all text escaped."""
    # Here and not at the top: neither library should count in the memory that a training is measured by.
    from markupsafe import Markup

    from pocketune.plots import ACCENT, choices_plot, loss_plot, memory_plot, phase_colour

    choices = [Choice(**choice) for choice in record.plan.get("choices", ())]
    thumbnails = sorted((folder / "photos").glob("*.jpg"))
    return fill_template(
        files("pocketune") / "report.html.j2",
        record=record,
        model_name=Path(record.model).name if Path(record.model).is_absolute() else record.model,
        accent=ACCENT,
        tiles=_tiles(record),
        blocks=_block_cells(record.plan),
        plan={_label(key): _value(key, value) for key, value in record.plan.items() if key not in _PLAN_SHOWN_ELSEWHERE},
        recipe={_label(key): _value(key, value) for key, value in record.recipe.model_dump(mode="json").items()},
        pairs=[
            (pair, _embed(folder / pair.before, side=_SAMPLE_SIDE), _embed(folder / pair.after, side=_SAMPLE_SIDE))
            for pair in record.samples
        ],
        photos=[_embed(path, side=_THUMBNAIL_SIDE) for path in thumbnails[:_MAX_THUMBNAILS]],
        loss_svg=Markup(loss_plot(record.losses)) if record.losses else None,  # drawn from numbers alone
        choices_svg=Markup(choices_plot(choices, record.recipe)) if choices else None,  # drawn from numbers alone
        memory_svg=Markup(memory_plot(record.memory)) if record.memory else None,  # drawn from numbers alone
        phases=[
            {
                "name": phase,
                "colour": phase_colour(phase),
                "seconds": record.seconds.get(phase),
                "rss": readable_size(peak.rss_bytes),
                "predicted": _predicted(record, phase),
                "anonymous": readable_size(peak.anonymous_bytes),
                "file": readable_size(peak.file_bytes),
            }
            for phase, peak in record.peaks.items()
        ],
        has_budget=record.prediction is not None,
        command=shlex.join(["pocketune", "sample", folder.name or ".", "--prompt", record.recipe.instance_prompt]),
        started=_readable_time(record.started),
        duration=duration(sum(record.seconds.values())),
    )


def fill_template(template: Traversable, **values: Any) -> str:
    """Give a page as text: what is filled in is escaped, unless it is markup, and none may be missing."""
    import jinja2  # here, as above

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values)


def _readable_time(iso: str) -> str:
    """2030-01-02 03:04 UTC; text that is no ISO 8601 time stays as it is."""
    try:
        return f"{datetime.fromisoformat(iso).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return iso


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """The figures at the top: value, name, remark."""
    peaks = {phase: peak.rss_bytes for phase, peak in record.peaks.items()}
    trained, blocks = record.plan.get("trained_blocks", []), record.plan.get("blocks")
    tiles = [(f"{record.recipe.steps:,}", "steps", f"batch of {record.recipe.batch_size}")]
    if peaks:
        highest = max(peaks, key=lambda phase: peaks[phase])
        tiles.append((readable_size(peaks.get("training", peaks[highest])), "peak memory", "resident, while training"))
        if highest != "training":
            tiles.append((readable_size(peaks[highest]), "highest of all", f"in the phase {highest}"))
    if blocks:
        tiles.append(
            (f"{len(trained)} of {blocks}", "blocks trained", f"{record.plan.get('trained_parameters', 0):,} parameters")
        )
    tiles.append((f"{100 * record.check.image_change:.1f} %", "image change", "mean difference, same seed"))
    return tiles


def _block_cells(plan: dict[str, Any]) -> list[tuple[int, str]]:
    """Each block's number and what happened to it: trained, exact, approximate (cached), or dropped."""
    count, trained = plan.get("blocks", 0), set(plan.get("trained_blocks", []))
    first_trained = min(trained, default=0)
    cells = []
    for index in range(count):
        if index in trained:
            kind = "trained"
        elif not plan.get("residuals"):
            kind = "dropped"
        else:
            kind = "exact" if index < first_trained else "approximate"
        cells.append((index, kind))
    return cells


def _predicted(record: RunRecord, phase: str) -> str:
    """The predicted peak of a phase; a dash where nothing was predicted."""
    found = ((record.prediction or {}).get("phases") or {}).get(phase)
    return "-" if found is None else readable_size(found)


def _embed(path: Path, *, side: int) -> str:
    """An image as a data URI, its longer side at most `side` pixels; small images keep every pixel."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        msg = f"cannot put {path} into the report: {error}. Leave the RUN folder alone while a job runs."
        raise RunError(msg) from error
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "jpeg" if max(image.size) > 256 or path.suffix == ".jpg" else "png"
    image.save(buffer, format=kind, **({"quality": 90} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _label(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _value(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, int | float):
        return readable_size(value)
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}" if key != "seed" else str(value)
    if isinstance(value, list | tuple):
        numbers = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
        return (ranges_text(value) if numbers else ", ".join(map(str, value))) or "none"
    return str(value)
