"""Scales of rows and columns around ordinary layers, to be captured: what `pocketune.weights.layers` computes on packed ones.

    y = s_out * (W (s_in * x)) + bias

W is one frozen weight of the graph, stored packed and dequantized where it is used, forward and backward. Each graph takes the
scales of a single interval; which one, the host decides by the timestep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pocketune.errors import ModelError


class ScaledLinear(nn.Linear):
    """A Linear with scales. s_out: (out,); s_in: (in,), or None."""

    s_out: nn.Parameter
    s_in: nn.Parameter | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        """(.., in) to (.., out)."""
        scaled = input if self.s_in is None else input * self.s_in
        output = nn.functional.linear(scaled, self.weight) * self.s_out
        return output if self.bias is None else output + self.bias


class ScaledConv2d(nn.Conv2d):
    """A convolution with scales of its channels."""

    s_out: nn.Parameter
    s_in: nn.Parameter | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name for it
        """(batch, in, height, width) to (batch, out, height, width)."""
        scaled = input if self.s_in is None else input * self.s_in.view(-1, 1, 1)
        output = nn.functional.conv2d(scaled, self.weight, None, self.stride, self.padding, self.dilation)
        output = output * self.s_out.view(-1, 1, 1)
        return output if self.bias is None else output + self.bias.view(-1, 1, 1)


_SCALED: dict[type, type] = {nn.Linear: ScaledLinear, nn.Conv2d: ScaledConv2d}
_PLAIN = {scaled: plain for plain, scaled in _SCALED.items()}


def add_scales(model: nn.Module, names: Sequence[str], *, inputs: bool) -> dict[str, nn.Parameter]:
    """Freeze a model and give some of its layers scales of one.

    Args:
        model: changed in place; its weights may lie on the meta device, the scales do not.
        names: of Linears and convolutions.
        inputs: whether columns are scaled too.

    Returns:
        The scales, named "LAYER.s_out" and "LAYER.s_in", in the order of the layers.

    Raises:
        ModelError: a layer is of another kind.
    """
    model.requires_grad_(False)
    parameters: dict[str, nn.Parameter] = {}
    for name in names:
        layer = model.get_submodule(name)
        if type(layer) not in _SCALED:
            msg = f"{name} is a {type(layer).__name__}, whose scales cannot be exported. Please report this model."
            raise ModelError(msg)
        rows, columns = layer.get_parameter("weight").shape[:2]
        layer.__class__ = _SCALED[type(layer)]
        layer.s_out = nn.Parameter(torch.ones(rows))
        layer.register_parameter("s_in", nn.Parameter(torch.ones(columns)) if inputs else None)
        parameters |= {f"{name}.{kind}": value for kind in ("s_out", "s_in") if (value := getattr(layer, kind)) is not None}
    return parameters


def remove_scales(layer: nn.Module) -> None:
    """Make a layer ordinary again."""
    if type(layer) in _PLAIN:
        layer.__class__ = _PLAIN[type(layer)]
        del layer.s_out, layer.s_in
