"""Tables in pages are those that were generated."""

from __future__ import annotations

from pathlib import Path

from benchmarks.insert_tables import ROOT, insert_tables, main


def test_place_is_filled_and_filling_again_changes_nothing(tmp_path: Path) -> None:
    tables = tmp_path / "docs" / "tables"
    tables.mkdir(parents=True)
    (tables / "quality.md").write_text("| a |\n|---|\n| 1 |\n")
    page = "before\n<!-- table:quality -->\nold\n<!-- /table -->\nafter\n<!-- table:other -->\n<!-- /table -->\n"
    (tmp_path / "README.md").write_text(page)
    main(tmp_path)
    filled = (tmp_path / "README.md").read_text()
    assert filled == page.replace("old\n", "\n| a |\n|---|\n| 1 |\n\n")
    assert insert_tables(filled, tables) == filled


def test_committed_pages_show_the_committed_tables() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        page = path.read_text(encoding="utf-8")
        assert insert_tables(page, ROOT / "docs" / "tables") == page, f"run `make table`: {path} shows an old table"
