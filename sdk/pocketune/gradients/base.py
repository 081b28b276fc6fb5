"""The seam between the training loop and the ways to a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

Loss = Callable[[], Tensor]
"""Computes the loss of a step, a scalar, with the parameters as they are; equal every time it is called within the step."""


@dataclass(frozen=True)
class Estimate:
    """A loss and its gradient, which comes one parameter at a time so that not all of it need exist at once.

    Attributes:
        loss: at the parameters before the update.
        gradient: called with a parameter's name; shaped like the parameter, or None where the loss did not use it.
    """

    loss: float
    gradient: Callable[[str], Tensor | None]


class GradientEstimator(Protocol):
    """A way to the gradient. Parameters have the same bits afterwards as before, and the global random state is not touched."""

    def __call__(self, loss: Loss, parameters: Mapping[str, nn.Parameter], *, step: int) -> Estimate:
        """Estimate the gradient of `loss`.

        Args:
            loss: to call as often as needed.
            parameters: what trains, by name.
            step: number of the optimizer step, from which all random numbers follow.
        """
