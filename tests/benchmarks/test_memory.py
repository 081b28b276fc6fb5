"""The memory benchmark: its rows come from the SDK's own training loop, its table from rows alone."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import streaming_cost
from benchmarks.memory.__main__ import main
from benchmarks.memory.jobs import JOBS, LOW, Job
from benchmarks.memory.measure import RANK, measure, recipe_of
from benchmarks.memory.pipelines import write_configs
from benchmarks.memory.table import memory_table
from benchmarks.memory.weights import write_random
from benchmarks.memory.whole import measure_whole
from benchmarks.rows import append_row, read_rows
from pocketune.budget.inputs import clip_tokens
from pocketune.models.load import ModelFolder
from pocketune.models.published import PUBLISHED
from pocketune.tensorfile import open_tensor_file

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]


def row(name: str, peak: float) -> dict[str, object]:
    return {
        "job": name,
        "title": JOBS[name].title,
        "compared": "",
        "rank": RANK,
        "peak_rss_bytes": peak,
        "peak_anonymous_bytes": 3e8,
        "peak_file_bytes": 1e8,
        "floor_bytes": 2e8,
        "cpu_s_per_step": [9.0, 7.25],
        "spilled_bytes_per_step": 5e7,
    }


def test_every_job_is_a_valid_recipe_of_a_published_model() -> None:
    for job in JOBS.values():
        assert job.model in PUBLISHED
        recipe_of(job, steps=1)


@pytest.mark.parametrize("name", ["sd35-medium", "sd15"])
def test_pipelines_can_be_planned_by_their_configurations(name: str, tmp_path: Path) -> None:
    models = write_configs(name, tmp_path)
    folder = ModelFolder(name, tmp_path)
    assert set(models) == {"vae", *folder.family.text_encoders}
    assert clip_tokens(folder, "text_encoder") == 77 and folder.native_resolution >= 512


def test_jobs_are_measured_without_scipy() -> None:
    code = "import sys, benchmarks.memory.__main__, benchmarks.memory.measure; assert 'scipy.stats' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_jobs_are_measured_with_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine has: more threads hold more memory, and rows would not compare."""
    ran: list[str] = []

    def run(_: list[str], *, env: dict[str, str], **__: object) -> SimpleNamespace:
        ran.append(env["OMP_NUM_THREADS"])
        return SimpleNamespace(returncode=0, stdout=json.dumps(row("sd15-512", 6e8)))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert main(["--jobs", "sd15-512", "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert ran == ["1"] and len(read_rows(tmp_path / "rows.jsonl")) == 1


def test_random_weights_are_a_sound_file(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a": (3, 5), "b": (7,), "c": (2, 2, 3, 3)}
    write_random(tmp_path / "w.safetensors", shapes)
    found = open_tensor_file(tmp_path / "w.safetensors")
    assert {name: entry.shape for name, entry in found.tensors.items()} == shapes
    assert found.dtypes == ("BF16",)
    assert all(not found.statistics(name).zero and found.statistics(name).finite for name in shapes)


@pytest.mark.parametrize("skip", ["none", "0-1,5"])
def test_a_row_is_measured_on_the_real_training_loop(tiny_folder: Path, skip: str) -> None:
    job = Job(title="tiny", model="tiny", resolution=64, text_tokens=20, skip=skip, settings=LOW)
    found = measure("tiny", job, tiny_folder, steps=2)
    assert found["finite"]
    assert len(found["cpu_s_per_step"]) == len(found["wall_s_per_step"]) == found["steps"] == 2
    assert found["peak_rss_bytes"] >= found["peak_anonymous_bytes"] > 0
    assert not list(tiny_folder.glob("tmp*"))


def test_a_whole_job_tells_the_peak_of_every_phase(tiny_folder: Path) -> None:
    job = Job(title="tiny", model="tiny", resolution=64, text_tokens=20, skip="0-1,5", settings=LOW, whole=True)
    found = measure_whole("tiny", job, tiny_folder, steps=1)
    assert {"photos", "text", "latents", "features", "training", "samples"} <= found["phase_peak_rss_bytes"].keys()
    table = memory_table([found | {"floor_bytes": 1}])
    assert "tiny, peak MB of each phase:" in table
    assert " training |" in table


def test_table_takes_the_newest_row_of_each_job(tmp_path: Path) -> None:
    rows = tmp_path / "memory.jsonl"
    for name, peak in (("sd35-512", 9e8), ("flux-256", 12e8), ("sd35-512", 8e8)):
        append_row(rows, row(name, peak))
    assert main(["--table-only", "--out", str(rows), "--table-file", str(tmp_path / "memory.md")]) == 0
    lines = [line for line in (tmp_path / "memory.md").read_text().splitlines() if line.startswith("| ")]
    assert [line.split("|")[2].strip() for line in lines[1:]] == ["800", "1200"]
    assert "| 7.2 |" in lines[1]
    assert memory_table([]) == ""


def test_table_compares_a_job_with_the_one_it_must_be_near_to() -> None:
    rows = [row("sd15-512-ram", 6e8), row("sd15-512-tuneqdm8", 15.4e8) | {"packed_bytes": 8e8}]
    table = memory_table(rows)
    assert "and 800 MB of packed weights | 1.10 | 1.15 |" in table
    assert "1.15" not in memory_table(rows[1:])


def test_inference_runs_the_model_forward_and_trains_nothing(tiny_folder: Path) -> None:
    settings = {"weights": "streamed"}
    job = Job(title="tiny", model="tiny", resolution=64, text_tokens=20, settings=settings, inference=True)
    found = measure("tiny", job, tiny_folder, steps=2)
    assert found["finite"] and found["trained_parameters"] == 0 and len(found["cpu_s_per_step"]) == 2


def test_the_cost_of_streaming_is_measured_in_turns(tiny_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "cost.jsonl"
    streaming_cost.measure(tiny_folder, resolution=64, skip="0-1,5", rounds=1, out=rows, text_tokens=20)
    cold, warm = read_rows(rows)
    assert cold["cold"] and not warm["cold"]
    assert warm["cpu_s"].keys() == warm["wall_s"].keys() == set(streaming_cost.TURNS)
    assert min(warm["cpu_s"].values()) > 0


def test_cost_table_takes_medians_of_the_warm_rounds_of_the_newest_run() -> None:
    of = {"model": "m", "resolution": 256, "threads": 1, "torch": "2", "allocator": "glibc", "wall_s": {}}
    of["wall_s"] = dict.fromkeys(streaming_cost.TURNS, 30.0)
    seconds = [(9, 9, 9), (1, 9, 9), (9, 9, 9), (4, 5, 10), (4, 4, 10), (4, 6, 10)]
    rows = [
        {**of, "cold": number in (0, 2), "cpu_s": dict(zip(streaming_cost.TURNS, some, strict=True))}
        for number, some in enumerate(seconds)
    ]
    table = streaming_cost.cost_table(rows)
    assert "in memory | 4.0 | 9.0 | 30 |" in table
    assert "1.25 times" in table and "all: 0.50." in table
    assert streaming_cost.cost_table([]) == ""


def test_committed_table_is_that_of_the_committed_rows() -> None:
    rows = [row for row in read_rows(ROOT / "benchmarks" / "results" / "memory.jsonl") if row["job"] in JOBS]
    assert rows and (ROOT / "docs" / "tables" / "memory.md").read_text(encoding="utf-8") == memory_table(rows)


def test_committed_rows_keep_what_is_promised() -> None:
    newest = {row["job"]: row for row in read_rows(ROOT / "benchmarks" / "results" / "memory.jsonl")}
    promised = {name: job.bound_mb for name, job in JOBS.items() if job.bound_mb and name in newest}
    assert {"sd35-256-half", "sd15-512"} <= promised.keys()
    assert all(newest[name]["peak_rss_bytes"] <= mb * 1e6 for name, mb in promised.items())


def test_what_the_page_says_of_zoodip_holds_for_committed_rows() -> None:
    peaks = {row["job"]: row["peak_rss_bytes"] for row in read_rows(ROOT / "benchmarks" / "results" / "memory.jsonl")}
    over_packed = min(peaks["sd15-512-zoodip8"], peaks["sd15-512-zoodip4"])
    assert over_packed > peaks["sd15-512"] > peaks["sd15-512-zoodip-streamed"]


def test_committed_rows_of_streaming_cost_what_is_promised() -> None:
    rows = [row for row in read_rows(ROOT / "benchmarks" / "results" / "streaming_cost.jsonl") if not row["cold"]]
    of = [row["cpu_s"] for row in rows]
    ratios = [(cpu["streamed"] / cpu["resident"], cpu["streamed"] / cpu["all_streamed"]) for cpu in of]
    assert rows and all(streamed <= 1.25 and half <= 0.55 for streamed, half in ratios)
