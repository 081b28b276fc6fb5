"""The whole job on a tiny model of every architecture; the LoRA file loads in the stock pipeline with every key used."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from pocketune import Recipe, generate, personalize
from pocketune.errors import PlanError, RecipeError
from pocketune.models.load import ModelFolder
from tests.tiny_models import BUILDERS

LORA = Path("lora") / "pytorch_lora_weights.safetensors"
SKIPS = {"sd15": "hollow:0.5", "sd2": "auto", "sdxl": "hollow:0.3", "sd35": "1,3"}
TARGETS = {"sd35": ("attn.to_q", "attn.add_q_proj", "attn2.to_q", "attn2.to_out.0")}  # dual attention in block 0
PATCHES = {"flux": "dynamic", "sana": "random", "sdxl": "dynamic", "sd2": "resize"}
STOCK_LOADERS = [name for name in BUILDERS if name != "pixart"]


def quick_recipe(**changes: object) -> Recipe:
    settings: dict[str, object] = {
        "instance_prompt": "a photo of sks toy",
        "steps": 3,
        "learning_rate": 1e-2,
        "resolution": 64,
        "sample_steps": 2,
        "sample_prompts": ("a photo of sks toy",),
    }
    return Recipe.create(**Recipe.relevant(settings | changes))


@pytest.mark.parametrize("name", BUILDERS)
def test_personalize(tiny_pipelines: Callable[[str], ModelFolder], toy_photos: Path, tmp_path: Path, name: str) -> None:
    model = tiny_pipelines(name)
    recipe = quick_recipe(
        skip=SKIPS.get(name, "0-1,3"),
        patches=PATCHES.get(name, "none"),
        lora_targets=TARGETS.get(name),
        class_prompt="a toy",
        class_images=1,
    )
    before = torch.get_rng_state()
    record = personalize(toy_photos, model=model.path, recipe=recipe, out=tmp_path / "run")
    assert torch.equal(before, torch.get_rng_state())
    assert len(record.losses) == 3 and np.isfinite(record.losses).all()
    assert any(record.check.norms.values()) and record.check.image_change > 0
    assert record.model_kind == model.denoiser_kind
    assert record.plan["feature_cache_bytes"] > 0
    assert record.plan["resolution"] == (32 if name in PATCHES else 64)
    assert record.recipe.weighting_scheme == ("logit_normal" if name in ("sd3", "sd35") else "none")

    stored = load_file(tmp_path / "run" / LORA)
    trained = record.plan["trained_blocks"]
    assert 0 < len(trained) < model.block_count
    skipped = [f".{model.empty_denoiser().block_name(index)}." for index in set(range(model.block_count)) - set(trained)]
    assert not any(block in f".{key}" for key in stored for block in skipped)
    assert all(any(f".{target}." in key for key in stored) for target in TARGETS.get(name, ()))
    assert generate(model.path, ["a toy"], steps=2, resolution=64, lora=tmp_path / "run")[0].size == (64, 64)

    if name in STOCK_LOADERS:
        absent = {part: None for part in model.family.optional if not model.has(part)}
        pipeline = model.family.pipeline.from_pretrained(model.path, **absent)
        pipeline.load_lora_weights(tmp_path / "run" / "lora")
        component = getattr(pipeline, model.family.component)
        arrived = get_peft_model_state_dict(component, adapter_name=next(iter(component.peft_config)))
        assert {f"{model.family.component}.{key}" for key in arrived} == set(stored)
        assert all(torch.equal(arrived[key.partition(".")[2]], stored[key]) for key in stored)


def test_pixart_lora_loads_with_peft(tiny_pipelines: Callable[[str], ModelFolder], toy_photos: Path, tmp_path: Path) -> None:
    """diffusers 0.42 has no LoRA loader for PixArt; peft loads the folder into the stock model."""
    from diffusers import PixArtSigmaPipeline
    from peft import PeftModel

    model = tiny_pipelines("pixart")
    personalize(toy_photos, model=model.path, recipe=quick_recipe(), out=tmp_path / "run")
    pipeline = PixArtSigmaPipeline.from_pretrained(model.path)
    tuned = PeftModel.from_pretrained(pipeline.transformer, tmp_path / "run" / "lora")
    stored = load_file(tmp_path / "run" / LORA)
    arrived = get_peft_model_state_dict(tuned, adapter_name="default")
    assert {key.removeprefix("base_model.model.") for key in arrived} == {key.removeprefix("transformer.") for key in stored}
    assert all(torch.equal(arrived[f"base_model.model.{key.removeprefix('transformer.')}"], stored[key]) for key in stored)


def test_loss_that_does_not_fit_the_architecture_is_refused(
    tiny_pipelines: Callable[[str], ModelFolder], toy_photos: Path, tmp_path: Path
) -> None:
    for changes, reason in (
        ({"precondition_outputs": True}, "predicts noise"),
        ({"weighting_scheme": "cosmap"}, "weighs the loss of rectified flow"),
    ):
        with pytest.raises(RecipeError, match=reason):
            personalize(toy_photos, model=tiny_pipelines("pixart").path, recipe=quick_recipe(**changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unet_refuses_plans_that_make_no_sense(
    tiny_pipelines: Callable[[str], ModelFolder], toy_photos: Path, tmp_path: Path
) -> None:
    model = tiny_pipelines("sd15")
    for changes, reason in (
        ({"skip": "0-1"}, "skip connections to each other"),
        ({"skip": "2-3"}, "around the middle block 4"),
        ({"skip": "4,6"}, "such as 2-6"),
        ({"skip": "2-4"}, "block 5 takes"),
        ({"skip": "2-6", "use_residuals": False}, "nothing would enter the decoder"),
    ):
        with pytest.raises(PlanError, match=reason):
            personalize(toy_photos, model=model.path, recipe=quick_recipe(**changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
