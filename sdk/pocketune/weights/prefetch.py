"""Reads the weight that will be used next into the system's page cache, on a thread, while the current one is used."""

from __future__ import annotations

import threading
from queue import Empty, Full, Queue
from weakref import finalize

from pocketune.weights.mapped import Place
from pocketune.weights.matrix import Matrix

_BYTES_AT_A_TIME = 2**22


class Prefetcher:
    """Learns the order in which weights are used and asks for the next one ahead.

    A step uses each weight in three orders: forward, again forward when a block is recomputed, and backward. So the next weight
    follows from the last two. What it asks for goes to the page cache, which is not memory of this process and is given up
    when memory is short; a wrong guess costs a read.
    """

    def __init__(self) -> None:
        """Know nothing yet; the thread begins with the first guess."""
        self._follower: dict[tuple[int, int], Matrix] = {}
        self._before: Matrix | None = None
        self._current: Matrix | None = None
        self._wanted: Queue[tuple[Place, ...] | None] = Queue(maxsize=2)
        self._thread: threading.Thread | None = None

    def using(self, matrix: Matrix) -> None:
        """Say which weight is used now."""
        if self._before is not None and self._current is not None:
            self._follower[id(self._before), id(self._current)] = matrix
        self._before, self._current = self._current, matrix
        follower = self._follower.get((id(self._before), id(matrix)))
        if follower is not None and follower is not matrix:
            self._ask(follower)

    def _ask(self, matrix: Matrix) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=_read_ahead, args=(self._wanted,), name="pocketune-weights", daemon=True)
            self._thread.start()
            finalize(self, _stop, self._wanted)
        try:
            self._wanted.put_nowait(matrix.places)
        except Full:  # the disk is slower than the arithmetic; the reader will wait for it anyway
            return


def _read_ahead(wanted: Queue[tuple[Place, ...] | None]) -> None:
    while (places := wanted.get()) is not None:
        for place in places:
            for start in range(place.start, place.stop, _BYTES_AT_A_TIME):
                place.file.expect(start, min(start + _BYTES_AT_A_TIME, place.stop))


def _stop(wanted: Queue[tuple[Place, ...] | None]) -> None:
    while True:
        try:
            wanted.put_nowait(None)
        except Full:
            try:
                wanted.get_nowait()
            except Empty:
                continue
        else:
            return
