"""The command line: personalize, plan, sample, select-blocks, inspect, doctor.

torch is imported by the commands that train or sample, not here, so that the others answer at once.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pocketune.commands.failures import clear_errors, needing_extra
from pocketune.commands.options import DEFAULT_MODEL, JsonOption, QuietOption
from pocketune.commands.personalize import personalize
from pocketune.commands.plan import plan
from pocketune.commands.sample import sample
from pocketune.display import ProgressDisplay, print_facts, print_lines, printable
from pocketune.report import megabytes

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Run the console script `pocketune`."""
    # transformers warns about optional packages while it is imported, before anything else could ask it not to.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pocketune {version('pocketune')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Personalize a text-to-image diffusion model on the device that holds the photos."""


app.command()(personalize)
app.command()(plan)
app.command()(sample)


@app.command()
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
        typer.Option(help="Who compares images: pocket, dino or clip; default: pocket for built-in models, else dino."),
    ] = None,
    embedder_model: Annotated[str | None, typer.Option(help="Local folder or hub id of DINO or CLIP.")] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Of the images, each for every prompt; default: 0.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.", min=1)] = 20,
    work: Annotated[Path | None, typer.Option(help="Folder of the toys' runs; default: beside --out.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find which blocks can be skipped, by hiding text in them. A search that was stopped goes on when repeated."""
    with clear_errors():
        with needing_extra("train"):
            from pocketune.choosing import choose_blocks
        with ProgressDisplay(Console(stderr=True), quiet=quiet) as display:
            selection = choose_blocks(
                model,
                out=out,
                runs=run or [],
                embedder=embedder,
                embedder_model=embedder_model,
                seeds=seed or [0],
                steps=steps,
                work=work or out.with_name(f"{out.stem}-runs"),
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


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A LoRA file, RUN folder, model folder or bundle.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Say what a file or folder is, without running or loading anything in it."""
    from pocketune.inspection import inspect as look

    with clear_errors():
        found = look(path)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    console = Console()
    console.print(Text(f"{found.kind}  {printable(found.path)}  {megabytes(found.size_bytes)}", style="bold"))
    print_facts(console, found.facts)
    print_lines(console, found.notes)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can do."""
    from pocketune.doctor import examine

    with clear_errors():
        report = examine()
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
        return
    console = Console()
    facts = report.as_dict()
    print_facts(console, {name: value for name, value in facts.items() if name not in {"advice", "problems"}})
    console.print()
    print_lines(console, report.advice)


if __name__ == "__main__":
    main()
