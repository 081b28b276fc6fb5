"""The protobuf wire format, as far as ONNX files need it: fields of a message, and messages from fields."""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """Bytes that are no protobuf message."""


def fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Number, wire type and value of each field in order; values of varints are unsigned, all others are views.

    Raises:
        WireError: the message is cut off or damaged.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, position = _varint(message, position)
            yield number, kind, value
            continue
        if kind == BYTES:
            size, position = _varint(message, position)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            msg = f"a field has the unknown wire type {kind}"
            raise WireError(msg)
        if size > len(message) - position:
            msg = "a field is longer than its message"
            raise WireError(msg)
        yield number, kind, message[position : position + size]
        position += size


def text(value: int | memoryview) -> str:
    """A string field's value.

    Raises:
        WireError: it is no string.
    """
    try:
        return bytes(nested(value)).decode()
    except UnicodeDecodeError as error:
        msg = "a string is not UTF-8"
        raise WireError(msg) from error


def nested(value: int | memoryview) -> memoryview:
    """A message field's value.

    Raises:
        WireError: it is no message.
    """
    if isinstance(value, int):
        msg = "a number stands where a message or string belongs"
        raise WireError(msg)
    return value


def numbers(value: int | memoryview) -> list[int]:
    """The signed values of a repeated int64 field, packed or not."""
    if isinstance(value, int):
        return [_signed(value)]
    found, position = [], 0
    while position < len(value):
        item, position = _varint(value, position)
        found.append(_signed(item))
    return found


def number_in(value: int | memoryview) -> int:
    """The signed value of a single int64 field; the last one counts.

    Raises:
        WireError: there is none.
    """
    found = numbers(value)
    if not found:
        msg = "a number is missing"
        raise WireError(msg)
    return found[-1]


def field(number: int, kind: int, value: int | bytes | memoryview) -> bytes:
    """Encode one field."""
    head = _encode_varint(number << 3 | kind)
    if isinstance(value, int):
        return head + _encode_varint(value)
    return head + (_encode_varint(len(value)) if kind == BYTES else b"") + bytes(value)


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, position
    msg = "a number is cut off or too long"
    raise WireError(msg)


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
