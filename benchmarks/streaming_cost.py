"""What streamed weights cost in CPU time: `python -m benchmarks.streaming_cost [--models runs/memory] [--table-only]`.

Three trainings of Stable Diffusion 3.5 medium at its true configuration, with random weights, take turns in one process, so
that whatever else the machine does hits all alike: half of the blocks skipped with the kept weights in memory, the same with
weights streamed, and all blocks streamed. All make activations again in backward. Each round is a raw row; the first round
begins with the weights outside of the page cache, and its resident training has just been loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.memory.jobs import JOBS, Job
from benchmarks.rows import Row, add_output_options, append_row, read_rows
from pocketune.atomic import write_text
from pocketune.errors import PocketuneError

if TYPE_CHECKING:
    from pocketune.models.load import ModelFolder

_MODEL = "sd35-medium"
RESIDENT, STREAMED, ALL = TURNS = ("resident", "streamed", "all_streamed")
_ALIKE = {"activations": "recomputed"}
_STREAMED = _ALIKE | {"weights": "streamed"}
_HALF = JOBS["sd35-256-half"].skip


def main(arguments: list[str] | None = None) -> int:
    """Measure, unless only the table is wanted, and write the table."""
    options = _parser().parse_args(arguments)
    try:
        if not options.table_only:
            from benchmarks.memory.weights import model_folder

            measure(model_folder(_MODEL, options.models), resolution=256, skip=_HALF, rounds=options.rounds, out=options.out)
        table = cost_table(read_rows(options.out))
        if table:
            write_text(options.table_file, table)
            print(f"wrote {options.table_file}")
    except PocketuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(path: Path, *, resolution: int, skip: str, rounds: int, out: Path, text_tokens: int = 333) -> None:
    """Let the trainings take turns; a row a round is appended to `out`, the first one with weights that no cache holds.

    Args:
        path: a folder with the weights of a transformer.
        resolution: side of the training images in pixels.
        skip: blocks, as a recipe names them, of the two trainings that skip.
        rounds: after the first.
        out: raw rows.
        text_tokens: of a prompt.
    """
    import torch

    from pocketune.allocator import name_allocator, return_freed_memory
    from pocketune.models.load import ModelFolder

    allocator = name_allocator() + (", freed memory returned" if return_freed_memory() else "")
    folder = ModelFolder(path.name, path)
    jobs = {
        RESIDENT: Job(title=RESIDENT, model="", resolution=resolution, text_tokens=text_tokens, skip=skip, settings=_ALIKE),
        STREAMED: Job(title=STREAMED, model="", resolution=resolution, text_tokens=text_tokens, skip=skip, settings=_STREAMED),
        ALL: Job(title=ALL, model="", resolution=resolution, text_tokens=text_tokens, settings=_STREAMED),
    }
    steps = {name: _training(folder, job) for name, job in jobs.items()}
    for number in range(rounds + 1):
        seconds: dict[str, list[float]] = {}
        for name in sorted(TURNS, reverse=number % 2 == 1):
            if number == 0:
                _forget(folder.denoiser_files())
            began = time.process_time(), time.perf_counter()
            steps[name]()
            seconds[name] = [round(time.process_time() - began[0], 3), round(time.perf_counter() - began[1], 3)]
        append_row(
            out,
            {
                "model": folder.name,
                "resolution": resolution,
                "skip": skip,
                "threads": torch.get_num_threads(),
                "allocator": allocator,
                "torch": torch.__version__,
                "round": number,
                "cold": number == 0,
                "cpu_s": {name: found[0] for name, found in seconds.items()},
                "wall_s": {name: found[1] for name, found in seconds.items()},
            },
        )


def _training(folder: ModelFolder, job: Job) -> Callable[[], float]:
    """A step of a training, ready to be run again and again."""
    from benchmarks.memory.bench import Bench
    from benchmarks.memory.measure import recipe_of
    from pocketune.methods.lora import add_lora
    from pocketune.train import forget_activations, new_optimizer, train_step, update

    recipe = recipe_of(job, steps=1)
    bench = Bench.of(folder, job, recipe)
    parameters = add_lora(bench.adapter, blocks=bench.plan.kept, rank=recipe.rank)
    optimizer = new_optimizer(parameters, recipe)
    forget_activations(bench.adapter, recipe, lambda: update(parameters.values(), recipe, optimizer))
    return partial(train_step, bench.adapter, parameters, bench.plan, recipe, bench.batches(()), optimizer)


def _forget(files: Sequence[Path]) -> None:
    """Put files out of the page cache, where the system can."""
    for path in files:
        with path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cost_table(rows: Sequence[Row]) -> str:
    """Markdown: of the newest run, medians over its warm rounds beside its cold one, and the medians of the ratios."""
    rows = _newest_run(rows)
    if not rows:
        return ""
    warm, cold = [row for row in rows if not row["cold"]], rows[0]
    titles = {
        RESIDENT: "half of the blocks skipped, weights in memory",
        STREAMED: "half of the blocks skipped, weights streamed",
        ALL: "all blocks, weights streamed",
    }
    lines = [
        "<!-- generated by `python -m benchmarks.streaming_cost --table-only`; do not edit -->",
        "",
        f"{cold['model']}, {cold['resolution']} px, {cold['threads']} thread(s), torch {cold['torch']}, allocator "
        f"{cold['allocator']}; medians of {len(warm)} rounds in one process, on a machine that did other work too. The wall's "
        "clock of the cold round has the disk in it.",
        "",
        "| step | CPU s, warm | CPU s, cold | wall s, cold |",
        "|---|---:|---:|---:|",
        *(
            f"| {titles[name]} | {median(row['cpu_s'][name] for row in warm):.1f} | {cold['cpu_s'][name]:.1f} "
            f"| {cold['wall_s'][name]:.0f} |"
            for name in TURNS
        ),
        "",
        f"Streamed against in memory: {_ratio(warm, STREAMED, RESIDENT):.2f} times the CPU time. Half of the blocks against "
        f"all: {_ratio(warm, STREAMED, ALL):.2f}.",
        "",
    ]
    return "\n".join(lines)


def _newest_run(rows: Sequence[Row]) -> list[Row]:
    """Rows from the last cold round on."""
    start = max((number for number, row in enumerate(rows) if row["cold"]), default=len(rows))
    return list(rows[start:]) if len(rows) - start > 1 else []


def _ratio(rows: Sequence[Row], over: str, under: str) -> float:
    return float(median(row["cpu_s"][over] / row["cpu_s"][under] for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streaming_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="with a warm cache, after a cold one (%(default)s)")
    parser.add_argument("--models", type=Path, default=Path("runs/memory"), help="folder of random weights (%(default)s)")
    add_output_options(parser, "streaming_cost")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
