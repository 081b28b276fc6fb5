"""A bundle, opened only after everything in it has been checked: nothing is run or written before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pocketune.memory import read_memory
from pocketune.progress import OnProgress, Progress
from pocketune_edge.agreement import MANIFEST_FILE, MAX_MANIFEST_BYTES, SEAL_FILE
from pocketune_edge.errors import BundleError
from pocketune_edge.manifest import Graph, Manifest
from pocketune_edge.onnxfile import GraphFile, move_weights, read_graph_file
from pocketune_edge.reading import read_manifest
from pocketune_edge.storage import Archive, Place, Storage, open_storage, real_path
from pocketune_edge.wire import WireError

MAX_GRAPH_BYTES = 2**30
_CHUNK = 2**20

OnBytes = Callable[[int, int], None]


class Bundle:
    """A checked bundle: its manifest, and its files as they are to be given to the runtime."""

    def __init__(self, path: Path, manifest: Manifest, storage: Storage) -> None:
        """Use what `open_bundle` has checked."""
        self.path = path
        self.manifest = manifest
        self._storage = storage

    def read(self, path: str) -> bytes:
        """The content of a small file."""
        return self._storage.place(path).read()

    def place(self, path: str) -> Place:
        """Where a file's bytes lie on disk."""
        return self._storage.place(path)

    def model(self, graph: Graph) -> tuple[bytes, Path]:
        """A graph's ONNX bytes, and the folder relative to which its weights are found.

        The graph is given with its weights placed anew where they were checked to be; from an archive, they lie inside the
        archive, so that they are mapped from there.
        """
        archived = isinstance(self._storage, Archive)

        def place(file: str) -> tuple[str, int]:
            found = self._storage.place(file)
            return found.file.name if archived else file, found.start

        try:
            content = move_weights(self.read(graph.file), place)
        except WireError as error:
            _refuse(self.path, f"{graph.file} changed after it was checked: {error}")
        return content, self.path.parent if archived else self.path

    @property
    def total_bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(file.bytes for file in self.manifest.files)


def open_bundle(path: str | Path, *, on_bytes: OnBytes | None = None) -> Bundle:
    """Check a bundle from its seal to its last byte, and open it.

    Args:
        path: a folder or an uncompressed zip.
        on_bytes: called with (checked, total) bytes.

    Raises:
        BundleError: it is missing, damaged, incomplete, contradicts itself, of a newer schema, for another runtime, or asks for
            anything beyond plain operators and its own weights; or its path is not UTF-8.
    """
    path = real_path(Path(path))
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        msg = f"the bundle's path {str(path)!r} is not UTF-8, which the runtime cannot open. Rename the bundle or its folder."
        raise BundleError(msg) from error
    storage = open_storage(path)
    try:
        content = _sealed_manifest(path, storage)
        manifest = read_manifest(content, str(path))
        bundle = Bundle(path, manifest, storage)
        _check_files(bundle, storage, on_bytes or (lambda *_: None))
        for graph in manifest.graphs:
            _check_graph(bundle, graph)
    except OSError as error:
        msg = f"cannot read the bundle {path}: {error.strerror or error}. Check the disk and its permissions."
        raise BundleError(msg) from error
    return bundle


def telling(on_progress: OnProgress) -> OnBytes:
    """An `on_bytes` for `open_bundle` that tells progress."""

    def tell(done: int, total: int) -> None:
        rss = read_memory().rss_bytes
        on_progress(Progress(phase="bundle", done=-(-done // 10**6), total=-(-total // 10**6), unit="megabyte", rss_bytes=rss))

    return tell


def _sealed_manifest(path: Path, storage: Storage) -> bytes:
    place = storage.place(MANIFEST_FILE)
    if place.size > MAX_MANIFEST_BYTES:
        _refuse(path, f"{MANIFEST_FILE} has {place.size} bytes")
    content = place.read()
    seal = storage.place(SEAL_FILE)
    expected = f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_FILE}\n".encode()
    if seal.size != len(expected) or seal.read() != expected:
        _refuse(path, f"{MANIFEST_FILE} does not have the hash that {SEAL_FILE} says")
    return content


def _check_files(bundle: Bundle, storage: Storage, on_bytes: OnBytes) -> None:
    manifest, path = bundle.manifest, bundle.path
    present = storage.paths()
    if present is not None:
        unlisted = present - {file.path for file in manifest.files} - {MANIFEST_FILE, SEAL_FILE}
        if unlisted:
            _refuse(path, f"it has the entry {min(unlisted)[:80]!r}, which the manifest does not list")
    for file in manifest.files:
        if file.path in (MANIFEST_FILE, SEAL_FILE):
            _refuse(path, f"the manifest lists {file.path}")
        size = storage.place(file.path).size
        if size != file.bytes:
            _refuse(path, f"{file.path} has {size} bytes, the manifest says {file.bytes}")
    done, total = 0, bundle.total_bytes
    for file in manifest.files:
        digest, left = hashlib.sha256(), file.bytes
        with storage.place(file.path).open() as content:
            while left:
                chunk = content.read(min(_CHUNK, left))
                if not chunk:
                    _refuse(path, f"{file.path} became shorter while it was read")
                digest.update(chunk)
                left -= len(chunk)
                done += len(chunk)
                on_bytes(done, total)
        if digest.hexdigest() != file.sha256:
            _refuse(path, f"{file.path} does not have the hash that the manifest says")


def _check_graph(bundle: Bundle, graph: Graph) -> None:
    path = bundle.path
    if bundle.place(graph.file).size > MAX_GRAPH_BYTES:
        _refuse(path, f"{graph.file} is larger than any graph")
    try:
        found = read_graph_file(bundle.read(graph.file))
    except WireError as error:
        _refuse(path, f"{graph.file} is not a plain ONNX graph: {error}")
    if found.opset > bundle.manifest.opset:
        _refuse(path, f"{graph.file} has operator set {found.opset}, the manifest says {bundle.manifest.opset}")
    for said, got in ((graph.inputs, found.inputs), (graph.outputs, found.outputs)):
        claimed = sorted((spec.name, spec.shape, spec.dtype) for spec in said)
        actual = sorted((port.name, port.shape, port.dtype) for port in got)
        if claimed != actual:
            differing = sorted({item[0] for item in set(claimed) ^ set(actual)})
            _refuse(path, f"{graph.file} has other inputs or outputs than the manifest says: {', '.join(differing)[:200]}")
    _check_weights(bundle, graph, found)


def _check_weights(bundle: Bundle, graph: Graph, found: GraphFile) -> None:
    for weight in found.weights:
        if weight.file not in graph.weights:
            _refuse(bundle.path, f"{graph.file} reads {weight.file[:80]!r}, which the manifest does not allow")
        if weight.offset + weight.length > bundle.place(weight.file).size:
            _refuse(bundle.path, f"{graph.file} reads beyond the end of {weight.file}")


def _refuse(path: Path, reason: str, advice: str = " Copy or export the bundle again.") -> NoReturn:
    msg = f"{path} is not a sound bundle: {reason}.{advice}"
    raise BundleError(msg)
