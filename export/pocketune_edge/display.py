"""Progress of a job on stderr: how far, how fast, how long still, and how much memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from pocketune.progress import Progress
from pocketune.units import duration, readable_size

_LINE_INTERVAL_S = 10.0
_REDRAW_INTERVAL_S = 0.2


class Display:
    """Shows the events of a job: one line that is redrawn in a terminal, now and then a line elsewhere, nothing when quiet.

    Use it as a context manager, and give it to a job as its `on_progress`.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """Show on `stream`. `clock` gives seconds."""
        self._stream = stream
        self._quiet = quiet
        self._clock = clock
        self._terminal = stream.isatty()
        self._phase = ""
        self._shown_s = 0.0
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> Display:
        """Nothing is shown yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the line that was redrawn."""
        if self._terminal and self._phase:
            say("", self._stream)

    def __call__(self, event: Progress) -> None:
        """Show an event, if it is time to."""
        if self._quiet:
            return
        now = self._clock()
        begins, ends = event.phase != self._phase, 0 < event.total == event.done
        if begins:
            self._first = None
        counts = bool(event.total) and self._first is None
        if counts:
            self._first = (event.done, now)
        interval = _REDRAW_INTERVAL_S if self._terminal else _LINE_INTERVAL_S
        if not (begins or counts or ends or now - self._shown_s >= interval):
            return
        line = "  ".join(part for part in (f"{event.phase:<12}", *self._parts(event, now)) if part)
        if self._terminal:
            self._stream.write(("\n" if begins and self._phase else "\r\x1b[K") + line)
            self._stream.flush()
        else:
            say(line, self._stream)
        self._phase, self._shown_s = event.phase, now

    def _parts(self, event: Progress, now: float) -> list[str]:
        count = f"{event.done}/{event.total} {event.unit}{'' if event.total == 1 else 's'}" if event.total else ""
        loss = "" if event.loss is None else f"loss {event.loss:.4f}"
        return [count, *self._speed(event, now), loss, readable_size(event.rss_bytes)]

    def _speed(self, event: Progress, now: float) -> list[str]:
        """Rate since the first event of the phase that had a count, and the time left at that rate."""
        done, began = self._first or (event.done, now)
        if event.done == done or now <= began:
            return []
        each = (now - began) / (event.done - done)
        rate = f"{1 / each:.1f} {event.unit}s/s" if each < 1 else f"{each:.1f} s a {event.unit}"
        left = each * (event.total - event.done)
        return [rate, f"{duration(left)} left"] if event.done < event.total else [rate]


def say(text: str, stream: TextIO | None = None) -> None:
    """Write a line, to stdout unless another stream is given."""
    stream = stream or sys.stdout
    stream.write(f"{text}\n")
    stream.flush()


def printable(text: str) -> str:
    """Text without control characters: file names and manifests may hold terminal commands."""
    return "".join(character if character.isprintable() else "?" for character in text)
