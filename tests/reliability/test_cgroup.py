"""Jobs under a control group whose limit is their budget: the kernel would end a job that takes more."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pocketune.models.load import ModelFolder
from pocketune.record import RunRecord

ROOT = Path("/sys/fs/cgroup")
VERSION_1 = (ROOT / "memory" / "memory.limit_in_bytes").exists()
SETTINGS = """instance_prompt = "a photo of sks toy"
steps = 3
sample_steps = 2
sample_prompts = ["a photo of sks toy"]
learning_rate = 1e-2
"""
# Name of the model, and the budget, in MB of 1e6 bytes.
PAIRS = [("pocket-sd3", 900), ("pocket-sd3", 700), ("sd15", 700), ("sdxl", 700), ("flux", 700)]
# Enters the group that is its first argument, and becomes the command behind it.
INSIDE = ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"']

pytestmark = pytest.mark.slow


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group for memory, if this machine lets us make one."""
    folder = (ROOT / "memory" if VERSION_1 else ROOT) / f"pocketune-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    if not (folder / ("memory.limit_in_bytes" if VERSION_1 else "memory.max")).exists():
        folder.rmdir()
        pytest.skip("control groups here do not limit memory")
    yield folder
    folder.rmdir()


def personalize_within(group: Path, megabytes: int, *, model: str, photos: Path, out: Path) -> subprocess.CompletedProcess[str]:
    limit = group / ("memory.limit_in_bytes" if VERSION_1 else "memory.max")
    limit.write_text(str(megabytes * 1_000_000))
    recipe = out.with_suffix(".toml")
    recipe.write_text(SETTINGS)
    command = [sys.executable, "-m", "pocketune.cli", "personalize", str(photos), "--recipe", str(recipe), "--out", str(out)]
    return subprocess.run(
        [*INSIDE, str(group), *command, "--model", model, "--memory-budget", f"{megabytes}MB"],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("model", "megabytes"), PAIRS)
def test_a_planned_job_lives_within_its_budget(
    group: Path,
    toy_photos: Path,
    tmp_path: Path,
    tiny_pipelines: Callable[[str], ModelFolder],
    model: str,
    megabytes: int,
) -> None:
    place = model if model.startswith("pocket-") else str(tiny_pipelines(model).path)
    done = personalize_within(group, megabytes, model=place, photos=toy_photos, out=tmp_path / "run")
    assert done.returncode == 0, done.stderr
    record = RunRecord.read(tmp_path / "run" / "run.json")
    assert max(reading.rss_bytes for reading in record.peaks.values()) <= megabytes * 1_000_000


def test_a_starved_job_is_refused_with_the_reason(group: Path, toy_photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # The limit leaves room for planning; the budget does not leave room for the libraries.
    (group / ("memory.limit_in_bytes" if VERSION_1 else "memory.max")).write_text("900000000")
    command = [sys.executable, "-m", "pocketune.cli", "personalize", str(toy_photos), "--instance-prompt", "a toy"]
    done = subprocess.run(
        [*INSIDE, str(group), *command, "--out", str(out), "--memory-budget", "200MB"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Interpreter and libraries alone take" in done.stderr
    assert not out.exists()
