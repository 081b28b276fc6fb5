"""What an ONNX file asks of the runtime, read before the runtime sees it; and the file with its weights found elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from pocketune_edge.wire import BYTES, WireError, field, fields, nested, number_in, numbers, text

_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_DTYPES = {1: "float32", 7: "int64"}
_EXTERNAL = 1
MAX_ELEMENTS = 2**40

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_OPSET, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 5, 11, 12, 15
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 13, 14


@dataclass(frozen=True)
class Port:
    """An input or output: name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class External:
    """A weight in another file, as the graph claims it."""

    name: str
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class GraphFile:
    """What a file holds. opset: of ai.onnx."""

    opset: int
    operators: frozenset[str]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: tuple[External, ...]


def read_graph_file(content: bytes) -> GraphFile:
    """Read the structure of a plain graph.

    Raises:
        WireError: it is no ONNX file, or not plain: other operator domains, nested graphs, functions, sparse or odd weights.
    """
    opsets: list[int] = []
    graphs: list[memoryview] = []
    for number, _, value in fields(memoryview(content)):
        if number == _MODEL_GRAPH:
            graphs.append(nested(value))
        elif number == _MODEL_OPSET:
            opsets.append(_read_opset(nested(value)))
        elif number in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
            _refuse("it has functions or training information of its own")
    if len(graphs) != 1 or len(opsets) != 1:
        _refuse("expected one graph and one operator set")
    return _read_graph(graphs[0], opsets[0])


def move_weights(content: bytes, place: Callable[[str], tuple[str, int]]) -> bytes:
    """The same file with its weights looked for elsewhere.

    Args:
        content: of a file that `read_graph_file` accepts.
        place: from the name of a weight file to another file's name, and the byte in it at which the weight file begins.
    """
    model = []
    for number, kind, value in fields(memoryview(content)):
        if number == _MODEL_GRAPH:
            graph = [
                field(n, k, _moved_tensor(nested(v), place) if n == _GRAPH_INITIALIZER else v)
                for n, k, v in fields(nested(value))
            ]
            value = memoryview(b"".join(graph))
        model.append(field(number, kind, value))
    return b"".join(model)


def _read_graph(graph: memoryview, opset: int) -> GraphFile:
    operators, inputs, outputs, weights = set(), [], [], []
    for number, _, value in fields(graph):
        if number == _GRAPH_NODE:
            operators.add(_read_node(nested(value)))
        elif number == _GRAPH_INITIALIZER:
            external = _read_tensor(nested(value))
            if external is not None:
                weights.append(external)
        elif number == _GRAPH_INPUT:
            inputs.append(_read_port(nested(value)))
        elif number == _GRAPH_OUTPUT:
            outputs.append(_read_port(nested(value)))
        elif number == _GRAPH_SPARSE:
            _refuse("it has sparse weights")
    return GraphFile(opset, frozenset(operators), tuple(inputs), tuple(outputs), tuple(weights))


def _read_opset(message: memoryview) -> int:
    domain, version = "", 0
    for number, _, value in fields(message):
        if number == 1:
            domain = text(value)
        elif number == 2:
            version = number_in(value)
    if domain not in ("", "ai.onnx"):
        _refuse(f"it needs operators of {domain[:80]!r}; only ai.onnx is allowed")
    return version


def _read_node(message: memoryview) -> str:
    operator = ""
    for number, _, value in fields(message):
        if number == 4:
            operator = text(value)
        elif number == 7 and text(value) not in ("", "ai.onnx"):
            _refuse(f"it uses an operator of {text(value)[:80]!r}; only ai.onnx is allowed")
        elif number == 5:
            _check_attribute(nested(value))
    return operator


def _check_attribute(message: memoryview) -> None:
    for number, _, value in fields(message):
        if number in (6, 11, 22, 23):  # a graph, graphs, a sparse tensor, sparse tensors
            _refuse("a node holds a graph or a sparse tensor of its own")
        if number in (5, 10) and _read_tensor(nested(value)) is not None:
            _refuse("a node's attribute refers to another file")


def _read_tensor(message: memoryview) -> External | None:
    name, dims, kind, external = "", [], 0, False
    stored: dict[str, str] = {}
    for number, _, value in fields(message):
        if number == _TENSOR_DIMS:
            dims += numbers(value)
        elif number == _TENSOR_TYPE:
            kind = number_in(value)
        elif number == _TENSOR_NAME:
            name = text(value)
        elif number == _TENSOR_EXTERNAL:
            stored |= dict([_read_pair(nested(value))])
        elif number == _TENSOR_LOCATION:
            external = number_in(value) == _EXTERNAL
    elements = math.prod(dims)
    if kind not in _ITEM_BYTES or min(dims, default=0) < 0 or elements > MAX_ELEMENTS:
        _refuse(f"the tensor {name[:80]!r} has the type {kind} or an impossible shape")
    if not external:
        if stored:
            _refuse(f"the tensor {name[:80]!r} is said to be in this file and in another")
        return None
    file, offset, length = stored.get("location", ""), stored.get("offset", "0"), stored.get("length", "")
    if not (file and offset.isdecimal() and length.isdecimal() and len(offset) < 20 and len(length) < 20):
        _refuse(f"the tensor {name[:80]!r} does not say where its data lies")
    if int(length) != elements * _ITEM_BYTES[kind]:
        _refuse(f"the tensor {name[:80]!r} claims {length} bytes for {elements} elements")
    return External(name, file, int(offset), int(length))


def _read_pair(message: memoryview) -> tuple[str, str]:
    pair = {number: text(value) for number, _, value in fields(message)}
    return pair.get(1, ""), pair.get(2, "")


def _read_port(message: memoryview) -> Port:
    name, dims, kind = "", [], 0
    for number, _, value in fields(message):
        if number == 1:
            name = text(value)
        elif number == 2:
            for part, _, inner in fields(nested(value)):
                if part != 1:
                    _refuse(f"{name[:80]!r} is not a plain tensor")
                for item, _, deeper in fields(nested(inner)):
                    if item == 1:
                        kind = number_in(deeper)
                    elif item == 2:
                        dims = [_read_side(nested(side)) for n, _, side in fields(nested(deeper)) if n == 1]
    if kind not in _DTYPES:
        _refuse(f"{name[:80]!r} has the type {kind}, expected float32 or int64")
    return Port(name, tuple(dims), _DTYPES[kind])


def _read_side(message: memoryview) -> int:
    for number, _, value in fields(message):
        if number == 1:
            return number_in(value)
    return -1  # a symbolic side, which no manifest has


def _moved_tensor(message: memoryview, place: Callable[[str], tuple[str, int]]) -> bytes:
    external = _read_tensor(message)
    if external is None:
        return bytes(message)
    file, start = place(external.file)
    entries = {"location": file, "offset": str(start + external.offset), "length": str(external.length)}
    kept = [field(number, kind, value) for number, kind, value in fields(message) if number != _TENSOR_EXTERNAL]
    pairs = [field(1, BYTES, key.encode()) + field(2, BYTES, value.encode()) for key, value in entries.items()]
    return b"".join([*kept, *(field(_TENSOR_EXTERNAL, BYTES, pair) for pair in pairs)])


def _refuse(reason: str) -> NoReturn:
    raise WireError(reason)
