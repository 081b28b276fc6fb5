"""Passes over captured graphs, for every backend. Each states what it needs and ensures; none changes what is computed.

They change graphs in place; a graph's code is out of date until it is recompiled.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pocketune.errors import ModelError

FOLD_LIMIT = 2**22
"""Largest constant, in elements, that folding makes."""

aten = torch.ops.aten
_ALIASES = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
_LIKE = {aten.ones_like.default: 1.0, aten.zeros_like.default: 0.0}
_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    *_ALIASES,
}
_CUTS = _VIEWS | {aten.clone.default, aten._unsafe_view.default}


def prepare(module: GraphModule, weights: Mapping[str, Node]) -> tuple[dict[str, Node], dict[str, Derived]]:
    """Run all passes of this module, in the order in which they help each other.

    Args:
        module: the graph, changed in place; its code is compiled anew.
        weights: the placeholder of each weight.

    Returns:
        The placeholder of each weight that is left, in order, and how to make those that are cut out of others.
    """
    replace_in_place(module)
    remove_identities(module)
    fold_constants(module)
    remove_identities(module)
    left, derived = fold_weight_views(module, weights)
    module.recompile()
    return left, derived


def replace_in_place(module: GraphModule) -> None:
    """Turn `x.op_(y)` into `op(x, y)` whose result later users of x see.

    Needs: no view of x is used after the operation. Ensures: no operator changes an input.

    Raises:
        ModelError: a view of x is used later.
    """
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not getattr(node.target, "_schema", None) or not node.target._schema.is_mutable:
            continue
        changed = node.args[0]
        later = [user for user in changed.users if order.get(user, -1) > order[node]]
        views = [view for view in _views_of(changed) if any(order.get(user, -1) > order[node] for user in view.users)]
        if views or _base_of(changed) is not changed:
            msg = f"the model changes a tensor in place ({node.target}) that a view still shows. Please report this model."
            raise ModelError(msg)
        packet, overload = node.target.overloadpacket, node.target._overloadname
        node.target = getattr(getattr(aten, packet.__name__.rstrip("_")), overload)
        for user in later:
            user.replace_input_with(changed, node)


def remove_identities(module: GraphModule) -> None:
    """Remove operators that return their input, and pairs of transposes.

    Needs: no operator changes an input. Ensures: no alias, no multiplication by exactly 1, no reshape or expansion to the same
    shape, no t(t(x)); every result is bit for bit what it was.
    """
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        same = _identity_source(node)
        if same is not None:
            node.replace_all_uses_with(same)
    module.graph.eliminate_dead_code()


def fold_constants(module: GraphModule) -> None:
    """Compute what depends on no input, and keep the results as buffers of the module.

    Needs: no operator changes an input. Ensures: every operator depends on an input, unless its result is larger than
    `FOLD_LIMIT`; constants are `get_attr` nodes named "constant_N".
    """
    values: dict[Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            values[node] = getattr(module, node.target)
        elif node.op == "call_function":
            if node.target in _LIKE:
                values[node] = torch.full(node.meta["val"].shape, _LIKE[node.target], dtype=node.meta["val"].dtype)
            elif node.target is aten.full_like.default:
                values[node] = torch.full(node.meta["val"].shape, node.args[1], dtype=node.meta["val"].dtype)
            elif all(source in values for source in node.all_input_nodes) and _elements(node) <= FOLD_LIMIT:
                values[node] = _run(node, values)
    number = 0
    for node, value in values.items():
        outside = [user for user in node.users if user not in values]
        if not isinstance(value, Tensor) or not outside:
            continue
        name = f"constant_{number}"
        number += 1
        module.register_buffer(name, value.clone())
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(name)
        constant.meta = dict(node.meta)
        for user in outside:
            user.replace_input_with(node, constant)
    module.graph.eliminate_dead_code()


def fold_weight_views(module: GraphModule, weights: Mapping[str, Node]) -> tuple[dict[str, Node], dict[str, Derived]]:
    """Replace a small part that is cut out of a weight by a weight of its own, as the crop of a large position table.

    Needs: constants are folded. Ensures: where a graph uses a weight only through views with fewer elements than the weight,
    the views are weights of their own, named "WEIGHT.partN".
    """
    left: dict[str, Node] = {}
    derived: dict[str, Derived] = {}
    for name, node in weights.items():
        ends = _view_ends(node)
        if any(end is node or _elements(end) >= _elements(node) for end in ends):
            left[name] = node
            continue
        for number, end in enumerate(ends):
            part = f"{name}.part{number}"
            derived[part] = Derived(name, _chain(node, end))
            with module.graph.inserting_before(node):
                left[part] = module.graph.placeholder(part.replace(".", "_"))
            left[part].meta = dict(end.meta)
            end.replace_all_uses_with(left[part])
    module.graph.eliminate_dead_code()
    for name, node in weights.items():
        if name not in left:
            module.graph.erase_node(node)
    return left, derived


class Derived:
    """A weight that is a view of another one."""

    def __init__(self, base: str, steps: Sequence[Callable[[Tensor], Tensor]]) -> None:
        """Keep the other weight's name and the views that lead here."""
        self.base = base
        self._steps = steps

    def make(self, weight: Tensor) -> Tensor:
        """Cut this part out of the whole weight."""
        for step in self._steps:
            weight = step(weight)
        return weight.contiguous()


def _identity_source(node: Node) -> Node | None:
    source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if source is None or "val" not in source.meta or not isinstance(node.meta.get("val"), Tensor):
        return None
    before, after = source.meta["val"], node.meta["val"]
    if node.target in _ALIASES:
        return source
    if node.target in {aten.mul.Scalar, aten.mul.Tensor, aten.div.Scalar, aten.div.Tensor} and node.args[1] == 1.0:
        return source if not isinstance(node.args[1], Node) and before.dtype == after.dtype else None
    if node.target in {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}:
        return source if before.shape == after.shape else None
    if node.target is aten._to_copy.default:
        return source if before.dtype == after.dtype else None
    if node.target is aten.slice.Tensor:
        return source if before.shape == after.shape and (len(node.args) < 5 or node.args[4] == 1) else None
    if node.target is aten.t.default and source.target is aten.t.default:
        return source.args[0]  # type: ignore[return-value]
    return None


def _elements(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def _run(node: Node, values: dict[Node, Any]) -> Any:
    arguments = torch.fx.node.map_arg(node.args, lambda source: values[source])
    keywords = torch.fx.node.map_arg(node.kwargs, lambda source: values[source])
    if node.target is operator.getitem:
        return operator.getitem(*arguments)
    return node.target(*arguments, **keywords)  # type: ignore[operator]


def _views_of(node: Node) -> list[Node]:
    direct = [user for user in node.users if user.target in _VIEWS]
    return direct + [deeper for view in direct for deeper in _views_of(view)]


def _base_of(node: Node) -> Node:
    while node.op == "call_function" and node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _view_ends(node: Node) -> list[Node]:
    """The last views on every way from a weight, or the node itself where it is used by anything else."""
    if not node.users or any(user.target not in _CUTS for user in node.users):
        return [node]
    return [end for user in node.users for end in _view_ends(user)]


def _chain(start: Node, end: Node) -> list[Callable[[Tensor], Tensor]]:
    steps: list[Callable[[Tensor], Tensor]] = []
    node = end
    while node is not start:
        steps.insert(0, partial(_apply, node))
        node = node.args[0]  # type: ignore[assignment]
    return steps


def _apply(node: Node, tensor: Tensor) -> Tensor:
    result: Tensor = node.target(tensor, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return result
