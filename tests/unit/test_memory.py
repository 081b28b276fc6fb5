"""Readings agree with the kernel and tell heap from mapped files; the log keeps peaks by phase and never disturbs a job."""

import mmap
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pocketune import memory
from pocketune.errors import PocketuneError
from pocketune.memory import MemoryLog, MemoryReading, memory_source, read_memory, read_peak_rss

MB = 1_000_000
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def logged_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "pocketune-memory"]


@linux
def test_agrees_with_an_independent_reader():
    psutil = pytest.importorskip("psutil")
    theirs, ours = psutil.Process().memory_info().rss, read_memory()
    assert abs(ours.rss_bytes - theirs) < 8 * MB
    assert ours.anonymous_bytes + ours.file_bytes <= ours.rss_bytes + 64 * MB
    assert read_peak_rss() >= ours.rss_bytes - 8 * MB
    assert memory_source() == "/proc/self/status"


def fresh_pages(size: int) -> np.ndarray:
    """Written anonymous memory, mapped anew: the allocator could answer from pages that it had kept, and nothing would grow."""
    pages = np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)
    pages[:] = 1
    return pages


@linux
def test_heap_is_anonymous_and_mapped_files_are_not(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(60 * MB))
    start = read_memory()
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    assert mapped[::4096].sum() == 0
    with_file = read_memory()
    heap = fresh_pages(60 * MB)
    with_heap = read_memory()
    assert with_file.file_bytes - start.file_bytes > 55 * MB
    assert with_file.anonymous_bytes - start.anonymous_bytes < 5 * MB
    assert with_heap.anonymous_bytes - with_file.anonymous_bytes > 55 * MB
    assert with_heap.file_bytes - with_file.file_bytes < 5 * MB
    assert heap[-1] == 1


def status_file(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = folder / "status"
    path.write_text(text)
    monkeypatch.setattr(memory, "_STATUS", path)


def test_swapped_memory_counts_as_anonymous(tmp_path, monkeypatch):
    fields = {"VmHWM": 900, "VmRSS": 700, "RssAnon": 500, "RssFile": 150, "RssShmem": 50, "VmSwap": 30}
    text = "Name:\tpython\n" + "".join(f"{name}:\t{value:8} kB\n" for name, value in fields.items())
    status_file(tmp_path, monkeypatch, text)
    assert read_memory() == MemoryReading(rss_bytes=700 * 1024, anonymous_bytes=530 * 1024, file_bytes=150 * 1024)
    assert read_peak_rss() == 900 * 1024


def test_a_kernel_that_does_not_tell_them_apart_gives_an_upper_bound_and_says_so(tmp_path, monkeypatch):
    status_file(tmp_path, monkeypatch, "VmRSS:\t  700 kB\n")
    assert read_memory() == MemoryReading(rss_bytes=700 * 1024, anonymous_bytes=700 * 1024, file_bytes=0)
    assert read_peak_rss() is None
    assert "upper bound" in memory_source()


def test_other_systems_use_psutil_and_say_so(tmp_path, monkeypatch):
    pytest.importorskip("psutil")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    reading = read_memory()
    assert reading.anonymous_bytes == reading.rss_bytes > MB
    assert reading.file_bytes == 0
    assert memory_source().startswith("psutil (all resident memory counted as anonymous")


def test_without_any_source_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(PocketuneError, match=r"pip install 'pocketune\[train\]'"):
        read_memory()


def test_rows_are_in_time_order_and_peaks_bound_them(capfd):
    with MemoryLog(interval_s=0.002) as log:
        log.phase("training")
        time.sleep(0.05)
        log.phase("samples")
        time.sleep(0.02)
        log.phase("training")
    rows, peaks = log.rows, log.peaks()
    order = list(dict.fromkeys(row.phase for row in rows))
    assert order == ["start", "training", "samples"] == list(peaks)
    assert len(rows) > 10
    assert all(first.seconds <= second.seconds for first, second in pairwise(rows))
    for row in rows:
        assert row.rss_bytes <= peaks[row.phase].rss_bytes
        assert row.anonymous_bytes <= peaks[row.phase].anonymous_bytes
        assert row.file_bytes <= peaks[row.phase].file_bytes
    assert capfd.readouterr() == ("", "")


@linux
def test_peak_of_anonymous_memory_belongs_to_its_phase():
    with MemoryLog(interval_s=60) as log:
        log.phase("small")
        log.phase("large")
        block = fresh_pages(50 * MB)
        log.phase("after")
        del block
    peaks = log.peaks()
    assert peaks["large"].anonymous_bytes - peaks["small"].anonymous_bytes > 45 * MB


@linux
def test_a_short_new_maximum_of_resident_memory_is_not_missed():
    with MemoryLog(interval_s=60) as log:  # no sample ever falls into the phase
        assert [row.phase for row in log.rows] == ["start"]
        before = read_memory().rss_bytes
        needed = read_peak_rss() - before + 40 * MB
        log.phase("spike")
        fresh_pages(needed)
        log.phase("after")
        after = log.rows[-1].rss_bytes
    assert after < before + needed // 2
    assert log.peaks()["spike"].rss_bytes >= before + needed - 5 * MB
    assert log.peaks()["start"].rss_bytes < before + needed // 2


def test_long_logs_are_thinned_and_keep_their_maxima(monkeypatch):
    monkeypatch.setattr(memory, "MAX_ROWS", 12)
    readings = [MemoryReading(1000 + (index == 137) * 5000, index, 0) for index in range(400)]
    current = iter(readings)
    log = MemoryLog()
    for index, reading in enumerate(current):
        if index == 200:
            log._phase = "later"
        log._record(reading)
    rows = log.rows
    assert 6 <= len(rows) <= 13
    assert max(row.rss_bytes for row in rows if row.phase == "start") == 6000 == log.peaks()["start"].rss_bytes
    assert max(row.anonymous_bytes for row in rows) == 399
    assert {row.phase for row in rows} == {"start", "later"}
    ends = [-1, *(row.anonymous_bytes for row in rows)]
    assert all(
        0 < second - first <= 100 for first, second in pairwise(ends)
    )  # no part of the time is much coarser than the rest


def test_thread_ends_with_the_log_even_when_the_job_fails():
    with pytest.raises(ZeroDivisionError), MemoryLog(interval_s=0.001) as log:
        log.phase("training")
        1 / 0  # noqa: B018
    assert logged_threads() == []
    assert "training" in log.peaks()


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), PocketuneError("no memory to read")])
def test_a_reading_that_fails_is_left_out(monkeypatch, capfd, error):
    real = memory.read_memory

    def out_of_descriptors() -> MemoryReading:
        if threading.current_thread().name == "pocketune-memory":
            failures.append(1)
            raise error
        return real()

    failures: list[int] = []
    monkeypatch.setattr(memory, "read_memory", out_of_descriptors)
    with MemoryLog(interval_s=0.001):
        deadline = time.monotonic() + 5
        while len(failures) < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
    assert len(failures) >= 3
    assert capfd.readouterr() == ("", "")


@linux
def test_a_reading_is_cheap():
    count = 200
    began = time.thread_time()
    for _ in range(count):
        read_memory()
    assert (time.thread_time() - began) / count < 0.002
