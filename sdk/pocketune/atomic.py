"""Whole files or none: write to a temporary neighbour, fsync, rename."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pocketune.errors import RunError
from pocketune.procfs import read_procfs


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well the file takes its place, else it is removed.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror}. Free some space or choose another --out."
        raise RunError(msg) from error
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
        _fsync_folder(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        reason = getattr(error, "strerror", None) or error
        msg = f"cannot write {path}: {reason}. Free some space or choose another --out."
        raise RunError(msg) from error
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold; nothing is made.

    Raises:
        RunError: it has no name or is a folder, or its folder cannot be written or made.
    """
    try:
        place = next((parent for parent in path.absolute().parents if parent.exists()), path)
        if path.is_dir():
            reason = "it is a folder"
        elif not place.is_dir():
            reason = f"{place} is no folder"
        elif not os.access(place, os.W_OK | os.X_OK):
            reason = f"{place} may not be written"
        else:
            return
    except OSError as error:
        reason = error.strerror or str(error)
    msg = f"cannot write {path}: {reason}. Choose another --out."
    raise RunError(msg)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _umask() -> int:
    """Read without setting it, as `os.umask` must: another thread may make a file at that moment."""
    told = re.search(r"^Umask:\s*([0-7]+)$", read_procfs(Path("/proc/self/status")), re.MULTILINE)
    if told:
        return int(told[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
