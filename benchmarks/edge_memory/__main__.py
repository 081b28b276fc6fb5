"""Peak memory of `pocketune-edge personalize`: `python -m benchmarks.edge_memory [--models pocket-sd3] [--table-only]`.

Each row is a fresh process that reads photos, encodes them, makes features and trains, on one thread. Rows are written at once
and those that are there are not measured again. Bundles are made below --work and deleted after their rows, unless --keep.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.edge_memory import bundle_path
from benchmarks.edge_memory.table import WEIGHTS, memory_table
from benchmarks.rows import Row, add_output_options, append_row, read_rows
from pocketune.atomic import write_text
from pocketune.errors import PocketuneError, RunError
from pocketune.runfolder import DEVICE_RECORD_FILE

MODELS = ("pocket-sd3", "sd35-medium")
MODES = ("streaming", "one graph")
PHOTOS = Path("demo/photos/toy")
STEPS = {"pocket-sd3": 10, "sd35-medium": 2}


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, and write the table."""
    options = _parser().parse_args(arguments)
    try:
        for model in () if options.table_only else options.models:
            _measure_model(model, options)
        write_text(options.table_file, memory_table(read_rows(options.out)))
        print(f"wrote {options.table_file}")
    except PocketuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measure_model(model: str, options: argparse.Namespace) -> None:
    known = {(row["model"], row["weights"], row["mode"]) for row in read_rows(options.out)}
    wanted = [(kind, mode) for kind in options.weights for mode in MODES if (model, kind, mode) not in known]
    missing = [
        kind for kind in dict.fromkeys(kind for kind, _ in wanted) if not bundle_path(options.work, model, kind).exists()
    ]
    if missing:
        made = _output_of([sys.executable, "-m", "benchmarks.edge_memory.bundles", str(options.work), model, *missing])
        append_row(options.out, {"model": model, "weights": ",".join(missing), "mode": "export", **made})
    for kind, mode in wanted:
        row = {"model": model, "weights": kind, "mode": mode, **run_edge(bundle_path(options.work, model, kind), mode, options)}
        append_row(options.out, row)
        print(f"{model:12} {kind:5} {mode:10} {row['peak_rss_bytes'] / 1e6:.0f} MB", flush=True)
    if not options.keep:
        shutil.rmtree(options.work / model, ignore_errors=True)
        for kind in WEIGHTS:
            shutil.rmtree(bundle_path(options.work, model, kind), ignore_errors=True)


def run_edge(bundle: Path, mode: str, options: argparse.Namespace) -> Row:
    """Personalize in a fresh process; its peaks in bytes and the median CPU seconds of a step."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    steps = STEPS[manifest["model"]["name"]]
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        record = _record_of(bundle, mode, steps=steps, run=Path(scratch) / "run")
    step = next(graph for graph in manifest["graphs"] if graph["role"] == "train_step")
    return {
        "resolution": manifest["batch"]["resolution"],
        "blocks": manifest["model"]["block_count"],
        "trained_blocks": sum(span["stop"] - span["start"] for span in manifest["plan"]["spans"] if not span["skipped"]),
        "step_weight_bytes": step["weight_bytes"],
        "steps": steps,
        "peak_rss_bytes": max(reading["rss_bytes"] for reading in record["peaks"].values()),
        "peaks": record["peaks"],
        "step_cpu_seconds": median(record["step_cpu_seconds"]),
        "versions": record["versions"],
    }


def _record_of(bundle: Path, mode: str, *, steps: int, run: Path) -> dict[str, Any]:
    """What a fresh process that personalizes writes about itself."""
    command = [sys.executable, "-m", "pocketune_edge.cli", "personalize", str(bundle), str(PHOTOS), "--out", str(run)]
    command += ["--steps", str(steps), "--threads", "1", "--json", "--quiet"]
    _output_of([*command, "--streaming"] if mode == "streaming" else command)
    record: dict[str, Any] = json.loads((run / DEVICE_RECORD_FILE).read_text(encoding="utf-8"))
    return record


def _output_of(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        msg = f"{' '.join(command)} failed: {reason[:300]}. Run it by hand to see more."
        raise RunError(msg)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.edge_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=MODELS, help="default: both; sd35-medium needs 25 GB of disk"
    )
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS, help="default: all")
    parser.add_argument("--work", type=Path, default=Path("runs/edge_memory"), help="models and bundles (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="do not delete models and bundles")
    add_output_options(parser, "edge_memory")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
