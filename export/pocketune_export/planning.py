"""Planned memory: what a graph's intermediate results need at their peak, and what a training phase needs in all."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import GraphProto, TensorProto, ValueInfoProto, helper, shape_inference

from pocketune_edge.agreement import CARRIED
from pocketune_export.graphspec import Graph
from pocketune_export.manifest import Memory

_ALIASES = frozenset({"Reshape", "Identity", "Squeeze", "Unsqueeze"})
FLOAT_BYTES = 4
STATE = frozenset({"parameters", "exp_avg", "exp_avg_sq", "gradients"})


def activation_bytes(content: bytes) -> int:
    """Peak bytes of a model's intermediate results and outputs, when nodes run in their order and free what nobody reads again.

    Args:
        content: of the .onnx file; external data is not read.
    """
    graph = shape_inference.infer_shapes(onnx.load_model_from_string(content)).graph
    sizes = {info.name: _bytes(info) for info in (*graph.value_info, *graph.output)}
    root = _roots(graph)
    last = {root.get(info.name, info.name): len(graph.node) for info in graph.output}
    for place, node in enumerate(graph.node):
        for name in node.input:
            last[root.get(name, name)] = max(place, last.get(root.get(name, name), 0))
    ends: dict[int, list[str]] = {}
    now = peak = 0
    for place, node in enumerate(graph.node):
        for name in node.output:
            if name and root.get(name, name) == name:
                now += sizes.get(name, 0)
                ends.setdefault(last.get(name, place), []).append(name)
        peak = max(peak, now)
        now -= sum(sizes.get(name, 0) for name in ends.pop(place, ()))
    return peak


def planned_memory(graphs: Sequence[Graph], *, points: int = 1) -> Memory:
    """What the training phase needs, in one graph or block by block, from the manifest's graphs.

    Args:
        graphs: all of them.
        points: where a zeroth-order step measures the loss, each with parameters of its own; 1 for backpropagation.
    """
    step = next(graph for graph in graphs if graph.role in ("train_step", "loss"))
    streaming = [graph for graph in graphs if graph.role in ("embed", "block_forward", "block_vjp", "head_loss", "adamw")]
    trained = {graph.block for graph in graphs if graph.role == "block_vjp"}
    entering = next(graph for graph in graphs if graph.role == "embed").outputs
    kept = (points - 1) * sum(spec.elements * FLOAT_BYTES for spec in entering) + sum(
        elements * FLOAT_BYTES
        for pieces in _pieces(graphs)
        if pieces[0].role == "block_forward" and pieces[0].block in trained
        for name, elements in _given(pieces).items()
        if name != "parameters"
    )
    optimizer = next((graph for graph in graphs if graph.role == "adamw"), step)
    vectors = sum(spec.elements * FLOAT_BYTES for spec in optimizer.inputs if spec.name in STATE)
    state = vectors + (points - 1) * sum(spec.elements * FLOAT_BYTES for spec in step.inputs if spec.name == "parameters")
    return Memory(
        one_graph_anonymous=step.activation_bytes + _input_bytes(step),
        one_graph_mapped=step.weight_bytes,
        streaming_anonymous=state + kept + max(map(_peak, _pieces(streaming))),
        streaming_mapped=max(graph.weight_bytes for graph in streaming),
    )


def _pieces(graphs: Sequence[Graph]) -> list[list[Graph]]:
    """The graphs, those together that are pieces of one."""
    found: dict[tuple[str, int | None], list[Graph]] = {}
    for graph in graphs:
        found.setdefault((graph.role, graph.block), []).append(graph)
    return [sorted(pieces, key=lambda graph: graph.part) for pieces in found.values()]


def _given(pieces: Sequence[Graph]) -> dict[str, int]:
    """Elements of each input that no other piece makes."""
    return {spec.name: spec.elements for piece in pieces for spec in piece.inputs if not spec.name.startswith(CARRIED)}


def _peak(pieces: Sequence[Graph]) -> int:
    """Bytes of inputs, of what is handed on, and of intermediate results, at the piece that needs most."""
    given = sum(_given(pieces).values()) * FLOAT_BYTES
    peaks = []
    for number, piece in enumerate(pieces):
        needed = {spec.name for later in pieces[number:] for spec in later.inputs}
        handed = sum(spec.elements for earlier in pieces[:number] for spec in earlier.outputs if spec.name in needed)
        peaks.append(given + handed * FLOAT_BYTES + piece.activation_bytes)
    return max(peaks)


def _roots(graph: GraphProto) -> dict[str, str]:
    """Of each value that shares memory with another, the first one."""
    root: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in _ALIASES:
            root[node.output[0]] = root.get(node.input[0], node.input[0])
    return root


def _bytes(info: ValueInfoProto) -> int:
    kind = info.type.tensor_type
    if kind.elem_type == TensorProto.UNDEFINED:
        return 0
    count = 1
    for side in kind.shape.dim:
        count *= side.dim_value
    return count * int(helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize)


def _input_bytes(graph: Graph) -> int:
    return sum(spec.elements * FLOAT_BYTES for spec in graph.inputs)
