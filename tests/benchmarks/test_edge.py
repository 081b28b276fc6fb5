"""The benchmarks of the edge runtime: tables come from rows alone, and the committed rows keep what is promised."""

from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks.edge_memory.table import memory_table
from benchmarks.edge_speed import speed_table
from benchmarks.rows import read_rows

ROOT = Path(__file__).parents[2]
RESULTS, TABLES = ROOT / "benchmarks" / "results", ROOT / "docs" / "tables"


def memory_row(**changes: Any) -> dict[str, Any]:
    training = {"rss_bytes": 94_000_000, "anonymous_bytes": 43_000_000, "file_bytes": 51_000_000}
    return {
        "model": "m",
        "weights": "int8",
        "mode": "streaming",
        "resolution": 128,
        "blocks": 12,
        "trained_blocks": 6,
        "peaks": {"training": training},
        "peak_rss_bytes": 98_400_000,
        "step_cpu_seconds": 0.5,
        "versions": {"onnxruntime": "1.2.3"},
    } | changes


def test_memory_table_is_made_from_rows() -> None:
    export = {"model": "m", "weights": "fp32,int8", "mode": "export", "peak_rss_bytes": 1_300_000, "weight_bytes": 2_000_000}
    table = memory_table([export, memory_row(), memory_row(model="other", weights="fp32")])
    assert "| int8 | streaming | 94 | 43 | 51 | 98 | 0.50 |" in table
    assert "`m`, 128 pixels, 6 of 12 blocks train" in table and "`other`" in table
    assert "took at most 1 MB; the denoiser's weights are 2 MB" in table


def test_speed_table_takes_the_median_of_ratios() -> None:
    of = {"model": "m", "resolution": 128, "blocks": 12, "trained_blocks": 6, "weights": "fp32", "threads": 1}
    versions = {"torch": "2.0+cpu", "onnxruntime": "1.2"}
    pairs = [(0.2, 0.1), (0.3, 0.1), (0.4, 0.4)]
    rows = [{**of, "versions": versions, "torch_seconds": eager, "edge_seconds": edge} for eager, edge in pairs]
    line = speed_table(rows).splitlines()[-1]
    assert "300 ms (torch 2.0)" in line and "100 ms (onnxruntime 1.2)" in line and "| 0.50 [0.33, 1.00] | 3 |" in line


@pytest.mark.parametrize(("name", "table"), [("edge_memory", memory_table), ("edge_speed", speed_table)])
def test_committed_tables_are_those_of_the_committed_rows(name: str, table: Any) -> None:
    rows = read_rows(RESULTS / f"{name}.jsonl")
    assert rows and (TABLES / f"{name}.md").read_text(encoding="utf-8") == table(rows)


def test_committed_rows_keep_what_is_promised() -> None:
    rows = read_rows(RESULTS / "edge_memory.jsonl")
    streaming = {row["weights"]: row for row in rows if row["model"] == "sd35-medium" and row["mode"] == "streaming"}
    assert streaming.keys() == {"fp32", "fp16", "int8", "int4"}
    assert all(streaming[kind]["peak_rss_bytes"] <= 700_000_000 for kind in ("fp16", "int8", "int4"))
    # A block's mapped weights alone are 406 MB in fp32; what cannot be evicted stays within the bound.
    assert all(row["peaks"]["training"]["anonymous_bytes"] <= 700_000_000 for row in streaming.values())
    exports = [row for row in rows if row["mode"] == "export" and row["model"] == "sd35-medium"]
    assert exports and all(row["peak_rss_bytes"] <= 1.5 * row["weight_bytes"] for row in exports)
    speed = read_rows(RESULTS / "edge_speed.jsonl")
    assert median(row["edge_seconds"] / row["torch_seconds"] for row in speed) <= 1.0
