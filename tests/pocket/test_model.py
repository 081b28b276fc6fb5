"""The shipped models are ordinary diffusers folders: small, loadable by stock diffusers, and steered by prompts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from pocketune.models.load import BUILT_IN, ModelFolder, open_model
from pocketune.pocket.steering import measure_steering


@pytest.fixture(scope="module", params=BUILT_IN)
def model(request: pytest.FixtureRequest) -> ModelFolder:
    return open_model(request.param)


@pytest.fixture(scope="module")
def pipeline(model: ModelFolder) -> Any:
    """As stock diffusers loads it; it must be told again that SD3's third text encoder is absent."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if "text_encoder_3" in model.index else {}
    pipeline: Any = DiffusionPipeline.from_pretrained(model.path, dtype=torch.float32, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_arguments(model: ModelFolder) -> dict[str, Any]:
    return model.family.sampling(model.text_padding)


def test_it_is_small_and_of_the_promised_shape(model: ModelFolder) -> None:
    assert sum(file.stat().st_size for file in Path(model.path).rglob("*") if file.is_file()) <= 32e6
    assert model.block_count >= 12
    assert (model.vae_scale, model.native_resolution) == (8, 128)


def test_it_has_a_name_to_be_opened_with() -> None:
    assert "pocket-sd3" in BUILT_IN


def test_prompts_steer_it(model: ModelFolder, pipeline: Any) -> None:
    """Twelve held-out prompts in few sampling steps; an interim checkpoint is far above the 1 in 12 of chance."""
    _, shares = measure_steering(pipeline, 12, steps=12, batch_size=12, text=text_arguments(model))
    assert shares["background"] >= 0.9
    assert shares["colour"] >= 0.75
    assert shares["noun"] >= (0.75 if model.note() is None else 0.3)


def test_stock_padding_does_no_harm(model: ModelFolder, pipeline: Any) -> None:
    """diffusers' default appends 256 zero tokens; the picture stays nearly the same."""
    if not isinstance(pipeline, StableDiffusion3Pipeline):
        pytest.skip("only Stable Diffusion 3 pads its text for an absent encoder")
    assert model.text_padding == 0
    images = []
    for padding in (0, 256):
        generator = torch.Generator().manual_seed(0)
        image = pipeline("a photo of a red car on grass", generator=generator, num_inference_steps=12, guidance_scale=4.0,
                         max_sequence_length=padding, output_type="np").images[0]  # fmt: skip
        images.append(image)
    difference = np.abs(images[0] - images[1]).mean()
    other = pipeline("a photo of a red car on grass", generator=torch.Generator().manual_seed(1), num_inference_steps=12,
                     guidance_scale=4.0, max_sequence_length=0, output_type="np").images[0]  # fmt: skip
    assert difference < 0.5 * np.abs(images[0] - other).mean()


def test_card_states_what_was_measured(model: ModelFolder) -> None:
    measured = json.loads((model.path / "measurements.json").read_text())
    card = (model.path / "README.md").read_text()
    assert f"{measured['steering']['all']:.1%}" in card
    assert measured["steering"]["count"] == 200
    assert measured["steering"]["all"] >= 0.9 or model.note() is not None


@pytest.mark.slow
def test_measurements_can_be_repeated(model: ModelFolder, pipeline: Any) -> None:
    _, shares = measure_steering(pipeline, 200, text=text_arguments(model))
    measured = json.loads((model.path / "measurements.json").read_text())["steering"]
    assert shares == pytest.approx(measured, abs=0.02)
