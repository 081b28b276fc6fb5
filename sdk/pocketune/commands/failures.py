"""How commands fail: one line for a person, and an exit code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from pocketune.display import printable
from pocketune.errors import Interrupted, PocketuneError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


@contextmanager
def clear_errors(*, run: Path | None = None) -> Iterator[None]:
    """Turn the errors that a person can do something about into one line and an exit code; `run` is what could be resumed."""
    try:
        yield
    except Interrupted as error:
        typer.echo(f"interrupted: {printable(str(error))}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error
    except PocketuneError as error:
        typer.echo(f"error: {printable(str(error))}", err=True)
        raise typer.Exit(EXIT_ERROR) from error
    except KeyboardInterrupt as error:
        again = "with --resume to go on" if run is not None and run.exists() else "to start again"
        typer.echo(f"interrupted: give the same command {again}.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error


@contextmanager
def needing_extra(extra: str) -> Iterator[None]:
    """Import the libraries of an extra: say so where they are missing, and keep their remarks at import off the screen."""
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0].startswith("pocketune"):
            raise
        msg = f"this command needs {error.name}, which is not installed. Run: pip install 'pocketune[{extra}]'"
        raise PocketuneError(msg) from error
