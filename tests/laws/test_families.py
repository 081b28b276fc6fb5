"""What an architecture says of itself is what its stock pipeline does: plans are made from it before anything is loaded."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pocketune.budget.inputs import text_tokens
from pocketune.models.base import SkipConnected
from pocketune.models.load import ModelFolder
from pocketune.models.published import PUBLISHED, PublishedModel
from pocketune.models.registry import FAMILIES
from pocketune.sample import run_pipeline
from tests.tiny_models import BUILDERS

CPU = torch.device("cpu")
Pipelines = Callable[[str], ModelFolder]
every_model = pytest.mark.parametrize("name", BUILDERS)


def test_every_architecture_is_tried(tiny_pipelines: Pipelines) -> None:
    assert {tiny_pipelines(name).family.key for name in BUILDERS} == set(FAMILIES)


@every_model
def test_sizes_are_those_of_latents_and_encoded_text(tiny_pipelines: Pipelines, name: str) -> None:
    model = tiny_pipelines(name)
    (prompt,) = model.encode_prompts(["a photo of sks toy"], device=CPU).values()
    assert model.sizes.channels == model.vae_config["latent_channels"]
    assert prompt.hidden.shape == (1, text_tokens(model), model.sizes.text_width)
    assert (0 if prompt.pooled is None else prompt.pooled.shape[1]) == model.sizes.pooled_width
    adapter = model.empty_denoiser()
    assert adapter.block_count == model.sizes.blocks
    assert issubclass(model.family.adapter, SkipConnected) == isinstance(adapter, SkipConnected)


@every_model
def test_guidance_and_timesteps_are_those_of_the_pipeline(tiny_pipelines: Pipelines, name: str) -> None:
    model = tiny_pipelines(name)
    pipeline = model.pipeline(dtype=torch.float32, device=CPU)
    calls: list[tuple[int, float]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        timestep = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
        calls.append((len(latents), float(timestep.max())))

    getattr(pipeline, model.family.component).register_forward_pre_hook(note, with_kwargs=True)
    run_pipeline(pipeline, model, ["a toy"], seeds=[0], steps=2, guidance=model.family.guidance, resolution=64)
    assert {samples for samples, _ in calls} == {model.family.guided_passes}
    noisiest = max(timestep for _, timestep in calls) * model.family.timestep_divisor
    assert 400 < noisiest <= 1000


@pytest.mark.parametrize(("variant", "tokens"), [("dev", 512), ("schnell", 256)])
def test_flux_takes_the_text_that_its_variant_was_made_with(tiny_pipelines: Pipelines, variant: str, tokens: int) -> None:
    model = copy.copy(tiny_pipelines("flux"))
    model.denoiser_config = model.denoiser_config | {"guidance_embeds": variant == "dev"}
    (prompt,) = model.encode_prompts(["a photo of sks toy"], device=CPU).values()
    assert prompt.hidden.shape[1] == text_tokens(model) == tokens


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_usual_sides(name: str) -> None:
    assert PublishedModel(name).native_resolution == {"sd15": 512, "sd21": 768}.get(name, 1024)
