"""Manifests are read strictly, alike by exporter and device, and those of older schemas with what they meant."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pocketune.runfolder import run_fingerprint
from pocketune_edge.bundle import open_bundle
from pocketune_edge.errors import BundleError, SettingError
from pocketune_edge.reading import read_manifest
from pocketune_edge.settings import settings_of
from pocketune_export.manifest import Manifest
from tests.edge.handmade import TOKENS, WIDTH, read_manifest_json, seal

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


def terabytes(manifest: dict[str, Any]) -> None:
    """Parameters that add up, but of which the start values hold next to none."""
    tuned = manifest["tuned"]
    for parameter, offset in zip(tuned["parameters"], (0, 2**38), strict=True):
        parameter |= {"shape": [2**19, 2**19], "offset": offset}
    tuned["flat_elements"] = 2**39


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (terabytes, r"549755813888 elements, of which lora/start\.safetensors can hold"),
        (changed("model.name", "toy \udcff"), "expected text that UTF-8 can write, got 'toy .udcff'"),
        (changed("schema_version", 2), "schema version 2; this Pocketune reads up to 1. Update"),
        (changed("schema_minor", 2), r"schema version 1\.2; this Pocketune reads up to 1\.1\. Update"),
        (changed("backend", "other"), "expected one of onnx, got 'other'"),
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
        (changed("tuned.flat_elements", 2**39), "flat vector claims 549755813888"),
        (changed("model.block_count", 2), "covers 1 of 2 blocks"),
        (changed("model.block_count", True), "expected a int"),
        (changed("model.surprise", 1), "unknown field"),
        (changed("noise_schedule.shift", 0), "above 0"),
        (changed("noise_schedule", None), "expected an object"),
        (changed("noise_schedule.train_timesteps", 2**39), "claims 549755813888 timesteps"),
        (changed("batch.latent_shape", [2**39, 8, 8]), "embed does not take the batch's latents"),
        (changed("batch.resolution", 2**39), "does not take images of 549755813888 pixels"),
        (changed("graphs.3.block", 1), "0 of 1 blocks have a graph block_forward"),
        (changed("graphs.3.role", "block_vjp"), "0 of 1 blocks have a graph block_forward"),
    ],
)
def test_a_manifest_that_lies_is_refused(bundle: Path, change: Change, message: str) -> None:
    manifest = read_manifest_json(bundle)
    change(manifest)
    seal(bundle, manifest, list_files=False)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_a_setting_that_is_no_text_is_refused(sound: Path) -> None:
    """A terminal of another encoding sends such bytes."""
    with pytest.raises(SettingError, match="instance_prompt: expected text that UTF-8 can write"):
        settings_of(open_bundle(sound).manifest, {"instance_prompt": "a \udcff toy"})


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


def test_a_whole_number_is_the_rate_that_it_stands_for(sound: Path) -> None:
    """To a fingerprint, 1 and 1.0 are two recipes."""
    manifest = open_bundle(sound).manifest
    (asked, whole), (_, rate) = (settings_of(manifest, {"learning_rate": value, "steps": 3}) for value in (1, 1.0))
    assert asked.learning_rate == 1
    assert run_fingerprint(whole, model="m", photos=[]) == run_fingerprint(rate, model="m", photos=[])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"schema_version": 1e400}', b"\xff\xfe"])
def test_a_damaged_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError, match="manifest"):
        read_manifest(content, "b")


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
