"""Passes over ONNX graphs. Each states what it needs and ensures; none changes what is computed.

There is no elimination of common subexpressions: it would undo recomputation and keep dequantized weights alive.
"""

from __future__ import annotations

import onnx_ir as ir


def fold_transposes(graph: ir.Graph) -> None:
    """Turn a matrix product of a transposed matrix into Gemm with transA or transB.

    Needs: a MatMul or Gemm operand transposed by [1, 0] has a matrix on the other side too, as ATen's `mm` has. Ensures: no
    such product reads a Transpose, so that one initializer serves the forward product x W^T and the backward product g W.
    """
    for node in list(graph):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        left, right = (_transposed(value) for value in node.inputs[:2])
        if left is None and right is None:
            continue
        flags = {name: int(node.attributes[name].as_int()) if name in node.attributes else 0 for name in ("transA", "transB")}
        operands = [left or node.inputs[0], right or node.inputs[1], *node.inputs[2:]]
        flags = {"transA": flags["transA"] ^ (left is not None), "transB": flags["transB"] ^ (right is not None)}
        gemm = ir.node("Gemm", operands, attributes=flags, num_outputs=1, name=node.name)
        old, new = node.outputs[0], gemm.outputs[0]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        graph.insert_before(node, gemm)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def remove_unused(graph: ir.Graph) -> None:
    """Remove nodes and initializers whose results nobody reads.

    Needs: nothing. Ensures: every node and initializer leads to a graph output; optional outputs that nobody reads are unnamed.
    """
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        unread = [value for value in node.outputs if not value.uses() and value not in outputs]
        if len(unread) == len(node.outputs):
            graph.remove(node, safe=True)
        elif node.op_type == "LayerNormalization":
            for value in unread:
                value.name = ""
    for name in [name for name, value in graph.initializers.items() if not value.uses() and value not in outputs]:
        del graph.initializers[name]


def _transposed(value: ir.Value | None) -> ir.Value | None:
    """The matrix that a value is the transpose of, if it is one."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "Transpose" or list(producer.attributes["perm"].as_ints()) != [1, 0]:
        return None
    return producer.inputs[0]
