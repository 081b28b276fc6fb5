"""The exact gradient, by automatic differentiation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from pocketune.gradients.base import Estimate, Loss


class Backprop:
    """Backpropagation: one forward and one backward pass, and the activations between them in memory."""

    def __call__(self, loss: Loss, parameters: Mapping[str, nn.Parameter], *, step: int) -> Estimate:  # noqa: ARG002
        """The gradient of every parameter, which is left in its `grad`."""
        value = loss()
        torch.autograd.backward(value)
        return Estimate(value.item(), lambda name: parameters[name].grad)
