"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from pocketune.errors import RecipeError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?I?)B?\s*")


def parse_size(text: str) -> int:
    """Bytes of "1GiB", "900MB", "1.5G" or "800000000"; MB and M are 1e6 bytes, MiB 2^20.

    Raises:
        RecipeError: it is no size.
    """
    found = _SIZE.fullmatch(text.upper())
    if found is None or found[2] == "I" or not float(found[1]):
        msg = f'"{text}" is no size of memory: expected a number with a unit, such as 1GiB, 900MB or 1.5G.'
        raise RecipeError(msg)
    return round(float(found[1]) * _UNITS[found[2]])


def readable(size_bytes: float) -> str:
    """In GiB from 1 GiB on, else in MiB: 3.4 GiB, 612 MiB."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.0f} MiB"
