"""JSON files that anyone may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pocketune.errors import FileFormatError, reading
from pocketune.units import readable_size

LIMIT_BYTES = 64_000_000


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        FileFormatError: it cannot be read, is of no plausible size, or holds something else.
    """
    with reading(path):
        if path.stat().st_size > LIMIT_BYTES:
            msg = f"{path} has more than {readable_size(LIMIT_BYTES)}, which is no plausible size. Copy it again."
            raise FileFormatError(msg)
        content = path.read_bytes()
    return parse_object(content, path)


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that some bytes are, which were found at a path.

    Raises:
        FileFormatError: they are something else.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        msg = f"{path} is not valid JSON: {error}. Copy it again."
        raise FileFormatError(msg) from error
    if not isinstance(value, dict):
        msg = f"{path} holds a {type(value).__name__}, expected a JSON object. Copy it again."
        raise FileFormatError(msg)
    return value
