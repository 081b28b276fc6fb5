"""Trace a function of tensors once into a plain graph of ATen operators, without data: the source of every backend.

Nothing here belongs to one backend. The graph's inputs are the caller's inputs, then the frozen weights by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from pocketune.errors import ModelError
from pocketune_export.graphspec import Dtype, TensorSpec
from pocketune_export.passes import Derived, prepare

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "int64": torch.int64}
NAMES: dict[torch.dtype, Dtype] = {torch.float32: "float32", torch.int64: "int64"}

T = TypeVar("T")
Function = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Capture:
    """A traced function.

    Attributes:
        module: a graph whose placeholders are the inputs in order, then the weights in order, and whose output is a tuple.
        inputs: what the caller gives.
        outputs: what it gets.
        weights: names of the frozen weights.
        derived: how to make those weights that are cut out of another.
    """

    module: GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[str, ...]
    derived: Mapping[str, Derived]

    @property
    def weight_nodes(self) -> dict[str, Node]:
        """The placeholder of each weight."""
        placeholders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        return dict(zip(self.weights, placeholders[len(self.inputs) :], strict=True))


def capture(model: nn.Module, function: Function, inputs: Sequence[TensorSpec], meanings: Mapping[str, str]) -> Capture:
    """Trace `function`, with every frozen parameter and buffer of `model` as an input of the graph.

    The trace is made of shapes alone: weights may lie on the meta device, and no memory is used for data. Attention is traced
    as plain arithmetic, whose backward every runtime has; then the passes of `passes.py` are run. Inputs and weights that the
    function does not use are left out.

    Args:
        model: whose weights the function uses; those that require a gradient must be bound by the function itself.
        function: from named inputs to named outputs; it may take gradients with `torch.autograd.grad`.
        inputs: names, shapes and dtypes.
        meanings: of every output that the function may give.

    Raises:
        ModelError: the result depends on the data in a way that no static graph can express.
    """
    weights = frozen_weights(model)
    given_names = [spec.name for spec in inputs]
    result_names: list[str] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(given_names, tensors, strict=False))
        bound = dict(zip(weights, tensors[len(given) :], strict=True))
        results = with_weights(model, bound, lambda: function(given))
        result_names[:] = results
        return tuple(results.values())

    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        # Each example is a tensor of its own: two inputs that share one are silently taken for the same.
        examples = [torch.empty(spec.shape, dtype=DTYPES[spec.dtype]) for spec in inputs]
        examples += [torch.empty(weight.shape, dtype=_float32_if_floating(weight)) for weight in weights.values()]
        try:
            module = make_fx(flat)(*examples)
        except (RuntimeError, TypeError) as error:
            msg = (
                f"the model cannot be captured as a static graph: {str(error).splitlines()[0][:200]}. Please report this model."
            )
            raise ModelError(msg) from error
    used = _drop_unused(module, (*given_names, *weights))
    results = next(node for node in module.graph.nodes if node.op == "output").args[0]
    outputs = tuple(
        TensorSpec(name=name, shape=tuple(node.meta["val"].shape), dtype=NAMES[node.meta["val"].dtype], meaning=meanings[name])
        for name, node in zip(result_names, results, strict=True)
    )
    kept = tuple(spec for spec in inputs if spec.name in used)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"][len(kept) :]
    nodes = dict(zip((name for name in weights if name in used), placeholders, strict=True))
    left, derived = prepare(module, nodes)
    return Capture(module, kept, outputs, tuple(left), derived)


def with_weights(model: nn.Module, weights: Mapping[str, Tensor], function: Callable[[], T]) -> T:
    """Call a function while `model` has other parameters or buffers, by name; afterwards it has its own again."""
    bound = {f"model.{name}": tensor for name, tensor in weights.items()}
    result: T = functional_call(_Holder(model), bound, (function,))
    return result


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that do not train, and buffers, by name; a tied weight is there once."""
    frozen: dict[str, Tensor] = {name: tensor for name, tensor in model.named_parameters() if not tensor.requires_grad}
    return frozen | dict(model.named_buffers())


class _Holder(nn.Module):
    """Gives `functional_call` a module whose forward is any function."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


def _float32_if_floating(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.is_floating_point() else weight.dtype


def _drop_unused(module: GraphModule, names: tuple[str, ...]) -> set[str]:
    """Remove dead nodes, then placeholders without users; the names that stay."""
    module.graph.eliminate_dead_code()
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    used = set()
    for name, node in zip(names, placeholders, strict=True):
        if node.users:
            used.add(name)
        else:
            module.graph.erase_node(node)
    return used
