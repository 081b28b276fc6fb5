"""Safetensors files with equal bytes for equal content: the library writes the entries of the metadata in a random order."""

from __future__ import annotations

import json


def with_sorted_metadata(content: bytes) -> bytes:
    """A safetensors file as it is, but with its metadata sorted by name.

    Args:
        content: the whole file, as the library has written it.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[end:]
