"""Masking text: exact where it claims to be, on every architecture, through the stock model's own forward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pocketune.errors import ModelError
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


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux"])
def test_text_still_sees_the_image(tiny_model: ModelFolder, tiny_pipelines: Callable[[str], ModelFolder], name: str) -> None:
    """What the text becomes in a masked block is what it becomes without a mask, and depends on the image."""
    model = tiny_model if name == "sd3" else tiny_pipelines(name)
    adapter = model.load_denoiser(dtype=torch.float32, device=CPU)
    text = adapter.stream_names.index("text")
    (prompt,) = model.encode_prompts(TEXTS[:1], device=CPU).values()
    generator = torch.Generator().manual_seed(1)
    latents, others = (torch.randn(1, model.sizes.channels, 8, 8, generator=generator) for _ in range(2))
    compared = 0
    with torch.no_grad():
        context = adapter.context(latents, torch.tensor([500.0]), prompt)
        streams, seen = adapter.embed(latents, prompt), adapter.embed(others, prompt)
        for index in range(adapter.block_count):
            plain = adapter.block(index, streams, context)
            with text_masked(adapter, [index]):
                masked = adapter.block(index, streams, context)
                other = adapter.block(index, tuple(seen[n] if n != text else streams[n] for n in range(2)), context)
            assert not torch.allclose(masked[1 - text], plain[1 - text], rtol=1e-3, atol=1e-4)
            if len(plain) > text:  # the last block ends the text stream
                torch.testing.assert_close(masked[text], plain[text], rtol=1e-5, atol=1e-5)
                assert not torch.allclose(masked[text], other[text], rtol=1e-3, atol=1e-4)
                compared += 1
            streams = plain
    assert compared >= adapter.block_count - 1


def test_attention_that_cannot_be_masked_is_refused(case: tuple[DenoiserAdapter, Callable[[int], Tensor]]) -> None:
    """As by another attention backend of diffusers: a mask without effect would make every block look needless."""
    adapter, output = case
    plain = output(0)

    def elsewhere(query: Tensor, *_: object, **__: object) -> Tensor:
        return torch.zeros_like(query)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", elsewhere)
        assert output(0).isfinite().all()
        with text_masked(adapter, range(adapter.block_count)), pytest.raises(ModelError, match="native attention backend"):
            output(0)
    assert torch.equal(output(0), plain)


def test_an_error_inside_leaves_the_model_as_it_was(case: tuple[DenoiserAdapter, Callable[[int], Tensor]]) -> None:
    adapter, output = case
    plain = output(0)
    attention = next(found for index in range(adapter.block_count) for found in adapter.text_attention(index))
    handle = attention.module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), text_masked(adapter, range(adapter.block_count)):
        output(0)
    handle.remove()
    assert torch.equal(output(0), plain)
