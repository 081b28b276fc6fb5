"""`pocketune doctor`: what this machine can do."""

from __future__ import annotations

import json

import typer
from rich.console import Console

from pocketune.commands.failures import clear_errors
from pocketune.commands.options import JsonOption
from pocketune.display import print_facts, print_lines


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
