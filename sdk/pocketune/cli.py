"""The command line: personalize, plan, sample, select-blocks, inspect, doctor.

torch is imported by the commands that train or sample, while they run, so that the others answer at once.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Annotated

import typer

from pocketune.commands.doctor import doctor
from pocketune.commands.inspect import inspect
from pocketune.commands.personalize import personalize
from pocketune.commands.plan import plan
from pocketune.commands.sample import sample
from pocketune.commands.select_blocks import select_blocks

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
app.command()(select_blocks)
app.command()(inspect)
app.command()(doctor)


if __name__ == "__main__":
    main()
