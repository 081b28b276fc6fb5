"""Memory of this process: a single reading, and a log over time with peaks by phase.

Resident memory is the sum of two kinds that behave differently. Anonymous memory (heap, activations, optimizer state) can only
be swapped out and is what gets a process killed; file-backed memory (code, mapped weights) can be dropped and read again.

On Linux the numbers are the kernel's own, from /proc/self/status: VmRSS, RssAnon + VmSwap, RssFile. Where the kernel does not
tell the two kinds apart (other systems, some sandboxes), all resident memory counts as anonymous, which is an upper bound, and
file-backed memory as 0; `memory_source` says which it is. No system counts memory of a GPU here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from pocketune.errors import PocketuneError
from pocketune.procfs import read_procfs

MAX_ROWS = 6000
"""Rows kept by a log; beyond, neighbours are merged by their maxima and the time between rows doubles."""

_STATUS = Path("/proc/self/status")
_UPPER_BOUND = "all resident memory counted as anonymous, an upper bound"


@dataclass(frozen=True)
class MemoryReading:
    """Memory of this process, in bytes.

    Attributes:
        rss_bytes: resident memory.
        anonymous_bytes: resident anonymous memory and swapped-out memory.
        file_bytes: resident pages of mapped files.
    """

    rss_bytes: int
    anonymous_bytes: int
    file_bytes: int


@dataclass(frozen=True)
class MemoryRow:
    """A reading at a time, in seconds since the log was opened, within a phase."""

    seconds: float
    phase: str
    rss_bytes: int
    anonymous_bytes: int
    file_bytes: int


def read_memory() -> MemoryReading:
    """Read the memory of this process now; some 50 microseconds on Linux.

    Raises:
        PocketuneError: the system has no /proc/self/status and psutil is not installed.
    """
    status = _read_status()
    if "VmRSS" not in status:
        return _read_with_psutil()
    rss, swap = status["VmRSS"], status.get("VmSwap", 0)
    anonymous = status.get("RssAnon", rss)
    return MemoryReading(rss_bytes=rss, anonymous_bytes=anonymous + swap, file_bytes=status.get("RssFile", 0))


def read_peak_rss() -> int | None:
    """Give the largest resident memory of this process since it started, in bytes (VmHWM); None where it is not known."""
    return _read_status().get("VmHWM")


def memory_source() -> str:
    """Say where `read_memory` takes its numbers from, and whether anonymous memory is a count or an upper bound."""
    status = _read_status()
    if "VmRSS" not in status:
        return f"psutil ({_UPPER_BOUND})"
    return str(_STATUS) if "RssAnon" in status else f"{_STATUS} ({_UPPER_BOUND})"


class MemoryLog:
    """Reads the memory of this process in a background thread, and keeps rows and peaks by phase.

    `on_reading`: called there with each reading, if it is set.

    Use it as a context manager; rows and peaks remain readable afterwards::

        with MemoryLog() as log:
            log.phase("training")
            train()
        log.peaks()["training"].anonymous_bytes
    """

    def __init__(self, *, interval_s: float = 0.1) -> None:
        """Set the time between readings; the log starts when it is entered, in the phase "start"."""
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="pocketune-memory", daemon=True)
        self._began = 0.0
        self._phase = "start"
        self._rows: list[MemoryRow] = []
        self._samples_per_row = 1
        self._samples_in_row = 0
        self._peaks: dict[str, MemoryReading] = {}
        self._high_water = 0
        self.on_reading: Callable[[MemoryReading], None] | None = None

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        with self._lock:
            self._high_water = read_peak_rss() or 0
            self._record(read_memory())
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()
        with self._lock:
            self._close_phase()

    def phase(self, name: str) -> None:
        """End the current phase with a reading and begin the phase `name`; a name may come back."""
        with self._lock:
            self._close_phase()
            self._phase = name
            self._record(read_memory())

    @property
    def rows(self) -> tuple[MemoryRow, ...]:
        """What was read so far, in time order; at most about `MAX_ROWS` of them."""
        with self._lock:
            return tuple(self._rows)

    def peaks(self) -> dict[str, MemoryReading]:
        """Give the largest value of each of the three numbers in each phase; the three need not be of one moment.

        A resident peak that is the highest of the process so far is exact, because the kernel notes it. Lower ones, and the
        other two numbers, are the largest of the readings: what comes and goes between two of them is not seen.
        """
        with self._lock:
            return dict(self._peaks)

    def _sample(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                reading = read_memory()
            except (OSError, PocketuneError):
                continue  # no file descriptor left, for example: a later reading may succeed, and a log must not end a job
            with self._lock:
                self._record(reading)
            if self.on_reading is not None:
                self.on_reading(reading)

    def _close_phase(self) -> None:
        self._record(read_memory())
        high_water = read_peak_rss() or 0
        if high_water > self._high_water:
            peak = self._peaks[self._phase]
            self._peaks[self._phase] = replace(peak, rss_bytes=max(peak.rss_bytes, high_water))
            self._high_water = high_water

    def _record(self, reading: MemoryReading) -> None:
        seconds = time.monotonic() - self._began
        row = MemoryRow(seconds, self._phase, reading.rss_bytes, reading.anonymous_bytes, reading.file_bytes)
        known = self._peaks.get(self._phase, reading)
        self._peaks[self._phase] = MemoryReading(
            rss_bytes=max(known.rss_bytes, reading.rss_bytes),
            anonymous_bytes=max(known.anonymous_bytes, reading.anonymous_bytes),
            file_bytes=max(known.file_bytes, reading.file_bytes),
        )
        if self._rows and self._rows[-1].phase == row.phase and self._samples_in_row < self._samples_per_row:
            self._rows[-1] = _merged(self._rows[-1], row)
            self._samples_in_row += 1
        else:
            self._rows.append(row)
            self._samples_in_row = 1
        if len(self._rows) > MAX_ROWS:
            self._rows = _halved(self._rows)
            self._samples_per_row *= 2


def _merged(first: MemoryRow, second: MemoryRow) -> MemoryRow:
    return replace(
        first,
        rss_bytes=max(first.rss_bytes, second.rss_bytes),
        anonymous_bytes=max(first.anonymous_bytes, second.anonymous_bytes),
        file_bytes=max(first.file_bytes, second.file_bytes),
    )


def _halved(rows: list[MemoryRow]) -> list[MemoryRow]:
    kept: list[MemoryRow] = []
    pending: MemoryRow | None = None
    for row in rows:
        if pending is not None and pending.phase == row.phase:
            kept.append(_merged(pending, row))
            pending = None
            continue
        if pending is not None:
            kept.append(pending)
        pending = row
    return [*kept, pending] if pending is not None else kept


def _read_status() -> dict[str, int]:
    fields = (line.split() for line in read_procfs(_STATUS).splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}


def _read_with_psutil() -> MemoryReading:
    try:
        import psutil  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        msg = "the memory of this process cannot be read on this system without psutil. Run: pip install 'pocketune[train]'"
        raise PocketuneError(msg) from error
    rss = int(psutil.Process().memory_info().rss)
    return MemoryReading(rss_bytes=rss, anonymous_bytes=rss, file_bytes=0)
