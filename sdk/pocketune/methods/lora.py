"""LoRA on the kept blocks, by peft; a fresh adapter changes nothing (its up-projection is zero).

Paper: Hu et al. 2021 (LoRA), equation 3: h = W x + (alpha / rank) B A x. Here alpha equals the rank, as in diffusers' script.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from pocketune.errors import RecipeError
from pocketune.models.base import DenoiserAdapter

ADAPTER = "default"


def add_lora(
    adapter: DenoiserAdapter, *, blocks: Sequence[int], rank: int, targets: Sequence[str] | None = None, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Freeze the denoiser and give the named Linears of some blocks a LoRA in float32.

    Args:
        adapter: the denoiser, changed in place.
        blocks: indices of the blocks to tune.
        rank: of each pair of matrices.
        targets: Linear names inside a block; default: the adapter's.
        seed: of the down-projections, Gaussian with deviation 1 / rank.

    Returns:
        The trainable parameters by name, down (rank, in) and up (out, rank).

    Raises:
        RecipeError: as of `lora_layers`.
    """
    model = adapter.model
    model.requires_grad_(False)
    present = lora_layers(adapter, blocks=blocks, targets=targets)
    pattern = "|".join(re.escape(name) for name in present)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, target_modules=f"({pattern})")
    with torch.random.fork_rng(devices=[]):  # peft draws its start from the global generator; every value is overwritten below
        if hasattr(model, "add_adapter"):
            model.add_adapter(config, adapter_name=ADAPTER)
        else:  # diffusers gives PixArt no such method
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, start in start_values(parameters, rank=rank, seed=seed).items():
        parameters[name].data = parameters[name].data.float().copy_(start)
    return parameters


def lora_layers(adapter: DenoiserAdapter, *, blocks: Sequence[int], targets: Sequence[str] | None = None) -> list[str]:
    """The names of the Linears that get a LoRA, in the order of the model; arguments as of `add_lora`.

    Raises:
        RecipeError: no Linear of these blocks has one of the names that are asked for.
    """
    names = targets or adapter.default_lora_targets
    wanted = {f"{adapter.block_name(index)}.{name}" for index in blocks for name in names}
    present = [path for path, module in adapter.model.named_modules() if path in wanted and isinstance(module, nn.Linear)]
    if not present:
        asked = ", ".join(names)
        msg = f"no Linear named {asked} in blocks {list(blocks)}. Leave lora_targets out to use the model's defaults."
        raise RecipeError(msg)
    return present


def check_targets(adapter: DenoiserAdapter, *, blocks: Sequence[int], targets: Sequence[str] | None) -> None:
    """Refuse a name that no block of the intact model has, and names of which these blocks have none.

    Blocks differ: of FLUX.1 only the first have projections for text, so a name may be absent from those that train.

    Raises:
        RecipeError: as of `lora_layers`.
    """
    for name in targets or ():
        lora_layers(adapter, blocks=range(adapter.block_count), targets=[name])
    lora_layers(adapter, blocks=blocks, targets=targets)


def start_values(parameters: Mapping[str, Tensor], *, rank: int, seed: int) -> dict[str, Tensor]:
    """What a fresh adapter's parameters are, float32 on the CPU, in the order of their names.

    Args:
        parameters: by name; only their shapes are used.
        rank: of each pair of matrices.
        seed: of the down-projections, Gaussian with deviation 1 / rank; up-projections are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=generator) / rank if "lora_A" in name else torch.zeros(parameter.shape)
        for name, parameter in sorted(parameters.items())
    }
