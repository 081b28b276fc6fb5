"""Where a bundle's files lie: a folder, or an uncompressed zip whose entries are read, and mapped into memory, in place."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol

from pocketune_edge.errors import BundleError

MAX_ENTRIES = 10_000
_LOCAL_HEADER = 30


@dataclass(frozen=True)
class Place:
    """Bytes [start, start + size) of a file on disk."""

    file: Path
    start: int
    size: int

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file, at the first of these bytes."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            yield file

    def read(self) -> bytes:
        """All of these bytes."""
        with self.open() as file:
            return file.read(self.size)


class Storage(Protocol):
    """The files of a bundle by their paths in it."""

    def place(self, path: str) -> Place:
        """Where a file lies.

        Raises:
            BundleError: it is missing, or no plain file.
        """

    def paths(self) -> frozenset[str] | None:
        """All files there are, or None where others do no harm."""


class Folder:
    """A bundle that is a folder."""

    def __init__(self, root: Path) -> None:
        """Use a folder."""
        self._root = root

    def place(self, path: str) -> Place:
        """Where a file lies; links are refused, on the way to it too."""
        whole = self._root.joinpath(*path.split("/"))
        steps = [parent for parent in (whole, *whole.parents) if parent != self._root and self._root in parent.parents]
        if any(step.is_symlink() for step in steps):
            msg = f"{self._root} has a link at {path}; bundles hold plain files only. Copy or export the bundle again."
            raise BundleError(msg)
        if not whole.is_file():
            msg = f"{self._root} lacks the file {path}. Copy or export the bundle again."
            raise BundleError(msg)
        return Place(whole, 0, whole.stat().st_size)

    def paths(self) -> None:
        """Not asked: a file manager may have left something of its own."""


class Archive:
    """A bundle that is an uncompressed zip; entries are used where they lie, so they can be mapped into memory."""

    def __init__(self, file: Path) -> None:
        """Read the archive's table of contents.

        Raises:
            BundleError: it is damaged, compressed, encrypted, or names a file twice.
        """
        self._file = file
        self._places: dict[str, Place] = {}
        size = file.stat().st_size
        try:
            with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
                entries = archive.infolist()
                if len(entries) > MAX_ENTRIES:
                    self._refuse(f"it has {len(entries)} entries")
                for entry in entries:
                    self._places[entry.filename] = self._locate(entry, raw, size)
        except BundleError:
            raise
        except Exception as error:  # the zip module raises nearly every type of exception on damaged bytes
            msg = f"{file} is not a sound zip archive ({str(error)[:100]}). Copy or export the bundle again."
            raise BundleError(msg) from error

    def place(self, path: str) -> Place:
        """Where an entry's bytes lie."""
        if path not in self._places:
            msg = f"{self._file} lacks the file {path}. Copy or export the bundle again."
            raise BundleError(msg)
        return self._places[path]

    def paths(self) -> frozenset[str]:
        """All entries."""
        return frozenset(self._places)

    def _locate(self, entry: zipfile.ZipInfo, raw: BinaryIO, size: int) -> Place:
        if entry.filename in self._places:
            self._refuse(f"it has {entry.filename[:80]!r} twice")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            self._refuse(f"{entry.filename[:80]!r} is compressed or encrypted, and cannot be used in place")
        raw.seek(entry.header_offset)
        header = raw.read(_LOCAL_HEADER)
        if len(header) != _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
            self._refuse(f"{entry.filename[:80]!r} does not lie where the table of contents says")
        name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        start = entry.header_offset + _LOCAL_HEADER + name_length + extra_length
        if start + entry.file_size > size:
            self._refuse(f"{entry.filename[:80]!r} reaches beyond the end")
        return Place(self._file, start, entry.file_size)

    def _refuse(self, reason: str) -> NoReturn:
        msg = f"{self._file} is not a sound bundle: {reason}. Copy or export the bundle again."
        raise BundleError(msg)


def real_path(path: Path) -> Path:
    """The place that links lead to: the runtime maps weights only from there. A path that leads nowhere stays as it is."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # links in a circle are a RuntimeError before Python 3.13
        return path.absolute()


def open_storage(path: Path) -> Storage:
    """The files of a bundle.

    Raises:
        BundleError: there is nothing at the path, or neither a folder nor a zip.
    """
    try:
        if path.is_dir():
            return Folder(path)
        if path.is_file() and zipfile.is_zipfile(path):
            return Archive(path)
        exists = path.exists()
    except OSError as error:
        msg = f"cannot read the bundle {path}: {error.strerror or error}. Check the path and its permissions."
        raise BundleError(msg) from error
    if not exists:
        msg = f"the bundle {path} does not exist. Check the path."
        raise BundleError(msg)
    msg = f"{path} is not a bundle: expected a folder or a .ptb archive as `export-trainable` writes it."
    raise BundleError(msg)
