"""Masking text: exact where it claims to be, on every architecture, through the stock model's own forward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pocketune.methods.lora import add_lora
from pocketune.models.base import DenoiserAdapter, Prompt, denoise
from pocketune.models.load import ModelFolder
from pocketune.models.masking import text_masked
from tests.tiny_models import BUILDERS

CPU = torch.device("cpu")
TEXTS = ("a photo of sks toy", "three green houses at night")
NAMES = ["sd3", *BUILDERS]


@pytest.fixture(params=NAMES)
def case(
    request: pytest.FixtureRequest, tiny_model: ModelFolder, tiny_pipelines: Callable[[str], ModelFolder]
) -> tuple[DenoiserAdapter, Callable[[int], Tensor]]:
    """A model, and its output for one of two texts; nothing but the text's tokens differs."""
    model = tiny_model if request.param == "sd3" else tiny_pipelines(request.param)
    adapter = model.load_denoiser(dtype=torch.float32, device=CPU)
    parameters = add_lora(adapter, blocks=range(adapter.block_count), rank=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    encoded = model.encode_prompts(TEXTS, device=CPU)
    latents = torch.randn(1, 4, 8, 8, generator=generator)

    @torch.no_grad()
    def output(text: int) -> Tensor:
        first = encoded[TEXTS[0]]
        sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]) if model.family.takes_sizes else None
        prompt = Prompt(hidden=encoded[TEXTS[text]].hidden, pooled=first.pooled, mask=first.mask, sizes=sizes)
        return denoise(adapter, latents, torch.tensor([500.0]), prompt)

    return adapter, output


def test_masked_everywhere_text_does_not_matter(case: tuple[DenoiserAdapter, Callable[[int], Tensor]]) -> None:
    adapter, output = case
    plain = output(0)
    assert not torch.equal(plain, output(1))
    with text_masked(adapter, range(adapter.block_count)):
        assert torch.equal(output(0), output(1))
        assert output(0).isfinite().all()
        assert not torch.equal(output(0), plain)
    assert torch.equal(output(0), plain)


def test_masked_nowhere_changes_nothing(case: tuple[DenoiserAdapter, Callable[[int], Tensor]]) -> None:
    adapter, output = case
    plain = output(0)
    with text_masked(adapter, ()):
        assert torch.equal(output(0), plain)


def test_masked_in_part_the_rest_still_sees_the_text(case: tuple[DenoiserAdapter, Callable[[int], Tensor]]) -> None:
    adapter, output = case
    seeing = [index for index in range(adapter.block_count) if adapter.text_attention(index)]
    for blocks in (seeing[:1], seeing[1:]):
        with text_masked(adapter, blocks):
            assert not torch.equal(output(0), output(1))


def test_an_error_inside_leaves_the_model_as_it_was(case: tuple[DenoiserAdapter, Callable[[int], Tensor]]) -> None:
    adapter, output = case
    plain = output(0)
    attention = next(found for index in range(adapter.block_count) for found in adapter.text_attention(index))
    handle = attention.module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), text_masked(adapter, range(adapter.block_count)):
        output(0)
    handle.remove()
    assert torch.equal(output(0), plain)
