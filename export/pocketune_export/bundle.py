"""Bundles on disk, written whole or not at all: a folder, or a zip with stored entries. `pocketune_edge.bundle` opens them."""

from __future__ import annotations

import hashlib
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from pocketune.atomic import replacing
from pocketune.errors import PlanError, RunError
from pocketune.weights.files import file_sha256
from pocketune_edge.agreement import MANIFEST_FILE, MAX_MANIFEST_BYTES, SEAL_FILE
from pocketune_export.manifest import File, Manifest
from pocketune_export.weights import ALIGNMENT

ARCHIVE_SUFFIX = ".ptb"
_CHUNK = 2**20
_OLDEST = (1980, 1, 1, 0, 0, 0)
_LOCAL_HEADER_BYTES = 30
_ZIP64_FIELD_BYTES = 20
_PADDING_FIELD = 0xD935
"""Extra field of a zip entry that only pads, as Android's zipalign writes it."""


def check_new(out: Path) -> None:
    """Refuse a place where something is.

    Raises:
        RunError: `out` exists already, or cannot be looked at.
    """
    try:
        taken = out.exists()
    except OSError as error:
        msg = f"cannot write {out}: {error.strerror or error}. Choose another --out."
        raise RunError(msg) from error
    if taken:
        msg = f"{out} exists already. Choose another --out, or delete it."
        raise RunError(msg)


def new_bundle_folder(out: Path) -> AbstractContextManager[Path]:
    """As `new_folder`, but packed into one file if `out` ends in ".ptb"."""
    return new_folder(out, finish=pack if out.suffix == ARCHIVE_SUFFIX else Path.rename)


@contextmanager
def new_folder(out: Path, *, finish: Callable[[Path, Path], object] = Path.rename) -> Iterator[Path]:
    """Give a folder to fill; when the block ends well it becomes `out`.

    Args:
        out: does not exist.
        finish: makes `out` of the folder.

    Raises:
        RunError: `out` exists already, or cannot be written.
    """
    check_new(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent) as scratch:
            folder = Path(scratch) / "folder"
            folder.mkdir()
            yield folder
            finish(folder, out)
    except OSError as error:
        msg = f"cannot write {out}: {error.strerror or error}. Free some space or choose another --out."
        raise RunError(msg) from error


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and its hash into a bundle folder.

    Raises:
        PlanError: the manifest is larger than devices read.
    """
    content = manifest.to_json()
    if len(content) > MAX_MANIFEST_BYTES:
        msg = (
            f"the manifest of this bundle has {len(content)} bytes, devices read at most {MAX_MANIFEST_BYTES}: it lists "
            "every tensor that trains. Train fewer blocks, or fewer intervals of scales."
        )
        raise PlanError(msg)
    (folder / MANIFEST_FILE).write_bytes(content)
    (folder / SEAL_FILE).write_bytes(f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_FILE}\n".encode())


def describe_file(folder: Path, name: str) -> File:
    """The manifest's entry for a file."""
    return File(path=name, bytes=(folder / name).stat().st_size, sha256=file_sha256(folder / name))


def pack(folder: Path, archive: Path) -> None:
    """Pack a bundle folder into one file, the same bytes for the same bundle; entries are aligned as tensors in them are."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names.sort(key=lambda name: name not in (MANIFEST_FILE, SEAL_FILE))
    with replacing(archive) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as packed:
        for name in names:
            entry = zipfile.ZipInfo(name, date_time=_OLDEST)
            entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            entry.file_size = (folder / name).stat().st_size
            entry.extra = _padding(packed.start_dir + len(name), entry.file_size)
            with (folder / name).open("rb") as source, packed.open(entry, "w") as target:
                for chunk in iter(lambda source=source: source.read(_CHUNK), b""):  # type: ignore[misc]
                    target.write(chunk)


def _padding(after_name: int, size: int) -> bytes:
    """An extra field that brings the content of an entry, whose name ends at `after_name`, to an aligned place."""
    header = _LOCAL_HEADER_BYTES + 4 + (_ZIP64_FIELD_BYTES if size * 1.05 > zipfile.ZIP64_LIMIT else 0)
    length = -(after_name + header) % ALIGNMENT
    return struct.pack("<HH", _PADDING_FIELD, length) + b"\0" * length
