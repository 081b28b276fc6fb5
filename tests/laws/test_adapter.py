"""The adapter-decomposed forward is diffusers' own forward."""

import pytest
import torch

from pocketune.errors import PlanError, RecipeError
from pocketune.methods.lora import add_lora, check_targets
from pocketune.models.base import Prompt, denoise
from pocketune.models.flux import ATTENTION_TARGETS
from pocketune.models.load import ModelFolder
from pocketune.models.published import published

CPU = torch.device("cpu")


def _inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, Prompt]:
    g = torch.Generator().manual_seed(1)
    prompt = Prompt(hidden=torch.randn(batch, 20, 128, generator=g), pooled=torch.randn(batch, 128, generator=g))
    return torch.randn(batch, 4, 8, 8, generator=g), torch.tensor([100.0, 900.0])[:batch], prompt


def test_building_touches_no_gpu(tiny_model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a GPU's random state would start CUDA, and take memory on it."""

    def refuse(*_: object) -> None:
        message = "a GPU was asked"
        raise AssertionError(message)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", refuse)
    before = torch.get_rng_state()
    add_lora(tiny_model.load_denoiser(dtype=torch.float32, device=CPU), blocks=(0,), rank=2)
    tiny_model.load_vae(device=CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_equals_diffusers_bit_for_bit(tiny_model: ModelFolder) -> None:
    adapter = tiny_model.load_denoiser(dtype=torch.float32, device=CPU)
    latents, timesteps, prompt = _inputs()
    with torch.no_grad():
        ours = denoise(adapter, latents, timesteps, prompt)
        theirs = adapter.model(
            hidden_states=latents,
            encoder_hidden_states=prompt.hidden,
            pooled_projections=prompt.pooled,
            timestep=timesteps,
            return_dict=False,
        )[0]
    assert torch.equal(ours, theirs)


def test_loads_what_diffusers_loads(tiny_model: ModelFolder) -> None:
    from diffusers import SD3Transformer2DModel

    ours = tiny_model.load_denoiser(dtype=torch.float32, device=CPU).model.state_dict()
    theirs = SD3Transformer2DModel.from_pretrained(tiny_model.path, subfolder="transformer").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_partial_load_holds_no_weights_of_other_blocks(tiny_model: ModelFolder) -> None:
    adapter = tiny_model.load_denoiser(dtype=torch.float32, device=CPU, blocks=(2, 3))
    present = {name.split(".")[1] for name, _ in adapter.model.named_parameters() if name.startswith("transformer_blocks.")}
    assert present == {"2", "3"}
    latents, timesteps, prompt = _inputs()
    with pytest.raises(PlanError, match="removed block"):
        denoise(adapter, latents, timesteps, prompt)


def test_a_lora_target_of_other_blocks_than_those_that_train_is_no_mistake() -> None:
    flux = published("flux1-dev")
    check_targets(flux, blocks=range(19, 47), targets=ATTENTION_TARGETS)  # single-stream blocks have none for text
    with pytest.raises(RecipeError, match=r"attn\.to_Q"):
        check_targets(flux, blocks=range(57), targets=(*ATTENTION_TARGETS, "attn.to_Q"))
