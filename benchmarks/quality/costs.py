"""What a method costs: peak memory and time of one training in a fresh process, so that nothing else counts.

`python -m benchmarks.quality --costs` starts `python -m benchmarks.quality.costs REQUEST.json` for every row.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.methods import Method
from benchmarks.rows import Row, append_row, read_rows
from pocketune.errors import RunError
from pocketune.memory import MemoryReading
from pocketune.record import RunRecord
from pocketune.runfolder import RECORD_FILE

KEY = ("model", "weights", "settings", "method", "changes", "repeat")
"""What tells one row from another."""


def measure_costs(
    methods: Sequence[Method],
    photos: Sequence[Path],
    *,
    model: str,
    recipe: dict[str, Any],
    repeats: int,
    identity: Row,
    out: Path,
    on_row: Callable[[Row], None] = lambda _: None,
) -> None:
    """Write the rows that `out` lacks, one a training.

    Args:
        methods: those that train are measured.
        photos: of the subject that is trained.
        model: built-in name, diffusers folder or hub id.
        recipe: with everything but what methods change.
        repeats: trainings a method.
        identity: "model", "weights" and "settings" of every row.
        out: the file of raw rows.
        on_row: called with every new row.

    Raises:
        RunError: a training failed.
    """
    done = {tuple(row.get(name) for name in KEY) for row in read_rows(out)}
    for repeat in range(repeats):
        for method in methods:
            row: Row = {**identity, "method": method.name, "changes": method.changes_text(recipe), "repeat": repeat}
            if method.source != "lora" or tuple(row[name] for name in KEY) in done:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                row |= _trained(Path(scratch), photos, model, method.changed(recipe))
            append_row(out, row)
            on_row(row)


def cost_of(record: RunRecord) -> Row:
    """The figures of one run: peaks in bytes, time in seconds."""
    training = record.peaks["training"]
    frozen = record.peaks.get("features", MemoryReading(0, 0, 0))
    return {
        "skipped": record.plan["skipped"],
        "trained_parameters": record.plan["trained_parameters"],
        "training_rss_bytes": training.rss_bytes,
        "training_anonymous_bytes": training.anonymous_bytes,
        "features_rss_bytes": frozen.rss_bytes,
        "cache_bytes": record.plan["feature_cache_bytes"],
        "training_s": round(record.seconds["training"], 2),
        "features_s": round(record.seconds.get("features", 0.0), 2),
        "latents_s": round(record.seconds.get("latents", 0.0), 2),
        "torch": record.versions["torch"],
    }


def _trained(scratch: Path, photos: Sequence[Path], model: str, recipe: dict[str, Any]) -> Row:
    request, run = scratch / "request.json", scratch / "run"
    request.write_text(
        json.dumps({"photos": [str(path) for path in photos], "model": model, "recipe": recipe, "out": str(run)}),
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, "-m", "benchmarks.quality.costs", str(request)], check=False)
    if done.returncode != 0:
        msg = f"the training with {recipe} failed, see above. Take the method out to go on."
        raise RunError(msg)
    return cost_of(RunRecord.read(run / RECORD_FILE))


def main(arguments: Sequence[str]) -> int:
    """Do the one training that a request file describes."""
    from benchmarks.models import quiet_loading
    from pocketune import Recipe, personalize

    quiet_loading()
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    recipe = Recipe.create(**request["recipe"])
    personalize(request["photos"], model=request["model"], recipe=recipe, out=request["out"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
