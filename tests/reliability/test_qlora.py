"""QLoRA: the whole job with a LoRA over packed weights, whose result is an ordinary LoRA."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from pocketune import generate, personalize
from tests.reliability.test_job import LORA, quick_recipe

PROMPT = "a photo of sks toy"


@pytest.mark.parametrize("bits", [8, 4])
def test_qlora_trains_over_packed_weights_and_samples(bits: int, tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    recipe = quick_recipe(weight_bits=bits)
    record = personalize(toy_photos, model=tiny_folder, recipe=recipe, out=tmp_path / "run")
    assert any(record.check.norms.values()) and record.check.image_change > 0

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.load_lora_weights(tmp_path / "run" / "lora")
    loaded = {name for name, _ in pipeline.transformer.named_parameters() if "lora_" in name}
    stored = load_file(tmp_path / "run" / LORA)
    assert len(loaded) == len(stored) and not any("scales" in name or "codes" in name for name in stored)

    with_lora, without = (
        np.asarray(image)
        for lora in (tmp_path / "run", None)
        for image in generate(tiny_folder, [PROMPT], lora=lora, seeds=[0], steps=2)
    )
    assert not np.array_equal(with_lora, without)


def test_fewer_bits_round_the_first_loss_more(tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    """The same draws over float, 8-bit and 4-bit weights: close to each other, and not the same."""
    losses = {}
    for bits in (None, 8, 4):
        record = personalize(
            toy_photos, model=tiny_folder, recipe=quick_recipe(weight_bits=bits, steps=1), out=tmp_path / str(bits)
        )
        losses[bits] = record.losses[0]
    errors = {bits: abs(losses[bits] - losses[None]) / losses[None] for bits in (8, 4)}
    assert 0 < errors[8] < 0.01
    assert errors[8] < errors[4] < 0.5
