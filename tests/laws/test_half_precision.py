"""Laws of training in half precision: gradients neither underflow nor overflow, and small updates of scales show."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pocketune.errors import RunError
from pocketune.methods.lora import add_lora
from pocketune.methods.scales import add_scales, packed_layers
from pocketune.models.base import Prompt
from pocketune.models.load import ModelFolder
from pocketune.recipe import Recipe
from pocketune.step import Batch
from pocketune.train import forget_activations, new_optimizer, train_step, update
from pocketune.weights.layers import PackedLinear, Scales
from pocketune.weights.quantizers import Quantization
from tests.laws.test_step import CPU, NO_SKIP, make_batch
from tests.tolerances import HALF_PRECISION_COSINE, HALF_PRECISION_UPDATE

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LARGE = 128 * 128 * 16 / (8 * 8 * 4)
"""How many times more numbers the latents of 1024 pixels have than those of the tiny model."""
LOW = {"activations": "recomputed", "optimizer_in_backward": True}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch_in(dtype: torch.dtype, *, size: float = LARGE, sigmas: tuple[float, float] = (0.2, 0.8)) -> Batch:
    """A batch whose output has gradients as small as those of larger latents."""
    batch = replace(make_batch((0.5 / size, 0.5 / size)), sigmas=torch.tensor(sigmas), timesteps=1000 * torch.tensor(sigmas))
    halves = {name: getattr(batch, name).to(dtype) for name in ("latents", "noise", "sigmas")}
    prompt = Prompt(hidden=batch.prompt.hidden.to(dtype), pooled=batch.prompt.pooled.to(dtype))
    return Batch(**{**vars(batch), **halves, "prompt": prompt})


def gradients(
    model: ModelFolder,
    settings: dict[str, object],
    dtype: str,
    *,
    spoil: Callable[[Tensor], Tensor] | None = None,
    sigmas: tuple[float, float] = (0.2, 0.8),
) -> tuple[dict[str, Tensor], dict[str, nn.Parameter]]:
    """What the optimizer sees in a step, and the parameters after it."""
    recipe = Recipe.create(**Recipe.relevant({"instance_prompt": "x", "max_grad_norm": 1e9, "dtype": dtype, **settings}))
    bits = recipe.weight_bits
    quantization = None if bits is None else Quantization(bits)
    kind = getattr(torch, dtype)
    adapter = model.load_denoiser(dtype=kind, device=CPU, quantization=quantization)
    if recipe.method == "scales":
        adapter.model.requires_grad_(False)
        add_scales(adapter.model, packed_layers(adapter.model), intervals=1, inputs=True)
        parameters = {name: one for name, one in adapter.model.named_parameters() if ".scales." in name}
    else:
        parameters = add_lora(adapter, blocks=range(6), rank=2, seed=7)
        with torch.no_grad():
            for number, parameter in enumerate(parameters.values()):
                parameter.copy_(0.05 * numbers(*parameter.shape, seed=number))
    optimizer, found = new_optimizer(parameters, recipe), {}

    def see(*_: object) -> None:
        found.update({name: one.grad.clone() for name, one in parameters.items() if one.grad is not None})

    optimizer.register_step_pre_hook(see)
    if spoil is not None:
        next(iter(parameters.values())).register_hook(spoil)
    if recipe.activations != "kept":
        forget_activations(adapter, recipe, partial(update, parameters.values(), recipe, optimizer))
    train_step(adapter, parameters, NO_SKIP, recipe, batch_in(kind, sigmas=sigmas), optimizer)
    return found, parameters


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "settings",
    [{}, LOW, {"method": "scales", "weight_bits": 8}, {"method": "scales", "weight_bits": 4, **LOW}],
    ids=["lora", "lora in backward", "scales", "scales in backward"],
)
def test_gradients_are_those_of_float32(tiny_model: ModelFolder, settings: dict[str, object], dtype: str) -> None:
    """Of a loss as small as that of 1024 pixels, with the loss scale taken out again before they are clipped."""
    expected, found = (gradients(tiny_model, settings, kind)[0] for kind in ("float32", dtype))
    check_alike(found, expected)


def test_weights_past_the_largest_number_of_float16_are_those_of_float32(tiny_model: ModelFolder) -> None:
    """1 / sigma^2 at the least noise that there is."""
    settings = {"weighting_scheme": "sigma_sqrt"}
    expected, found = (gradients(tiny_model, settings, kind, sigmas=(0.001, 0.5))[0] for kind in ("float32", "float16"))
    check_alike(found, expected)


def check_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    flat = [torch.cat([one[name].flatten() for name in sorted(expected)]) for one in (found, expected)]
    assert torch.cosine_similarity(*flat, dim=0) > HALF_PRECISION_COSINE
    assert float(flat[0].norm() / flat[1].norm()) == pytest.approx(1, rel=1 - HALF_PRECISION_COSINE)


@pytest.mark.parametrize("settings", [{}, LOW], ids=["at once", "in backward"])
def test_a_gradient_that_is_no_number_stops_training_before_the_update(
    tiny_model: ModelFolder, settings: dict[str, object]
) -> None:
    """Clipping would turn one infinite number into parameters that are all NaN, at a loss that is finite."""
    with pytest.raises(RunError, match="gradient became inf"):
        gradients(tiny_model, settings, "float32", spoil=lambda gradient: gradient * torch.inf)


def scaled_linear(bits: int) -> tuple[PackedLinear, Scales]:
    plain = nn.Linear(256, 16, bias=False)
    plain.weight.data = 0.05 * numbers(16, 256)
    layer = PackedLinear(plain, Quantization(bits).pack(plain.weight.data), dtype=torch.float32)  # type: ignore[arg-type]
    layer.scales.append(Scales(16, 256, device=CPU))
    return layer, layer.scales[0]  # type: ignore[return-value]


@torch.no_grad()
@pytest.mark.parametrize("side", ["s_out", "s_in"])
@pytest.mark.parametrize("dtype", HALVES.values())
@pytest.mark.parametrize("bits", [8, 4])
def test_one_update_of_scales_shows(bits: int, dtype: torch.dtype, side: str) -> None:
    """At the default rate of input scales, less than half a step from 1 to the next number of bfloat16."""
    layer, scales = scaled_linear(bits)
    x = numbers(64, 256, seed=2)
    before = layer(x), layer(x.to(dtype)).float()
    getattr(scales, side).add_(Recipe.create(instance_prompt="x").scale_in_learning_rate)
    expected, found = (after - first for after, first in zip((layer(x), layer(x.to(dtype)).float()), before, strict=True))
    share = (found * expected).sum() / (expected * expected).sum()
    assert float(share) == pytest.approx(1, abs=HALF_PRECISION_UPDATE)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_outputs_overflow_where_those_of_the_float_layer_do(bits: int) -> None:
    """Sums of codes reach 65504 long before sums of weights do."""
    layer, _ = scaled_linear(bits)
    x = torch.full((1, 256), 30000.0)
    found, expected = layer(x.half()).float(), layer(x)
    assert expected.abs().max() < 65504 < 2 * expected.abs().max()
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))
