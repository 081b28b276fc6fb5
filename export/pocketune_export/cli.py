"""The command line `export-trainable`: export a bundle, verify one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pocketune.commands.failures import EXIT_ERROR, clear_errors, needing_extra
from pocketune.commands.options import DEFAULT_MODEL, JsonOption, QuietOption
from pocketune.display import ProgressDisplay, print_facts
from pocketune.errors import RecipeError, RunError
from pocketune.progress import Progress
from pocketune.recipe import Recipe
from pocketune.units import readable_size

if TYPE_CHECKING:
    from pocketune_edge.steps import Mode
    from pocketune_export.manifest import Manifest
    from pocketune_export.verify import Verification

app = typer.Typer(pretty_exceptions_enable=False)


class Backend(StrEnum):
    """Where a bundle runs."""

    onnx = "onnx"


class WeightsKind(StrEnum):
    """How frozen matrices are stored."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"
    int4 = "int4"


def main() -> None:
    """Run the console script `export-trainable`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()


@app.callback(invoke_without_command=True)
def export(
    context: typer.Context,
    recipe: Annotated[
        Path | None, typer.Option(help="TOML file of settings: batch size, resolution, rank and skipped blocks are fixed.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help='The bundle to make: a folder, or one file if it ends in ".ptb".')] = None,
    model: Annotated[str, typer.Option(help="Built-in name, local diffusers folder, or hub id.")] = DEFAULT_MODEL,
    backend: Annotated[Backend, typer.Option(help="The runtime that will train.")] = Backend.onnx,
    weights: Annotated[WeightsKind, typer.Option(help="How frozen matrices are stored.")] = WeightsKind.fp32,
    weight_block: Annotated[
        int | None, typer.Option(help="int8 and int4: weights of a row that share a scale; default: the whole row.", min=2)
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Export the training step of a model and a recipe, and all that a device needs around it."""
    if context.invoked_subcommand is not None:
        context.default_map = {context.invoked_subcommand: {"as_json": as_json, "quiet": quiet}}
        return
    with clear_errors():
        if recipe is None:
            msg = "no recipe: a bundle is made for one. Give a TOML file with --recipe."
            raise RecipeError(msg)
        if out is None:
            msg = "no place for the bundle: name a folder, or a file that ends in .ptb, with --out."
            raise RunError(msg)
        settings = Recipe.from_toml(recipe)
        with needing_extra("onnx"):
            from pocketune_export.exporter import export_trainable
        with ProgressDisplay(Console(stderr=True), quiet=quiet) as display:
            manifest = export_trainable(
                recipe=settings,
                out=out,
                model=model,
                backend=backend.value,
                weights=weights.value,
                weight_block=weight_block,
                on_progress=display,
            )
    if as_json:
        typer.echo(json.dumps(_summary(manifest, out)))
    elif not quiet:
        planned = {name: readable_size(size) for name, size in manifest.memory.model_dump(mode="json").items()}
        print_facts(Console(), _summary(manifest, out) | {"planned_memory": planned})


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle: a folder or an archive.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="What was exported, where the bundle's name for it does not lead there.")
    ] = None,
    steps: Annotated[int, typer.Option(help="AdamW steps to compare.", min=1, max=10_000)] = 20,
    streaming: Annotated[bool, typer.Option("--streaming", help="Run the bundle block by block.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.", min=0)] = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a few steps with the bundle and with eager PyTorch, and compare the loss, every gradient and every parameter."""
    with clear_errors():
        with needing_extra("onnx"):
            from pocketune.memory import read_memory
            from pocketune_edge.bundle import open_bundle, telling
            from pocketune_export.verify import verify as compare

        with ProgressDisplay(Console(stderr=True), quiet=quiet) as display:

            def tell(done: int, total: int) -> None:
                display(Progress(phase="steps", done=done, total=total, unit="step", rss_bytes=read_memory().rss_bytes))

            mode: Mode = "streaming" if streaming else "one graph"
            opened = open_bundle(bundle, on_bytes=telling(display))
            found = compare(opened, model=model, steps=steps, mode=mode, seed=seed, on_step=tell)
    if as_json:
        everything = {"gradients": found.gradients, "parameters": found.parameters}
        differences = {kind: {name: _finite(value) for name, value in of.items()} for kind, of in everything.items()}
        typer.echo(json.dumps(_comparison(found) | differences, allow_nan=False))
    elif not quiet:
        print_facts(Console(), _comparison(found))
    if not found.passed:
        typer.echo(f"error: {bundle} does not train as PyTorch does. Export it again, and report this model.", err=True)
        raise typer.Exit(EXIT_ERROR)


def _summary(manifest: Manifest, out: Path) -> dict[str, Any]:
    return {
        "bundle": str(out),
        "model": manifest.model.name,
        "weights": manifest.weights.storage,
        "graphs": len(manifest.graphs),
        "size_bytes": sum(file.bytes for file in manifest.files),
        "planned_memory": manifest.memory.model_dump(mode="json"),
    }


def _comparison(found: Verification) -> dict[str, Any]:
    from pocketune_export.verify import GRADIENT_TOLERANCE, TOLERANCE

    return {
        "passed": found.passed,
        "mode": found.mode,
        "steps": found.steps,
        "tolerance": TOLERANCE,
        "gradient_tolerance": GRADIENT_TOLERANCE,
        "parameter_tolerance": found.parameter_tolerance,
        "loss_difference": _finite(found.loss),
        "largest_gradient_difference": _named(found.gradients, found.worst_gradient),
        "largest_parameter_difference": _named(found.parameters, found.worst_parameter),
    }


def _named(differences: Mapping[str, float], name: str | None) -> dict[str, Any] | None:
    return None if name is None else {"name": name, "value": _finite(differences[name])}


def _finite(difference: float) -> float | None:
    """What JSON can hold: null for a difference that is no number."""
    return difference if math.isfinite(difference) else None


if __name__ == "__main__":
    main()
