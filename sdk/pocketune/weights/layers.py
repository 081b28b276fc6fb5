"""Layers whose frozen weight is held packed, with trainable scales of its rows and columns around it.

    y = s_out * base * ((C - z) (s_in * x)) + bias

C are the codes, z and base the zero and scale that the quantizer gave each row. The weight is unpacked a few rows at a time,
in forward and again in backward, so that no float copy of it lives between the two, and none of the whole of it ever does.
Backward keeps the layer's input and nothing else: the product that the gradient of s_out needs is computed again.

Forward multiplies with s_out base (C - z) s_in, which is rounded to the type of the input once. In half precision an input or
output times a scale near 1 would be rounded to what it was, and a small update of the scale would change nothing; and products
with codes, which reach 255, overflow in float16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pocketune.errors import PlanError
from pocketune.weights.frozen import AbsentWeight, absent, convolution_back
from pocketune.weights.quant import Packed, unpack

TILE_VALUES = 2**21
"""Weights unpacked at a time, some 8 MB in float32. For other types half as many: for a moment both copies exist."""


@dataclass
class Selected:
    """Which scales the layers of a model use, set by the host before each pass: one index for each sample of the batch."""

    rows: tuple[int, ...] = (0,)


class Scales(nn.Module):
    """One pair of scales. s_out: (out,); s_in: (in,), or None where only rows are scaled. Ones change nothing."""

    def __init__(self, rows: int, columns: int | None, *, device: torch.device) -> None:
        """Begin with ones; columns None: no s_in."""
        super().__init__()
        self.s_out = nn.Parameter(torch.ones(rows, device=device))
        self.s_in = None if columns is None else nn.Parameter(torch.ones(columns, device=device))

    def forward(self, inputs: Tensor, layer: PackedLayer) -> Tensor:
        """The layer's product with these scales, without bias."""
        output: Tensor = _Product.apply(inputs, self.s_in, self.s_out, layer)  # type: ignore[no-untyped-call]
        return output


class PackedLayer(AbsentWeight, ABC):
    """What packed Linears and convolutions share. `bits`: of a code; `scales`: those to choose from, if any train."""

    codes: Tensor
    zeros: Tensor
    base: Tensor
    bits: int
    columns: int
    kernel: tuple[int, ...]
    scales: nn.ModuleList
    selected: Selected

    def hold(self, packed: Packed, *, columns: int, kernel: Sequence[int]) -> None:
        """Take the packed weight, one group to a row; columns: input channels; kernel: sides of a convolution's."""
        self.register_buffer("codes", packed.codes, persistent=False)
        self.register_buffer("zeros", packed.zeros, persistent=False)
        self.register_buffer("base", packed.scales[:, 0].clone(), persistent=False)
        self.bits, self.columns, self.kernel = packed.bits, columns, tuple(kernel)
        self.scales = nn.ModuleList()
        self.selected = Selected()

    @property
    def channels(self) -> int:
        """Where an input's channels are."""
        return -1 if isinstance(self, nn.Linear) else 1

    def tiles(self, like: Tensor, *, s_out: Tensor | None = None, s_in: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The weight, within scales if given, by runs of rows: the run, and (rows, in, *kernel) in the type of `like`."""
        rows, width = self.codes.shape[0], self.codes.shape[1] * (8 // self.bits)
        step = max(1, TILE_VALUES // width // (1 if like.dtype == torch.float32 else 2))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield part, self._tile(part, width, s_out, s_in).to(like.dtype)

    def _tile(self, part: slice, width: int, s_out: Tensor | None, s_in: Tensor | None) -> Tensor:
        codes, base = self.codes[part], self.base[part] if s_out is None else self.base[part] * s_out[part]
        packed = Packed(codes=codes, scales=base[:, None], zeros=self.zeros[part], bits=self.bits)
        tile = unpack(packed, torch.empty(codes.shape[0], width, device=codes.device)).view(-1, self.columns, *self.kernel)
        return tile if s_in is None else tile.mul_(s_in.view(-1, *(1,) * len(self.kernel)))

    @torch.no_grad()
    def merged(self, scales: Scales | None) -> Tensor:
        """The float32 weight that the layer multiplies with, (out, in, *kernel)."""
        s_out, s_in = (None, None) if scales is None else (scales.s_out, scales.s_in)
        return torch.cat([tile for _, tile in self.tiles(self.base, s_out=s_out, s_in=s_in)])

    @abstractmethod
    def multiply(self, inputs: Tensor, tile: Tensor) -> Tensor:
        """The product of an input with some rows."""

    @abstractmethod
    def multiply_back(self, gradient: Tensor, tile: Tensor, shape: Sequence[int]) -> Tensor:
        """The share of the input's gradient that some rows give; shape: of the input."""

    def product(self, inputs: Tensor) -> Tensor:
        """The layer's output without bias, with the scales that are selected for each sample.

        Raises:
            PlanError: the batch has another size than was selected for.
        """
        if not self.scales:
            output: Tensor = _Product.apply(inputs, None, None, self)  # type: ignore[no-untyped-call]
            return output
        rows = self.selected.rows
        if len(set(rows)) == 1:
            return self.scales[rows[0]](inputs, self)  # type: ignore[no-any-return]
        if len(rows) != inputs.shape[0]:
            msg = f"scales were selected for {len(rows)} samples, a layer got {inputs.shape[0]}. Select them for each batch."
            raise PlanError(msg)
        return torch.cat([self.scales[row](inputs[n : n + 1], self) for n, row in enumerate(rows)])


class PackedLinear(PackedLayer, nn.Linear):
    """A frozen `nn.Linear` in few bits."""

    def __init__(self, like: nn.Linear, packed: Packed, *, dtype: torch.dtype) -> None:
        """Stand in for a Linear, with its bias; dtype: what others are told that the weight has."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.weight, self.bias = absent(like.weight.shape, dtype=dtype, device=packed.codes.device), like.bias
        self.hold(packed, columns=like.in_features, kernel=())

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        """(.., in) to (.., out)."""
        output = self.product(input)
        return output if self.bias is None else output.add_(self.bias)  # in place: the product keeps no output for backward

    def multiply(self, inputs: Tensor, tile: Tensor) -> Tensor:
        """(.., in) with (rows, in) to (.., rows)."""
        return nn.functional.linear(inputs, tile)

    def multiply_back(self, gradient: Tensor, tile: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: ARG002
        """(.., rows) with (rows, in) to (.., in)."""
        return gradient @ tile


class PackedConv2d(PackedLayer, nn.Conv2d):
    """A frozen `nn.Conv2d` of one group, zero-padded, in few bits."""

    def __init__(self, like: nn.Conv2d, packed: Packed, *, dtype: torch.dtype) -> None:
        """Stand in for a convolution; arguments as of `PackedLinear`."""
        nn.Module.__init__(self)
        for name in like.__constants__:
            setattr(self, name, getattr(like, name))
        self.weight, self.bias = absent(like.weight.shape, dtype=dtype, device=packed.codes.device), like.bias
        self.hold(packed, columns=like.in_channels, kernel=like.kernel_size)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name for it
        """(batch, in, height, width) to (batch, out, height, width)."""
        output = self.product(input)
        return output if self.bias is None else output.add_(self.bias.view(-1, 1, 1))

    def multiply(self, inputs: Tensor, tile: Tensor) -> Tensor:
        """Some channels of the convolution."""
        return nn.functional.conv2d(inputs, tile, None, self.stride, self.padding, self.dilation)

    def multiply_back(self, gradient: Tensor, tile: Tensor, shape: Sequence[int]) -> Tensor:
        """The convolution's transpose."""
        return convolution_back(self, gradient, tile, gradient.new_empty(1).expand(shape))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, s_in: Tensor | None, s_out: Tensor | None, layer: PackedLayer) -> Tensor:
        ctx.layer, ctx.shape = layer, inputs.shape
        ctx.save_for_backward(None if s_out is None else inputs, s_in, s_out)
        parts = [layer.multiply(inputs, tile) for _, tile in layer.tiles(inputs, s_out=s_out, s_in=s_in)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=layer.channels)

    @staticmethod
    @once_differentiable  # type: ignore[misc, unused-ignore]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        layer: PackedLayer = ctx.layer
        inputs, s_in, s_out = ctx.saved_tensors
        gradient, channels = gradients[0], layer.channels
        wants_inputs, wants_in, wants_out, _ = ctx.needs_input_grad
        scaled = inputs if s_in is None else inputs * _along(s_in, layer, inputs)
        back, s_out_parts = None, []
        for part, tile in layer.tiles(gradient):
            here = gradient[..., part] if channels == -1 else gradient[:, part]
            if wants_out:
                s_out_parts.append(_sum(layer.multiply(scaled, tile).mul_(here), channels))
            if wants_inputs or wants_in:
                weighted = here if s_out is None else here * _along(s_out[part], layer, here)
                share = layer.multiply_back(weighted, tile, ctx.shape)
                back = share if back is None else back.add_(share)
        s_in_gradient = _sum(back * inputs, channels) if wants_in and back is not None else None
        if wants_inputs and s_in is not None and back is not None:
            back = back * _along(s_in, layer, back)
        return back if wants_inputs else None, s_in_gradient, torch.cat(s_out_parts) if wants_out else None, None


def _along(scales: Tensor, layer: PackedLayer, like: Tensor) -> Tensor:
    """Scales shaped to multiply the channels of a tensor, in its type."""
    return scales.to(like.dtype) if layer.channels == -1 else scales.to(like.dtype).view(-1, 1, 1)


def _sum(values: Tensor, channels: int) -> Tensor:
    """The float32 sum over all but the channels."""
    return values.float().flatten(0, -2).sum(0) if channels == -1 else values.float().sum((0, 2, 3))
