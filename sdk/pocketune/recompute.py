"""Activations that backward needs, made again instead of kept, and what is kept moved to disk if asked for.

Paper: Chen et al. 2016 (Training deep nets with sublinear memory cost), section 4: keep what enters each block, and run it
again in backward.
Differs: what enters a block, and what it saves while it runs again, may lie in a scratch file; and a block's gradients can be
handed on as soon as they are known, so that the optimizer's step is taken inside backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from pocketune.scratch import Scratch, Stored

OnGradients = Callable[[Sequence[nn.Parameter]], None]
"""Called in backward, once for each unit, with parameters whose `grad` is complete."""


def recompute(module: nn.Module, *, scratch: Scratch | None = None, on_gradients: OnGradients | None = None) -> None:
    """Make a module run again in backward instead of keeping what it computed; without gradients it runs as before.

    The module must be a function of its tensors: no random numbers, no state. Results and gradients are the same bit for bit.

    Args:
        module: changed in place.
        scratch: where activations go meanwhile; default: they stay in memory.
        on_gradients: told which parameters have their gradients.
    """
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        places = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        needed = bool(parameters) or any(leaves[number].requires_grad for number in places)
        if not needed or not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        unit = _Unit(inner, leaves, structure, places, scratch, on_gradients, len(parameters))
        outputs = _Recompute.apply(unit, *(leaves[number] for number in places), *parameters)  # type: ignore[no-untyped-call]
        return tree_unflatten(list(outputs), unit.output_structure)

    module.forward = forward


class _Unit:
    """One call of a module: everything about it but the tensors that enter."""

    def __init__(
        self,
        run: Callable[..., Any],
        leaves: Sequence[Any],
        structure: Any,
        places: Sequence[int],
        scratch: Scratch | None,
        on_gradients: OnGradients | None,
        parameter_count: int,
    ) -> None:
        self._run, self._structure, self._places = run, structure, places
        self._others = [None if number in set(places) else leaf for number, leaf in enumerate(leaves)]
        self.scratch, self.on_gradients, self.parameter_count = scratch, on_gradients, parameter_count
        self.output_structure: Any = None

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        leaves = list(self._others)
        for number, tensor in zip(self._places, tensors, strict=True):
            leaves[number] = tensor
        args, kwargs = tree_unflatten(leaves, self._structure)
        outputs, self.output_structure = tree_flatten(self._run(*args, **kwargs))
        return tuple(outputs)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit: _Unit, *tensors: Tensor) -> tuple[Any, ...]:
        inputs = tensors[: len(tensors) - unit.parameter_count]
        outputs = unit(inputs)
        ctx.set_materialize_grads(False)  # an output that nobody uses gives its parameters no gradient, rather than zeros
        ctx.unit = unit
        ctx.parameters = tensors[len(inputs) :]
        # Tensors that need no gradient, such as the embedded timestep, are shared by all units and stay where they are.
        ctx.inputs = [
            unit.scratch.put(one)
            if unit.scratch is not None and ctx.needs_input_grad[1 + number] and unit.scratch.takes(one)
            else one
            for number, one in enumerate(inputs)
        ]
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        unit: _Unit = ctx.unit
        stored, ctx.inputs = ctx.inputs, None
        inputs = [
            (one.take() if isinstance(one, Stored) else one).detach().requires_grad_(ctx.needs_input_grad[1 + number])
            for number, one in enumerate(stored)
        ]
        del stored
        with torch.enable_grad(), saved_to(unit.scratch):
            outputs = unit(inputs)
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and isinstance(output, Tensor) and output.requires_grad
        ]
        del outputs
        wanted = [one for one in (*inputs, *ctx.parameters) if one.requires_grad]
        found = torch.autograd.grad(
            [output for output, _ in pairs], wanted, [gradient for _, gradient in pairs], allow_unused=True
        )
        of = {id(one): gradient for one, gradient in zip(wanted, found, strict=True)}
        of_inputs = [of.get(id(one)) for one in inputs]
        of_parameters = [of.get(id(parameter)) for parameter in ctx.parameters]
        if unit.on_gradients is None:
            return None, *of_inputs, *of_parameters
        for parameter, gradient in zip(ctx.parameters, of_parameters, strict=True):
            parameter.grad = gradient
        unit.on_gradients(ctx.parameters)
        return None, *of_inputs, *(None for _ in of_parameters)


@contextmanager
def saved_to(scratch: Scratch | None) -> Iterator[None]:
    """Move what autograd saves meanwhile to a scratch file, if there is one; leaves, such as parameters, stay."""
    if scratch is None:
        yield
        return

    def pack(tensor: Tensor) -> Tensor | Stored:
        return tensor if tensor.is_leaf or not scratch.takes(tensor) else scratch.put(tensor)

    def unpack(kept: Tensor | Stored) -> Tensor:
        return kept.take() if isinstance(kept, Stored) else kept

    with saved_tensors_hooks(pack, unpack):
        yield
