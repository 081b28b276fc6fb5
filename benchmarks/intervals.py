"""Bootstrap intervals of means and of ratios of means, over subjects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def mean_estimate(values: np.ndarray) -> Estimate:
    """The mean over subjects, values: (subjects,), with its percentile bootstrap interval; equal values give equal ends."""
    return _estimate(float(values.mean()), values[_resamples(len(values))].mean(axis=1))


def ratio_estimate(values: np.ndarray, reference: np.ndarray) -> Estimate:
    """The ratio of two means over the same subjects, both (subjects,); subjects are resampled in pairs."""
    drawn = _resamples(len(values))
    return _estimate(float(values.mean() / reference.mean()), values[drawn].mean(axis=1) / reference[drawn].mean(axis=1))


def _resamples(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(count, size=(RESAMPLES, count))


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(value, float(low), float(high))
