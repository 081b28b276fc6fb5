"""Laws of packed layers and their scales: what autograd finds on the float layer, without ever keeping the float layer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pocketune.weights.layers as layers
from pocketune import Recipe, personalize
from pocketune.errors import FileFormatError, PlanError, RecipeError
from pocketune.inspection import inspect
from pocketune.methods.scales import ScalesMethod, add_scales, intervals_of, load_scales, merge, packed_layers, trained_layers
from pocketune.models.base import Prompt, denoise
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan, parse_plan
from pocketune.sample import generate
from pocketune.step import predict
from pocketune.weights.layers import PackedConv2d, PackedLayer, PackedLinear, Scales
from pocketune.weights.quantizers import Quantization
from tests.laws.test_step import make_batch
from tests.tolerances import SCALE_GRADIENT, SCALES_MERGED

CPU = torch.device("cpu")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(kind: str, bits: int, *, inputs: bool = True, intervals: int = 1) -> tuple[PackedLayer, Tensor]:
    """A packed layer with scales that are not one, and an input."""
    layer: PackedLayer
    if kind == "linear":
        plain = nn.Linear(48, 70)
        plain.weight.data, plain.bias.data = numbers(70, 48), numbers(70, seed=1)
        layer = PackedLinear(plain, Quantization(bits).pack(plain.weight.data), dtype=torch.float32)
        x = numbers(2, 5, 48, seed=2)
    else:
        conv = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        conv.weight.data, conv.bias.data = numbers(10, 6, 3, 3), numbers(10, seed=1)
        layer = PackedConv2d(conv, Quantization(bits).pack(conv.weight.data), dtype=torch.float32)
        x = numbers(2, 6, 9, 9, seed=2)
    model = nn.ModuleDict({"layer": layer})
    add_scales(model, ["layer"], intervals=intervals, inputs=inputs)
    with torch.no_grad():
        for number, parameter in enumerate(layer.scales.parameters()):
            parameter.add_(0.3 * numbers(*parameter.shape, seed=10 + number))
    return layer, x


def on_the_float_layer(layer: PackedLayer, x: Tensor, s_out: Tensor, s_in: Tensor | None) -> Tensor:
    weight = layer.merged(None) * s_out.view(-1, *(1,) * (1 + len(layer.kernel)))
    if s_in is not None:
        weight = weight * s_in.view(1, -1, *(1,) * len(layer.kernel))
    if isinstance(layer, PackedConv2d):
        return nn.functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
    return nn.functional.linear(x, weight, layer.bias)


def test_the_quantizer_s_numbers_stay_as_they_are_in_half_precision(tiny_model: ModelFolder) -> None:
    """Codes are worth the same in training and in sampling, which packs another pipeline."""
    models = [
        tiny_model.load_denoiser(dtype=dtype, device=CPU, quantization=Quantization(8)).model
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for name in packed_layers(models[0]):
        expected, layer = (model.get_submodule(name) for model in models)
        assert torch.equal(layer.base, expected.base)
        assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("tile", [2**21, 100])
@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_are_those_of_the_float_layer(
    monkeypatch: pytest.MonkeyPatch, kind: str, bits: int, inputs: bool, tile: int
) -> None:
    """Output, and the gradients of the input and both scales, whether the weight is unpacked whole or by a few rows."""
    monkeypatch.setattr(layers, "TILE_VALUES", tile)
    layer, x = packed(kind, bits, inputs=inputs)
    scales = layer.scales[0]
    trained = [scales.s_out, *([scales.s_in] if inputs else [])]
    found_x, expected_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    output = layer(found_x)
    weights = numbers(*output.shape, seed=5)
    found = torch.autograd.grad((output * weights).sum(), [found_x, *trained])
    copies = [parameter.detach().clone().requires_grad_() for parameter in trained]
    expected_output = on_the_float_layer(layer, expected_x, copies[0], copies[1] if inputs else None)
    expected = torch.autograd.grad((expected_output * weights).sum(), [expected_x, *copies])
    for one, other in zip([output, *found], [expected_output, *expected], strict=True):
        assert (one - other).abs().max() <= SCALE_GRADIENT * other.abs().max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_backward_keeps_the_input_and_the_scales_alone(kind: str, bits: int) -> None:
    """No float copy of a weight, and no product."""
    layer, x = packed(kind, bits)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x.requires_grad_())
    assert sorted(tensor.numel() for tensor in kept) == sorted(
        [x.numel(), *(parameter.numel() for parameter in layer.scales.parameters())]
    )
    frozen = PackedLinear(nn.Linear(8, 8), Quantization(8).pack(numbers(8, 8)), dtype=torch.float32)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        frozen(numbers(3, 8).requires_grad_())
    assert kept == []


def test_weights_are_really_packed() -> None:
    eight, four = packed("linear", 8)[0], packed("linear", 4)[0]
    assert eight.codes.dtype == four.codes.dtype == torch.uint8
    assert (eight.codes.nbytes, four.codes.nbytes) == (70 * 48, 70 * 24)
    assert eight.weight.untyped_storage().nbytes() == 4
    assert (eight.merged(None) - numbers(70, 48)).abs().max() < 0.02
    assert (four.merged(None) - numbers(70, 48)).abs().max() < 0.3


def test_intervals_split_the_timesteps_evenly() -> None:
    assert intervals_of(torch.tensor([0.0, 249.9, 250.0, 500.0, 999.9, 1000.0]), 4) == (0, 0, 1, 2, 3, 3)
    assert intervals_of(torch.tensor(700), 1) == (0,)


def test_a_batch_may_mix_intervals_and_each_trains_its_own() -> None:
    layer, x = packed("linear", 8, intervals=3)
    layer.selected.rows = (2, 0)
    mixed = layer(x)
    for row, interval in enumerate((2, 0)):
        layer.selected.rows = (interval,)
        torch.testing.assert_close(mixed[row : row + 1], layer(x[row : row + 1]))
    mixed.sum().backward()
    assert [pair.s_out.grad is not None for pair in layer.scales] == [True, False, True]
    layer.selected.rows = (2, 0, 1)
    with pytest.raises(PlanError, match="3 samples"):
        layer(x)


@pytest.mark.parametrize("name", ["tiny-sd3", "flux", "pixart", "sana", "sd15"])
def test_scales_of_a_transformer_train_where_tokens_are_seen(
    tiny_model: ModelFolder, tiny_pipelines: Callable[[str], ModelFolder], name: str
) -> None:
    folder = tiny_model if name == "tiny-sd3" else tiny_pipelines(name)
    adapter = folder.empty_denoiser()
    plan = BlockPlan(adapter.block_count)
    linears = [path for path, layer in adapter.model.named_modules() if isinstance(layer, nn.Linear)]
    found = trained_layers(adapter, plan, linears)
    assert found
    if name == "sd15":
        assert found == linears
        return
    blocks = tuple(f"{part}." for index in plan.kept for part in adapter.block_parts(index))
    assert all(path.startswith(blocks) for path in found)
    left = [path for path in linears if path.startswith(blocks) and path not in found]
    assert all(".norm" in path for path in left)
    part = adapter.default_scale_targets[0]
    assert set(trained_layers(adapter, plan, linears, targets=[part])) < set(found)


def test_a_part_without_packed_layers_is_refused_before_anything_is_made(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path
) -> None:
    asked = Recipe.create(instance_prompt="a photo of sks toy", method="scales", weight_bits=8, scale_targets=["attn", "mlp"])
    with pytest.raises(RecipeError, match='"mlp"'):
        personalize(toy_photos, model=tiny_folder, recipe=asked, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("timestep", "interval"), [(100.0, "0"), (900.0, "3")])
def test_a_step_trains_the_interval_of_its_timestep(tiny_model: ModelFolder, timestep: float, interval: str) -> None:
    asked = Recipe.create(instance_prompt="a photo of sks toy", method="scales", weight_bits=8, scale_intervals=4)
    adapter = tiny_model.load_denoiser(dtype=torch.float32, device=CPU, quantization=Quantization(8))
    tuned = ScalesMethod().attach(adapter, plan=BlockPlan(6), recipe=asked, folder=tiny_model)
    batch = make_batch()
    batch = tuned.inputs(replace(batch, timesteps=torch.full_like(batch.timesteps, timestep)))
    predict(adapter, BlockPlan(6), batch).square().sum().backward()
    trained = {
        name.split(".scales.")[1].split(".")[0] for name, parameter in tuned.parameters.items() if parameter.grad is not None
    }
    assert trained == {interval}


@pytest.mark.parametrize("bits", [8, 4])
def test_hqq_has_smaller_errors_on_normal_weights(bits: int) -> None:
    pytest.importorskip("torchao")
    weight = numbers(32, 256)
    errors = {}
    for name in ("minmax", "hqq"):
        layer = PackedLinear(nn.Linear(256, 32), Quantization(bits, name).pack(weight), dtype=torch.float32)
        assert layer.codes.nbytes == 32 * 256 * bits // 8
        errors[name] = float((layer.merged(None) - weight).abs().mean())
    assert errors["hqq"] < errors["minmax"]


def test_merged_equals_applied(tiny_model: ModelFolder) -> None:
    """For each interval, an ordinary model with its weights computes what the packed one does within it."""
    batch, found = make_batch(), []
    for interval in (0, 1):
        adapter = tiny_model.load_denoiser(dtype=torch.float32, device=CPU, quantization=Quantization(4))
        selected = add_scales(adapter.model, packed_layers(adapter.model), intervals=2, inputs=True)
        with torch.no_grad():
            for number, (name, parameter) in enumerate(adapter.model.named_parameters()):
                if ".scales." in name:
                    parameter.add_(0.05 * numbers(*parameter.shape, seed=number))
            selected.rows = (interval,)
            applied = denoise(adapter, batch.noisy, batch.timesteps, batch.prompt)
            merge(adapter.model, interval)
            assert packed_layers(adapter.model) == []
            found.append(denoise(adapter, batch.noisy, batch.timesteps, batch.prompt))
        torch.testing.assert_close(found[-1], applied, rtol=0, atol=SCALES_MERGED)
    assert (found[0] - found[1]).abs().max() > 100 * SCALES_MERGED


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_scales_of_all_that_is_left_of_a_hollowed_unet_train(tiny_pipelines: Callable[[str], ModelFolder], name: str) -> None:
    """Residual layers and samplers of kept blocks among them, whether the skipped blocks are gone or not."""
    model = tiny_pipelines(name)
    plan = parse_plan("2-6", model.block_count)
    left, whole = (
        model.load_denoiser(dtype=torch.float32, device=CPU, blocks=blocks, quantization=Quantization(8))
        for blocks in (plan.kept, None)
    )
    inside = ("down_blocks.", "mid_block.", "up_blocks.")
    expected = [layer for layer in packed_layers(left.model) if layer.startswith(inside)]
    assert trained_layers(left, plan, packed_layers(left.model)) == expected
    assert trained_layers(whole, plan, packed_layers(whole.model)) == expected
    assert all(any(kind in layer for layer in expected) for kind in ("resnets", "attentions", "downsamplers", "upsamplers"))


@pytest.mark.parametrize("name", ["tiny-sd3", "sd15"])
def test_scales_personalize_sample_by_timestep_and_are_known(
    name: str,
    tiny_folder: Path,
    tiny_pipelines: Callable[[str], ModelFolder],
    toy_photos: Path,
    tmp_path: Path,
) -> None:
    model = tiny_folder if name == "tiny-sd3" else tiny_pipelines(name).path
    changes = {"method": "scales", "weight_bits": 8, "scale_intervals": 2, "scale_learning_rate": 0.05}
    prompt = "a photo of sks toy"
    recipe = Recipe.create(instance_prompt=prompt, steps=4, sample_steps=2, sample_prompts=(prompt,), **changes)
    record = personalize(toy_photos, model=model, recipe=recipe, out=tmp_path / "run")
    assert any(record.check.norms.values()) and record.check.image_change > 0

    path = tmp_path / "run" / "scales" / "pocketune_scales.safetensors"
    found = inspect(path)
    assert found.kind == "scales" and found.facts["bits"] == "8" and found.facts["intervals"] == "2"
    assert inspect(tmp_path / "run").facts["scales"]["layers"] == found.facts["layers"]
    (image,) = generate(model, [prompt], lora=tmp_path / "run", seeds=[1000], steps=2, guidance=recipe.guidance_scale)
    stored = load_file(path)
    with_one_interval = {key: stored[key.replace(".scales.0.", ".scales.1.")].clone() for key in stored}
    other = tmp_path / "other.safetensors"
    save_file(with_one_interval, other, metadata={**found.facts["metadata"]})
    (changed,) = generate(model, [prompt], lora=other, seeds=[1000], steps=2, guidance=recipe.guidance_scale)
    assert image.tobytes() != changed.tobytes()
    save_file({key: torch.ones_like(value) for key, value in stored.items()}, other, metadata={**found.facts["metadata"]})
    (neutral,) = generate(model, [prompt], lora=other, seeds=[1000], steps=2, guidance=record.recipe.guidance_scale)
    with Image.open(tmp_path / "run" / record.samples[0].before) as before:  # what packing does is in both images of the pair
        assert before.tobytes() == neutral.tobytes()

    folder = ModelFolder(name, model)
    denoiser = folder.load_denoiser(dtype=torch.float32, device=CPU).model
    save_file(load_file(path), other, metadata={**found.facts["metadata"], "codes": "0" * 16})
    with pytest.raises(FileFormatError, match="other weights"):
        load_scales(denoiser, other, folder)


def test_scales_follow_the_timestep(tiny_model: ModelFolder, tmp_path: Path) -> None:
    """A call of the model itself picks the interval, as a stock pipeline's loop does."""
    model = tiny_model.load_denoiser(dtype=torch.float32, device=CPU, quantization=Quantization(8)).model
    names = packed_layers(model)
    add_scales(model, names, intervals=2, inputs=True)
    from pocketune.methods.scales import codes_digest

    tensors = {
        name: value.detach() + 0.1 * name.count(".scales.1.") for name, value in model.named_parameters() if ".scales." in name
    }
    metadata = {"bits": "8", "quantizer": "minmax", "intervals": "2", "codes": codes_digest(model, list(tensors))}
    save_file(tensors, tmp_path / "scales.safetensors", metadata=metadata)
    plain = tiny_model.load_denoiser(dtype=torch.float32, device=CPU).model
    selected = load_scales(plain, tmp_path / "scales.safetensors", tiny_model)
    prompt = Prompt(hidden=numbers(1, 20, 128), pooled=numbers(1, 128))
    for timestep, interval in ((torch.tensor([100.0]), 0), (torch.tensor([900.0]), 1)):
        with torch.no_grad():
            plain(
                hidden_states=numbers(1, 4, 8, 8),
                timestep=timestep,
                encoder_hidden_states=prompt.hidden,
                pooled_projections=prompt.pooled,
            )
        assert selected.rows == (interval,)
    assert isinstance(plain.get_submodule(names[0]).scales[1], Scales)
