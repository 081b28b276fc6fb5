"""Bundles are checked before anything in them is used; sound ones run alike from a folder and from an archive."""

import copy
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pocketune_edge.bundle import Bundle, open_bundle
from pocketune_edge.errors import BundleError
from pocketune_edge.reading import read_manifest
from pocketune_edge.session import Session
from pocketune_edge.settings import settings_of
from pocketune_export.manifest import Manifest
from tests.edge.handmade import TOKENS, WIDTH, head_graph, make_bundle, pack, read_manifest_json, seal


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "sound")


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "bundle"))


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


Change = Callable[[dict[str, Any]], None]


def changed(path: str, value: Any) -> Change:
    """Set a manifest field, as in "graphs.0.inputs.1.shape"."""
    *steps, last = path.split(".")

    def change(manifest: dict[str, Any]) -> None:
        target: Any = manifest
        for step in steps:
            target = target[int(step) if isinstance(target, list) else step]
        target[int(last) if isinstance(target, list) else last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("schema_version", 2), "schema version 2; this Pocketune reads up to 1. Update"),
        (changed("schema_minor", 2), r"schema version 1\.2; this Pocketune reads up to 1\.1\. Update"),
        (changed("backend", "executorch"), "for executorch; this runtime runs onnx"),
        (changed("files.0.path", "../outside.onnx"), "leaves the bundle"),
        (changed("files.0.path", "/etc/passwd"), "leaves the bundle"),
        (changed("files.0.path", "a\\b"), "leaves the bundle"),
        (changed("files.0.bytes", 2**45), "at most"),
        (changed("files.0.bytes", 2**39), "the manifest says 549755813888"),
        (changed("files.0.sha256", "f" * 64), "does not have the hash"),
        (changed("graphs.0.file", "nowhere.onnx"), "used but not listed"),
        (changed("graphs.0.weights", []), "which the manifest does not allow"),
        (changed("graphs.0.inputs.0.shape", [1, TOKENS, WIDTH + 1]), "other inputs or outputs than the manifest says: image"),
        (changed("graphs.0.inputs.0.shape", [2**39, 2**39]), "impossible shape"),
        (changed("graphs.0.inputs.0.name", "velocity"), "two inputs or outputs of one name"),
        (changed("graphs.0.inputs.0.dtype", "int64"), "other inputs or outputs"),
        (changed("opset", 17), "operator set 18, the manifest says 17"),
        (changed("lora.flat_elements", 2**39), "flat vector claims 549755813888"),
        (changed("model.block_count", 2), "covers 1 of 2 blocks"),
        (changed("model.block_count", True), "expected a int"),
        (changed("model.surprise", 1), "unknown field"),
        (changed("noise_schedule.shift", 0), "above 0"),
        (changed("noise_schedule", None), "expected an object"),
    ],
)
def test_a_manifest_that_lies_is_refused(bundle: Path, change: Change, message: str) -> None:
    manifest = read_manifest_json(bundle)
    change(manifest)
    seal(bundle, manifest, list_files=False)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_a_missing_field_is_refused(bundle: Path) -> None:
    manifest = read_manifest_json(bundle)
    del manifest["graphs"][0]["role"]
    seal(bundle, manifest, list_files=False)
    with pytest.raises(BundleError, match=r"graphs\.0: the field 'role' is missing"):
        open_bundle(bundle)


def test_a_bundle_of_the_first_schema_is_read(bundle: Path) -> None:
    """What came later has defaults there, and only there."""
    manifest = read_manifest_json(bundle)
    del manifest["noise_schedule"]["ddim"], manifest["recipe"]["refresh_every"]
    seal(bundle, manifest, list_files=False)
    with pytest.raises(BundleError, match="the field 'ddim' is missing"):
        open_bundle(bundle)
    manifest["noise_schedule"]["ddim"] = None
    seal(bundle, manifest, list_files=False)
    with pytest.raises(BundleError, match="the field 'refresh_every' is missing"):
        settings_of(open_bundle(bundle).manifest, {})
    del manifest["noise_schedule"]["ddim"], manifest["schema_minor"]
    seal(bundle, manifest, list_files=False)
    opened = open_bundle(bundle).manifest
    assert opened.noise_schedule.ddim is None
    assert settings_of(opened, {})[0].refresh_every is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"schema_version": 1e400}', b"\xff\xfe"])
def test_a_damaged_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError, match="manifest"):
        read_manifest(content, "b")


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
        (hostile(_subgraph), "a graph or a sparse tensor of its own"),
        (hostile(_function), "functions"),
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


def test_both_readers_agree_on_manifests(sound: Path) -> None:
    """The strict models of the exporter and the light reader here accept and refuse the same."""
    rng = random.Random(7)
    original = read_manifest_json(sound)
    values = [None, 0, -1, 1.5, 2**41, "", "x", "../x", True, [], {}, [1, 2], 1e-9, "0" * 64, [[]], 10**400]
    verdicts = []
    for _ in range(300):
        manifest = copy.deepcopy(original)
        target: Any = manifest
        while True:
            key = rng.choice(list(target) if isinstance(target, dict) else list(range(len(target))))
            if not (isinstance(target[key], dict | list) and target[key]) or rng.random() < 0.15:
                break
            target = target[key]
        if target is manifest["recipe"]:
            continue  # read by each side in its own way, later
        action = rng.randrange(6)
        if action == 0 and isinstance(target, dict):
            del target[key]
        elif action == 1 and isinstance(target, dict):
            target["new"] = 1
        else:
            target[key] = rng.choice(values)
        if manifest.get("schema_version") is True or manifest.get("schema_minor") != 1 or manifest["schema_minor"] is True:
            continue  # to pydantic's Literal, true is 1; and older schemas are read by devices alone
        content = json.dumps(manifest).encode()
        verdicts.append((refused_by(read_light, content), refused_by(Manifest.model_validate_json, content), content))
    assert [content for light, strict, content in verdicts if light != strict] == []
    assert 20 < sum(light for light, _, _ in verdicts) < len(verdicts)
    assert refused_by(read_light, json.dumps(original).encode()) is False


def read_light(content: bytes) -> object:
    return read_manifest(content, "b")


def refused_by(reader: Callable[[bytes], object], content: bytes) -> bool:
    try:
        reader(content)
    except (BundleError, ValidationError):
        return True
    return False
