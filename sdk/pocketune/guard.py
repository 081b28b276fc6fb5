"""Stops a job before the system does: when memory comes near the budget, the job saves what it has and says so."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable

from pocketune.memory import MemoryReading

SHARE = 0.98
"""Of the budget; what is left over is for saving a checkpoint."""


class Guard:
    """Is told every reading of memory, on any thread, and interrupts the job as Ctrl-C would.

    `tripped`: the reading that was too much, if there was one; `device_bytes`: what the job had of a GPU then, if that was it.
    """

    def __init__(
        self, budget_bytes: int, *, device_budget_bytes: int | None = None, device_bytes: Callable[[], int] | None = None
    ) -> None:
        """Set the bounds; call it on the thread of the job.

        Args:
            budget_bytes: main memory.
            device_budget_bytes: memory of a GPU.
            device_bytes: what the job has of the latter now.
        """
        self._limit = round(SHARE * budget_bytes)
        self._device_limit = None if device_budget_bytes is None else round(SHARE * device_budget_bytes)
        self._read_device = device_bytes
        # Only the main thread can be interrupted, and a process in the background may ignore it; others ask now and then.
        on_main_thread = threading.current_thread() is threading.main_thread()
        self._interrupts = on_main_thread and callable(signal.getsignal(signal.SIGINT))
        self.tripped: MemoryReading | None = None
        self.device_bytes: int | None = None

    def __call__(self, reading: MemoryReading) -> None:
        """Look at a reading."""
        if self.tripped is not None:
            return
        if reading.rss_bytes <= self._limit:
            self.device_bytes = self._too_much_of_the_device()
            if self.device_bytes is None:
                return
        self.tripped = reading
        if self._interrupts:
            _thread.interrupt_main()

    def check(self) -> None:
        """Ask whether the job must stop, where it cannot be interrupted.

        Raises:
            KeyboardInterrupt: it must.
        """
        if self.tripped is not None and not self._interrupts:
            raise KeyboardInterrupt

    def _too_much_of_the_device(self) -> int | None:
        if self._device_limit is None or self._read_device is None:
            return None
        used = self._read_device()
        return used if used > self._device_limit else None
