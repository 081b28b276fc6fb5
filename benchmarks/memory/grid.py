"""Further jobs, small ones: rows that the planner's constants were fitted to, and rows to test it by."""

from __future__ import annotations

from typing import Any

from benchmarks.memory.jobs import LOW, Job

_MODELS = {
    "pixart-sigma-xl-1024": ("PixArt-Sigma", 300),
    "sana-600m-1024": ("SANA-0.6B", 300),
    "sana-1600m-1024": ("SANA-1.6B", 300),
    "sd35-medium": ("SD3.5-medium", 333),
    "sd15": ("SD1.5", 77),
}
"""Titles, and tokens of a prompt."""
_PIXART, _SANA, _LARGE_SANA, _SD35, _SD15 = _MODELS
_TWO, _FOUR, _SEVEN = "0-12,15-27", "0-11,16-27", "0-13,21-27"
_HOLLOW = "6-10"
_RECOMPUTED: dict[str, Any] = {"activations": "recomputed"}
_STREAMED: dict[str, Any] = {"weights": "streamed", "activations": "recomputed"}


def _job(model: str, resolution: int, what: str, *, skip: str = "none", **settings: Any) -> Job:
    name, tokens = _MODELS[model]
    title = f"{name}, {resolution} px, {what}"
    return Job(title=title, model=model, resolution=resolution, text_tokens=tokens, skip=skip, settings=settings)


FITTED: dict[str, Job] = {
    "fit-pixart-256-recomputed": _job(_PIXART, 256, "14 of 28 blocks, weights in memory", skip="0-9,24-27", **_RECOMPUTED),
    "fit-pixart-256-low": _job(_PIXART, 256, "activations on disk", **LOW),
    "fit-pixart-256-quarter": _job(_PIXART, 256, "7 of 28 blocks, activations on disk", skip=_SEVEN, **LOW),
    "fit-pixart-256-two-streamed": _job(_PIXART, 256, "2 of 28 blocks, weights streamed", skip=_TWO, **_STREAMED),
    "held-sana-256-two-low": _job(_SANA, 256, "2 of 28 blocks, activations on disk", skip=_TWO, **LOW),
    "held-sana-128-two": _job(_SANA, 128, "2 of 28 blocks, weights in memory", skip=_TWO, **_RECOMPUTED),
    "held-sana-192-four": _job(_SANA, 192, "4 of 28 blocks, weights streamed", skip=_FOUR, **_STREAMED),
}
"""Rows that the planner's constants were fitted to, beside those that `budget.constants` names of `benchmarks.memory.jobs`.

The last three were held out until they showed that the code of convolutions was not counted.
"""

HELD_OUT: dict[str, Job] = {
    "held-pixart-512-two-streamed": _job(_PIXART, 512, "2 of 28 blocks, weights streamed", skip=_TWO, **_STREAMED),
    "held-pixart-128-two-rank": _job(
        _PIXART, 128, "2 of 28 blocks, weights streamed, rank 64", skip=_TWO, rank=64, **_STREAMED
    ),
    "held-pixart-384-two": _job(_PIXART, 384, "2 of 28 blocks, weights in memory", skip=_TWO, **_RECOMPUTED),
    "held-pixart-256-four-low": _job(_PIXART, 256, "4 of 28 blocks, activations on disk", skip=_FOUR, **LOW),
    "held-pixart-128-low": _job(_PIXART, 128, "activations on disk", **LOW),
    "held-pixart-128-streamed": _job(_PIXART, 128, "weights streamed", **_STREAMED),
    "held-pixart-192-four-rank": _job(
        _PIXART, 192, "4 of 28 blocks, weights streamed, rank 4", skip=_FOUR, rank=4, **_STREAMED
    ),
    "held-pixart-128-int8": _job(_PIXART, 128, "weights streamed in 8 bits", weight_bits=8, **_STREAMED),
    "held-pixart-192-two-streamed": _job(_PIXART, 192, "2 of 28 blocks, weights streamed", skip=_TWO, **_STREAMED),
    "held-pixart-320-two-low": _job(_PIXART, 320, "2 of 28 blocks, activations on disk", skip=_TWO, **LOW),
    "held-pixart-256-seven-streamed": _job(_PIXART, 256, "7 of 28 blocks, weights streamed", skip=_SEVEN, **_STREAMED),
    "held-pixart-448-two-low": _job(_PIXART, 448, "2 of 28 blocks, activations on disk", skip=_TWO, **LOW),
    "held-pixart-128-four-streamed": _job(_PIXART, 128, "4 of 28 blocks, weights streamed", skip=_FOUR, **_STREAMED),
    "held-sana-256-low": _job(_SANA, 256, "activations on disk", **LOW),
    "held-sana-512-two": _job(_SANA, 512, "2 of 28 blocks, weights streamed", skip=_TWO, **_STREAMED),
    "held-sana-large-256-low": _job(_LARGE_SANA, 256, "activations on disk", skip="0-4,15-19", **LOW),
    "held-sana-large-128": _job(_LARGE_SANA, 128, "weights streamed", **_STREAMED),
    "held-sd35-128-low": _job(_SD35, 128, "activations on disk", **LOW),
    "held-sd35-128-four": _job(_SD35, 128, "4 of 24 blocks, weights streamed", skip="0-9,14-23", **_STREAMED),
    "held-sd35-128-rank": _job(
        _SD35, 128, "12 of 24 blocks, activations on disk, rank 64", skip="0-7,20-23", **LOW | {"rank": 64}
    ),
    "held-sd35-384-two": _job(_SD35, 384, "2 of 24 blocks, weights streamed", skip="0-10,13-23", **_STREAMED),
    "held-sd35-256-four-int4": _job(
        _SD35, 256, "4 of 24 blocks, weights streamed in 4 bits", skip="0-9,14-23", weight_bits=4, **_STREAMED
    ),
    "held-sd15-256-low": _job(_SD15, 256, "activations on disk", **LOW),
    "held-sd15-256-streamed": _job(_SD15, 256, "weights streamed", **_STREAMED),
    "held-sd15-384-low": _job(_SD15, 384, "activations on disk", **LOW),
    "held-sd15-384-hollow": _job(_SD15, 384, "5 middle layers skipped, weights streamed", skip=_HOLLOW, **_STREAMED),
    "held-sd15-256-hollow": _job(_SD15, 256, "5 middle layers skipped, activations on disk", skip=_HOLLOW, **LOW),
    "held-sd15-256-rank": _job(_SD15, 256, "weights streamed, rank 64", rank=64, **_STREAMED),
}
"""Rows of jobs that were chosen, and measured, after the constants were fixed."""
