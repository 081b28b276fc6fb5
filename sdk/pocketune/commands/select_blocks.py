"""`pocketune select-blocks`: which blocks of a model can be skipped, found by hiding text in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pocketune.atomic import check_writable
from pocketune.commands.failures import clear_errors, needing_extra
from pocketune.commands.options import DEFAULT_MODEL, MAX_SEED, JsonOption, QuietOption
from pocketune.display import ProgressDisplay, print_facts
from pocketune.errors import RunError


def select_blocks(
    out: Annotated[
        Path, typer.Option("--out", help="The JSON file to write; a page with the same name too.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="Built-in name, local diffusers folder, or hub id.")] = DEFAULT_MODEL,
    run: Annotated[
        list[Path] | None,
        typer.Option("--run", help="A RUN of this model; several. Default for built-in models: rendered toys are trained."),
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(
            help="Embedding that compares images: pocket, dino or clip; default: pocket for built-in models, else dino."
        ),
    ] = None,
    embedder_model: Annotated[str | None, typer.Option(help="Local folder or hub id of DINO or CLIP.")] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Seed of the images, each for every prompt; default: 0.", min=0, max=MAX_SEED),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.", min=1, max=1000)] = 20,
    work: Annotated[Path | None, typer.Option(help="Folder of the toys' runs; default: beside --out.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find which blocks can be skipped, by hiding text in them. A search that was stopped goes on when repeated."""
    with clear_errors():
        if out.suffix == ".html":
            msg = f"{out} is where the page would go. Name a JSON file with --out."
            raise RunError(msg)
        check_writable(out)
        check_writable(out.with_suffix(".html"))
        with needing_extra("train"):
            from pocketune.selection import search, sources
        with ProgressDisplay(Console(stderr=True), quiet=quiet) as display:
            found = sources.find_sources(
                model,
                out=out,
                work=work,
                runs=run or [],
                embedder=embedder,
                embedder_model=embedder_model,
                on_progress=display,
            )
            selection = search.select_blocks(
                model,
                found.personalized,
                out=out,
                judge=found.judge,
                seeds=seed or [0],
                steps=steps,
                guidance=found.guidance,
                on_progress=display,
            )
    if as_json:
        typer.echo(selection.model_dump_json())
    elif not quiet:
        print_facts(Console(), {"selection": str(out), "report": str(out.with_suffix(".html"))})
        for split in selection.splits():
            typer.echo(
                f"{split.first + split.last:3} skipped: first {split.first}, last {split.last} (distance {split.score:.4f})"
            )
