"""What layers share whose frozen weight is not in memory as it is: it lies on disk, or is packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


def absent(shape: torch.Size, *, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """What stands for the weight: of its shape, a single value in memory, and not a number if someone uses it."""
    value = torch.full((1,) * len(shape), torch.nan, dtype=dtype, device=device)
    return nn.Parameter(value.expand(shape), requires_grad=False)


class AbsentWeight(nn.Module):
    """A layer whose `weight` is `absent`, and stays so when the model is cast or moved, as diffusers casts autoencoders."""

    weight: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        shape = self.weight.shape
        self.weight = nn.Parameter(self.weight.detach()[(slice(1),) * len(shape)], requires_grad=False)
        applied: Any = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight = nn.Parameter(self.weight.detach().expand(shape), requires_grad=False)
        return applied  # type: ignore[no-any-return]


def convolution_back(layer: nn.Conv2d, gradient: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """The gradient of a convolution's input, of a layer of one group.

    Args:
        layer: its stride, padding and dilation count.
        gradient: of the output, (batch, out, height, width).
        weight: (out, in, *kernel), or some of its rows or columns.
        like: its shape, and on some devices its strides, are the result's; its values do not matter.
    """
    back, _, _ = torch.ops.aten.convolution_backward(
        gradient,
        like,
        weight,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        (0, 0),
        1,
        (True, False, False),
    )
    return back  # type: ignore[no-any-return]
