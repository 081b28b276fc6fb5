"""Builds an ONNX graph node by node; weights become initializers that are dequantized anew at each use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import ArrayLike, NDArray

from pocketune_export.weights import Stored, WeightPart

OPSET = 18
"""Has all that is needed (bitwise operators, layer normalization), and is read by every runtime since 2023."""

TYPES: dict[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.bool: ir.DataType.BOOL,
}
_NUMPY = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.bool: np.bool_,
}


Attribute = float | int | str | Sequence[int] | ir.TensorProtocol


class Builder:
    """A growing graph.

    Attributes:
        nodes: in order.
        initializers: by name.
        used: the stored weights that the graph reads, by name.
    """

    def __init__(self, part: WeightPart, matmul_weights: frozenset[str], *, file: str) -> None:
        """Start empty.

        Args:
            part: where weights come from.
            matmul_weights: names of those that are matrices of multiplications.
            file: bundle path for weights that no graph used before.
        """
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.used: dict[str, Stored] = {}
        self._part = part
        self._file = file
        self._matmul = matmul_weights
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._values = 0

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """Append a node of one output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, count: int, *inputs: ir.Value | None, **attributes: Attribute) -> tuple[ir.Value, ...]:
        """Append a node of several outputs."""
        # Optional inputs at the end are left out, not named "": at the latter the fusions of ONNX Runtime 1.31 crash.
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        node = ir.node(kind, inputs, attributes=attributes, num_outputs=count, name=f"{kind}_{len(self.nodes)}")
        for value in node.outputs:
            value.name = f"value_{self._values}"
            self._values += 1
        self.nodes.append(node)
        return tuple(node.outputs)

    def constant(self, value: ArrayLike, dtype: torch.dtype) -> ir.Value:
        """A constant inside the graph; equal ones are shared."""
        array: NDArray[np.generic] = np.asarray(value, dtype=_NUMPY[dtype])
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._initializer(f"constant_{len(self._constants)}", ir.tensor(array))
        return self._constants[key]

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A vector of int64."""
        return self.constant(list(values), torch.int64)

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        """The value in another dtype."""
        return self.op("Cast", value, to=int(TYPES[dtype]))

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """The value in another shape."""
        return self.op("Reshape", value, self.ints(shape))

    def weight(self, name: str) -> ir.Value:
        """A frozen weight in float32, for one use.

        Each use has its own dequantization, so that the float32 copy is gone between the forward and the backward use.
        """
        stored = self._stored(name)
        value = self._raw(stored, "weight")
        if stored.storage == "fp16":
            return self.cast(value, torch.float32)
        if stored.storage == "fp32":
            return value
        scale = self._raw(stored, "scale")
        zero_point = self._raw(stored, "zero") if "zero" in stored.tensors else None
        if stored.storage in ("int4", "packed4"):
            low = self.op("BitwiseAnd", value, self._byte(15))
            high = self.op("BitShift", value, self._byte(4), direction="RIGHT")
            value = self.op("Concat", low, high, axis=1)
        if stored.storage == "int4":
            zero = ir.tensor(np.array([8], dtype=np.uint8))
            zero_point = self.op("ConstantOfShape", self.ints([scale_count(stored)]), value=zero)
        if zero_point is not None and zero_point.dtype == ir.DataType.FLOAT:
            shifted = self.op("Sub", self.cast(value, torch.float32), self.reshape(zero_point, [-1, 1]))
            whole = self.op("Mul", shifted, self.reshape(scale, [-1, 1]))
        else:
            whole = self.op("DequantizeLinear", value, scale, zero_point, axis=0)
        plain = len(stored.shape) == 2 and scale_count(stored) == stored.shape[0]
        return whole if plain else self.reshape(whole, stored.shape)

    def weight_rows(self, name: str, indices: ir.Value) -> ir.Value:
        """Rows of a frozen table in float32; only they are converted."""
        stored = self._stored(name)
        rows = self.op("Gather", self._raw(stored, "weight"), indices, axis=0)
        return self.cast(rows, torch.float32) if stored.storage == "fp16" else rows

    def _stored(self, name: str) -> Stored:
        if name not in self.used:
            self.used[name] = self._part.stored(name, file=self._file, matmul=name in self._matmul)
        return self.used[name]

    def _raw(self, stored: Stored, role: str) -> ir.Value:
        tensor = stored.tensors[role]
        name = tensor.name or role
        return self.initializers[name] if name in self.initializers else self._initializer(name, tensor)

    def _byte(self, value: int) -> ir.Value:
        name = f"byte_{value}"
        if name in self.initializers:
            return self.initializers[name]
        return self._initializer(name, ir.tensor(np.array(value, dtype=np.uint8)))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.initializers[name] = value
        return value


def scale_count(stored: Stored) -> int:
    """How many scales a quantized matrix has."""
    return stored.tensors["scale"].size
