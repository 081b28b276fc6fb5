"""Sizes and times as people write and read them. MB are 1e6 bytes and GB 1e9, as everywhere in the documentation."""

from __future__ import annotations

import re

from pocketune.errors import RecipeError

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?I?)B?\s*")


def parse_size(text: str) -> int:
    """Bytes of "1GiB", "900MB", "1.5G" or "800000000"; MB and M are 1e6 bytes, MiB 2^20.

    Raises:
        RecipeError: it is no size.
    """
    found = _SIZE.fullmatch(text.upper())
    size = 0.0 if found is None or found[2] == "I" else float(found[1]) * _FACTORS[found[2]]
    if not 1 <= size < 2**63:
        msg = f'"{text}" is no size of memory: expected a number with a unit, such as 1GiB, 900MB or 1.5G.'
        raise RecipeError(msg)
    return round(size)


def readable_size(size_bytes: float) -> str:
    """Bytes as a person reads them: 3.2 MB, 1,234 MB, 25.3 GB from 10 GB on, and 41.5 kB below 0.1 MB."""
    size = size_bytes / 1e6
    if 0 < size < 0.1:
        return f"{size_bytes / 1e3:.1f} kB"
    if size >= 10_000:
        return f"{size / 1e3:.1f} GB"
    return f"{size:,.0f} MB" if size >= 100 else f"{size:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
