"""A graph file is read as the runtime reads it, or refused: nothing in it can be seen by one of the two alone."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError

from pocketune_edge.bundle import Bundle, open_bundle
from pocketune_edge.errors import BundleError
from pocketune_edge.manifest import Graph
from pocketune_edge.onnxfile import GraphFile, move_weights, read_graph_file
from pocketune_edge.session import Session
from pocketune_edge.wire import BYTES, FIXED32, VARINT, Kind, Message, WireError, encoded, fields
from tests.edge.handmade import TOKENS, WIDTH, head_graph, read_manifest_json, seal

SOUND: bytes = head_graph().SerializeToString()
SECRET = b"../secret.bin"
BEYOND = 2**29
"""Added to a field's number, vanishes in parsers that keep 29 bits of it."""
FIXED64 = 1
TENSOR, PAIR, NODE = (7, 5), (7, 5, 13), (7, 1)
Change = Callable[[bytes], bytes]


def changed(content: bytes, way: tuple[int, ...], change: Change) -> bytes:
    """The first message that the way leads to, put through `change`."""
    if not way:
        return change(content)
    parts, done = [], False
    for number, kind, value in fields(memoryview(content)):
        part: int | bytes = value if isinstance(value, int) else bytes(value)
        if number == way[0] and not done and isinstance(part, bytes):
            part, done = changed(part, way[1:], change), True
        parts.append(encoded(number, kind, part))
    return b"".join(parts)


def hidden(*numbers: int) -> Change:
    """Fields whose numbers look like others."""

    def change(message: bytes) -> bytes:
        return b"".join(encoded(n + BEYOND * (n in numbers), kind, value) for n, kind, value in fields(memoryview(message)))

    return change


def fixed64(number: int, value: bytes) -> bytes:
    return encoded(number, FIXED64, 0)[:-1] + value


def place(file: bytes) -> bytes:
    return encoded(1, BYTES, b"location") + encoded(2, BYTES, file)


def without(*numbers: int) -> Change:
    def change(message: bytes) -> bytes:
        return b"".join(encoded(*part) for part in fields(memoryview(message)) if part[0] not in numbers)

    return change


def placed(tensor: bytes, *, length: str) -> bytes:
    """A tensor whose length is written in this way."""
    entries = (encoded(1, BYTES, b"length") + encoded(2, BYTES, length.encode()), place(b"weights/head.bin"))
    return without(13)(tensor) + b"".join(encoded(13, BYTES, entry) for entry in entries)


def external(value: bytes) -> Change:
    """A tensor that says with these bytes that its data lies elsewhere."""
    return lambda message: without(14)(message) + b"\x70" + value


HOSTILE = {
    "an outer file in fields that look unknown": changed(changed(SOUND, PAIR, lambda _: place(SECRET)), TENSOR, hidden(13, 14)),
    "an operator domain in a field that looks unknown": changed(
        SOUND, NODE, lambda node: node + hidden(7)(encoded(7, BYTES, b"com.microsoft"))
    ),
    "a function in a field that looks unknown": SOUND + hidden(25)(encoded(25, BYTES, b"")),
    "a second operator set in a field that looks unknown": SOUND + hidden(8)(encoded(8, BYTES, b"")),
    "a field number of more than 32 bits": SOUND + encoded(2**32 + 7, BYTES, b""),
    "the field number 0": SOUND + encoded(0, VARINT, 1),
    "a harmless name in another wire type": changed(SOUND, PAIR, lambda _: place(SECRET) + fixed64(2, b"head.bin")),
    "a name in four bytes": changed(SOUND, PAIR, lambda _: encoded(1, BYTES, b"location") + encoded(2, FIXED32, b"head")),
    "a harmless name as a second value": changed(SOUND, PAIR, lambda _: place(SECRET) + encoded(2, BYTES, b"head.bin")),
    "a second place": changed(SOUND, TENSOR, lambda tensor: tensor + encoded(13, BYTES, place(b"head.bin"))),
    "an entry of the runtime's own": changed(
        SOUND, TENSOR, lambda t: t + encoded(13, BYTES, encoded(1, BYTES, b"prepacked_0") + encoded(2, BYTES, b"W|0;64;0"))
    ),
    "elsewhere, in 33 bits": changed(SOUND, TENSOR, external(b"\x81\x80\x80\x80\x10")),
    "elsewhere, not in its shortest form": changed(SOUND, TENSOR, external(b"\x81\x00")),
    "elsewhere, in eleven bytes": changed(SOUND, TENSOR, external(b"\x81" + b"\x80" * 9 + b"\x00")),
    "elsewhere, in more than 64 bits": changed(SOUND, TENSOR, external(b"\x81" + b"\x80" * 8 + b"\x02")),
    "elsewhere, in four bytes": changed(SOUND, TENSOR, lambda t: without(14)(t) + encoded(14, FIXED32, b"\1\0\0\0")),
    "elsewhere, packed": changed(SOUND, TENSOR, lambda t: without(14)(t) + encoded(14, BYTES, b"\1")),
    "here and elsewhere": changed(SOUND, TENSOR, lambda tensor: tensor + encoded(14, VARINT, 0)),
    "sides packed": changed(SOUND, TENSOR, lambda t: without(1)(t) + encoded(1, BYTES, bytes([WIDTH, WIDTH]))),
    "bytes here and elsewhere": changed(SOUND, TENSOR, lambda t: t + encoded(9, BYTES, bytes(4 * WIDTH * WIDTH))),
    "a length in other digits": changed(SOUND, TENSOR, lambda tensor: placed(tensor, length="١٦٣٨٤")),
    "a length with zeros before it": changed(SOUND, TENSOR, lambda tensor: placed(tensor, length="016384")),
    "a number in four bytes": SOUND.replace(b"\x08\x08", b"\x0d\x08\0\0\0", 1),
    "a group": SOUND + bytes([7 << 3 | 3, 7 << 3 | 4]),
    "a group inside a message": changed(SOUND, NODE, lambda node: node + bytes([7 << 3 | 3, 7 << 3 | 4])),
    "an extension": SOUND + encoded(1000, BYTES, b""),
    "two graphs": SOUND + encoded(7, BYTES, b""),
    "a size not in its shortest form": SOUND + b"\x12\x81\x00x",
    "metadata": SOUND + encoded(14, BYTES, encoded(1, BYTES, b"ort_config") + encoded(2, BYTES, b"{}")),
    "a graph inside a node": changed(SOUND, NODE, lambda node: node + encoded(5, BYTES, encoded(6, BYTES, b""))),
    "a graph by its type alone": changed(SOUND, NODE, lambda node: node + encoded(5, BYTES, encoded(20, VARINT, 5))),
    "no shape": changed(SOUND, (7, 11, 2, 1), without(2)),
    "a symbolic side": changed(SOUND, (7, 11, 2, 1, 2, 1), lambda _: encoded(2, BYTES, b"n")),
    "a sequence": changed(SOUND, (7, 11, 2), lambda kind: kind + encoded(4, BYTES, b"")),
    "another format": b"\x08\x08\x12\x09ORTMORTM!" + without(1)(SOUND),
    "a name that is no text": changed(SOUND, NODE, lambda node: node + encoded(3, BYTES, b"\xff")),
    "nine dimensions": changed(SOUND, TENSOR, lambda t: t + encoded(1, VARINT, 1) * 7),
    "a negative side": changed(SOUND, TENSOR, lambda t: without(1)(t) + encoded(1, VARINT, 2**64 - WIDTH) * 2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_parsers_read_differently_is_refused(name: str) -> None:
    assert HOSTILE[name] != SOUND
    with pytest.raises(WireError):
        read_graph_file(HOSTILE[name])


def test_a_hidden_weight_file_opens_no_bundle(bundle: Path) -> None:
    """As it would reach a device: with sound hashes, and a file to be read beside the bundle."""
    (bundle.parent / "secret.bin").write_bytes(bytes(64 + 4 * WIDTH * WIDTH))
    for name in ("an outer file in fields that look unknown", "a harmless name in another wire type"):
        (bundle / "head.onnx").write_bytes(HOSTILE[name])
        manifest = read_manifest_json(bundle)
        seal(bundle, manifest)
        with pytest.raises(BundleError, match="is not a plain ONNX graph"):
            open_bundle(bundle)


def seen_by_protobuf(content: bytes) -> tuple[Any, ...]:
    """What the reference implementation finds of what matters."""
    model = onnx.load_model_from_string(content)
    model.DiscardUnknownFields()
    assert not (model.functions or model.training_info or model.metadata_props or model.graph.sparse_initializer)
    tensors = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute if a.HasField("t"))]
    outside = []
    for tensor in tensors:
        said = {entry.key: entry.value for entry in tensor.external_data}
        assert bool(said) == (tensor.data_location == onnx.TensorProto.EXTERNAL)
        if said:
            outside.append((tensor.name, said["location"], int(said.get("offset", 0)), int(said["length"])))
    domains = {node.domain for node in model.graph.node} | {opset.domain for opset in model.opset_import}
    assert domains <= {"", "ai.onnx"}
    assert not any(a.HasField("g") or a.graphs or a.ref_attr_name for node in model.graph.node for a in node.attribute)
    ports = [
        [(port.name, tuple(side.dim_value for side in port.type.tensor_type.shape.dim)) for port in side]
        for side in (model.graph.input, model.graph.output)
    ]
    return model.opset_import[0].version, *ports, outside


def seen_by_us(found: GraphFile) -> tuple[Any, ...]:
    ports = [[(port.name, port.shape) for port in side] for side in (found.inputs, found.outputs)]
    return found.opset, *ports, [(weight.name, weight.file, weight.offset, weight.length) for weight in found.weights]


def test_whatever_is_accepted_is_what_protobuf_reads(skipping_bundle: Path) -> None:
    """Of files whose fields are repeated, renumbered, given other wire types or cut, those that pass say the same to both."""
    rng = random.Random(11)
    originals = [SOUND, *(path.read_bytes() for path in sorted(skipping_bundle.glob("*.onnx"))[:4])]
    accepted = 0
    for original in originals:
        assert seen_by_us(read_graph_file(original)) == seen_by_protobuf(original)
        places = list(ways(original))
        for _ in range(300 if original is SOUND else 20):
            content = changed(original, rng.choice(places), lambda message: disturbed(message, rng))
            try:
                found = read_graph_file(content)
            except WireError:
                continue
            try:
                expected = seen_by_protobuf(content)
            except DecodeError:
                pytest.fail("a file was accepted that protobuf does not read")
            assert seen_by_us(found) == expected
            accepted += 1
    assert accepted > 20


def ways(content: bytes, way: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """To every kind of message in the content."""
    yield way
    found = set()
    for number, _, value in fields(memoryview(content)):
        if number in MESSAGES.get(way, ()) and number not in found and isinstance(value, memoryview):
            found.add(number)
            yield from ways(bytes(value), (*way, number))


MESSAGES: dict[tuple[int, ...], tuple[int, ...]] = {(): (7, 8), (7,): (1, 5, 11, 12, 13), (7, 1): (5,), (7, 5): (13,)}
for port in (11, 12, 13):
    MESSAGES |= {(7, port): (2,), (7, port, 2): (1,), (7, port, 2, 1): (2,), (7, port, 2, 1, 2): (1,)}


def disturbed(message: bytes, rng: random.Random) -> bytes:
    parts = [
        (number, kind, bytes(value) if not isinstance(value, int) else value)
        for number, kind, value in fields(memoryview(message))
    ]
    if not parts:
        return message
    position = rng.randrange(len(parts))
    number, kind, value = parts[position]
    whole = [encoded(*part) for part in parts]
    match rng.randrange(7):
        case 0:
            whole.insert(rng.randrange(len(whole) + 1), whole[position])
        case 1:
            whole[position] = encoded(number + rng.choice([BEYOND, 1, 8]), kind, value)
        case 2:
            whole[position] = encoded(number, FIXED32, b"head")
        case 3:
            whole.insert(position, encoded(number, VARINT, rng.choice([0, 1, 2**31, 2**32 + 1, 2**64 - 1])))
        case 4:
            del whole[position]
        case 5:
            rng.shuffle(whole)
        case _:
            place = rng.randrange(len(message))
            return message[:place] + bytes([rng.randrange(256)]) + message[place + 1 :]
    return b"".join(whole)


def test_the_bytes_decide_no_format(bundle: Path) -> None:
    """ONNX Runtime takes bytes marked as its own format for that, unless it is told; the reader is not the only guard."""
    posing = HOSTILE["another format"]

    class Unchecked(Bundle):
        def model(self, graph: Graph) -> tuple[bytes, Path]:
            del graph
            return posing, self.path

    opened = open_bundle(bundle)
    unchecked = Unchecked(opened.path, opened.manifest, opened._storage)
    session = Session(unchecked, opened.manifest.graph("head"), threads=1)
    values = {"image": np.zeros((1, TOKENS, WIDTH), np.float32), "embedding": np.ones((1, WIDTH), np.float32)}
    assert np.array_equal(session.run(values)["velocity"], np.ones((1, TOKENS, WIDTH), np.float32))


def test_a_graph_is_given_to_the_runtime_as_it_was_read(bundle: Path) -> None:
    """From a folder too: what the reader did not see of a weight's place is gone, and a file that changed is refused."""
    opened = open_bundle(bundle)
    graph = opened.manifest.graph("head")
    assert opened.model(graph)[0] == move_weights(SOUND, lambda file: (file, 0))
    assert seen_by_protobuf(opened.model(graph)[0]) == seen_by_protobuf(SOUND)
    (bundle / "head.onnx").write_bytes(HOSTILE["a harmless name in another wire type"])
    with pytest.raises(BundleError, match="changed after it was checked"):
        opened.model(graph)


def test_fields_survive_being_written() -> None:
    message = Message("a test", {1: Kind.INT64, 2: Kind.TEXT, 536870911: Kind.FLOAT}, {3: Kind.INT32})
    values = [(1, -5), (2, "photo é"), (3, 0), (3, 2**31 - 1), (536870911, b"\0\0\x80\x3f")]
    kinds = [VARINT, BYTES, VARINT, VARINT, FIXED32]
    content = b""
    for (number, value), kind in zip(values, kinds, strict=True):
        raw: Any = value % 2**64 if isinstance(value, int) else value.encode() if isinstance(value, str) else value
        content += encoded(number, kind, raw)
    assert list(message.read(memoryview(content))) == values
