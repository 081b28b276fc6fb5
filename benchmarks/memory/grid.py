"""Further jobs, small ones: rows that the planner's constants were fitted to, and rows to test it by."""

from __future__ import annotations

from typing import Any

from benchmarks.memory.jobs import LOW, Job

_TITLES = {"pixart-sigma-xl-1024": "PixArt-Sigma", "sana-600m-1024": "SANA-0.6B"}
_PIXART, _SANA = _TITLES
_TWO, _FOUR, _SEVEN = "0-12,15-27", "0-11,16-27", "0-13,21-27"
_RECOMPUTED: dict[str, Any] = {"activations": "recomputed"}
_STREAMED: dict[str, Any] = {"weights": "streamed", "activations": "recomputed"}


def _job(model: str, resolution: int, what: str, *, skip: str = "none", **settings: Any) -> Job:
    title = f"{_TITLES[model]}, {resolution} px, {what}"
    return Job(title=title, model=model, resolution=resolution, text_tokens=300, skip=skip, settings=settings)


FITTED: dict[str, Job] = {
    "fit-pixart-256-recomputed": _job(_PIXART, 256, "14 of 28 blocks, weights in memory", skip="0-9,24-27", **_RECOMPUTED),
    "fit-pixart-256-low": _job(_PIXART, 256, "activations on disk", **LOW),
    "fit-pixart-256-quarter": _job(_PIXART, 256, "7 of 28 blocks, activations on disk", skip=_SEVEN, **LOW),
    "fit-pixart-256-two-streamed": _job(_PIXART, 256, "2 of 28 blocks, weights streamed", skip=_TWO, **_STREAMED),
}
"""Rows that the planner's constants were fitted to, beside those that `budget.constants` names of `benchmarks.memory.jobs`."""

HELD_OUT: dict[str, Job] = {
    "held-sana-256-two-low": _job(_SANA, 256, "2 of 28 blocks, activations on disk", skip=_TWO, **LOW),
    "held-pixart-512-two-streamed": _job(_PIXART, 512, "2 of 28 blocks, weights streamed", skip=_TWO, **_STREAMED),
    "held-sana-128-two": _job(_SANA, 128, "2 of 28 blocks, weights in memory", skip=_TWO, **_RECOMPUTED),
    "held-pixart-128-two-rank": _job(
        _PIXART, 128, "2 of 28 blocks, weights streamed, rank 64", skip=_TWO, rank=64, **_STREAMED
    ),
    "held-pixart-384-two": _job(_PIXART, 384, "2 of 28 blocks, weights in memory", skip=_TWO, **_RECOMPUTED),
    "held-sana-192-four": _job(_SANA, 192, "4 of 28 blocks, weights streamed", skip=_FOUR, **_STREAMED),
    "held-pixart-256-four-low": _job(_PIXART, 256, "4 of 28 blocks, activations on disk", skip=_FOUR, **LOW),
}
"""Rows of jobs that were chosen, and measured, after the constants were fixed."""
