"""What a job tells while it runs. The core never prints: it calls a function with `Progress`, and stops when told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One event of a job.

    Attributes:
        phase: what is going on: such as "photos", "text", "latents", "class images", "features", "training" or "samples".
        done: finished units of `unit` in this phase.
        total: units in this phase; 0 where it is not known.
        unit: what is counted, in the singular, such as "photo", "step" or "image".
        loss: mean training loss of the last step, in the training phase.
        rss_bytes: resident memory of the process now.
        note: something to tell a person once.
    """

    phase: str
    done: int
    total: int
    unit: str
    rss_bytes: int
    loss: float | None = None
    note: str | None = None


OnProgress = Callable[[Progress], None]


def ignore(_: object) -> None:
    """The callback that does nothing."""
