"""Random numbers that every runtime can make again: the raw words of Philox4x64-10, and normals by Box and Muller.

Distributions of numpy's and torch's generators are private to these libraries, and numpy's may change with a version; raw
Philox words may not. They are the outputs, four a block, under a 128-bit key and a 256-bit counter whose lowest word counts
blocks from 1. Paper: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """Second word of the key: what the numbers are for."""

    PHOTOS = 0
    CLASS_IMAGES = 1
    NOISE = 2
    SAMPLING = 3
    PERTURBATION = 4
    CHOICE = 5


def words(seed: int, stream: Stream, count: int, *, purpose: int = 0, index: int = 0) -> NDArray[np.uint64]:
    """Uniform 64-bit words, (count,).

    Args:
        seed: first word of the key, below 2**64.
        stream: second word of the key.
        count: how many.
        purpose: second word of the counter.
        index: third word of the counter.
    """
    key, counter = np.array([seed, stream], np.uint64), np.array([0, purpose, index, 0], np.uint64)
    raw: NDArray[np.uint64] = np.random.Philox(key=key, counter=counter).random_raw(count)
    return raw


def uniforms(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) of the upper 53 bits of each word."""
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(seed: int, stream: Stream, shape: tuple[int, ...], *, purpose: int = 0, index: int = 0) -> NDArray[np.float64]:
    """Standard normal numbers of a shape, float64.

    Paper: Box and Muller 1958: sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v). The first half of the words are u, taken from (0, 1],
    the second half v; all cosines come before all sines, and of an odd count the last sine is dropped.
    """
    count = math.prod(shape)
    half = (count + 1) // 2
    u = uniforms(words(seed, stream, 2 * half, purpose=purpose, index=index))
    radius, angle = np.sqrt(-2.0 * np.log(u[:half] + 2.0**-53)), 2.0 * np.pi * u[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].reshape(shape)
