"""Lower a capture to a plain ONNX model: ai.onnx alone, weights as external data, ready to be loaded without optimization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node
from torch.fx.node import map_arg

from pocketune_export.aten_layers import lowering_of
from pocketune_export.capture import DTYPES, Capture
from pocketune_export.graphspec import TensorSpec
from pocketune_export.onnx_builder import OPSET, TYPES, Builder
from pocketune_export.onnx_passes import fold_transposes, remove_unused
from pocketune_export.weights import WeightPart

IR_VERSION = 8
"""Of opset 18; newer runtimes read it too."""
_PRODUCTS = {torch.ops.aten.mm.default: (0, 1), torch.ops.aten.addmm.default: (1, 2), torch.ops.aten.bmm.default: (0, 1)}


@dataclass(frozen=True)
class Lowered:
    """An ONNX model and what it reads.

    Attributes:
        content: of the .onnx file; the same for the same capture and weights.
        files: bundle paths of its external data.
        weight_bytes: size of the weights that it reads.
    """

    content: bytes
    files: tuple[str, ...]
    weight_bytes: int


def lower(capture: Capture, part: WeightPart, *, file: str) -> Lowered:
    """Lower a capture; its weights are stored at first use.

    Args:
        capture: left as it is, so that it can be lowered again.
        part: where the weights come from.
        file: bundle path for those that no graph used before.

    Raises:
        ModelError: an operator has no lowering.
    """
    part.add_derived(capture.derived)
    builder = Builder(part, _matmul_weights(capture), file=file)
    inputs = [_port(spec) for spec in capture.inputs]
    outputs = _emit(capture, builder, inputs)
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports={"": OPSET},
        name="main",
    )
    fold_transposes(graph)
    remove_unused(graph)
    proto = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, producer_name="pocketune"))
    used = builder.used.values()
    return Lowered(
        content=proto.SerializeToString(deterministic=True),
        files=tuple(sorted({stored.file for stored in used if stored.file})),
        weight_bytes=sum(stored.bytes for stored in used),
    )


def _emit(capture: Capture, builder: Builder, inputs: list[ir.Value]) -> list[ir.Value]:
    """Append the nodes of a capture; the graph's outputs."""
    names = {node: name for name, node in capture.weight_nodes.items()}
    values: dict[Node, Any] = {}
    given = iter(inputs)
    for node in capture.module.graph.nodes:
        if node.op == "placeholder":
            if node not in names:
                values[node] = next(given)
        elif node.op == "get_attr":
            constant = getattr(capture.module, node.target)
            values[node] = builder.constant(constant.numpy(), constant.dtype)
        elif node.op == "call_function":
            values[node] = _emit_node(builder, node, values, names)
        else:
            return _outputs(capture, builder, [values[source] for source in node.args[0]])
    return []


def _emit_node(builder: Builder, node: Node, values: Mapping[Node, Any], names: Mapping[Node, str]) -> Any:
    def value_of(source: Node) -> Any:
        return builder.weight(names[source]) if source in names else values[source]

    table = node.args[0] if node.args else None
    if node.target is torch.ops.aten.embedding.default and table in names:
        return builder.weight_rows(names[table], value_of(node.args[1]))  # type: ignore[arg-type,index]
    lowering = lowering_of(node)
    return lowering(builder, node, *map_arg(node.args, value_of), **map_arg(node.kwargs, value_of))


def _outputs(capture: Capture, builder: Builder, values: list[ir.Value]) -> list[ir.Value]:
    """Name the outputs; one that is an input, a constant or another output gets a value of its own."""
    outputs: list[ir.Value] = []
    for spec, value in zip(capture.outputs, values, strict=True):
        own = value if value.producer() is not None and value not in outputs else builder.op("Identity", value)
        port = _port(spec)
        own.name, own.shape, own.type = port.name, port.shape, port.type
        outputs.append(own)
    return outputs


def _port(spec: TensorSpec) -> ir.Value:
    return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(TYPES[DTYPES[spec.dtype]]))


def _matmul_weights(capture: Capture) -> frozenset[str]:
    """Weights that are used as matrices of matrix products and as nothing else."""
    return frozenset(name for name, node in capture.weight_nodes.items() if node.users and _only_multiplied(node))


def _only_multiplied(node: Node) -> bool:
    for user in node.users:
        if user.target is torch.ops.aten.t.default:
            if not _only_multiplied(user):
                return False
        elif user.target not in _PRODUCTS or node not in [user.args[place] for place in _PRODUCTS[user.target]]:
            return False
    return True
