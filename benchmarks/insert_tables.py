"""Puts the generated tables of docs/tables into the pages that show them: `python -m benchmarks.insert_tables`.

A page marks the place with `<!-- table:NAME -->` and `<!-- /table -->`; docs/tables/NAME.md replaces what stands between them.
"""

from __future__ import annotations

import re
from pathlib import Path

from pocketune.atomic import write_text

ROOT = Path(__file__).parent.parent
_PLACE = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def insert_tables(page: str, tables: Path) -> str:
    """Fill the marked places of a page; a place whose table does not exist yet stays as it is."""

    def fill(match: re.Match[str]) -> str:
        table = tables / f"{match[2]}.md"
        return f"{match[1]}\n{table.read_text(encoding='utf-8').strip()}\n\n{match[3]}" if table.is_file() else match[0]

    return _PLACE.sub(fill, page)


def main(root: Path = ROOT) -> None:
    """Fill the README and the pages under docs."""
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = insert_tables(before, root / "docs" / "tables")
        if after != before:
            write_text(path, after)
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
