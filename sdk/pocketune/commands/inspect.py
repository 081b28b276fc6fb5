"""`pocketune inspect`: what a file or folder is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pocketune.commands.failures import clear_errors
from pocketune.commands.options import JsonOption
from pocketune.display import print_facts, print_lines, printable
from pocketune.units import readable_size


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
    console.print(Text(f"{found.kind}  {printable(found.path)}  {readable_size(found.size_bytes)}", style="bold"))
    facts = dict(found.facts)
    if found.kind == "bundle":
        facts["files"] = {name: readable_size(size) for name, size in facts["files"].items()}
    print_facts(console, facts)
    print_lines(console, found.notes)
