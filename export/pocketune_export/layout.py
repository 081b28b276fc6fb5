"""How what trains lies in the one flat vector that exported graphs take and return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pocketune.errors import PlanError
from pocketune_export.capture import frozen_weights, with_weights


@dataclass(frozen=True)
class Slot:
    """One parameter's place: elements [start, stop) of the flat vector, row-major."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """One past its last element."""
        count = 1
        for side in self.shape:
            count *= side
        return self.start + count


@dataclass(frozen=True)
class Layout:
    """The parameters that train, those of a block together, without gaps."""

    slots: tuple[Slot, ...]

    @property
    def elements(self) -> int:
        """Length of the flat vector."""
        return self.slots[-1].stop if self.slots else 0

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The flat vector's parameters by name, as views."""
        return {slot.name: flat[slot.start : slot.stop].view(slot.shape) for slot in self.slots}

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """A flat vector of values by name."""
        return torch.cat([values[slot.name].reshape(-1) for slot in self.slots])

    def beside(self, prefixes: Sequence[str], *, before: bool) -> tuple[Layout, int, int]:
        """The layout of what lies before, or behind, all parameters with some prefixes; results as of `part`."""
        inside = [place for place, slot in enumerate(self.slots) if slot.name.startswith(tuple(prefixes))]
        if not inside:
            return Layout(()), 0, 0
        return _moved(self.slots[: inside[0]] if before else self.slots[inside[-1] + 1 :])

    def part(self, prefixes: Sequence[str]) -> tuple[Layout, int, int]:
        """The layout of one block alone, starting at 0, and its slice [start, stop) of the whole vector.

        Args:
            prefixes: of the block's parameters.

        Raises:
            PlanError: the block's parameters are not neighbours.
        """
        chosen = [slot for slot in self.slots if slot.name.startswith(tuple(prefixes))]
        if not chosen:
            return Layout(()), 0, 0
        start, stop = chosen[0].start, chosen[-1].stop
        if sum(slot.stop - slot.start for slot in chosen) != stop - start:
            msg = f"the parameters of {', '.join(prefixes)} are not neighbours. Please report this model."
            raise PlanError(msg)
        return _moved(chosen)


def _moved(slots: Sequence[Slot]) -> tuple[Layout, int, int]:
    """A layout of neighbours alone, starting at 0, and their slice [start, stop) of the whole vector."""
    if not slots:
        return Layout(()), 0, 0
    start = slots[0].start
    return Layout(tuple(Slot(slot.name, slot.shape, slot.start - start) for slot in slots)), start, slots[-1].stop


def layout_of(parameters: Mapping[str, Tensor], without: Sequence[str] = ()) -> Layout:
    """Lay out parameters one after the other, leaving some out."""
    slots: list[Slot] = []
    for name, parameter in parameters.items():
        if name not in without:
            slots.append(Slot(name, tuple(parameter.shape), slots[-1].stop if slots else 0))
    return Layout(tuple(slots))


def without_use(model: nn.Module, parameters: Mapping[str, Tensor], loss: Callable[[], Tensor]) -> tuple[str, ...]:
    """Names of the parameters whose modules a loss never runs, found on shapes alone: zeroth-order steps do not move them.

    Arguments as of `without_gradient`.
    """
    ran: set[str] = set()
    handles = [
        model.get_submodule(owner).register_forward_pre_hook(lambda *_, owner=owner: ran.add(owner))
        for owner in {name.rpartition(".")[0] for name in parameters}
    ]
    try:
        with FakeTensorMode(), torch.no_grad():
            held = {**frozen_weights(model), **parameters}
            fakes = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in held.items()}
            with_weights(model, fakes, loss)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(name for name in parameters if name.rpartition(".")[0] not in ran)


def without_gradient(model: nn.Module, parameters: Mapping[str, Tensor], loss: Callable[[], Tensor]) -> tuple[str, ...]:
    """Names of the parameters that a loss does not depend on, found on shapes alone.

    PyTorch's AdamW leaves them as they are, weight decay included; so they have no place in the flat vector.

    Args:
        model: may lie on the meta device.
        parameters: what trains.
        loss: computes the loss from tensors that it makes itself; called where tensors hold no data.
    """
    with FakeTensorMode():
        leaves = {name: torch.empty(value.shape, requires_grad=True) for name, value in parameters.items()}
        frozen = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in frozen_weights(model).items()}
        value = with_weights(model, frozen | leaves, loss)
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return tuple(name for name, gradient in zip(leaves, gradients, strict=True) if gradient is None)
