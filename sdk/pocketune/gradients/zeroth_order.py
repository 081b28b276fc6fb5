"""Zeroth-order gradients: differences of losses along random directions, from forward passes alone.

A direction is never stored. It follows from the seed, the step and the parameter's number, and is made again whenever it is
needed, on every device alike. The parameters are never written either: a module sees perturbed values only while it runs, and
its own tensor is put back as it was. So the restore is exact bit for bit, which adding and subtracting a direction would not be
(floating-point sums round), and no copy of all parameters is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pocketune.errors import PlanError, RunError
from pocketune.sampling.directions import Directions, Probing

Loss = Callable[[], Tensor]
"""Computes the loss of a step, a scalar, with the parameters as they are; equal every time it is called within the step."""
Direction = Callable[[str], Tensor]
"""Of each parameter by name: standard normal numbers in its shape."""


@dataclass(frozen=True)
class Estimate:
    """A loss and its gradient, which comes one parameter at a time so that not all of it need exist at once.

    Attributes:
        loss: at the parameters before the update.
        gradient: called with a parameter's name; shaped like the parameter, or None where the loss did not use it.
    """

    loss: float
    gradient: Callable[[str], Tensor | None]


class ZerothOrder:
    """The mean over random directions z of the slope of the loss along z, times z.

    Paper: two-sided is SPSA (Spall 1992) as in MeZO (Malladi et al. 2023, arXiv 2305.17333, definition 1 and algorithm 1):
    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps) z. One-sided with n queries is ZOODiP's (arXiv 2503.14868):
    g = 1/n sum_i (L(theta + eps z_i) - L(theta)) / eps z_i.
    Differs: MeZO adds and subtracts eps z in place, which restores parameters up to rounding; here the restore is exact.
    """

    def __init__(self, model: nn.Module, *, seed: int, queries: int = 1, epsilon: float = 1e-3, two_sided: bool = True) -> None:
        """Set how directions are drawn and walked.

        Args:
            model: holds the parameters; each must be used in the forward of the very module that owns it.
            seed: of the directions.
            queries: directions a step.
            epsilon: how far to go along a direction.
            two_sided: whether to go both ways, two forward passes a query, or one way, one a query and one a step.
        """
        self._model = model
        self._seed = seed
        self._probing = Probing(queries=queries, epsilon=epsilon, two_sided=two_sided)

    @torch.no_grad()
    def __call__(self, loss: Loss, parameters: Mapping[str, nn.Parameter], *, step: int) -> Estimate:
        """Estimate the gradient; its loss is the mean over both sides, or the one at the parameters themselves.

        Raises:
            PlanError: the loss used none of the parameters.
            RunError: a loss is no number, and so no slope is.
        """
        directions = [self.direction(parameters, step=step, query=query) for query in range(self._probing.queries)]
        used: set[str] = set()
        losses = []
        for query, scale in self._probing.points:
            if not scale:
                losses.append(loss().item())
                continue
            with perturbed(self._model, parameters, directions[query], scale=scale) as met:
                losses.append(loss().item())
            used.update(met)
        if not all(map(math.isfinite, losses)):
            msg = (
                f"the losses along directions became {losses} at step {step + 1}. "
                "Try a lower zo_learning_rate or zo_epsilon, or dtype float32, in a new run."
            )
            raise RunError(msg)
        value, slopes = self._probing.slopes(losses)
        if not used:
            msg = "the loss used none of the trained parameters, so it has no slope. Train blocks that are not skipped."
            raise PlanError(msg)

        @torch.no_grad()
        def gradient(name: str) -> Tensor | None:
            if name not in used:
                return None
            total = torch.zeros_like(parameters[name])
            for direction, slope in zip(directions, slopes, strict=True):
                total.add_(direction(name), alpha=slope / len(slopes))
            return total

        return Estimate(value, gradient)

    def direction(self, parameters: Mapping[str, nn.Parameter], *, step: int, query: int) -> Direction:
        """The direction of a query of a step, as a function of the parameter's name."""
        directions = Directions(parameters, seed=self._seed, queries=self._probing.queries)

        def along(name: str) -> Tensor:
            like = parameters[name]
            values = directions.along(name, tuple(like.shape), step=step, query=query)
            return torch.from_numpy(values).to(device=like.device, dtype=like.dtype)

        return along


@contextmanager
def perturbed(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], direction: Direction, *, scale: float
) -> Iterator[set[str]]:
    """Let every module that owns some of the parameters see them moved by scale times the direction, while it runs.

    Args:
        model: whose modules are meant.
        parameters: what moves, by name.
        direction: where to.
        scale: how far.

    Yields:
        The names of the parameters that were met, filled as modules run.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    met: set[str] = set()
    originals: dict[str, Tensor] = {}

    def enter(module: nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            name = names.get(id(parameter))
            if name is not None:
                met.add(name)
                originals[name] = parameter.data
                parameter.data = parameter.data.add(direction(name), alpha=scale)

    def leave(module: nn.Module, _: object, __: object) -> None:
        for parameter in module.parameters(recurse=False):
            name = names.get(id(parameter))
            if name in originals:
                parameter.data = originals[name]
                del originals[name]  # now, so that Ctrl-C finds it in place or still there

    handles = []
    for module in model.modules():
        if any(id(parameter) in names for parameter in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield met
    finally:
        for handle in handles:
            handle.remove()
        for name, original in originals.items():  # a pre-hook that failed has no module that leaves
            parameters[name].data = original
