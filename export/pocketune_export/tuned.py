"""What trains in an exported denoiser, LoRA or scales: put into the empty model, described, and its start values as a file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors.torch import save
from torch import nn

from pocketune.delta import save_lora
from pocketune.errors import RecipeError
from pocketune.headers import with_sorted_metadata
from pocketune.methods.lora import ADAPTER, add_lora, start_values
from pocketune.methods.scales import digest_of, metadata_of, quantization_of, trained_layers
from pocketune.models.base import DenoiserAdapter
from pocketune.plan.blocks import BlockPlan
from pocketune.recipe import Recipe
from pocketune.runfolder import LORA_FILE, SCALES_FILE
from pocketune.weights.quantizers import packs
from pocketune_export import manifest as m
from pocketune_export.layout import Layout
from pocketune_export.scaled import add_scales, remove_scales
from pocketune_export.sources import DenoiserWeights
from pocketune_export.weights import Packing


@dataclass(frozen=True)
class Trained:
    """What trains.

    Attributes:
        parameters: by name, in the order of the blocks; of one interval of timesteps, where there are several.
        path: of the start values in a bundle, and of the result in a RUN folder.
        content: the file of start values.
        lora: of LoRA, its settings.
    """

    parameters: dict[str, nn.Parameter]
    path: str
    content: bytes
    lora: m.Lora | None


def packing_of(model: nn.Module, recipe: Recipe) -> Packing | None:
    """Which weights of a denoiser the recipe packs; asked before anything is added to the model."""
    quantization = quantization_of(recipe)
    if quantization is None:
        return None
    layers = (name for name, layer in model.named_modules() if packs(layer, quantization.bits))
    return Packing(quantization, frozenset(f"{name}.weight" for name in layers))


def attach(
    adapter: DenoiserAdapter, plan: BlockPlan, recipe: Recipe, *, weights: DenoiserWeights, packing: Packing | None
) -> Trained:
    """Give an empty denoiser what trains, with real start values.

    Args:
        adapter: its weights lie on the meta device.
        plan: which blocks train.
        recipe: what trains.
        weights: of the denoiser.
        packing: as `packing_of` gave it.

    Raises:
        RecipeError: nothing trains.
    """
    trained = _scales(adapter, plan, recipe, weights, packing) if recipe.method == "scales" else _lora(adapter, plan, recipe)
    return replace(trained, parameters=by_block(adapter, trained.parameters))


def _lora(adapter: DenoiserAdapter, plan: BlockPlan, recipe: Recipe) -> Trained:
    targets = recipe.lora_targets or adapter.default_lora_targets
    parameters = add_lora(adapter, blocks=plan.kept, rank=recipe.rank, targets=targets, seed=recipe.seed)
    for name, value in start_values(parameters, rank=recipe.rank, seed=recipe.seed).items():
        set_module_tensor_to_device(adapter.model, name, "cpu", value=value)
    with tempfile.TemporaryDirectory() as scratch:
        content = save_lora(adapter, Path(scratch)).read_bytes()
    real = {name: adapter.model.get_parameter(name) for name in parameters}
    return Trained(real, LORA_FILE.as_posix(), content, m.Lora(rank=recipe.rank, alpha=float(recipe.rank), targets=targets))


def _scales(
    adapter: DenoiserAdapter, plan: BlockPlan, recipe: Recipe, weights: DenoiserWeights, packing: Packing | None
) -> Trained:
    packed = [] if packing is None else [name for name, _ in adapter.model.named_modules() if f"{name}.weight" in packing.names]
    layers = trained_layers(adapter, plan, packed, targets=recipe.scale_targets)
    if packing is None or not layers:
        msg = "no layer of the kept blocks is packed, so there are no scales to train. Skip fewer blocks."
        raise RecipeError(msg)
    codes = digest_of(packing.quantization.pack(weights(f"{name}.weight")).codes for name in sorted(layers))
    parameters = add_scales(adapter.model, layers, inputs=recipe.scale_inputs)
    tensors = {
        interval_name(name, interval): torch.ones(parameter.shape)
        for name, parameter in parameters.items()
        for interval in range(recipe.scale_intervals)
    }
    content = with_sorted_metadata(save(tensors, metadata_of(recipe, adapter.model, codes=codes)))
    return Trained(parameters, SCALES_FILE.as_posix(), content, None)


def take_out(model: nn.Module, names: Iterable[str]) -> None:
    """Take the LoRA or the scales with these parameters out of a model: they stay as they started, which changes nothing."""
    for layer in {re.split(r"\.lora_[AB]\.|\.s_(?:in|out)$", name)[0] for name in names}:
        owner, _, leaf = layer.rpartition(".")
        wrapped = model.get_submodule(layer)
        if hasattr(wrapped, "base_layer"):
            setattr(model.get_submodule(owner), leaf, wrapped.base_layer)
        else:
            remove_scales(wrapped)


def interval_name(name: str, interval: int) -> str:
    """The name in PyTorch of an interval's scale, which is called "LAYER.s_out" or "LAYER.s_in" here."""
    layer, _, kind = name.rpartition(".")
    return f"{layer}.scales.{interval}.{kind}"


def describe(trained: Trained, adapter: DenoiserAdapter, layout: Layout, recipe: Recipe, *, prefix: str) -> m.Tuned:
    """What the manifest says. prefix: of the names in a LoRA file."""
    scales = recipe.method == "scales"
    intervals = recipe.scale_intervals if scales else 1
    starts = {slot.name: slot.start for slot in layout.slots}

    def parameters() -> Iterator[m.Parameter]:
        for interval in range(intervals):
            for name, parameter in trained.parameters.items():
                torch_name = interval_name(name, interval) if scales else name
                yield m.Parameter(
                    name=torch_name,
                    key=torch_name if scales else prefix + name.replace(f".{ADAPTER}.", "."),
                    shape=tuple(parameter.shape),
                    interval=interval,
                    block=_block_of(adapter, name),
                    offset=starts.get(name),
                )

    return m.Tuned(
        method="scales" if scales else "lora",
        lora=trained.lora,
        intervals=intervals,
        parameters=tuple(parameters()),
        flat_elements=layout.elements,
        initial=trained.path,
    )


def _block_of(adapter: DenoiserAdapter, name: str) -> int | None:
    for index in range(adapter.block_count):
        if name.startswith(tuple(f"{part}." for part in adapter.block_parts(index))):
            return index
    return None


def by_block(adapter: DenoiserAdapter, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What lies before the blocks in the model, what lies in each, and the rest; in a U-Net a block's parts lie apart."""
    blocks = {name: _block_of(adapter, name) for name in parameters}
    before = set(takewhile(lambda name: blocks[name] is None, parameters))

    def place(name: str) -> int:
        block = blocks[name]
        return (-1 if name in before else adapter.block_count) if block is None else block

    return {name: parameters[name] for name in sorted(parameters, key=place)}
