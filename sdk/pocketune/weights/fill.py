"""From a model on the meta device to one that runs: small weights in memory, large ones there too or on disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from pocketune.errors import ModelError
from pocketune.weights.layers import PackedLayer
from pocketune.weights.store import WeightStore
from pocketune.weights.stream import Tiles, stream


@dataclass(frozen=True, kw_only=True)
class Residence:
    """Where frozen weights are while a model runs.

    Attributes:
        streamed: they stay on disk, and layers read them while they run; otherwise in memory.
        bits: 8 or 4: they are those of a packed copy; None: as the model's files have them.
    """

    streamed: bool = False
    bits: Literal[4, 8] | None = None


RESIDENT = Residence()

Windows = Mapping[str, Callable[[Tensor], Tensor]]
"""By name, what is taken of a stored tensor, such as the part of a table that is used."""


def fill(
    model: nn.Module,
    store: WeightStore,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tiles: Tiles | None,
    held: Collection[str] = (),
    stored_name: Callable[[str], str] = lambda name: name,
    windows: Windows | None = None,
    cast_buffers: bool = True,
    in_float32: Collection[str] = (),
) -> None:
    """Give a model on the meta device its weights, one at a time, with no copy of the whole in between.

    Args:
        model: changed in place.
        store: the weights.
        dtype: of floating-point parameters and of buffers that the store has.
        device: where they go.
        tiles: leave large weights on disk, and read them through this buffer; None: hold them.
        held: names of weights that the model has already.
        stored_name: the name that a parameter has in the store.
        windows: tensors that are wanted in part.
        cast_buffers: whether other floating-point buffers have `dtype` too; those of packed layers are the quantizer's own.
        in_float32: names of parameters that have this type, whatever `dtype` is.

    Raises:
        ModelError: a weight is missing, or of another shape than the configuration says.
    """
    replaced = {}
    if tiles:
        replaced = stream(model, store, dtype=dtype, device=device, tiles=tiles, stored_name=stored_name, in_float32=in_float32)
    wanted = [name for name in model.state_dict() if name not in replaced and name not in held]
    missing = [name for name in wanted if stored_name(name) not in store]
    if missing:
        msg = f"{len(missing)} weights are missing from the model's files, first {missing[0]}. Download the model again."
        raise ModelError(msg)
    for name in wanted:
        stored = stored_name(name)
        window = (windows or {}).get(name)
        kind = torch.float32 if name in in_float32 else dtype
        value = store.load(stored, dtype=kind) if window is None else window(store.view(stored)).to(kind)
        if window is not None:
            store.drop(stored)
        try:
            set_module_tensor_to_device(model, name, device, value=value, dtype=kind)
        except ValueError as error:
            msg = f"the weights are damaged or do not fit the configuration: {error}. Download the model again."
            raise ModelError(msg) from error
    packed = {path for path, module in model.named_modules() if isinstance(module, PackedLayer)}
    for name, buffer in model.named_buffers():
        kind = dtype if cast_buffers and name.rpartition(".")[0] not in packed else buffer.dtype
        if buffer.is_floating_point() and (buffer.dtype != kind or buffer.device != device):
            set_module_tensor_to_device(model, name, device, value=buffer, dtype=kind)
