"""Check that the files of a bundle hold what its manifest says: a hash proves only that they are the files that were sealed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper

from pocketune.errors import FileFormatError
from pocketune_export.manifest import Graph, Manifest, TensorSpec

_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
_MAX_GRAPH_BYTES = 2**31 - 1
_MAX_HEADER_BYTES = 2**24


def check_contents(folder: Path, manifest: Manifest) -> None:
    """Check every graph and the LoRA file against the manifest; no graph is run.

    Raises:
        FileFormatError: a graph has other inputs or outputs, an operator outside ai.onnx, or data outside its weight files; or
            the LoRA file has other tensors.
    """
    for graph in manifest.graphs:
        for complaint in _graph_faults(folder / graph.file, graph, manifest):
            msg = f"{folder}: {graph.file}: {complaint}. Export the bundle again."
            raise FileFormatError(msg)
    for complaint in _lora_faults(folder / manifest.lora.initial, manifest):
        msg = f"{folder}: {manifest.lora.initial}: {complaint}. Export the bundle again."
        raise FileFormatError(msg)


def _graph_faults(path: Path, graph: Graph, manifest: Manifest) -> Iterator[str]:
    if path.stat().st_size > _MAX_GRAPH_BYTES:
        yield f"the graph has {path.stat().st_size} bytes, too many for ONNX"
        return
    try:
        model: ModelProto = onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, ValueError):
        yield "it is no ONNX model"
        return
    imports = {entry.domain: entry.version for entry in model.opset_import}
    if imports != {"": manifest.opset} or model.functions:
        yield f"it needs the operator sets {imports}, expected ai.onnx {manifest.opset} alone"
    yield from _port_faults("inputs", model.graph.input, graph.inputs)
    yield from _port_faults("outputs", model.graph.output, graph.outputs)
    sizes = {file.path: file.bytes for file in manifest.files if file.path in graph.weights}
    for tensor in _tensors(model.graph):
        yield from _tensor_faults(tensor, sizes)
    for node in model.graph.node:
        if node.domain or any(attribute.g.node or attribute.graphs for attribute in node.attribute):
            yield f"the node {node.name[:80]} ({node.domain}:{node.op_type}) is not a plain operator of ai.onnx"


def _port_faults(kind: str, found: list[ValueInfoProto], expected: tuple[TensorSpec, ...]) -> Iterator[str]:
    have = [
        (info.name, tuple(side.dim_value for side in info.type.tensor_type.shape.dim), info.type.tensor_type.elem_type)
        for info in found
    ]
    for actual, spec in zip(have, expected, strict=False):
        if actual != (spec.name, spec.shape, _TYPES[spec.dtype]):
            yield f"{kind}: it has {actual[0]} {actual[1]}, the manifest says {spec.name} {spec.shape} {spec.dtype}"
    if len(have) != len(expected):
        yield f"it has {len(have)} {kind}, the manifest says {len(expected)}"


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _tensor_faults(tensor: TensorProto, sizes: Mapping[str, int]) -> Iterator[str]:
    try:
        item = int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, ValueError):
        yield f"the tensor {tensor.name[:80]} has the unknown type {tensor.data_type}"
        return
    expected = math.prod(tensor.dims) * item
    if min(tensor.dims, default=0) < 0:
        yield f"the tensor {tensor.name[:80]} has a negative side"
    if tensor.data_location != TensorProto.EXTERNAL:
        if len(tensor.raw_data) != expected:
            yield f"the tensor {tensor.name[:80]} has {len(tensor.raw_data)} bytes, expected {expected}"
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location, offset, length = (entries.get(key, "") for key in ("location", "offset", "length"))
    if location not in sizes:
        yield f"the tensor {tensor.name[:80]} lies in {location[:80]!r}, which is not among the graph's weight files"
    elif not (offset.isdecimal() and length.isdecimal()) or int(length) != expected:
        yield f"the tensor {tensor.name[:80]} claims {length[:20]} bytes, expected {expected}"
    elif int(offset) + expected > sizes[location]:
        yield f"the tensor {tensor.name[:80]} ends beyond the end of {location}"


def _lora_faults(path: Path, manifest: Manifest) -> Iterator[str]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if length > min(len(content), _MAX_HEADER_BYTES):
        yield "it is no safetensors file"
        return
    try:
        header = json.loads(content[8 : 8 + length])
        found = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        yield "it is no safetensors file"
        return
    expected = {parameter.key: ("F32", parameter.shape) for parameter in manifest.lora.parameters}
    for name in sorted(set(expected) ^ set(found)):
        yield f"the tensor {name[:120]} is there or in the manifest, but not in both"
    for name, form in expected.items():
        if found.get(name) != form:
            yield f"{name} is {found.get(name)}, the manifest says {form}"
