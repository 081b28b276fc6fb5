"""Inspection of folders says what they are; of unknown files, that they are; of pickles, that it opens none."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pocketune.errors import FileFormatError, ModelError
from pocketune.inspection import inspect
from tests.unit.inspected import PEFT, describe, fault, pairs, sd3_targets


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.ckpt", "a.pth", "a.pkl", "a", "a.dat"])
@pytest.mark.parametrize("archive", [False, True])
def test_pickles_are_refused_and_never_run(tmp_path, name, archive):
    trap = tmp_path / "trapped"
    content = pickle.dumps(Trap(trap), protocol=2)
    path = tmp_path / name
    if archive:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", content)
    else:
        path.write_bytes(content)
    message = fault(path)
    assert "can run any program" in message
    assert ".safetensors" in message
    assert not trap.exists()


def test_what_is_nothing_known(tmp_path):
    assert "no file or folder" in fault(tmp_path / "none")
    (tmp_path / "a.txt").write_text("hello there")
    assert "not recognised" in fault(tmp_path / "a.txt")
    (tmp_path / "empty").mkdir()
    assert "not recognised" in fault(tmp_path / "empty")
    (tmp_path / "loop").symlink_to("loop")
    fault(tmp_path / "loop")


def make_model(folder: Path) -> Path:
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.42.1",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder_3": [None, None],
        "../outside": ["a", "b"],
    }
    for name in ("transformer", "vae", "scheduler"):
        (folder / name).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    weights = {f"transformer_blocks.{block}.attn.to_q.weight": np.ones((4, 4), np.float16) for block in range(3)}
    save_file(weights, folder / "transformer/diffusion_pytorch_model.fp16.safetensors")
    save_file(weights, folder / "transformer/diffusion_pytorch_model.safetensors")
    save_file({"a": np.ones(5, np.float32)}, folder / "vae/model-00001-of-00002.safetensors")
    save_file({"b": np.ones(6, np.float32)}, folder / "vae/model-00002-of-00002.safetensors")
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "vae/model.safetensors.index.json").write_text(json.dumps(shards))
    return folder


def test_model_folder(tmp_path):
    found = describe(make_model(tmp_path))
    assert found.kind == "model"
    assert found.facts["pipeline"] == "StableDiffusion3Pipeline"
    components = found.facts["components"]
    assert set(components) == {"transformer", "vae", "scheduler"}
    assert components["transformer"]["parameters"] == 48
    assert components["transformer"]["blocks"] == {"transformer_blocks": "0-2"}
    assert components["vae"]["parameters"] == 11
    assert "parameters" not in components["scheduler"]
    assert found.facts["parameters"] == 59
    assert found.notes == ()


def test_model_folder_with_faults(tmp_path):
    make_model(tmp_path)
    shards = tmp_path / "vae/model.safetensors.index.json"
    for weight_map in ({"a": "../../secret"}, {"a": 3}, [], {}):
        shards.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError, match=r"the index|lacks 1 of 1"):
            inspect(tmp_path)
    shards.unlink()
    for path in (tmp_path / "vae").iterdir():
        path.unlink()
    (tmp_path / "vae/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02")
    (tmp_path / "scheduler").rmdir()
    notes = " ".join(inspect(tmp_path).notes)
    assert "vae has only pickled weights" in notes
    assert "scheduler is listed in model_index.json but its folder is missing" in notes


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff"])
@pytest.mark.parametrize("name", ["model_index.json", "run.json", "manifest.json"])
def test_damaged_json(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(FileFormatError, match=name):
        inspect(tmp_path)


def test_run_folder(tmp_path):
    (tmp_path / "lora").mkdir()
    targets = sd3_targets([4, 5])
    save_file(pairs(targets, zero=tuple(targets), **PEFT), tmp_path / "lora/pytorch_lora_weights.safetensors")
    (tmp_path / "run.json").write_text(json.dumps({"model": "pocket-sd3", "recipe": {"steps": 5}}))
    (tmp_path / "samples").mkdir()
    for name in ("00-before.png", "00-after.png"):
        (tmp_path / "samples" / name).touch()
    found = describe(tmp_path)
    assert found.kind == "run"
    assert found.facts["finished"]
    assert not found.facts["resumable"]
    assert found.facts["samples"] == 1
    assert found.facts["model"] == "pocket-sd3"
    assert found.facts["lora"]["blocks"] == {"transformer_blocks": "4-5"}
    assert "changes nothing" in found.notes[0]


def test_interrupted_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    newest = tmp_path / "checkpoints/step-000200.safetensors"
    for step in (100, 200):
        save_file({"x": np.ones(1)}, tmp_path / f"checkpoints/step-000{step}.safetensors", metadata={"step": f"{step}"})
    (tmp_path / "checkpoints/.step-000300.safetensors.a1.partial").touch()
    found = describe(tmp_path)
    assert (found.kind, found.facts["finished"], found.facts["resumable"]) == ("run", False, True)
    assert found.facts["checkpoints"] == ["step-000100.safetensors", "step-000200.safetensors"]
    assert found.facts["checkpoint_step"] == 200
    newest.write_bytes(newest.read_bytes()[:-1])
    found = describe(tmp_path)
    assert not found.facts["resumable"]
    assert "newest checkpoint cannot be used" in found.notes[0]


@pytest.mark.parametrize("made", ["features/a1/shard-0000.safetensors", "class_images/000.png", None])
def test_run_that_was_interrupted_before_training(tmp_path, made):
    (tmp_path / "job.json").write_text('{"fingerprint": "f"}')
    if made:
        (tmp_path / made).parent.mkdir(parents=True)
        (tmp_path / made).touch()
    found = describe(tmp_path)
    assert (found.kind, found.facts["finished"], found.facts["resumable"]) == ("run", False, made is not None)


def test_run_without_its_result(tmp_path):
    (tmp_path / "run.json").write_text('{"model": "m"}')
    assert "was removed" in inspect(tmp_path).notes[0]


@pytest.mark.parametrize("graphs", [{"train": {}, "sample": {}}, [{"name": "train"}, {"name": "sample"}]])
def test_bundle_folder(tmp_path, graphs):
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 1, "graphs": graphs}))
    (tmp_path / "train.onnx").write_bytes(b"12345")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/block-00.bin").write_bytes(b"123")
    found = describe(tmp_path)
    assert (found.kind, found.facts["schema_version"], found.facts["graphs"]) == ("bundle", 1, ["train", "sample"])
    assert found.facts["files"]["train.onnx"] == 5
    assert found.facts["files"]["weights/block-00.bin"] == 3


def test_bundle_in_one_file(tmp_path):
    path = tmp_path / "toy.ptb"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", json.dumps({"schema_version": 1, "graphs": {"train": {}}}))
        archive.writestr("train.onnx", b"12345")
    found = describe(path)
    assert (found.kind, found.facts["schema_version"], found.facts["graphs"]) == ("bundle", 1, ["train"])
    assert found.facts["files"]["train.onnx"] == 5
    assert found.size_bytes == path.stat().st_size

    path.write_bytes(path.read_bytes()[:-30])
    assert "Copy or export the bundle again" in fault(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", "{" + " " * 100_000 + "}")
    assert "compressed or too large" in fault(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", "[]")
    assert "expected a JSON object" in fault(path)


def test_folder_with_a_single_lora(tmp_path):
    save_file(pairs(sd3_targets([0]), **PEFT), tmp_path / "pytorch_lora_weights.safetensors")
    assert inspect(tmp_path).kind == "lora"
    save_file({"x": np.ones(1)}, tmp_path / "other.safetensors")
    assert "found 2 of the latter" in fault(tmp_path)
