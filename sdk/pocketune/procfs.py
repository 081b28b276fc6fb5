"""Files in which Linux describes the machine and the process, as those of /proc; other systems have none."""

from __future__ import annotations

from pathlib import Path


def read_procfs(path: Path) -> str:
    """What a file says; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
