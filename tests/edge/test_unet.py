"""A U-Net's bundle, of a diffusion that predicts noise: the edge runtime trains and samples as PyTorch does."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.numpy import load_file, save_file

from pocketune import personalize as personalize_with_torch
from pocketune.errors import Interrupted
from pocketune.recipe import Recipe
from pocketune_edge.bundle import open_bundle
from pocketune_edge.cli import main
from pocketune_edge.delta import load_result
from pocketune_edge.errors import LoraError
from pocketune_edge.job import personalize
from pocketune_export.exporter import export_trainable
from tests.edge.both_sides import LORA, assert_alike, largest_difference, sample_on_device, stop_at
from tests.edge.conftest import edge_recipe, recipe_of
from tests.tiny_models import small_unet
from tests.tolerances import EDGE_LOSS, EDGE_PARAMETER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_unet("sd15", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """The middle and its neighbours are skipped, and replaced by cached features."""
    return edge_recipe(skip="auto", steps=4, sample_steps=2)


@pytest.fixture(scope="module")
def bundle(folder: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "unet"
    export_trainable(recipe=recipe, out=out, model=folder)
    return out


@pytest.fixture(scope="module")
def torch_run(folder: Path, recipe: Recipe, toy_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("runs") / "torch"
    return out, personalize_with_torch(toy_photos, model=folder, recipe=recipe, out=out)


@pytest.fixture(scope="module")
def edge_run(bundle: Path, toy_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("runs") / "edge"
    return out, personalize(bundle, toy_photos, out=out, threads=1)


def test_trains_as_pytorch_does(torch_run: tuple[Path, Any], edge_run: tuple[Path, Any]) -> None:
    (torch_out, torch_record), (edge_out, edge_record) = torch_run, edge_run
    assert recipe_of(edge_record) == torch_record.recipe
    assert edge_record["feature_cache_bytes"] > 0
    assert list(edge_record["losses"]) == pytest.approx(list(torch_record.losses), rel=EDGE_LOSS)
    assert largest_difference(edge_out, torch_out) < EDGE_PARAMETER
    moved = load_file(edge_out / LORA)
    assert max(float(np.abs(value).max()) for name, value in moved.items() if "lora_B" in name) > 100 * EDGE_PARAMETER


def test_a_lora_of_another_strength_is_refused(bundle: Path, edge_run: tuple[Path, Any], tmp_path: Path) -> None:
    tensors = load_file(edge_run[0] / LORA)
    for alpha, fits in ((2, True), (8, False)):
        metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": alpha, "unet.r": 2})}
        save_file(tensors, tmp_path / "other.safetensors", metadata)
        with nullcontext() if fits else pytest.raises(LoraError, match="its strength is alpha 8 over rank 2"):
            load_result(open_bundle(bundle), tmp_path / "other.safetensors")


@pytest.mark.slow
def test_streaming_trains_as_one_graph_does(bundle: Path, edge_run: tuple[Path, Any], toy_photos: Path, tmp_path: Path) -> None:
    record = personalize(bundle, toy_photos, out=tmp_path / "run", streaming=True, threads=1)
    assert list(record["losses"]) == pytest.approx(list(edge_run[1]["losses"]), rel=EDGE_LOSS)
    assert largest_difference(tmp_path / "run", edge_run[0]) < EDGE_PARAMETER


@pytest.mark.slow
def test_a_run_goes_on_with_pytorch(
    folder: Path, recipe: Recipe, bundle: Path, torch_run: tuple[Path, Any], toy_photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted, match="step 2 of 4"):
        personalize(bundle, toy_photos, out=tmp_path / "run", threads=1, on_progress=stop_at(2))
    personalize_with_torch(toy_photos, model=folder, recipe=recipe, out=tmp_path / "run", resume=True)
    assert largest_difference(tmp_path / "run", torch_run[0]) < EDGE_PARAMETER


def test_samples_as_diffusers_does(folder: Path, bundle: Path, edge_run: tuple[Path, Any]) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(edge_run[0] / "lora")
    prompts = ["a photo of sks toy", "a red ball on grass"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline(prompts, latents=noise, num_inference_steps=3, guidance_scale=5.0, height=64, width=64).images
    assert_alike(sample_on_device(bundle, edge_run[0], prompts, noise), expected)


def test_the_command_makes_an_image(bundle: Path, edge_run: tuple[Path, Any], tmp_path: Path) -> None:
    given = ("--lora", str(edge_run[0]), "--prompt", "a photo of sks toy", "--steps", "2", "--out", str(tmp_path / "a.png"))
    assert main(["sample", str(bundle), *given, "--threads", "1", "--quiet"]) == 0
    assert Image.open(tmp_path / "a.png").size == (64, 64)
