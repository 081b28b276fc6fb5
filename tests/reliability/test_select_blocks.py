"""The search on a tiny model: what masking it finds, a stop and going on, and what it refuses."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from pocketune import Progress
from pocketune.delta import save_lora
from pocketune.errors import FileFormatError, Interrupted, PlanError
from pocketune.methods.lora import add_lora
from pocketune.models.load import ModelFolder
from pocketune.plan.selection import Selection
from pocketune.selection import Personalized, select_blocks


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """An embedding in which the tiny model's images are apart."""
    import numpy as np

    rows = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images])).flatten(1) - 127.5
    return torch.nn.functional.normalize(rows, dim=1)


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


def search(model: ModelFolder, subjects: Sequence[Personalized], out: Path, stop_after: int | None = None) -> Selection:
    seen = 0

    def count(_: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == stop_after:
            raise KeyboardInterrupt

    return select_blocks(
        model.path, subjects, out=out, embed=pixels, embedder="pixels", steps=1, guidance=2.0, on_progress=count
    )


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
    with pytest.raises(FileFormatError, match="another search"):
        search(tiny_model, subjects[:1], out)
    assert search(tiny_model, subjects, out) == whole
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not (tmp_path / "parts.json.partial").exists()


def test_unets_are_refused(tiny_pipelines: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="skips its middle"):
        search(tiny_pipelines("sd15"), [], tmp_path / "s.json")
