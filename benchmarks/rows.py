"""Raw results as JSON lines: one row a measurement, written as soon as it is there, read back to go on or to make tables.

The options that say where rows and table lie are those of every benchmark.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pocketune.errors import FileFormatError

Row = dict[str, Any]


def add_output_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Where a benchmark's rows go and its table is made, and whether rows are measured at all."""
    rows, table = Path(f"benchmarks/results/{name}.jsonl"), Path(f"docs/tables/{name}.md")
    parser.add_argument("--out", type=Path, default=rows, help="raw rows (%(default)s)")
    parser.add_argument("--table-only", action="store_true", help="make the table from the rows that are there")
    parser.add_argument("--table-file", type=Path, default=table, help="(%(default)s)")


def append_row(path: Path, row: Row) -> None:
    """Add a row at the end of the file, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, sort_keys=True) + "\n")


def read_rows(path: Path) -> list[Row]:
    """All rows; none if there is no file. A last line without its end is what a killed run left, and is cut off the file.

    Raises:
        FileFormatError: another line is no JSON object.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            msg = f"line {number} of {path} is no JSON: {error}. Take the line out to go on."
            raise FileFormatError(msg) from error
        if not isinstance(row, dict):
            msg = f"line {number} of {path} should be a JSON object, but is a {type(row).__name__}. Take the line out to go on."
            raise FileFormatError(msg)
        rows.append(row)
    return rows
