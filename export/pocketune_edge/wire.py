"""The protobuf wire format, in the one form that ONNX files are written in.

Parsers differ in what they make of everything else: of numbers that are longer than their type, of a field in another wire type
than its own, of one that stands there twice, of those that they do not know. All of it is refused, so that a runtime's parser
cannot see anything in a file that this one did not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

VARINT, BYTES, FIXED32 = 0, 2, 5
_MAX_FIELD_NUMBER = 2**29 - 1


class WireError(ValueError):
    """Bytes that are no protobuf message, or that parsers may read in different ways."""


class Kind(Enum):
    """What a field holds. Messages are bytes, enumerations are INT32; neither is ever negative in ONNX."""

    INT32 = "int32"
    INT64 = "int64"
    FLOAT = "float"
    TEXT = "text"
    BYTES = "bytes"


_WIRE_TYPES = {Kind.INT32: VARINT, Kind.INT64: VARINT, Kind.FLOAT: FIXED32, Kind.TEXT: BYTES, Kind.BYTES: BYTES}


@dataclass(frozen=True)
class Message:
    """All fields that a message may have, by number.

    Attributes:
        name: how errors call it.
        once: those that stand there at most once.
        repeated: those that may stand there more often, never packed.
    """

    name: str
    once: Mapping[int, Kind]
    repeated: Mapping[int, Kind] = field(default_factory=dict)

    def read(self, message: memoryview) -> Iterator[tuple[int, Any]]:
        """Number and value of each field in order: an int for numbers, a str for text, a view of the bytes for all others.

        Raises:
            WireError: the message is damaged, or has a field that is none of these, of another kind, or there twice.
        """
        seen = set()
        for number, wire_type, value in fields(message):
            kind = self.once.get(number) or self.repeated.get(number)
            if kind is None:
                msg = f"{self.name} has the field {number}, which plain graphs do not have"
                raise WireError(msg)
            if number in seen:
                msg = f"{self.name} has the field {number} twice"
                raise WireError(msg)
            if number in self.once:
                seen.add(number)
            if wire_type != _WIRE_TYPES[kind]:
                msg = f"{self.name} has the field {number} in wire type {wire_type}, expected {_WIRE_TYPES[kind]}"
                raise WireError(msg)
            yield number, _converted(value, kind)


def fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Number, wire type and value of each field in order; values of varints are unsigned, all others are views.

    Raises:
        WireError: the message is cut off or damaged, or not written in the shortest form.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if not 1 <= number <= _MAX_FIELD_NUMBER:  # of a longer one, other parsers keep 29 bits
            msg = f"a field has the number {number}, which no field can have"
            raise WireError(msg)
        if wire_type == VARINT:
            value, position = _varint(message, position)
            yield number, wire_type, value
            continue
        if wire_type == BYTES:
            size, position = _varint(message, position)
        elif wire_type == FIXED32:
            size = 4
        else:
            msg = f"a field has the wire type {wire_type}, which ONNX has not"
            raise WireError(msg)
        if size > len(message) - position:
            msg = "a field is longer than its message"
            raise WireError(msg)
        yield number, wire_type, message[position : position + size]
        position += size


def encoded(number: int, wire_type: int, value: int | bytes | memoryview) -> bytes:
    """One field as bytes."""
    head = _encode_varint(number << 3 | wire_type)
    if isinstance(value, int):
        return head + _encode_varint(value)
    return head + (_encode_varint(len(value)) if wire_type == BYTES else b"") + bytes(value)


def _converted(value: int | memoryview, kind: Kind) -> int | str | memoryview:
    if isinstance(value, int):
        if kind is Kind.INT32 and value >= 2**31:
            msg = "a number has more bits than its type"
            raise WireError(msg)
        return value - 2**64 if value >= 2**63 else value
    if kind is not Kind.TEXT:
        return value
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        msg = "a string is not UTF-8"
        raise WireError(msg) from error


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    if position < len(message) and message[position] < 0x80:
        return message[position], position + 1
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 2**64 or (byte == 0 and shift > 0):
                break
            return value, position
    msg = "a number is cut off, too long, or not in its shortest form"
    raise WireError(msg)


def _encode_varint(value: int) -> bytes:
    encoded_bytes = bytearray()
    while value > 0x7F:
        encoded_bytes.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded_bytes, value])
