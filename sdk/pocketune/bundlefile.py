"""Bundles of `export-trainable`, described from their manifest and the names and sizes of their files alone."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from pocketune.errors import FileFormatError
from pocketune.jsonfile import LIMIT_BYTES, parse_object, read_object

MANIFEST = "manifest.json"


def is_archived_bundle(path: Path) -> bool:
    """Whether a file is a zip with a manifest; other zips may hold pickles."""
    try:
        with zipfile.ZipFile(path) as archive:
            return MANIFEST in archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def describe_bundle(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Facts and notes about a bundle.

    Args:
        path: a folder, or an archive of which `is_archived_bundle` is true.

    Raises:
        FileFormatError: its manifest cannot be read.
    """
    manifest, files = _of_folder(path) if path.is_dir() else _of_archive(path)
    graphs = manifest.get("graphs")
    names = list(graphs) if isinstance(graphs, dict) else [g.get("name") for g in graphs or [] if isinstance(g, dict)]
    facts = {
        "schema_version": manifest.get("schema_version"),
        "graphs": [str(name) for name in names],
        "files": files,
    }
    return facts, () if facts["schema_version"] is not None else ("The manifest names no schema_version.",)


def _of_folder(folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return read_object(folder / MANIFEST), {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _of_archive(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(MANIFEST)
            if entry.file_size > LIMIT_BYTES or entry.compress_type != zipfile.ZIP_STORED:
                msg = f"{path} is no sound bundle: its manifest is compressed or too large. Copy or export it again."
                raise FileFormatError(msg)
            content = archive.read(entry)
            files = {one.filename: one.file_size for one in archive.infolist()}
    except FileFormatError:
        raise
    except Exception as error:  # the zip module raises nearly every type of exception on damaged bytes
        msg = f"{path} is not a sound zip archive ({str(error)[:100]}). Copy or export the bundle again."
        raise FileFormatError(msg) from error
    return parse_object(content, path / MANIFEST), files
