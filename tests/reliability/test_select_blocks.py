"""The search on a tiny model: what masking it finds, a stop and going on, and what it refuses."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pocketune import Progress
from pocketune.delta import save_lora
from pocketune.errors import FileFormatError, Interrupted, PlanError, RecipeError
from pocketune.methods.lora import add_lora
from pocketune.models.base import DenoiserAdapter
from pocketune.models.load import ModelFolder
from pocketune.plan.selection import Selection
from pocketune.selection import Judge, Personalized, select_blocks
from pocketune.selection import search as searching


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """An embedding in which the tiny model's images are apart."""
    import numpy as np

    rows = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images])).flatten(1) - 127.5
    return torch.nn.functional.normalize(rows, dim=1)


JUDGE = Judge(name="pixels", embed=pixels, digest="00ff", model="somewhere")


def never() -> list[Personalized]:
    pytest.fail("subjects were made before the search was refused")


@pytest.fixture(scope="module")
def subjects(tiny_model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> list[Personalized]:
    """Two LoRAs with random values."""
    found = []
    for seed in (0, 1):
        adapter = tiny_model.load_denoiser(dtype=torch.float32, device=torch.device("cpu"))
        parameters = add_lora(adapter, blocks=range(6), rank=2, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path_factory.mktemp("loras") / str(seed)
        save_lora(adapter, folder)
        found.append(Personalized(name=f"s{seed}", lora=folder, prompts=("a photo of sks toy", "a sks toy at night")))
    return found


def search(
    model: ModelFolder,
    subjects: Sequence[Personalized] | Callable[[], Sequence[Personalized]],
    out: Path,
    *,
    stop_after: int | None = None,
    judge: Judge | None = None,
    steps: int = 1,
) -> Selection:
    seen = 0

    def count(_: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == stop_after:
            raise KeyboardInterrupt

    return select_blocks(model.path, subjects, out=out, judge=judge or JUDGE, steps=steps, guidance=2.0, on_progress=count)


def test_stopped_search_goes_on_and_finds_the_same(
    tiny_model: ModelFolder, subjects: list[Personalized], tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    whole = search(tiny_model, subjects, tmp_path / "whole.json")
    assert torch.equal(before, torch.get_rng_state())
    assert whole.complete and whole.fingerprint == tiny_model.fingerprint()
    first, last = whole.mean_distances()
    assert first[0] == last[0] == 0
    assert min(first[1:] + last[1:]) > 0
    assert "<svg" in (tmp_path / "whole.html").read_text()

    out = tmp_path / "parts.json"
    with pytest.raises(Interrupted, match="same command"):
        search(tiny_model, subjects, out, stop_after=14)  # in the second subject
    assert not out.exists()
    assert not Selection.read(tmp_path / "parts.json.partial").complete
    with pytest.raises(FileFormatError, match="another search, which differs in personalized models"):
        search(tiny_model, subjects[:1], out)
    with pytest.raises(FileFormatError, match="differs in weights of the embedder"):
        search(tiny_model, never, out, judge=replace(JUDGE, digest="0000"))
    with pytest.raises(FileFormatError, match="differs in steps"):
        search(tiny_model, never, out, steps=2)
    assert search(tiny_model, lambda: subjects, out, judge=replace(JUDGE, model="elsewhere")) == whole
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not (tmp_path / "parts.json.partial").exists()


def test_what_needs_no_subjects_is_refused_before_they_are_made(
    tiny_model: ModelFolder, tiny_pipelines: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    out = tmp_path / "s.json"
    with pytest.raises(PlanError, match="skips its middle"):
        search(tiny_pipelines("sd15"), never, out)
    with pytest.raises(PlanError, match="1001 sampler steps"):
        search(tiny_model, never, out, steps=1001)
    with pytest.raises(PlanError, match="resolution 65"):
        select_blocks(tiny_model.path, never, out=out, judge=JUDGE, resolution=65)
    with pytest.raises(RecipeError, match="no device tpu"):
        select_blocks(tiny_model.path, never, out=out, judge=JUDGE, device="tpu")


def test_one_lora_is_no_two_subjects(tiny_model: ModelFolder, subjects: list[Personalized], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="s0 and again are one LoRA"):
        search(tiny_model, [*subjects, replace(subjects[0], name="again")], tmp_path / "s.json")


def test_each_distance_is_that_of_its_masked_blocks(
    tiny_model: ModelFolder, subjects: list[Personalized], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an image that tells which blocks were masked, and a judge to whom block i is worth 0.01 times 2 to the i."""
    masked: list[tuple[int, ...]] = []

    @contextmanager
    def note(_: DenoiserAdapter, blocks: Iterable[int]) -> Iterator[None]:
        masked.append(tuple(blocks))
        yield

    def told(*_: object, **__: object) -> list[tuple[int, ...]]:
        return masked[-1:]

    def embed(images: Sequence[Any]) -> Tensor:
        cosines = torch.tensor([1 - sum(worth(block) for block in blocks) for blocks in images], dtype=torch.float64)
        return torch.stack([cosines, (1 - cosines.square()).sqrt()], dim=1)

    def worth(block: int) -> float:
        return 0.01 * 2**block

    monkeypatch.setattr(searching, "text_masked", note)
    monkeypatch.setattr(searching, "run_pipeline", told)
    found = search(tiny_model, subjects[:1], tmp_path / "s.json", judge=replace(JUDGE, embed=embed)).models[0]
    assert sorted(masked) == sorted({tuple(range(n)) for n in range(6)} | {tuple(range(6 - m, 6)) for m in range(6)})
    assert found.first == pytest.approx([sum(map(worth, range(n))) for n in range(6)], abs=2e-6)
    assert found.last == pytest.approx([sum(map(worth, range(6 - m, 6))) for m in range(6)], abs=2e-6)
