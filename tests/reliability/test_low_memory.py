"""The whole job with weights on disk and activations made again gives the LoRA of the job that keeps all in memory."""

from pathlib import Path

import pytest

from pocketune import personalize
from pocketune.allocator import name_allocator, return_freed_memory, trim
from pocketune.weights import stream
from tests.reliability.test_job import LORA, quick_recipe


@pytest.mark.parametrize("settings", [{"skip": "0-1,5"}, {"skip": "none", "vae_tile": 512}])
def test_streamed_job_gives_equal_bytes(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    monkeypatch.setattr(stream, "SMALLEST_STREAMED", 1)
    low: dict[str, object] = {"weights": "streamed", "activations": "on_disk"}
    for name, changes in (("memory", {}), ("disk", low)):
        record = personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(**settings, **changes), out=tmp_path / name)
    assert record.plan["weights"] == "streamed"
    assert (tmp_path / "disk" / LORA).read_bytes() == (tmp_path / "memory" / LORA).read_bytes()
    images = [sorted((tmp_path / name / "samples").glob("*.png")) for name in ("memory", "disk")]
    assert [path.read_bytes() for path in images[0]] == [path.read_bytes() for path in images[1]]


def test_the_allocator_is_named_and_gives_back_what_was_freed() -> None:
    assert name_allocator() in {"jemalloc", "tcmalloc", "mimalloc", "glibc", "musl", "system"}
    assert return_freed_memory() in {True, False}
    trim()
