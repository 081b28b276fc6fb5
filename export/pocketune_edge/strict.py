"""Reads plain JSON data into frozen dataclasses by their annotations, and refuses whatever does not fit exactly."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy besides its type; bounds are of numbers, or of the lengths of texts and tuples.

    Attributes:
        low: inclusive.
        high: inclusive.
        above: exclusive.
        below: exclusive.
        pattern: of the whole text.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    pattern: str | None = None

    def complaint(self, value: Any) -> str | None:
        """Why a value breaks the rule, or None."""
        size = len(value) if isinstance(value, str | tuple) else value
        what = "a length" if isinstance(value, str | tuple) else "a number"
        if self.low is not None and size < self.low:
            return f"expected {what} of at least {self.low}, got {size}"
        if self.high is not None and size > self.high:
            return f"expected {what} of at most {self.high}, got {size}"
        if self.above is not None and size <= self.above:
            return f"expected {what} above {self.above}, got {size}"
        if self.below is not None and size >= self.below:
            return f"expected {what} below {self.below}, got {size}"
        if self.pattern is not None and not re.fullmatch(self.pattern, value):
            return f"expected text like {self.pattern}, got {value[:80]!r}"
        return None


class MisfitError(ValueError):
    """Data that does not fit; the text says where and why."""


def read(kind: type[T], data: Any, *, older: bool = False) -> T:
    """Make a value of a dataclass, or of any annotation made of the types below, from JSON data.

    Understood are dataclasses (exactly their fields), int, float (finite), str, bool, tuple, Literal, dict[str, Any], Any,
    unions of these with None, and Annotated with a `Rule`.

    Args:
        kind: what is wanted.
        data: as `json.loads` gives it.
        older: fields that have a default may be missing.

    Raises:
        MisfitError: the data has unknown or missing fields, wrong types, or values that break a rule.
    """
    value: T = _read(kind, data, (), older)
    return value


def _read(kind: Any, data: Any, where: tuple[str, ...], older: bool) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, data, where, older)
    if origin is Annotated:
        value = _read(arguments[0], data, where, older)
        for rule in arguments[1:]:
            complaint = rule.complaint(value) if value is not None else None
            if complaint:
                raise MisfitError(_at(where, complaint))
        return value
    if origin is Literal:
        if any(type(data) is type(choice) and data == choice for choice in arguments):
            return data
        raise MisfitError(_at(where, f"expected one of {', '.join(map(str, arguments))}, got {_short(data)}"))
    if origin in (Union, types.UnionType):
        [inner] = [argument for argument in arguments if argument is not type(None)]
        return None if data is None else _read(inner, data, where, older)
    if origin is tuple:
        return _read_tuple(arguments, data, where, older)
    return _read_plain(kind, data, where)


def _read_fields(kind: Any, data: Any, where: tuple[str, ...], older: bool) -> Any:
    if not isinstance(data, dict):
        raise MisfitError(_at(where, f"expected an object, got {_short(data)}"))
    hints = _hints(kind)
    for name in data:
        if name not in hints:
            raise MisfitError(_at(where, f"unknown field {name[:80]!r}"))
    for field in dataclasses.fields(kind):
        optional = older and field.default is not dataclasses.MISSING
        if field.name not in data and not optional:
            raise MisfitError(_at(where, f"the field {field.name!r} is missing"))
    return kind(**{name: _read(hints[name], value, (*where, name), older) for name, value in data.items()})


def _read_tuple(arguments: tuple[Any, ...], data: Any, where: tuple[str, ...], older: bool) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise MisfitError(_at(where, f"expected a list, got {_short(data)}"))
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(data)
    if len(arguments) != len(data):
        raise MisfitError(_at(where, f"expected {len(arguments)} items, got {len(data)}"))
    return tuple(
        _read(kind, item, (*where, str(index)), older) for index, (kind, item) in enumerate(zip(arguments, data, strict=True))
    )


def _read_plain(kind: Any, data: Any, where: tuple[str, ...]) -> Any:
    if kind is Any or (get_origin(kind) is dict and isinstance(data, dict)):
        return data
    if kind is float and type(data) in (int, float):
        number = float(data) if abs(data) < 2**1023 else math.inf
        if math.isfinite(number):
            return number
    elif type(data) is kind and (kind is not str or _is_unicode(data)):
        return data
    wanted = "an object" if get_origin(kind) is dict else f"a {kind.__name__}"
    if kind is str and isinstance(data, str):
        wanted = "text that UTF-8 can write"
    raise MisfitError(_at(where, f"expected {wanted}, got {_short(data)}"))


def _is_unicode(text: str) -> bool:
    """Whether it can be written: JSON and a terminal's stray bytes can bring halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _at(where: tuple[str, ...], complaint: str) -> str:
    return f"{'.'.join(where)}: {complaint}" if where else complaint


def _short(data: Any) -> str:
    text = repr(data)[:60] if isinstance(data, str | int | float) else type(data).__name__
    return text if data is not None else "null"
