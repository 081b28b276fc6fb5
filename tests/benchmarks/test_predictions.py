"""The planner against the rows of the memory benchmark."""

from pathlib import Path

import pytest

from benchmarks.memory.__main__ import JOBS, PREDICTIONS
from benchmarks.memory.grid import FITTED, HELD_OUT
from benchmarks.memory.jobs import LOW, Job
from benchmarks.memory.predict import predict_job
from benchmarks.memory.predictions import errors_of, predictions_table, read_predictions
from benchmarks.rows import read_rows

ROOT = Path(__file__).parent.parent.parent
ROWS = read_rows(ROOT / "benchmarks/results/memory.jsonl")
COMMITTED = read_predictions(ROOT / PREDICTIONS)
TOO_LOW = {"sd35-256": -0.06}
"""The one job that misses the aim, which docs/planning.md says too; what it holds beyond its plan is not known yet."""


def test_committed_predictions_are_of_committed_rows() -> None:
    assert set(COMMITTED) <= {row["job"] for row in ROWS}
    assert not set(FITTED) & set(HELD_OUT)


@pytest.mark.parametrize("name", ["fit-pixart-256-two-streamed", "sd15-512-zoodip8"])
def test_predictions_of_small_rows_can_be_made_again(name: str) -> None:
    assert predict_job(JOBS[name]) == COMMITTED[name]


@pytest.mark.slow
def test_all_predictions_can_be_made_again() -> None:
    assert {name: predict_job(JOBS[name]) for name in COMMITTED} == COMMITTED


def test_no_committed_prediction_is_far_off() -> None:
    """The aim is 5 % on average and -5 to +15 % at most, over 40 rows; the table says how far that is kept."""
    errors = errors_of(ROWS, COMMITTED)
    assert errors.mean <= 0.05
    assert all(error >= TOO_LOW.get(name, -0.05) for name, error in errors.by_job.items())
    # U-Nets are still predicted far too high, which docs/planning.md says.
    transformers = {name: error for name, error in errors.by_job.items() if JOBS[name].model not in ("sd15", "sdxl")}
    assert max(transformers.values()) <= 0.15


def test_errors_are_relative_to_what_is_above_the_floor() -> None:
    rows = [
        {"job": name, "title": name, "peak_rss_bytes": peak, "floor_bytes": 100}
        for name, peak in (("a", 300), ("b", 300), ("a", 200))
    ]
    errors = errors_of(rows, {"a": 110, "b": 190})
    assert errors.by_job == pytest.approx({"a": 0.1, "b": -0.05})
    assert errors.mean == pytest.approx(0.075)
    table = predictions_table(rows, {"a": 110, "b": 190}, held_out={"b"})
    assert "2 rows, 1 of them" in table
    assert "| b | 0 | 0 | -5.0 % | yes |" in table
    assert predictions_table(rows, {}, held_out=()) == ""


def test_jobs_that_are_not_a_training_are_not_predicted() -> None:
    settings = {"title": "x", "model": "sd15", "resolution": 64, "text_tokens": 77}
    assert predict_job(Job(**settings, settings=LOW, whole=True)) is None
    assert predict_job(Job(**settings)) is None
