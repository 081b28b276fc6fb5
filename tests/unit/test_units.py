"""Sizes and times are read and written in one way."""

from __future__ import annotations

import pytest

from pocketune.errors import RecipeError
from pocketune.units import duration, parse_size, readable_size


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 2**30), ("900MB", 900_000_000), ("1.5G", 1_500_000_000), ("512 mib", 2**29), ("800000000", 8e8)]
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "1TB", "-1G", "0", "0.4", "1 I", "1e9", "9" * 400 + "G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is no size of memory"):
        parse_size(text)


@pytest.mark.parametrize("text", ["3.2 MB", "600 MB", "25.3 GB"])
def test_a_size_is_written_as_it_may_be_asked_for(text: str) -> None:
    assert readable_size(parse_size(text)) == text


def test_sizes_are_decimal() -> None:
    sizes = [
        (0, "0.0 MB"),
        (41_500, "41.5 kB"),
        (3_240_000, "3.2 MB"),
        (1_234_000_000, "1,234 MB"),
        (25_277_000_000, "25.3 GB"),
    ]
    assert [readable_size(size_bytes) for size_bytes, _ in sizes] == [text for _, text in sizes]


def test_durations_carry_what_rounds_up() -> None:
    times = [(4.24, "4.2 s"), (59.97, "1 min 0 s"), (200, "3 min 20 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
    assert [duration(seconds) for seconds, _ in times] == [text for _, text in times]
