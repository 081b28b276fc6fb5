"""Limits that a container or a service manager put on this process: Linux control groups, versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pocketune.procfs import read_procfs

_UNLIMITED = 2**60  # version 1 writes "no limit" as the largest multiple of a page; no machine has an exbibyte


@dataclass(frozen=True, kw_only=True)
class CgroupLimits:
    """What the control groups of this process allow.

    Attributes:
        memory_bytes: tightest memory limit of the group and its ancestors; None without one.
        memory_used_bytes: what counts against that limit now, less cached file pages that the kernel drops when it needs room.
        cpus: tightest CPU quota in cores; None without one.
    """

    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    cpus: float | None = None


def read_limits(root: Path = Path("/")) -> CgroupLimits:
    """Read the limits of this process; all None where there are no control groups (another system, or none set).

    Args:
        root: folder that holds `proc` and `sys`; a copy of them serves for tests.
    """
    memory: tuple[int, int | None] | None = None
    cpus: float | None = None
    for folder in _folders(root, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit is not None and limit < _UNLIMITED and (memory is None or limit < memory[0]):
            memory = limit, _used(folder)
    for folder in _folders(root, "cpu"):
        quota = _cpus(folder)
        if quota is not None and (cpus is None or quota < cpus):
            cpus = quota
    return CgroupLimits(
        memory_bytes=memory[0] if memory else None,
        memory_used_bytes=memory[1] if memory else None,
        cpus=cpus,
    )


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folder of this process's group for a controller, then its ancestors that are visible."""
    mounts = list(_mounts(root))
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "", "")
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        for mounted_version, names, mount_root, mount_point in mounts:
            if mounted_version != version or (version == 1 and controller not in names):
                continue
            # Inside a container the group's path may lie outside what is mounted; then the mount itself is the group.
            inside = PurePosixPath(path).is_relative_to(mount_root) and ".." not in path
            relative = PurePosixPath(path).relative_to(mount_root) if inside else PurePosixPath()
            base = root / mount_point.lstrip("/")
            folder = base / relative
            folder = folder if folder.is_dir() else base
            yield folder
            yield from (parent for parent in folder.parents if parent.is_relative_to(base))


def _mounts(root: Path) -> Iterator[tuple[int, list[str], str, str]]:
    """Yield (version, controllers, root within the hierarchy, mount point) of every mounted control group."""
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) >= 5 and len(kind) >= 3 and kind[0] in ("cgroup", "cgroup2"):
            yield 2 if kind[0] == "cgroup2" else 1, kind[2].split(","), fields[3], fields[4]


def _used(folder: Path) -> int | None:
    used = _number(folder / "memory.current")
    if used is None:
        used = _number(folder / "memory.usage_in_bytes")
    if used is None:
        return None
    statistics = dict(line.split() for line in _lines(folder / "memory.stat") if len(line.split()) == 2)
    cached = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
    return max(used - cached, 0)


def _cpus(folder: Path) -> float | None:
    fields = (_lines(folder / "cpu.max") or [""])[0].split()
    if len(fields) == 2 and fields[0].isdigit() and fields[1].isdigit():
        return int(fields[0]) / int(fields[1])
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota and period else None


def _number(path: Path) -> int | None:
    text = (_lines(path) or [""])[0].strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    return read_procfs(path).splitlines()
