"""Cut a captured graph into parts that run one after the other, so that only one part's weights are needed at a time."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pocketune_edge.agreement import CARRIED
from pocketune_export.capture import NAMES, Capture
from pocketune_export.graphspec import TensorSpec

PIECE_BYTES = 2**27
"""Of the weights of a part of a block, as float32; what a device maps at once when it runs block by block."""


def cut(whole: Capture) -> tuple[Capture, ...]:
    """Cut before every layer: where weights of a new number, as in "encoder.layers.3.", are used for the first time.

    Each part takes inputs of the whole, and values that earlier parts give; together the parts give the outputs of the whole,
    bit for bit. Where a value that would have to be handed over is no float32 or int64 tensor, there is no cut.
    """
    nodes = [node for node in whole.module.graph.nodes if node.op == "call_function"]
    starts = _layer_starts(nodes, {node: name for name, node in whole.weight_nodes.items()})
    return _cut_at(whole, nodes, [start for start in starts if _is_cuttable(nodes, start)])


def cut_by_bytes(whole: Capture, *, limit: int = PIECE_BYTES) -> tuple[Capture, ...]:
    """Cut so that each part uses at most `limit` bytes of weights, counted as float32, or those of one operator.

    As `cut` otherwise. What follows from weights alone, as a transposed one, is not handed over but made again.
    """
    weights, own = set(whole.weight_nodes.values()), _weights_alone(whole)
    nodes = [node for node in whole.module.graph.nodes if node.op == "call_function" and node not in own]
    starts: list[int] = []
    held: set[Node] = set()
    for number, node in enumerate(nodes):
        needed = weights.intersection(_with_own(node.all_input_nodes, own))
        if held and _bytes(held | needed) > limit and _is_cuttable(nodes, number):
            starts.append(number)
            held = set()
        held |= needed
    return _cut_at(whole, nodes, starts, own)


def _cut_at(whole: Capture, nodes: Sequence[Node], starts: Sequence[int], own: Collection[Node] = ()) -> tuple[Capture, ...]:
    """The parts that begin at the first node and at `starts`; nodes of `own` are in every part that uses them."""
    place = {node: number for number, node in enumerate(nodes)}
    part_of = {node: sum(place[node] >= start for start in starts) for node in nodes}
    names = _names_of_values(whole, part_of)
    return tuple(_part(whole, number, part_of, names, own) for number in range(len(starts) + 1))


def _is_cuttable(nodes: Sequence[Node], start: int) -> bool:
    """Whether all that is made before `start` and used from there on can be handed over."""
    later = set(nodes[start:])
    return all(_can_be_handed_over(node) for node in nodes[:start] if not later.isdisjoint(node.users))


def _weights_alone(whole: Capture) -> set[Node]:
    """Operators whose result follows from weights and constants."""
    fixed = set(whole.weight_nodes.values())
    made: set[Node] = set()
    for node in whole.module.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr":
            fixed.add(node)
        elif node.op == "call_function" and sources and all(source in fixed for source in sources):
            fixed.add(node)
            made.add(node)
    return made - set(_results(whole))


def _with_own(nodes: Iterable[Node], own: Collection[Node]) -> Iterator[Node]:
    """The nodes, and what those of `own` are made of."""
    for node in nodes:
        yield node
        if node in own:
            yield from _with_own(node.all_input_nodes, own)


def _bytes(weights: Collection[Node]) -> int:
    return sum(int(node.meta["val"].numel()) * torch.float32.itemsize for node in weights)


def _layer_starts(nodes: Sequence[Node], weights: dict[Node, str]) -> list[int]:
    """Where the weights of another layer begin; not before the first weight of all."""
    starts: list[int] = []
    seen: set[str] = set()
    used = False
    for number, node in enumerate(nodes):
        layers = {found[1] for source in node.all_input_nodes if (found := re.match(r"(.*?\.\d+)\.", weights.get(source, "")))}
        if layers - seen and used:
            starts.append(number)
        seen |= layers
        used = used or any(source in weights for source in node.all_input_nodes)
    return starts


def _can_be_handed_over(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in (torch.float32, torch.int64)


def _names_of_values(whole: Capture, part_of: dict[Node, int]) -> dict[Node, str]:
    """Names of what parts give: outputs of the whole, and values that a later part takes."""
    results = _results(whole)
    names: dict[Node, str] = {}
    for spec, node in zip(whole.outputs, results, strict=True):
        names.setdefault(node, spec.name)
    for node, part in part_of.items():
        if node not in names and any(part_of.get(user, part) != part for user in node.users):
            names[node] = f"{CARRIED}{len(names)}"
    return names


def _part(whole: Capture, number: int, part_of: dict[Node, int], names: dict[Node, str], own: Collection[Node]) -> Capture:
    nodes = [node for node, part in part_of.items() if part == number]
    last = number == max(part_of.values())
    sources = {source for node in nodes for source in _with_own(node.all_input_nodes, own)}
    results = _results(whole)
    # A result that no operator makes is given by the last part.
    given = [node for node in names if part_of.get(node, -1) == number or (last and node not in part_of)]
    sources |= {node for node in given if node not in part_of}
    graph = Graph()
    copies: dict[Node, Node] = {}
    inputs: list[TensorSpec] = []
    placeholders = [node for node in whole.module.graph.nodes if node.op == "placeholder"]
    for spec, node in zip(whole.inputs, placeholders, strict=False):
        if node in sources:
            copies[node] = graph.placeholder(spec.name)
            inputs.append(spec)
    for node in names:
        if node in sources and part_of.get(node, number) != number:
            copies[node] = graph.placeholder(names[node])
            inputs.append(_spec(names[node], node))
    weights = [name for name, node in whole.weight_nodes.items() if node in sources]
    for name in weights:
        copies[whole.weight_nodes[name]] = graph.placeholder(name.replace(".", "_"))
    for node in whole.module.graph.nodes:
        if (node in sources and (node.op == "get_attr" or node in own)) or part_of.get(node) == number:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    for node, copy in copies.items():
        copy.meta = dict(node.meta)
    meanings = {names[node]: spec for spec, node in zip(whole.outputs, results, strict=True)}
    outputs = tuple(meanings.get(names[node]) or _spec(names[node], node) for node in given)
    graph.output(tuple(copies[node] for node in given))
    derived = {name: whole.derived[name] for name in weights if name in whole.derived}
    return Capture(GraphModule(whole.module, graph), tuple(inputs), outputs, tuple(weights), derived)


def _results(whole: Capture) -> list[Node]:
    return list(next(node for node in whole.module.graph.nodes if node.op == "output").args[0])


def _spec(name: str, node: Node) -> TensorSpec:
    value = node.meta["val"]
    return TensorSpec(name=name, shape=tuple(value.shape), dtype=NAMES[value.dtype], meaning="handed from part to part")
