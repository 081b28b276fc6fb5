"""ATen operators of forward passes as ONNX operators, one small function each. Shapes are static."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from pocketune.errors import ModelError
from pocketune_export.onnx_builder import Builder

Lowering = Callable[..., Any]
LOWERINGS: dict[str, Lowering] = {}


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """Register a function for ATen operators: of the builder, the FX node, and the operator's arguments as ONNX values."""

    def register(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys((f"aten.{name}" for name in names), function))
        return function

    return register


def shape_of(node: Any) -> tuple[int, ...]:
    """The static shape of an FX node."""
    return tuple(node.meta["val"].shape)


def dtype_of(node: Any) -> torch.dtype:
    """The dtype of an FX node."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def in_dtype(b: Builder, value: Any, source: Any, dtype: torch.dtype) -> ir.Value:
    """An argument as an ONNX value of a dtype: a Python number becomes a constant."""
    if not isinstance(source, Node):
        return b.constant(value, dtype)
    result: ir.Value = value if dtype_of(source) == dtype else b.cast(value, dtype)
    return result


def pair(b: Builder, node: Node, x: Any, y: Any, *, compare: bool = False) -> tuple[ir.Value, ir.Value]:
    """Two operands in one dtype: the result's, or of a comparison the operands' common one."""
    sources = node.args[:2]
    dtype = dtype_of(node)
    if compare:
        of = [s.meta["val"] if isinstance(s, Node) else s for s in sources]
        dtype = torch.result_type(of[0], of[1])  # type: ignore[arg-type]
    return in_dtype(b, x, sources[0], dtype), in_dtype(b, y, sources[1], dtype)


def _binary(kind: str, *, compare: bool = False) -> Lowering:
    def lower(b: Builder, node: Node, x: Any, y: Any) -> ir.Value:
        return b.op(kind, *pair(b, node, x, y, compare=compare))

    return lower


def _unary(kind: str) -> Lowering:
    return lambda b, _node, x: b.op(kind, x)


for _name, _kind in {"mul": "Mul", "div": "Div"}.items():
    lowers(f"{_name}.Tensor", f"{_name}.Scalar")(_binary(_kind))
lowers("minimum.default")(_binary("Min"))
lowers("maximum.default")(_binary("Max"))
for _name, _kind in {"eq": "Equal", "gt": "Greater", "lt": "Less", "ge": "GreaterOrEqual", "le": "LessOrEqual"}.items():
    lowers(f"{_name}.Tensor", f"{_name}.Scalar")(_binary(_kind, compare=True))
for _name, _kind in {
    "neg": "Neg",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "sin": "Sin",
    "cos": "Cos",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "abs": "Abs",
    "relu": "Relu",
    "logical_not": "Not",
    "reciprocal": "Reciprocal",
}.items():
    lowers(f"{_name}.default")(_unary(_kind))


@lowers("alias.default", "detach.default", "clone.default", "contiguous.default")
def _same(_b: Builder, _node: Node, x: ir.Value, **_: Any) -> ir.Value:
    return x


@lowers("_to_copy.default")
def _to_copy(b: Builder, node: Node, x: ir.Value, **_: Any) -> ir.Value:
    return in_dtype(b, x, node.args[0], dtype_of(node))


@lowers("add.Tensor", "add.Scalar")
def _add(b: Builder, node: Node, x: Any, y: Any, alpha: float = 1) -> ir.Value:
    left, right = pair(b, node, x, y)
    return b.op("Add", left, right if alpha == 1 else b.op("Mul", right, b.constant(alpha, dtype_of(node))))


@lowers("sub.Tensor", "sub.Scalar")
def _sub(b: Builder, node: Node, x: Any, y: Any, alpha: float = 1) -> ir.Value:
    left, right = pair(b, node, x, y)
    return b.op("Sub", left, right if alpha == 1 else b.op("Mul", right, b.constant(alpha, dtype_of(node))))


@lowers("rsub.Scalar")
def _rsub(b: Builder, node: Node, x: ir.Value, y: float) -> ir.Value:
    left, right = pair(b, node, x, y)
    return b.op("Sub", right, left)


@lowers("pow.Tensor_Scalar")
def _pow(b: Builder, node: Node, x: ir.Value, exponent: float) -> ir.Value:
    if exponent in (1, 2):
        return x if exponent == 1 else b.op("Mul", x, x)
    return b.op("Pow", x, b.constant(exponent, dtype_of(node)))


@lowers("pow.Scalar", "pow.Tensor_Tensor")
def _pow_of(b: Builder, node: Node, x: Any, y: Any) -> ir.Value:
    return b.op("Pow", *pair(b, node, x, y))


@lowers("rsqrt.default")
def _rsqrt(b: Builder, _node: Node, x: ir.Value) -> ir.Value:
    return b.op("Reciprocal", b.op("Sqrt", x))


@lowers("silu.default")
def _silu(b: Builder, _node: Node, x: ir.Value) -> ir.Value:
    return b.op("Mul", x, b.op("Sigmoid", x))


@lowers("gelu.default")
def _gelu(b: Builder, node: Node, x: ir.Value, approximate: str = "none") -> ir.Value:
    half = b.op("Mul", x, b.constant(0.5, dtype_of(node)))
    return b.op("Mul", half, b.op("Add", gelu_inner(b, x, approximate), b.constant(1.0, torch.float32)))


def gelu_inner(b: Builder, x: ir.Value, approximate: str) -> ir.Value:
    """The tanh or erf part of GELU. Paper: Hendrycks and Gimpel 2016, section 2."""
    if approximate != "tanh":
        return b.op("Erf", b.op("Mul", x, b.constant(math.sqrt(0.5), torch.float32)))
    cube = b.op("Mul", b.op("Mul", x, x), x)
    inner = b.op("Add", x, b.op("Mul", cube, b.constant(0.044715, torch.float32)))
    return b.op("Tanh", b.op("Mul", inner, b.constant(math.sqrt(2 / math.pi), torch.float32)))


@lowers("clamp.default")
def _clamp(b: Builder, node: Node, x: ir.Value, low: float | None = None, high: float | None = None, **kw: float) -> ir.Value:
    low, high = kw.get("min", low), kw.get("max", high)
    dtype = dtype_of(node)
    if low is not None:
        x = b.op("Max", x, b.constant(low, dtype))
    return x if high is None else b.op("Min", x, b.constant(high, dtype))


@lowers("where.self")
def _where(b: Builder, node: Node, condition: ir.Value, x: Any, y: Any) -> ir.Value:
    dtype = dtype_of(node)
    return b.op("Where", condition, in_dtype(b, x, node.args[1], dtype), in_dtype(b, y, node.args[2], dtype))


def _reduce(kind: str) -> Lowering:
    def lower(b: Builder, node: Node, x: ir.Value, dims: Sequence[int] | None = None, keep: bool = False, **_: Any) -> ir.Value:
        x = in_dtype(b, x, node.args[0], dtype_of(node))
        return b.op(kind, x, b.ints(dims) if dims else None, keepdims=int(keep))

    return lower


lowers("sum.dim_IntList", "sum.default")(_reduce("ReduceSum"))
lowers("mean.dim", "mean.default")(_reduce("ReduceMean"))


@lowers("argmax.default")
def _argmax(b: Builder, node: Node, x: ir.Value, dim: int = -1, keep: bool = False) -> ir.Value:
    if dtype_of(node.args[0]) == torch.bool:
        x = b.cast(x, torch.int32)
    return b.op("ArgMax", x, axis=dim, keepdims=int(keep))


@lowers("view.default", "_unsafe_view.default", "reshape.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims")
def _reshape(b: Builder, node: Node, x: ir.Value, *_: Any) -> ir.Value:
    return b.reshape(x, shape_of(node))


@lowers("expand.default")
def _expand(b: Builder, node: Node, x: ir.Value, *_: Any, **__: Any) -> ir.Value:
    return b.op("Expand", x, b.ints(shape_of(node)))


@lowers("t.default")
def _t(b: Builder, node: Node, x: ir.Value) -> ir.Value:
    return b.op("Transpose", x, perm=[1, 0]) if len(shape_of(node)) == 2 else x


@lowers("transpose.int")
def _transpose(b: Builder, node: Node, x: ir.Value, first: int, second: int) -> ir.Value:
    order = list(range(len(shape_of(node))))
    order[first], order[second] = order[second], order[first]
    return b.op("Transpose", x, perm=order)


@lowers("permute.default")
def _permute(b: Builder, _node: Node, x: ir.Value, order: Sequence[int]) -> ir.Value:
    return b.op("Transpose", x, perm=[place % len(order) for place in order])


@lowers("slice.Tensor")
def _slice(b: Builder, _node: Node, x: ir.Value, dim: int = 0, start: Any = 0, stop: Any = None, step: int = 1) -> ir.Value:
    stop = np.iinfo(np.int64).max if stop is None else stop
    return b.op("Slice", x, b.ints([start or 0]), b.ints([stop]), b.ints([dim]), b.ints([step]))


@lowers("select.int")
def _select(b: Builder, _node: Node, x: ir.Value, dim: int, index: int) -> ir.Value:
    return b.op("Gather", x, b.constant(index, torch.int64), axis=dim)


@lowers("split.Tensor", "split_with_sizes.default")
def _split(b: Builder, node: Node, x: ir.Value, _size: Any, dim: int = 0) -> tuple[ir.Value, ...]:
    sizes = [part.shape[dim] for part in node.meta["val"]]
    return b.ops("Split", len(sizes), x, b.ints(sizes), axis=dim)


@lowers("cat.default")
def _cat(b: Builder, node: Node, parts: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    kept = [part for part, source in zip(parts, node.args[0], strict=True) if source.meta["val"].numel()]  # type: ignore[arg-type]
    return b.op("Concat", *kept, axis=dim) if len(kept) > 1 else kept[0]


@lowers("constant_pad_nd.default")
def _pad(b: Builder, node: Node, x: ir.Value, pads: Sequence[int], value: float = 0.0) -> ir.Value:
    sides = len(pads) // 2
    rank = len(shape_of(node))
    before, after = pads[::2][::-1], pads[1::2][::-1]
    axes = b.ints(range(rank - sides, rank))
    return b.op("Pad", x, b.ints([*before, *after]), b.constant(value, dtype_of(node)), axes)


@lowers("index.Tensor")
def _index(b: Builder, node: Node, x: ir.Value, indices: Sequence[ir.Value]) -> ir.Value:
    sources: Any = node.args[1]
    shapes = [shape_of(source) for source in sources if source is not None]
    if len(shapes) != len(sources):
        msg = f"the model indexes with {node.args[1]}, which has no lowering to ONNX. Please report this model."
        raise ModelError(msg)
    common = np.broadcast_shapes(*shapes)
    columns = [b.reshape(b.op("Expand", index, b.ints(common)), (*common, 1)) for index in indices]
    return b.op("GatherND", x, b.op("Concat", *columns, axis=-1))


@lowers("mm.default", "bmm.default", "matmul.default")
def _matmul(b: Builder, _node: Node, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.op("MatMul", x, y)


@lowers("addmm.default")
def _addmm(b: Builder, _node: Node, bias: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.op("Gemm", x, y, bias)


@lowers("getitem")
def _getitem(_b: Builder, _node: Node, values: Sequence[Any], index: int) -> Any:
    return values[index]
