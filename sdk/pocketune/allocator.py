"""What the C library does with freed memory: by default glibc keeps much of it, between pieces that are still in use."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from pocketune.procfs import read_procfs

MAPPED_FROM_BYTES = 2**17
"""Larger pieces are mapped one by one, so that each goes back to the system when it is freed."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_OTHERS = ("jemalloc", "tcmalloc", "mimalloc")


def name_allocator() -> str:
    """The allocator of this process: "jemalloc", "tcmalloc", "mimalloc", "glibc", "musl", or "system" where it is not known."""
    mapped = read_procfs(Path("/proc/self/maps"))
    for name in _OTHERS:
        if f"lib{name}" in mapped:
            return name
    if "ld-musl" in mapped:
        return "musl"
    return "glibc" if platform.libc_ver()[0] == "glibc" else "system"


def return_freed_memory() -> bool:
    """Make glibc give freed tensors back to the system at once, from now on, and say whether it does.

    It costs a page fault for every page of every new tensor. A threshold that the environment sets is left as it is.
    """
    if name_allocator() != "glibc" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    libc = ctypes.CDLL(None)
    settings = {_M_MMAP_THRESHOLD: MAPPED_FROM_BYTES, _M_TRIM_THRESHOLD: MAPPED_FROM_BYTES, _M_MMAP_MAX: 2**20}
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings.items())


def trim() -> None:
    """Give back what glibc keeps of freed memory now."""
    if name_allocator() == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
