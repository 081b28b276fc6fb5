"""What every phase of a job does besides its work: it is timed, its memory is logged, and it says how far it is."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pocketune.allocator import trim
from pocketune.guard import Guard
from pocketune.memory import MemoryLog, read_memory
from pocketune.progress import OnProgress, Progress


@dataclass
class Watch:
    """A job's clock and memory log.

    Attributes:
        memory: logs memory by phase.
        on_progress: told how far the job is.
        seconds: of each phase that has ended, by name.
        guard: stops the job when it needs too much memory, if it has a budget.
        current: the phase that began last.
    """

    memory: MemoryLog
    on_progress: OnProgress
    seconds: dict[str, float] = field(default_factory=dict)
    guard: Guard | None = None
    current: str = "start"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and mark it in the memory log; what the phase before held goes back to the system first."""
        # Not when a phase ends: the function that runs it still holds its model then.
        gc.collect()
        trim()
        self.memory.phase(name)
        self.current = name
        self.tell(name, 0, 0, "step")
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def tell(self, phase: str, done: int, total: int, unit: str, loss: float | None = None) -> None:
        """Report progress with the memory of this moment."""
        rss = read_memory().rss_bytes
        self.on_progress(Progress(phase=phase, done=done, total=total, unit=unit, loss=loss, rss_bytes=rss))
        if self.guard is not None:
            self.guard.check()

    def say(self, phase: str, note: str) -> None:
        """Tell a person something once."""
        rss = read_memory().rss_bytes
        self.on_progress(Progress(phase=phase, done=0, total=0, unit="step", rss_bytes=rss, note=note))

    def guarded_by(self, guard: Guard) -> None:
        """Let a guard see every reading of memory from now on."""
        self.guard = self.memory.on_reading = guard
