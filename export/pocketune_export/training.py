"""The training step as functions of named tensors, ready to be captured: loss, backward and AdamW over a flat vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pocketune_export.capture import Function, with_weights
from pocketune_export.graphspec import TensorSpec
from pocketune_export.layout import Layout

BETA1, BETA2 = 0.9, 0.999
EPSILON = 1e-8

Named = Mapping[str, Tensor]

MEANINGS = {
    "loss": "loss before the update",
    "gradients": "of the loss with respect to parameters, not clipped",
    "new_parameters": "parameters after the step",
    "new_exp_avg": "first moments after the step",
    "new_exp_avg_sq": "second moments after the step",
}


def parameter_input(elements: int) -> TensorSpec:
    """The flat vector of `elements`."""
    return spec("parameters", (elements,), "what trains, flat")


def optimizer_inputs(elements: int, *, own_rates: bool = False) -> tuple[TensorSpec, ...]:
    """What AdamW takes besides gradients, for a flat vector of `elements`; own_rates: each has a learning rate of its own."""
    vectors = {
        "exp_avg": "AdamW's first moments, zeros at first",
        "exp_avg_sq": "AdamW's second moments, zeros at first",
    }
    scalars = {
        "weight_decay": "decoupled, times learning_rate",
        "epsilon": "added to the root of the second moment",
        "max_grad_norm": "the gradient is scaled down to this norm",
    }
    return (
        parameter_input(elements),
        *(TensorSpec(name=name, shape=(elements,), dtype="float32", meaning=text) for name, text in vectors.items()),
        spec("learning_rate", (elements,) if own_rates else (), "of this step"),
        TensorSpec(name="step", shape=(), dtype="int64", meaning="number of this step, 1 at first"),
        *(TensorSpec(name=name, shape=(), dtype="float32", meaning=text) for name, text in scalars.items()),
    )


def adamw(given: Named) -> dict[str, Tensor]:
    """Clip and update, as `clip_grad_norm_` and `torch.optim.AdamW` do.

    Paper: Loshchilov and Hutter 2019 (AdamW), algorithm 2.
    Differs: the norm is taken of the flat vector at once, not of the norms of its parts.

    Args:
        given: the inputs of `optimizer_inputs`, and "gradients".
    """
    gradients = given["gradients"]
    norm = (gradients * gradients).sum().sqrt()
    gradients = gradients * (given["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0)
    # In double, as PyTorch computes it on the host: 1 - 0.999 loses four digits in float32.
    step = given["step"].to(torch.float64)
    correction1 = 1.0 - torch.pow(BETA1, step)
    correction2 = 1.0 - torch.pow(BETA2, step)
    rate = (given["learning_rate"].to(torch.float64) / correction1).to(torch.float32)
    root = correction2.sqrt().to(torch.float32)
    decayed = given["parameters"] * (1.0 - given["learning_rate"] * given["weight_decay"])
    first = given["exp_avg"] + (gradients - given["exp_avg"]) * (1.0 - BETA1)
    second = given["exp_avg_sq"] * BETA2 + gradients * gradients * (1.0 - BETA2)
    update = first / (second.sqrt() / root + given["epsilon"])
    return {"new_parameters": decayed - rate * update, "new_exp_avg": first, "new_exp_avg_sq": second}


def train_step(model: nn.Module, layout: Layout, loss_of: Callable[[Named], Tensor]) -> Function:
    """One whole step: loss, its gradients by backpropagation, and the update.

    Args:
        model: holds the parameters.
        layout: where they lie in the flat vector.
        loss_of: the loss of the named batch inputs, computed with `model`.
    """

    def step(given: Named) -> dict[str, Tensor]:
        values = leaves(layout, given["parameters"])
        loss = with_weights(model, values, lambda: loss_of(given))
        gradients = torch.autograd.grad(loss, list(values.values()))
        flat = layout.join(dict(zip(values, gradients, strict=True)))
        return {"loss": loss, "gradients": flat, **adamw({**given, "gradients": flat})}

    return step


def loss_alone(model: nn.Module, layout: Layout, loss_of: Callable[[Named], Tensor]) -> Function:
    """The loss of a step, for gradients that need nothing else. Arguments as of `train_step`."""

    def loss(given: Named) -> dict[str, Tensor]:
        return {"loss": with_weights(model, layout.split(given["parameters"]), lambda: loss_of(given))}

    return loss


def leaves(layout: Layout, flat: Tensor) -> dict[str, Tensor]:
    """The parameters of a flat vector as tensors that gradients are taken of."""
    return {name: value.detach().requires_grad_() for name, value in layout.split(flat).items()}


def part_input(part: Layout) -> tuple[TensorSpec, ...]:
    """The flat vector of what trains in a graph of its own; nothing where nothing does."""
    return (spec("parameters", (part.elements,), "what trains here, flat"),) if part.slots else ()


def values_of(part: Layout, given: Named) -> dict[str, Tensor]:
    """The parameters in such a graph's inputs, by name."""
    return part.split(given["parameters"]) if part.slots else {}


def spec(name: str, shape: Sequence[int], meaning: str) -> TensorSpec:
    """A float32 input."""
    return TensorSpec(name=name, shape=tuple(shape), dtype="float32", meaning=meaning)
