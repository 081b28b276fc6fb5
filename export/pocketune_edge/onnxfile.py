"""What an ONNX file asks of the runtime, read before the runtime sees it; and the file with its weights found elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from pocketune_edge.agreement import MAX_ELEMENTS
from pocketune_edge.wire import BYTES, Kind, Message, WireError, encoded, fields

_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_DTYPES = {1: "float32", 7: "int64"}
_MAX_DIMENSIONS = 8
_EXTERNAL = 1
_WHOLE_NUMBER = re.compile("0|[1-9][0-9]{0,18}")
_OTHER_FORMAT = b"ORTM"
"""In bytes 4 to 7, makes ONNX Runtime take a file for one of its own format, whatever else is in it."""

# The part of onnx.proto that exported graphs use. What is not here is refused: functions, graphs in nodes, sparse tensors,
# metadata, symbolic sides, tensors that are neither raw bytes nor elsewhere.
_MODEL_GRAPH, _MODEL_OPSET = 7, 8
_MODEL = Message("the model", {1: Kind.INT64, 2: Kind.TEXT, _MODEL_GRAPH: Kind.BYTES}, {_MODEL_OPSET: Kind.BYTES})
_OPSET = Message("an operator set", {1: Kind.TEXT, 2: Kind.INT64})
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE = 1, 5, 11, 12, 13
_GRAPH = Message(
    "the graph",
    {2: Kind.TEXT},
    dict.fromkeys((_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE), Kind.BYTES),
)
_NODE_ATTRIBUTE, _NODE_DOMAIN = 5, 7
_NODE = Message(
    "a node", {3: Kind.TEXT, 4: Kind.TEXT, _NODE_DOMAIN: Kind.TEXT}, {1: Kind.TEXT, 2: Kind.TEXT, _NODE_ATTRIBUTE: Kind.BYTES}
)
_ATTRIBUTE_TENSOR, _ATTRIBUTE_TYPE = 5, 20
_ATTRIBUTE_TYPES = (1, 2, 3, 4, 7)
"""A float, an int, a string, a tensor, ints."""
_ATTRIBUTE = Message(
    "an attribute",
    {1: Kind.TEXT, 2: Kind.FLOAT, 3: Kind.INT64, 4: Kind.BYTES, _ATTRIBUTE_TENSOR: Kind.BYTES, _ATTRIBUTE_TYPE: Kind.INT32},
    {8: Kind.INT64},
)
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 9, 13, 14
_TENSOR = Message(
    "a tensor",
    {_TENSOR_TYPE: Kind.INT32, _TENSOR_NAME: Kind.TEXT, _TENSOR_RAW: Kind.BYTES, _TENSOR_LOCATION: Kind.INT32},
    {_TENSOR_DIMS: Kind.INT64, _TENSOR_EXTERNAL: Kind.BYTES},
)
_PAIR = Message("an entry", {1: Kind.TEXT, 2: Kind.TEXT})
_PORT = Message("a value", {1: Kind.TEXT, 2: Kind.BYTES})
_TYPE = Message("a type", {1: Kind.BYTES})
_TENSOR_KIND = Message("a tensor's type", {1: Kind.INT32, 2: Kind.BYTES})
_SHAPE = Message("a shape", {}, {1: Kind.BYTES})
_SIDE = Message("a side", {1: Kind.INT64})
_NOTHING = memoryview(b"")


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
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: tuple[External, ...]


def read_graph_file(content: bytes) -> GraphFile:
    """Read the structure of a plain graph.

    Raises:
        WireError: it is no ONNX file, or not plain: other operator domains, nested graphs, functions, sparse or odd weights, or
            anything that another parser may read in another way.
    """
    if content[4:8] == _OTHER_FORMAT:
        _refuse("it poses as a file of another format")
    opsets: list[int] = []
    graphs: list[memoryview] = []
    for number, value in _MODEL.read(memoryview(content)):
        if number == _MODEL_GRAPH:
            graphs.append(value)
        elif number == _MODEL_OPSET:
            opsets.append(_read_opset(value))
    if len(graphs) != 1 or len(opsets) != 1:
        _refuse("expected one graph and one operator set")
    return _read_graph(graphs[0], opsets[0])


def move_weights(content: bytes, place: Callable[[str], tuple[str, int]]) -> bytes:
    """The same file with its weights looked for elsewhere.

    Args:
        content: of a file that `read_graph_file` accepts.
        place: from the name of a weight file to another file's name, and the byte in it at which the weight file begins.

    Raises:
        WireError: it is no such file.
    """
    model = []
    for number, wire_type, value in fields(memoryview(content)):
        if number == _MODEL_GRAPH and isinstance(value, memoryview):
            graph = [
                encoded(
                    n, kind, _moved_tensor(part, place) if n == _GRAPH_INITIALIZER and isinstance(part, memoryview) else part
                )
                for n, kind, part in fields(value)
            ]
            model.append(encoded(number, wire_type, b"".join(graph)))
        else:
            model.append(encoded(number, wire_type, value))
    return b"".join(model)


def _read_graph(graph: memoryview, opset: int) -> GraphFile:
    inputs, outputs, weights = [], [], []
    for number, value in _GRAPH.read(graph):
        if number == _GRAPH_NODE:
            _check_node(value)
        elif number == _GRAPH_INITIALIZER:
            external = _read_tensor(value)
            if external is not None:
                weights.append(external)
        elif number == _GRAPH_INPUT:
            inputs.append(_read_port(value))
        elif number == _GRAPH_OUTPUT:
            outputs.append(_read_port(value))
        elif number == _GRAPH_VALUE:
            _read_value(value)
    return GraphFile(opset, tuple(inputs), tuple(outputs), tuple(weights))


def _read_opset(message: memoryview) -> int:
    found = dict(_OPSET.read(message))
    domain = found.get(1, "")
    if domain not in ("", "ai.onnx"):
        _refuse(f"it needs operators of {domain[:80]!r}; only ai.onnx is allowed")
    version: int = found.get(2, 0)
    return version


def _check_node(message: memoryview) -> None:
    for number, value in _NODE.read(message):
        if number == _NODE_DOMAIN and value not in ("", "ai.onnx"):
            _refuse(f"it uses an operator of {value[:80]!r}; only ai.onnx is allowed")
        elif number == _NODE_ATTRIBUTE:
            for part, inner in _ATTRIBUTE.read(value):
                if part == _ATTRIBUTE_TENSOR and _read_tensor(inner) is not None:
                    _refuse("a node's attribute refers to another file")
                if part == _ATTRIBUTE_TYPE and inner not in _ATTRIBUTE_TYPES:
                    _refuse(f"a node's attribute has the type {inner}")


def _read_tensor(message: memoryview) -> External | None:
    name, kind, location, raw = "", 0, 0, _NOTHING
    dims: list[int] = []
    stored: dict[str, str] = {}
    for number, value in _TENSOR.read(message):
        if number == _TENSOR_DIMS:
            dims.append(_side(value, known=len(dims)))
        elif number == _TENSOR_TYPE:
            kind = value
        elif number == _TENSOR_NAME:
            name = value
        elif number == _TENSOR_RAW:
            raw = value
        elif number == _TENSOR_EXTERNAL:
            key, said = _read_pair(value)
            if key in stored or key not in ("location", "offset", "length"):
                _refuse(f"a tensor has the entry {key[:80]!r} twice or for another runtime")
            stored[key] = said
        elif number == _TENSOR_LOCATION:
            location = value
    elements = math.prod(dims)
    if kind not in _ITEM_BYTES or elements > MAX_ELEMENTS:
        _refuse(f"the tensor {name[:80]!r} has the type {kind} or an impossible shape")
    size = elements * _ITEM_BYTES[kind]
    if location != _EXTERNAL:
        if stored or location:
            _refuse(f"the tensor {name[:80]!r} is said to be in this file and in another")
        if len(raw) != size:
            _refuse(f"the tensor {name[:80]!r} has {len(raw)} bytes for {elements} elements")
        return None
    file, offset, length = stored.get("location", ""), stored.get("offset", "0"), stored.get("length", "")
    if not (file and _WHOLE_NUMBER.fullmatch(offset) and _WHOLE_NUMBER.fullmatch(length)) or raw:
        _refuse(f"the tensor {name[:80]!r} does not say where its data lies")
    if int(length) != size:
        _refuse(f"the tensor {name[:80]!r} claims {length} bytes for {elements} elements")
    return External(name, file, int(offset), int(length))


def _side(value: int, *, known: int) -> int:
    """A side of a shape of which some sides are known; nothing is computed of a shape that cannot be."""
    if known == _MAX_DIMENSIONS or not 0 <= value <= MAX_ELEMENTS:
        _refuse("it has an impossible shape")
    return value


def _read_pair(message: memoryview) -> tuple[str, str]:
    pair = dict(_PAIR.read(message))
    return pair.get(1, ""), pair.get(2, "")


def _read_port(message: memoryview) -> Port:
    name, shape, kind = _read_value(message)
    if kind not in _DTYPES:
        _refuse(f"{name[:80]!r} has the type {kind}, expected float32 or int64")
    return Port(name, shape, _DTYPES[kind])


def _read_value(message: memoryview) -> tuple[str, tuple[int, ...], int]:
    """Name, shape and type of a value."""
    value = dict(_PORT.read(message))
    name: str = value.get(1, "")
    tensor = dict(_TENSOR_KIND.read(dict(_TYPE.read(value.get(2, _NOTHING))).get(1, _NOTHING)))
    if 2 not in tensor:
        _refuse(f"{name[:80]!r} has no shape")
    sides: list[int] = []
    for _, side in _SHAPE.read(tensor[2]):
        sides.append(_side(dict(_SIDE.read(side)).get(1, -1), known=len(sides)))
    return name, tuple(sides), tensor.get(1, 0)


def _moved_tensor(message: memoryview, place: Callable[[str], tuple[str, int]]) -> bytes:
    external = _read_tensor(message)
    if external is None:
        return bytes(message)
    file, start = place(external.file)
    entries = {"location": file, "offset": str(start + external.offset), "length": str(external.length)}
    kept = [encoded(number, kind, value) for number, kind, value in fields(message) if number != _TENSOR_EXTERNAL]
    pairs = [encoded(1, BYTES, key.encode()) + encoded(2, BYTES, value.encode()) for key, value in entries.items()]
    return b"".join([*kept, *(encoded(_TENSOR_EXTERNAL, BYTES, pair) for pair in pairs)])


def _refuse(reason: str) -> NoReturn:
    raise WireError(reason)
