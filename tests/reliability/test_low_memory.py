"""The whole job with weights on disk and activations made again gives the LoRA of the job that keeps all in memory."""

import gc
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from pocketune import generate, personalize
from pocketune.allocator import name_allocator, return_freed_memory, trim
from pocketune.errors import Interrupted
from pocketune.models.load import ModelFolder
from pocketune.progress import Progress
from pocketune.weights import stream
from pocketune.weights.layers import PackedLinear
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


@pytest.mark.parametrize("further", [{"activations": "on_disk"}, {"gradient": "zeroth_order", "zo_optimizer": "adam"}])
def test_a_word_over_streamed_weights_is_the_same(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, further: dict[str, object]
) -> None:
    """Denoiser and text encoders read their weights from disk, and the embedding has the bytes that it has without."""
    monkeypatch.setattr(stream, "SMALLEST_STREAMED", 1)
    asked = {"method": "token", "skip": "none", "instance_prompt": "a photo of sks toy", "token_start": "toy", **further}
    for name in ("resident", "streamed"):
        personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(**asked, weights=name), out=tmp_path / name)
    first, second = (tmp_path / name / "token" / "learned_embeds.safetensors" for name in ("resident", "streamed"))
    assert first.read_bytes() == second.read_bytes()


def test_interrupted_inside_backward_and_resumed_equals_unbroken(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are updated one by one; Ctrl-C between two of them must not leave half a step behind."""
    recipe = quick_recipe(steps=3, checkpoint_every=100, activations="recomputed", optimizer_in_backward=True)
    personalize(toy_photos, model=tiny_folder, recipe=recipe, out=tmp_path / "whole")
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def interrupted(parameters: Iterable[torch.Tensor], largest: float) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 10:  # six blocks and the rest of the model a step: in the middle of the second
            signal.raise_signal(signal.SIGINT)
        return clip(parameters, largest)

    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="after step 2 of 3"):
        patched.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
        personalize(toy_photos, model=tiny_folder, recipe=recipe, out=tmp_path / "broken")
    personalize(toy_photos, model=tiny_folder, recipe=recipe, out=tmp_path / "broken", resume=True)
    assert (tmp_path / "broken" / LORA).read_bytes() == (tmp_path / "whole" / LORA).read_bytes()


def test_what_training_held_is_gone_when_samples_begin(tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    alive: dict[str, int] = {}

    def count(event: Progress) -> None:
        alive.setdefault(event.phase, 0)
        alive[event.phase] = max(alive[event.phase], sum(type(one) is torch.optim.AdamW for one in gc.get_objects()))

    recipe = quick_recipe(weights="streamed", activations="on_disk", optimizer_in_backward=True)
    gc.collect()
    personalize(toy_photos, model=tiny_folder, recipe=recipe, out=tmp_path / "run", on_progress=count)
    assert alive["training"] == 1
    assert alive["samples"] == 0


def test_streamed_sampling_gives_equal_images(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SMALLEST_STREAMED", 1)
    images = [
        generate(tiny_folder, ["a photo of a toy"], seeds=[3], steps=2, resolution=64, streamed=streamed)[0].tobytes()
        for streamed in (False, True)
    ]
    assert images[0] == images[1]


@pytest.mark.parametrize(("method", "denoiser"), [("scales", PackedLinear), ("lora", stream.StreamedLinear)])
def test_what_does_not_train_is_streamed_beside_packed_weights(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, denoiser: type
) -> None:
    """Text encoders, VAE and what samples; pictures are those of weights in memory."""
    monkeypatch.setattr(stream, "SMALLEST_STREAMED", 1)
    kinds: list[set[type]] = []
    stock = ModelFolder.stock_pipeline

    def watched(folder: ModelFolder, **parts: Any) -> Any:
        kinds.append({type(module) for part in parts.values() if isinstance(part, nn.Module) for module in part.modules()})
        return stock(folder, **parts)

    with monkeypatch.context() as patched:
        patched.setattr(ModelFolder, "stock_pipeline", watched)
        recipe = quick_recipe(method=method, weight_bits=8, steps=2)
        record = personalize(toy_photos, model=tiny_folder, recipe=recipe, out=tmp_path / "run")
    texts, samples = kinds
    assert stream.StreamedLinear in texts and {denoiser, stream.StreamedLinear, stream.StreamedConv2d} <= samples
    asked = {"seeds": [1000], "steps": 2, "guidance": record.recipe.guidance_scale}
    (again,) = generate(tiny_folder, list(recipe.sample_prompts or ()), lora=tmp_path / "run", **asked)
    assert again.tobytes() == Image.open(tmp_path / "run" / "samples" / "00-after.png").tobytes()


def test_the_allocator_is_named_and_gives_back_what_was_freed() -> None:
    assert name_allocator() in {"jemalloc", "tcmalloc", "mimalloc", "glibc", "musl", "system"}
    assert return_freed_memory() in {True, False}
    trim()
