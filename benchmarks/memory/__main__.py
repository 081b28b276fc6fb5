"""Peak memory of training: `python -m benchmarks.memory [--jobs sd35-512,flux-256] [--steps 3] [--table]`.

Every job runs in a fresh process of one thread, one after the other, at a published model's true configuration with random
weights that are written to `--models` first (FLUX.1 takes 24 GB of disk). A raw row a job is appended at once; `--table` makes
the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.rows import add_output_options, append_row, read_rows
from pocketune.atomic import write_text
from pocketune.lean import without_scipy

with without_scipy():  # as the command line does; the jobs name LoRA targets of a model's family, which imports diffusers
    from benchmarks.memory.grid import FITTED, HELD_OUT
    from benchmarks.memory.jobs import JOBS as NAMED
    from benchmarks.memory.predictions import predictions_table, read_predictions
    from benchmarks.memory.table import memory_table

JOBS = NAMED | FITTED | HELD_OUT
PREDICTIONS = Path("benchmarks/results/memory-predictions.json")


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, measure the jobs, and write the table when asked to."""
    options = _parser().parse_args(arguments)
    if options.row:
        return _row(options)
    if not options.table_only and not options.predict:
        # MKL keeps buffers for each thread that it has used, and what the planner knows was fitted to rows of one.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        for name in options.jobs:
            command = [sys.executable, "-m", "benchmarks.memory", "--row", name, "--models", str(options.models)]
            command += ["--steps", str(options.steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
            if done.returncode != 0:
                print(f"error: the job {name} failed", file=sys.stderr)
                return 2
            row = json.loads(done.stdout.splitlines()[-1])
            append_row(options.out, row)
            print(f"{name:24} {row['peak_rss_bytes'] / 1e6:7.0f} MB  CPU s a step {row.get('cpu_s_per_step')}", flush=True)
    if options.predict:
        from benchmarks.memory.predict import write_predictions

        write_predictions(JOBS, sorted({row["job"] for row in read_rows(options.out)}), options.predictions)
    if options.table or options.table_only:
        rows = read_rows(options.out)
        # Small jobs that are there for the sake of predictions alone have a table of their own.
        write_text(options.table_file, memory_table([row for row in rows if row["job"] not in FITTED | HELD_OUT]))
        predictions = predictions_table(rows, read_predictions(options.predictions), held_out=HELD_OUT)
        write_text(options.table_file.with_stem(f"{options.table_file.stem}-predictions"), predictions)
        print(f"wrote {options.table_file}")
    return 0


def _row(options: argparse.Namespace) -> int:
    job = JOBS[options.row]
    # Imported here so that the process that starts the others stays small.
    if not options.folder:
        # Made by a process of its own: building a file must not count.
        from benchmarks.memory.pipelines import pipeline_folder
        from benchmarks.memory.weights import model_folder

        folder = (pipeline_folder if job.wants_text else model_folder)(job.model, options.models)
        command = [sys.executable, "-m", "benchmarks.memory", "--row", options.row, "--folder", str(folder)]
        return subprocess.run([*command, "--steps", str(options.steps)], check=False).returncode
    from benchmarks.memory.measure import measure
    from benchmarks.memory.whole import measure_whole

    print(json.dumps((measure_whole if job.whole else measure)(options.row, job, options.folder, steps=options.steps)))
    return 0


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in JOBS]
    if unknown:
        msg = f"unknown job {unknown[0]}; choose from {', '.join(JOBS)}"
        raise argparse.ArgumentTypeError(msg)
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--jobs",
        type=_names,
        default=list(NAMED),
        help=f"of {', '.join(NAMED)}, or of benchmarks/memory/grid.py; default: all of the former",
    )
    parser.add_argument("--steps", type=int, default=3, help="training steps a row (%(default)s)")
    parser.add_argument("--models", type=Path, default=Path("runs/memory"), help="folder of random weights (%(default)s)")
    add_output_options(parser, "memory")
    parser.add_argument("--table", action="store_true", help="make the table afterwards")
    parser.add_argument(
        "--predict", action="store_true", help="predict the jobs of the rows that are there, and measure nothing"
    )
    parser.add_argument("--predictions", type=Path, default=PREDICTIONS, help="figures of the planner (%(default)s)")
    parser.add_argument("--row", choices=tuple(JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
