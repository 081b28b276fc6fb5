"""Intervals of timesteps, each with numbers of its own; the same on every runtime, and nothing here needs torch."""

from __future__ import annotations

TIMESTEPS = 1000


def interval_of(timestep: float, intervals: int) -> int:
    """The interval of a timestep, i = floor(t N / T), 0 the least noisy.

    Paper: TuneQDM (arXiv 2401.04339).
    """
    return min(int(timestep * intervals / TIMESTEPS), intervals - 1)
