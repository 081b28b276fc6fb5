"""Bundles on disk: write them whole or not at all, and check everything before a file of one is used.

A bundle is a folder, or a zip with stored entries. `open_bundle` trusts nothing: no manifest, no size, no name, no link.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pocketune.atomic import replacing
from pocketune.errors import FileFormatError, RunError
from pocketune_export.contents import check_contents
from pocketune_export.manifest import MANIFEST_FILE, SEAL_FILE, File, Manifest
from pocketune_export.reading import MAX_MANIFEST_BYTES, read_manifest

ARCHIVE_SUFFIX = ".ptb"
_CHUNK = 2**20
_OLDEST = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Bundle:
    """A bundle that was checked: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Where a file of the manifest lies."""
        return self.folder / name


@contextmanager
def new_bundle_folder(out: Path) -> Iterator[Path]:
    """Give a folder to fill; when the block ends well it becomes `out`, or is packed into it if `out` ends in ".ptb".

    Raises:
        RunError: `out` exists already, or cannot be written.
    """
    if out.exists():
        msg = f"{out} exists already. Choose another --out, or delete it."
        raise RunError(msg)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent) as scratch:
            folder = Path(scratch) / "bundle"
            folder.mkdir()
            yield folder
            if out.suffix == ARCHIVE_SUFFIX:
                pack(folder, out)
            else:
                folder.rename(out)
    except OSError as error:
        msg = f"cannot write {out}: {error.strerror or error}. Free some space or choose another --out."
        raise RunError(msg) from error


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and its hash into a bundle folder."""
    content = manifest.to_json()
    (folder / MANIFEST_FILE).write_bytes(content)
    (folder / SEAL_FILE).write_bytes(f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_FILE}\n".encode())


def describe_file(folder: Path, name: str) -> File:
    """The manifest's entry for a file."""
    with (folder / name).open("rb") as file:
        return File(path=name, bytes=os.fstat(file.fileno()).st_size, sha256=_digest(file))


def pack(folder: Path, archive: Path) -> None:
    """Pack a bundle folder into one file, the same bytes for the same bundle."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names.sort(key=lambda name: name not in (MANIFEST_FILE, SEAL_FILE))
    with replacing(archive) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as packed:
        for name in names:
            entry = zipfile.ZipInfo(name, date_time=_OLDEST)
            entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            entry.file_size = (folder / name).stat().st_size
            with (folder / name).open("rb") as source, packed.open(entry, "w") as target:
                for chunk in iter(lambda source=source: source.read(_CHUNK), b""):  # type: ignore[misc]
                    target.write(chunk)


def open_bundle(path: Path) -> Bundle:
    """Check a bundle folder: manifest, then the presence, kind, size and hash of every file, then what graphs and LoRA hold.

    Raises:
        FileFormatError: anything is not as the manifest says.
    """
    if path.is_file():
        msg = f"{path} is an archive; its weights cannot be mapped into memory. Unpack it first, or give the folder."
        raise FileFormatError(msg)
    content = _small_file(path, MANIFEST_FILE, MAX_MANIFEST_BYTES)
    manifest = _sealed_manifest(content, _small_file(path, SEAL_FILE, 200), str(path))
    for file in manifest.files:
        _check_place(path, file.path)
        actual = (path / file.path).stat().st_size
        if actual != file.bytes:
            msg = f"{path}: {file.path} has {actual} bytes, expected {file.bytes}. Copy the bundle again."
            raise FileFormatError(msg)
    for file in manifest.files:
        with (path / file.path).open("rb") as opened:
            _check_digest(opened, file, str(path))
    check_contents(path, manifest)
    return Bundle(path, manifest)


def unpack(archive: Path, out: Path) -> Bundle:
    """Check an archive wholly, then unpack it to a new folder.

    Raises:
        FileFormatError: it is no bundle, or damaged; nothing is written then.
        RunError: `out` exists already, or cannot be written.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            manifest = _check_archive(packed, archive)
            with new_bundle_folder(out) as folder:
                for name in (MANIFEST_FILE, SEAL_FILE, *(file.path for file in manifest.files)):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    with packed.open(name) as source, (folder / name).open("wb") as target:
                        for chunk in iter(lambda source=source: source.read(_CHUNK), b""):  # type: ignore[misc]
                            target.write(chunk)
                check_contents(folder, manifest)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, RuntimeError, KeyError) as error:
        msg = f"{archive} is no bundle archive, or is damaged ({str(error)[:100]}). Copy it again."
        raise FileFormatError(msg) from error
    return Bundle(out, manifest)


def _check_archive(packed: zipfile.ZipFile, archive: Path) -> Manifest:
    entries = {entry.filename: entry for entry in packed.infolist()}
    for entry in packed.infolist():
        kind = stat.S_IFMT(entry.external_attr >> 16)
        plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1 and kind in (0, stat.S_IFREG)
        if not plain or entry.compress_size != entry.file_size:
            msg = f"{archive}: the entry {entry.filename[:80]!r} is compressed, encrypted or a link. Pack the bundle again."
            raise FileFormatError(msg)
    total, actual = sum(entry.file_size for entry in packed.infolist()), archive.stat().st_size
    if len(entries) != len(packed.infolist()) or total > actual:
        msg = f"{archive} claims {total} bytes in {len(packed.infolist())} entries, but has {actual}. Copy it again."
        raise FileFormatError(msg)
    for name, limit in ((MANIFEST_FILE, MAX_MANIFEST_BYTES), (SEAL_FILE, 200)):
        if name not in entries or entries[name].file_size > limit:
            msg = f"{archive} has no {name}, or one that is too large. It is no bundle."
            raise FileFormatError(msg)
    manifest = _sealed_manifest(packed.read(MANIFEST_FILE), packed.read(SEAL_FILE), str(archive))
    listed = {file.path: file for file in manifest.files}
    if set(entries) != {MANIFEST_FILE, SEAL_FILE, *listed}:
        odd = min(set(entries) ^ {MANIFEST_FILE, SEAL_FILE, *listed})
        msg = f"{archive}: {odd[:80]!r} is missing, or is not in the manifest. Pack the bundle again."
        raise FileFormatError(msg)
    for name, file in listed.items():
        if entries[name].file_size != file.bytes:
            msg = f"{archive}: {name} has {entries[name].file_size} bytes, expected {file.bytes}. Copy the bundle again."
            raise FileFormatError(msg)
        with packed.open(name) as opened:
            _check_digest(opened, file, str(archive))
    return manifest


def _sealed_manifest(content: bytes, seal_content: bytes, where: str) -> Manifest:
    """Read the manifest; a schema that is too new is told before a hash that differs."""
    manifest = read_manifest(content, where)
    expected = f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_FILE}"
    if seal_content.strip() != expected.encode():
        msg = f"{where}: {MANIFEST_FILE} does not match {SEAL_FILE}: one was altered. Copy or export the bundle again."
        raise FileFormatError(msg)
    return manifest


def _small_file(folder: Path, name: str, limit: int) -> bytes:
    try:
        _check_place(folder, name)
        with (folder / name).open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        msg = f"{folder} is no bundle: cannot read {name} ({error.strerror})."
        raise FileFormatError(msg) from error
    if len(content) > limit:
        msg = f"{folder}: {name} is larger than {limit} bytes. It is no bundle."
        raise FileFormatError(msg)
    return content


def _check_place(folder: Path, name: str) -> None:
    """Every part of the path is there, and no link."""
    path = folder
    for part in name.split("/"):
        path = path / part
        if path.is_symlink() or not path.exists():
            msg = f"{folder}: {name} is missing or a link. Copy the bundle again."
            raise FileFormatError(msg)
    if not path.is_file():
        msg = f"{folder}: {name} is no regular file. Copy the bundle again."
        raise FileFormatError(msg)


def _check_digest(opened: IO[bytes], file: File, where: str) -> None:
    if _digest(opened) != file.sha256:
        msg = f"{where}: {file.path} was altered: its sha256 differs from the manifest's. Copy or export the bundle again."
        raise FileFormatError(msg)


def _digest(opened: IO[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in iter(lambda: opened.read(_CHUNK), b""):
        digest.update(chunk)
    return digest.hexdigest()
