"""`pocketune personalize`: photos in, a LoRA out."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pocketune.budget.apart import Question, ask_apart, within_limits
from pocketune.commands.failures import clear_errors, needing_extra
from pocketune.commands.options import DEFAULT_MODEL, BudgetOption, JsonOption, QuietOption, SkipOption, recipe_of
from pocketune.display import ProgressDisplay, print_facts, print_lines
from pocketune.lean import without_scipy
from pocketune.record import RunRecord
from pocketune.runfolder import RECORD_FILE, REPORT_FILE
from pocketune.units import duration, parse_size, readable_size


def personalize(
    photos: Annotated[list[Path], typer.Argument(help="Photos (JPEG, PNG, WebP), or folders of them.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The RUN folder to make.", show_default=False)],
    instance_prompt: Annotated[
        str | None, typer.Option(help='What the photos show, with a rare word: "a photo of sks toy".')
    ] = None,
    model: Annotated[str, typer.Option(help="Built-in name, local diffusers folder, or hub id.")] = DEFAULT_MODEL,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of settings; options given here win over it.")] = None,
    skip: SkipOption = None,
    patches: Annotated[
        str | None, typer.Option(help="Train on patches of the photos: none, dynamic, resize, high-to-low or random.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="What is tuned: lora, scales (of packed weights), or token.")] = None,
    gradient: Annotated[
        str | None, typer.Option(help="Gradient: backprop, zeroth_order (forward passes alone) or mixed.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the training images in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal results.")] = None,
    class_prompt: Annotated[str | None, typer.Option(help='Turns prior preservation on: "a photo of a toy".')] = None,
    batch_size: Annotated[int | None, typer.Option(help="Photos in each step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of AdamW.")] = None,
    weights: Annotated[str | None, typer.Option(help="Frozen weights in memory or read from disk: resident, streamed.")] = None,
    weight_bits: Annotated[int | None, typer.Option(help="Pack the denoiser's weights to 8 or 4 bits.")] = None,
    activations: Annotated[str | None, typer.Option(help="What backward needs of a block: kept, recomputed, on_disk.")] = None,
    memory_budget: BudgetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a LoRA (or scales, or a word) of the subject in some photos; a RUN folder gets it, pictures and a report."""
    asked = {
        "instance_prompt": instance_prompt,
        "skip": skip,
        "patches": patches,
        "method": method,
        "gradient": gradient,
        "resolution": resolution,
        "steps": steps,
        "rank": rank,
        "seed": seed,
        "class_prompt": class_prompt,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weights": weights,
        "weight_bits": weight_bits,
        "activations": activations,
    }
    with clear_errors(run=out):
        settings = recipe_of(recipe, asked)
        budget: dict[str, Any] = {}
        if memory_budget is not None:
            size = parse_size(memory_budget)
            within, _ = within_limits(size)  # the job says so where that is less
            # Before the libraries are here: planning takes as much memory as they do, for a moment.
            question = Question(model=model, budget_bytes=within, photos=tuple(map(str, photos)))
            budget = {"memory_budget": size, "made_plan": None if resume else ask_apart(settings, question)}
        run_job = import_job(lean=settings.saves_memory or memory_budget is not None)
        with ProgressDisplay(Console(stderr=True), quiet=quiet) as display:
            record = run_job(photos, recipe=settings, out=out, model=model, resume=resume, on_progress=display, **budget)
    if as_json:
        typer.echo(json.dumps(_summary(record, out)))
    elif not quiet:
        _print_result(record, out)


def import_job(*, lean: bool) -> Callable[..., RunRecord]:
    """What trains, with all that it needs."""
    with needing_extra("train"), without_scipy() if lean else nullcontext():
        from pocketune.job import run_job
    return run_job


def _summary(record: RunRecord, out: Path) -> dict[str, Any]:
    """What a program wants to know first; `run.json` holds the rest."""
    values, check = record.to_json(), record.check
    return {
        "run": str(out),
        record.recipe.method: str(out / _result(record)),
        "report": str(out / REPORT_FILE),
        "record": str(out / RECORD_FILE),
        "steps": len(record.losses),
        "last_loss": record.losses[-1] if record.losses else None,
        "check": {"tensors": len(check.norms), "moved": check.moved, "image_change": check.image_change},
        **{name: values[name] for name in ("model", "model_note", "plan", "seconds", "prediction", "peaks", "samples")},
    }


def _print_result(record: RunRecord, out: Path) -> None:
    console, check = Console(), record.check
    peak = max((reading.rss_bytes for reading in record.peaks.values()), default=0)
    print_facts(
        console,
        {
            record.recipe.method: str(out / _result(record)),
            "report": str(out / REPORT_FILE),
            "took": f"{duration(sum(record.seconds.values()))}, at most {readable_size(peak)} of memory",
            "check": f"training moved {check.moved} of {len(check.norms)} tensors; the result loads and changes the images by "
            f"{100 * check.image_change:.1f} %",
        },
    )
    if record.model_note:
        print_lines(console, [record.model_note])


def _result(record: RunRecord) -> Path:
    from pocketune.tuning import METHODS

    return METHODS[record.recipe.method].result
