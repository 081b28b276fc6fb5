"""Layers and backward operators as ONNX operators: normalization, attention's softmax, convolution, resampling."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from pocketune.errors import ModelError
from pocketune_export.aten import LOWERINGS, Lowering, dtype_of, gelu_inner, lowers, shape_of
from pocketune_export.onnx_builder import Builder

F32 = torch.float32


@lowers("_softmax.default")
def _softmax(b: Builder, _node: Node, x: ir.Value, dim: int, _half: bool) -> ir.Value:
    return b.op("Softmax", x, axis=dim)


@lowers("_safe_softmax.default")
def _safe_softmax(b: Builder, node: Node, x: ir.Value, dim: int, **_: Any) -> ir.Value:
    plain = b.op("Softmax", x, axis=dim)
    if _is_product(node.args[0]):
        return plain
    # A row that a mask empties wholly is zero in PyTorch; plain softmax would give NaN.
    highest = b.op("ReduceMax", x, b.ints([dim]), keepdims=1)
    empty = b.op("Equal", highest, b.constant(-np.inf, F32))
    return b.op("Where", empty, b.constant(0.0, F32), plain)


def _is_product(node: Any) -> bool:
    """Whether a value is a matrix product, so that it holds no minus infinity."""
    while isinstance(node, Node) and str(node.target) in ("aten.view.default", "aten._unsafe_view.default"):
        node = node.args[0]
    return isinstance(node, Node) and str(node.target) in ("aten.bmm.default", "aten.mm.default")


@lowers("_softmax_backward_data.default")
def _softmax_backward(b: Builder, _node: Node, grad: ir.Value, y: ir.Value, dim: int, _dtype: Any) -> ir.Value:
    weighted = b.op("Mul", grad, y)
    total = b.op("ReduceSum", weighted, b.ints([dim]), keepdims=1)
    return b.op("Sub", weighted, b.op("Mul", y, total))


@lowers("native_layer_norm.default")
def _layer_norm(
    b: Builder, _node: Node, x: ir.Value, shape: Sequence[int], weight: ir.Value | None, bias: ir.Value | None, eps: float
) -> tuple[ir.Value, ...]:
    scale = b.constant(np.ones(shape), F32) if weight is None else weight
    return b.ops("LayerNormalization", 3, x, scale, bias, axis=-len(shape), epsilon=eps)


@lowers("native_layer_norm_backward.default")
def _layer_norm_backward(
    b: Builder,
    node: Node,
    grad: ir.Value,
    x: ir.Value,
    shape: Sequence[int],
    mean: ir.Value,
    rstd: ir.Value,
    weight: ir.Value | None,
    _bias: ir.Value | None,
    mask: Sequence[bool],
) -> tuple[ir.Value | None, ...]:
    _only_input(node, mask)
    grad = grad if weight is None else b.op("Mul", grad, weight)
    return _norm_backward(b, grad, x, mean, rstd, axes=[-place - 1 for place in range(len(shape))]), None, None


@lowers("native_group_norm.default")
def _group_norm(
    b: Builder,
    node: Node,
    x: ir.Value,
    weight: ir.Value | None,
    bias: ir.Value | None,
    rows: int,
    channels: int,
    pixels: int,
    groups: int,
    eps: float,
) -> tuple[ir.Value, ...]:
    grouped = b.reshape(x, (rows, groups, channels // groups * pixels))
    mean = b.op("ReduceMean", grouped, b.ints([2]), keepdims=1)
    centred = b.op("Sub", grouped, mean)
    variance = b.op("ReduceMean", b.op("Mul", centred, centred), b.ints([2]), keepdims=1)
    rstd = b.op("Reciprocal", b.op("Sqrt", b.op("Add", variance, b.constant(eps, F32))))
    y = b.reshape(b.op("Mul", centred, rstd), shape_of(node.args[0]))
    sides = [1] * (len(shape_of(node.args[0])) - 2)
    y = y if weight is None else b.op("Mul", y, b.reshape(weight, (channels, *sides)))
    y = y if bias is None else b.op("Add", y, b.reshape(bias, (channels, *sides)))
    return y, mean, rstd


@lowers("native_group_norm_backward.default")
def _group_norm_backward(
    b: Builder,
    node: Node,
    grad: ir.Value,
    x: ir.Value,
    mean: ir.Value,
    rstd: ir.Value,
    weight: ir.Value | None,
    rows: int,
    channels: int,
    pixels: int,
    groups: int,
    mask: Sequence[bool],
) -> tuple[ir.Value | None, ...]:
    _only_input(node, mask)
    shape = shape_of(node.args[1])
    grad = grad if weight is None else b.op("Mul", grad, b.reshape(weight, (channels, *[1] * (len(shape) - 2))))
    grouped = (rows, groups, channels // groups * pixels)
    # mean and rstd come from this table's own lowering, shaped (rows, groups, 1).
    gradient = _norm_backward(b, b.reshape(grad, grouped), b.reshape(x, grouped), mean, rstd, axes=[2])
    return b.reshape(gradient, shape), None, None


def _norm_backward(b: Builder, grad: ir.Value, x: ir.Value, mean: ir.Value, rstd: ir.Value, *, axes: Sequence[int]) -> ir.Value:
    """Gradient of (x - mean) rstd. Paper: Ba et al. 2016, supplementary equation of the normalized gradient."""
    normal = b.op("Mul", b.op("Sub", x, mean), rstd)
    level = b.op("ReduceMean", grad, b.ints(axes), keepdims=1)
    slope = b.op("ReduceMean", b.op("Mul", grad, normal), b.ints(axes), keepdims=1)
    return b.op("Mul", b.op("Sub", b.op("Sub", grad, level), b.op("Mul", normal, slope)), rstd)


def _only_input(node: Node, mask: Sequence[bool]) -> None:
    if any(mask[1:]):
        msg = f"{node.target} is asked for the gradient of a weight; only LoRA matrices train in an exported step."
        raise ModelError(msg)


@lowers("gelu_backward.default")
def _gelu_backward(b: Builder, _node: Node, grad: ir.Value, x: ir.Value, approximate: str = "none") -> ir.Value:
    one, half = b.constant(1.0, F32), b.constant(0.5, F32)
    inner = gelu_inner(b, x, approximate)
    left = b.op("Mul", half, b.op("Add", inner, one))
    if approximate == "tanh":
        cosh = b.op("Sub", one, b.op("Mul", inner, inner))
        factor = math.sqrt(2 / math.pi)
        cubic = b.op("Mul", b.op("Mul", x, x), b.constant(factor * 3 * 0.044715, F32))
        slope = b.op("Mul", cosh, b.op("Add", cubic, b.constant(factor, F32)))
        right = b.op("Mul", b.op("Mul", half, x), slope)
    else:
        bell = b.op("Exp", b.op("Mul", b.op("Mul", x, x), b.constant(-0.5, F32)))
        right = b.op("Mul", x, b.op("Mul", bell, b.constant(1 / math.sqrt(2 * math.pi), F32)))
    return b.op("Mul", grad, b.op("Add", left, right))


@lowers("silu_backward.default")
def _silu_backward(b: Builder, _node: Node, grad: ir.Value, x: ir.Value) -> ir.Value:
    one = b.constant(1.0, F32)
    gate = b.op("Sigmoid", x)
    slope = b.op("Add", one, b.op("Mul", x, b.op("Sub", one, gate)))
    return b.op("Mul", grad, b.op("Mul", gate, slope))


@lowers("tanh_backward.default")
def _tanh_backward(b: Builder, _node: Node, grad: ir.Value, y: ir.Value) -> ir.Value:
    return b.op("Mul", grad, b.op("Sub", b.constant(1.0, F32), b.op("Mul", y, y)))


@lowers("sigmoid_backward.default")
def _sigmoid_backward(b: Builder, _node: Node, grad: ir.Value, y: ir.Value) -> ir.Value:
    return b.op("Mul", grad, b.op("Mul", y, b.op("Sub", b.constant(1.0, F32), y)))


@lowers("slice_backward.default")
def _slice_backward(
    b: Builder, node: Node, grad: ir.Value, sizes: Sequence[int], dim: int, start: int, _stop: int, step: int
) -> ir.Value:
    if step != 1:
        msg = f"the gradient of a slice with step {step} has no lowering to ONNX. Please report this model."
        raise ModelError(msg)
    start = max(0, start + sizes[dim]) if start < 0 else start
    behind = sizes[dim] - start - shape_of(node.args[0])[dim]
    return b.op("Pad", grad, b.ints([start, behind]), b.constant(0.0, dtype_of(node)), b.ints([dim]))


@lowers("select_backward.default")
def _select_backward(b: Builder, node: Node, grad: ir.Value, sizes: Sequence[int], dim: int, index: int) -> ir.Value:
    index %= sizes[dim]
    pads = b.ints([index, sizes[dim] - index - 1])
    return b.op("Pad", b.op("Unsqueeze", grad, b.ints([dim])), pads, b.constant(0.0, dtype_of(node)), b.ints([dim]))


@lowers("convolution.default")
def _convolution(
    b: Builder,
    _node: Node,
    x: ir.Value,
    weight: ir.Value,
    bias: ir.Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> ir.Value:
    shared: dict[str, Any] = {
        "strides": list(stride),
        "pads": [*padding, *padding],
        "dilations": list(dilation),
        "group": groups,
    }
    if transposed:
        return b.op("ConvTranspose", x, weight, bias, output_padding=list(output_padding), **shared)
    return b.op("Conv", x, weight, bias, **shared)


@lowers("convolution_backward.default")
def _convolution_backward(
    b: Builder,
    node: Node,
    grad: ir.Value,
    _x: ir.Value,
    weight: ir.Value,
    _bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    _output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> tuple[ir.Value | None, ...]:
    _only_input(node, mask)
    if transposed:
        msg = "the gradient of a transposed convolution has no lowering to ONNX. Please report this model."
        raise ModelError(msg)
    sides, grad_sides, kernel = (shape_of(node.args[place])[2:] for place in (1, 0, 2))
    # What a strided convolution leaves over at the far edge has gradient zero.
    left_over = [
        side - ((small - 1) * s - 2 * p + d * (k - 1) + 1)
        for side, small, s, p, d, k in zip(sides, grad_sides, stride, padding, dilation, kernel, strict=True)
    ]
    gradient = b.op(
        "ConvTranspose",
        grad,
        weight,
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        output_padding=left_over,
        group=groups,
    )
    return gradient, None, None


@lowers("upsample_nearest2d.default")
def _upsample(b: Builder, node: Node, x: ir.Value, *_: Any) -> ir.Value:
    sizes = b.ints(shape_of(node))
    return b.op(
        "Resize", x, None, None, sizes, mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric"
    )


@lowers("upsample_nearest2d_backward.default")
def _upsample_backward(b: Builder, _node: Node, grad: ir.Value, size: Sequence[int], into: Sequence[int], *_: Any) -> ir.Value:
    if any(large % small for large, small in zip(size, into[2:], strict=True)):
        msg = f"the gradient of resizing {list(into)} to {list(size)} has no lowering to ONNX. Use sizes that are multiples."
        raise ModelError(msg)
    rows, channels, height, width = into
    split = b.reshape(grad, (rows, channels, height, size[0] // height, width, size[1] // width))
    return b.op("ReduceSum", split, b.ints([3, 5]), keepdims=0)


def lowering_of(node: Node) -> Lowering:
    """The function for an FX node's operator.

    Raises:
        ModelError: there is none.
    """
    name = "aten.getitem" if node.target is operator.getitem else str(node.target)
    if name not in LOWERINGS:
        msg = f"the model uses {name}, which has no lowering to ONNX. Please report this model."
        raise ModelError(msg)
    return LOWERINGS[name]
