"""Bundles are checked before anything in them is used; sound ones run alike from a folder and from an archive."""

import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketune_edge.bundle import Bundle, open_bundle
from pocketune_edge.delta import neutral
from pocketune_edge.errors import BundleError
from pocketune_edge.sample import render
from pocketune_edge.session import Session, Sessions
from tests.edge.handmade import TOKENS, WIDTH, head_graph, pack, read_manifest_json, seal


def run_head(bundle: Bundle) -> np.ndarray[Any, Any]:
    session = Session(bundle, bundle.manifest.graph("head"), threads=1)
    image = np.linspace(-1, 1, TOKENS * WIDTH, dtype=np.float32).reshape(1, TOKENS, WIDTH)
    return session.run({"image": image, "embedding": np.ones((1, WIDTH), np.float32)})["velocity"]


def test_folder_and_archive_run_alike(sound: Path, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    from_folder = run_head(open_bundle(sound, on_bytes=lambda done, total: progress.append((done, total))))
    from_archive = run_head(open_bundle(pack(sound, tmp_path / "b.ptb")))
    matrix = np.frombuffer((sound / "weights" / "head.bin").read_bytes()[64:], np.float32).reshape(WIDTH, WIDTH)
    image = np.linspace(-1, 1, TOKENS * WIDTH, dtype=np.float32).reshape(1, TOKENS, WIDTH)
    np.testing.assert_allclose(from_folder, image @ matrix + 1, rtol=1e-5, atol=1e-5)
    assert np.array_equal(from_folder, from_archive)
    assert progress[-1][0] == progress[-1][1] > 0


def test_a_shape_that_the_graph_does_not_take_is_refused_by_name(sound: Path) -> None:
    opened = open_bundle(sound)
    session = Session(opened, opened.manifest.graph("head"), threads=1)
    with pytest.raises(Exception, match=r"takes image as float32 \(1, 4, 64\), got float32 \(4, 64\)"):
        session.run({"image": np.zeros((TOKENS, WIDTH), np.float32)})


def test_the_seal_is_checked(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace("sks", "abc"))
    with pytest.raises(BundleError, match=r"hash that manifest\.sha256 says"):
        open_bundle(bundle)


def test_links_and_missing_files_are_refused(bundle: Path, tmp_path: Path) -> None:
    weights = bundle / "weights"
    (tmp_path / "moved").mkdir()
    shutil.move(weights / "head.bin", tmp_path / "moved" / "head.bin")
    with pytest.raises(BundleError, match=r"lacks the file weights/head\.bin"):
        open_bundle(bundle)
    (weights / "head.bin").symlink_to(tmp_path / "moved" / "head.bin")
    with pytest.raises(BundleError, match="link"):
        open_bundle(bundle)
    shutil.rmtree(weights)
    weights.symlink_to(tmp_path / "moved")
    with pytest.raises(BundleError, match="link"):
        open_bundle(bundle)


def test_a_link_to_a_bundle_is_as_good_as_the_bundle(sound: Path, tmp_path: Path) -> None:
    """The runtime maps weights only from where the archive really lies."""
    (tmp_path / "there").mkdir()
    archive = pack(sound, tmp_path / "there" / "b.ptb")
    (tmp_path / "link.ptb").symlink_to(archive)
    (tmp_path / "folder").symlink_to(sound)
    expected = run_head(open_bundle(sound))
    for name in ("link.ptb", "folder"):
        assert np.array_equal(run_head(open_bundle(tmp_path / name)), expected)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(BundleError, match="circle"):
        open_bundle(tmp_path / "circle")


def test_a_path_that_the_runtime_cannot_open_is_refused(sound: Path, tmp_path: Path) -> None:
    """In a folder or as a file; names of files are bytes on Linux."""
    place = tmp_path / os.fsdecode(b"b\xff")
    try:
        shutil.copytree(sound, place)
    except OSError:
        pytest.skip("names of files are text here")
    for path in (place, pack(sound, place.with_suffix(".ptb"))):
        with pytest.raises(BundleError, match="is not UTF-8"):
            open_bundle(path)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.ptb").write_text("not a zip")
    for path, message in (
        (tmp_path / "empty", "lacks"),
        (tmp_path / "words.ptb", "is not a bundle"),
        (tmp_path / "no", "exist"),
    ):
        with pytest.raises(BundleError, match=message):
            open_bundle(path)


def test_archives_that_are_not_plain_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="compressed"):
        open_bundle(pack(bundle, tmp_path / "small.ptb", compression=zipfile.ZIP_DEFLATED))
    twice = pack(bundle, tmp_path / "twice.ptb")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(twice, "a") as file:
        file.write(bundle / "head.onnx", "head.onnx")
    with pytest.raises(BundleError, match="twice"):
        open_bundle(twice)
    more = pack(bundle, tmp_path / "more.ptb")
    with zipfile.ZipFile(more, "a") as file:
        file.writestr("../escape.txt", "x")
    with pytest.raises(BundleError, match="does not list"):
        open_bundle(more)


def hostile(change: Callable[[Any], None]) -> bytes:
    model = head_graph()
    change(model)
    content: bytes = model.SerializeToString()
    return content


def _domain(model: Any) -> None:
    model.graph.node[0].domain = "com.microsoft"


def _imported_domain(model: Any) -> None:
    model.opset_import.add(domain="com.microsoft", version=1)


def _location(place: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.graph.initializer[0].external_data[0].value = place

    return change


def _offset(model: Any) -> None:
    model.graph.initializer[0].external_data[1].value = str(10**9)


def _length(model: Any) -> None:
    model.graph.initializer[0].external_data[2].value = "64"


def _dims(model: Any) -> None:
    model.graph.initializer[0].dims[0] = 2**40


def _subgraph(model: Any) -> None:
    attribute = model.graph.node[0].attribute.add(name="body", type=5)
    attribute.g.name = "inner"


def _function(model: Any) -> None:
    model.functions.add(name="f", domain="pocket")


def _input(model: Any) -> None:
    model.graph.input[0].name = "picture"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (hostile(_domain), "operator of 'com.microsoft'"),
        (hostile(_imported_domain), "operators of 'com.microsoft'|one operator set"),
        (hostile(_location("/etc/passwd")), "reads '/etc/passwd'"),
        (hostile(_location("../head.bin")), "reads '../head.bin'"),
        (hostile(_location("lora/start.safetensors")), "which the manifest does not allow"),
        (hostile(_offset), "beyond the end"),
        (hostile(_length), "claims 64 bytes for 4096 elements"),
        (hostile(_dims), "impossible shape"),
        (hostile(_subgraph), "an attribute has the field 6"),
        (hostile(_function), "the model has the field 25"),
        (hostile(_input), "other inputs or outputs than the manifest says: image, picture"),
        (b"", "expected one graph"),
        (b"\x0a", "cut off"),
        (b"not onnx at all", "not a plain ONNX graph"),
    ],
)
def test_graphs_that_ask_for_more_are_refused(bundle: Path, content: bytes, message: str) -> None:
    (bundle / "head.onnx").write_bytes(content)
    seal(bundle, read_manifest_json(bundle))
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_altered_bytes_are_always_noticed(bundle: Path, tmp_path: Path) -> None:
    """One changed, missing or added byte anywhere, in the folder and in the archive."""
    rng = random.Random(5)
    files = [path for path in sorted(bundle.rglob("*")) if path.is_file()]
    for number in range(100):
        file = files[number % len(files)]
        content = file.read_bytes()
        file.write_bytes(mutated(content, rng))
        with pytest.raises(BundleError):
            open_bundle(bundle)
        file.write_bytes(content)
    open_bundle(bundle)
    archive = pack(bundle, tmp_path / "b.ptb")
    content = archive.read_bytes()
    unnoticed = 0
    for _ in range(100):
        changed_content = mutated(content, rng)
        archive.write_bytes(changed_content)
        try:
            opened = open_bundle(archive)
        except BundleError:
            continue
        # What an archive says beside its entries (times, attributes, a comment) may change; what is used may not.
        unnoticed += 1
        assert all(opened.read(file.relative_to(bundle).as_posix()) == file.read_bytes() for file in files)
    assert unnoticed < 40


def mutated(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    match rng.randrange(3):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
        case _:
            return content[:place] + bytes([rng.randrange(256)]) + content[place:]


def test_resealed_mutations_never_crash(bundle: Path) -> None:
    """Someone who also renews hashes gets an error or a bundle whose graphs load or are refused, never a crash."""
    rng = random.Random(6)
    original = (bundle / "head.onnx").read_bytes()
    for _ in range(120):
        (bundle / "head.onnx").write_bytes(mutated(original, rng))
        seal(bundle, read_manifest_json(bundle))
        try:
            run_head(open_bundle(bundle))
        except Exception as error:
            assert type(error).__module__ == "pocketune_edge.errors", error


def test_resealed_manifests_never_crash(skipping_bundle: Path, tmp_path: Path) -> None:
    """Someone who changes sizes and counts, or removes graphs, and renews the hash, gets an error or a picture."""
    rng = random.Random(8)
    folder = Path(shutil.copytree(skipping_bundle, tmp_path / "bundle"))
    original = (folder / "manifest.json").read_text()
    made = 0
    for _ in range(60):
        manifest = json.loads(original)
        for _ in range(rng.randrange(1, 3)):
            *way, last = rng.choice(list(numbers_in({name: part for name, part in manifest.items() if name != "files"})))
            target: Any = manifest
            for key in way:
                target = target[key]
            target[last] = rng.choice([0, 1, 7, 2**20, 2**39])
        if rng.random() < 0.3:
            del manifest["graphs"][rng.randrange(len(manifest["graphs"]))]
        manifest["recipe"] = json.loads(original)["recipe"]  # numbers of steps that are not meant to end
        seal(folder, manifest, list_files=False)
        try:
            opened = open_bundle(folder)
            sessions = Sessions(opened, keep=False, threads=1)
            start = neutral(opened.manifest.tuned)
            made += len(
                list(render(sessions, ["x"], seeds=[0], steps=1, guidance=7, parameters=start, on_step=lambda *_: None))
            )
        except Exception as error:
            assert type(error).__module__ == "pocketune_edge.errors", error
    assert made > 0


def numbers_in(data: Any) -> Iterator[tuple[Any, ...]]:
    """The places of all whole numbers."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        if type(value) is int:
            yield (key,)
        yield from ((key, *rest) for rest in numbers_in(value))
