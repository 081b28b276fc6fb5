"""SDXL, whose U-Net takes sizes of photo and crop, and whose guidance leads away from zeros, trains as in PyTorch."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from pocketune import personalize as personalize_with_torch
from pocketune.recipe import Recipe
from pocketune_edge.bundle import open_bundle
from pocketune_edge.job import personalize
from pocketune_export.exporter import export_trainable
from pocketune_export.verify import verify
from tests.edge.both_sides import assert_alike, largest_difference, sample_on_device
from tests.edge.conftest import edge_recipe
from tests.tiny_models import small_unet
from tests.tolerances import EDGE_LOSS, EDGE_PARAMETER

pytestmark = pytest.mark.slow  # its fast sibling is `test_unet.py`


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_unet("sdxl", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return edge_recipe(skip="auto", steps=2)


@pytest.fixture(scope="module")
def bundle(folder: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "sdxl"
    export_trainable(recipe=recipe, out=out, model=folder)
    return out


def test_steps_equal_pytorch(bundle: Path, folder: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.manifest.graph("embed").takes("prompt_sizes") and opened.manifest.model.zero_negative
    found = verify(opened, model=folder, steps=3)
    assert found.passed, (found.loss, found.worst_parameter, found.parameters[found.worst_parameter])


def test_trains_and_samples_as_pytorch_does(
    bundle: Path, folder: Path, recipe: Recipe, toy_photos: Path, tmp_path: Path
) -> None:
    """From photos of several sizes, whose crops have sizes of their own."""
    theirs = personalize_with_torch(toy_photos, model=folder, recipe=recipe, out=tmp_path / "torch")
    ours = personalize(bundle, toy_photos, out=tmp_path / "edge", threads=1)
    assert list(ours["losses"]) == pytest.approx(list(theirs.losses), rel=EDGE_LOSS)
    assert largest_difference(tmp_path / "edge", tmp_path / "torch") < EDGE_PARAMETER
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "edge" / "lora")
    prompts = ["a photo of sks toy", "a red ball on grass"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline(prompts, latents=noise, num_inference_steps=3, guidance_scale=5.0, height=64, width=64).images
    assert_alike(sample_on_device(bundle, tmp_path / "edge", prompts, noise), expected)
