"""Inspection says what a file or folder is, opens no pickle, and survives hostile headers."""

import json
import pickle
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pocketune.errors import FileFormatError
from pocketune.inspection import Inspection, inspect
from pocketune.tensorfile import open_tensor_file


def describe(path: Path) -> Inspection:
    found = inspect(path)
    json.dumps(found.as_dict(), allow_nan=False)  # raises where it is no JSON
    return found


def fault(path: Path) -> str:
    with pytest.raises(FileFormatError) as caught:
        inspect(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def pairs(
    targets: list[str], *, rank: int = 4, width: int = 8, down: str, up: str, zero: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {}
    for target in targets:
        tensors[target + down] = rng.normal(size=(rank, width)).astype(np.float32)
        tensors[target + up] = np.full((width, rank), 0.0 if target in zero else -0.25, np.float32)
    return tensors


def sd3_targets(blocks: list[int]) -> list[str]:
    return [
        f"transformer.transformer_blocks.{block}.attn.{name}" for block in blocks for name in ("to_q", "to_out.0", "add_k_proj")
    ]


PEFT = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
KOHYA = {"down": ".lora_down.weight", "up": ".lora_up.weight"}


def test_lora_of_diffusers(tmp_path):
    tensors = pairs(sd3_targets([0, 1, 2, 5]), **PEFT)
    adapter = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.bias": "none"})
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"format": "pt", "lora_adapter_metadata": adapter})
    found = describe(tmp_path / "lora.safetensors")
    assert found.kind == "lora"
    assert found.size_bytes == (tmp_path / "lora.safetensors").stat().st_size
    assert found.notes == ()
    expected = {
        "layout": "diffusers (peft)",
        "architecture": "Stable Diffusion 3 (MMDiT)",
        "rank": 4,
        "alpha": 8.0,
        "targets": 12,
        "targets_by_part": {"denoiser": 12},
        "modules": ["attn.add_k_proj", "attn.to_out.0", "attn.to_q"],
        "blocks": {"transformer_blocks": "0-2,5"},
        "zero_targets": 0,
        "all_zero": False,
        "largest_up": 0.25,
        "parameters": 12 * 2 * 32,
        "dtypes": ["F32"],
    }
    assert {name: found.facts[name] for name in expected} == expected


def test_lora_of_kohya(tmp_path):
    unet = [f"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_{name}" for name in "qk"]
    tensors = pairs(unet, rank=2, width=768, **KOHYA) | pairs(["lora_te1_text_model_encoder_layers_0_mlp_fc1"], rank=8, **KOHYA)
    tensors |= {f"{name}.alpha": np.array(1.0, np.float32) for name in unet}
    save_file(tensors, tmp_path / "lora.safetensors")
    found = describe(tmp_path / "lora.safetensors")
    assert found.facts["rank"] == [2, 8]
    assert found.facts["alpha"] == 1.0
    assert found.facts["targets_by_part"] == {"denoiser": 2, "text_encoder": 1}
    assert found.facts["blocks"] == {"down_blocks": "1"}
    assert found.facts["architecture"] == "Stable Diffusion 1.x U-Net"


@pytest.mark.parametrize(
    ("target", "width", "expected"),
    [
        ("unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v", 2048, "Stable Diffusion XL U-Net"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 1024, "Stable Diffusion 2.x U-Net"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 96, "U-Net"),
        ("transformer.single_transformer_blocks.3.attn.to_q", 8, "FLUX"),
        ("transformer.transformer_blocks.3.attn1.to_q", 8, "transformer with cross-attention (PixArt, SANA)"),
        ("text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj", 8, "text encoder only"),
        ("something.else", 8, "unknown"),
    ],
)
def test_architecture_is_guessed(tmp_path, target, width, expected):
    save_file(pairs([target], width=width, **PEFT), tmp_path / "a.safetensors")
    assert describe(tmp_path / "a.safetensors").facts["architecture"] == expected


def test_older_diffusers_layout(tmp_path):
    names = {"down": "_lora.down.weight", "up": "_lora.up.weight"}
    save_file(pairs(["unet.down_blocks.0.attentions.0.processor.to_q"], **names), tmp_path / "a.safetensors")
    found = describe(tmp_path / "a.safetensors")
    assert (found.kind, found.facts["rank"], found.facts["targets"]) == ("lora", 4, 1)


def test_a_lora_that_does_nothing_is_called_so(tmp_path):
    targets = sd3_targets([0])
    save_file(pairs(targets, zero=tuple(targets), **PEFT), tmp_path / "a.safetensors")
    found = describe(tmp_path / "a.safetensors")
    assert found.facts["all_zero"]
    assert found.facts["zero_targets"] == 3
    assert "changes nothing" in found.notes[0]
    save_file(pairs(targets, zero=tuple(targets[:1]), **PEFT), tmp_path / "a.safetensors")
    found = describe(tmp_path / "a.safetensors")
    assert not found.facts["all_zero"]
    assert "1 of 3 targets" in found.notes[0]


def test_infinite_values_halves_and_ranks_that_do_not_match_are_noted(tmp_path):
    targets = sd3_targets([0])
    tensors = pairs(targets, **PEFT)
    tensors[targets[0] + ".lora_B.weight"][0, 0] = np.nan
    del tensors[targets[1] + ".lora_A.weight"]
    tensors[targets[2] + ".lora_B.weight"] = np.ones((8, 5), np.float32)
    save_file(tensors, tmp_path / "a.safetensors")
    notes = " ".join(describe(tmp_path / "a.safetensors").notes)
    assert "1 tensor(s) hold infinity or NaN" in notes
    assert "1 target(s) have only one of the two matrices" in notes
    assert "1 target(s) have matrices whose ranks do not match" in notes


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("dtype", "data", "zero", "finite", "largest"),
    [
        ("BF16", struct.pack("<2H", 0x3FC0, 0xC000), False, True, 2.0),
        ("BF16", struct.pack("<2H", 0x8000, 0), True, True, 0.0),
        ("BF16", struct.pack("<2H", 0x7F80, 0x3F80), False, False, 1.0),
        ("F16", np.array([-3, 1], "<f2").tobytes(), False, True, 3.0),
        ("F64", np.array([0, -0.0], "<f8").tobytes(), True, True, 0.0),
        ("I8", np.array([-128, 1], "i1").tobytes(), False, True, 128.0),
        ("F8_E4M3", b"\0\1", False, True, None),
        ("F8_E4M3", b"\0\0", True, True, None),
    ],
)
def test_statistics_of_every_kind_of_type(tmp_path, dtype, data, zero, finite, largest):
    header = {"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, len(data)]}}
    statistics = open_tensor_file(raw_file(tmp_path / "a.safetensors", header, data)).statistics("x")
    assert (statistics.zero, statistics.finite, statistics.largest) == (zero, finite, largest)


def test_other_tensors_are_not_read(tmp_path, monkeypatch):
    save_file(
        {"transformer_blocks.0.weight": np.ones((2, 3), np.float16), "x": np.ones(4, np.int64)}, tmp_path / "a.safetensors"
    )
    monkeypatch.setattr("pocketune.tensorfile.TensorFile._raw", lambda *_: pytest.fail("a tensor was read"))
    found = describe(tmp_path / "a.safetensors")
    assert (found.kind, found.facts["parameters"], found.facts["dtypes"]) == ("tensors", 10, ["F16", "I64"])
    assert found.facts["blocks"] == {"transformer_blocks": "0"}


TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "no bytes": b"",
    "short": b"\x02\0\0",
    "header longer than memory": struct.pack("<Q", 2**63) + b"{}",
    "header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "no JSON": struct.pack("<Q", 5) + b"{hell",
    "no object": struct.pack("<Q", 2) + b"[]",
    "deep": struct.pack("<Q", 100_000) + b'{"x":' + b"[" * 99_995,
    "no UTF-8": struct.pack("<Q", 6) + b'{"\xff":1',
}
HOSTILE_HEADERS = {
    "negative offset": {"x": TWO | {"data_offsets": [-8, 0]}},
    "backward offsets": {"x": TWO | {"data_offsets": [8, 0]}},
    "overlap": {"x": TWO, "y": TWO},
    "hole": {"x": TWO, "y": TWO | {"data_offsets": [12, 20]}},
    "beyond the end": {"x": TWO | {"shape": [2000], "data_offsets": [0, 8000]}},
    "overflow": {"x": TWO | {"shape": [2**62, 2**62]}},
    "shape and size disagree": {"x": TWO | {"shape": [3]}},
    "unknown type": {"x": TWO | {"dtype": "PICKLE"}},
    "metadata that is no text": {"__metadata__": {"a": 1}, "x": TWO},
    "list in place of an entry": {"x": ["F32", [2], [0, 8]]},
    "no offsets": {"x": {"dtype": "F32", "shape": [2]}},
}


@pytest.mark.parametrize("name", [*HOSTILE, *HOSTILE_HEADERS])
def test_hostile_header_is_refused(tmp_path, name):
    path = tmp_path / "a.safetensors"
    if name in HOSTILE:
        path.write_bytes(HOSTILE[name])
    else:
        raw_file(path, HOSTILE_HEADERS[name], bytes(8))
    assert "not a sound .safetensors file" in fault(path)


def test_name_that_occurs_twice_never_leads_outside_the_file(tmp_path):
    inside = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    outside = b'{"dtype":"F32","shape":[2],"data_offsets":[800,808]}'
    path = tmp_path / "a.safetensors"
    for first, second in ((inside, outside), (outside, inside)):
        raw_file(path, b'{"x":' + first + b',"x":' + second + b"}", bytes(8))
        try:
            file = open_tensor_file(path)
        except FileFormatError:
            continue
        assert file.tensors["x"].end <= path.stat().st_size


def test_mutated_bytes_give_an_inspection_or_a_file_format_error(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(
        pairs(sd3_targets([0]), **PEFT) | {"x.alpha": np.array(1, np.float32)}, path, metadata={"lora_adapter_metadata": "{}"}
    )
    content, rng = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    outcomes = {"inspection": 0, "error": 0}
    for _ in range(600):
        data = bytearray(content)
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(header if rng.random() < 0.8 else len(data))
            data[at] = rng.choice([rng.randrange(256), ord("9"), ord("]"), ord(","), ord("A")])
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(bytes(data))
        try:
            describe(path)
            outcomes["inspection"] += 1
        except FileFormatError:
            outcomes["error"] += 1
    assert min(outcomes.values()) > 50


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
        with pytest.raises(FileFormatError, match="weight_map"):
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


def test_run_without_its_result(tmp_path):
    (tmp_path / "run.json").write_text('{"model": "m"}')
    assert "was removed" in inspect(tmp_path).notes[0]


@pytest.mark.parametrize("graphs", [{"train": {}, "sample": {}}, [{"name": "train"}, {"name": "sample"}]])
def test_bundle_folder(tmp_path, graphs):
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 1, "graphs": graphs}))
    (tmp_path / "train.onnx").write_bytes(b"12345")
    found = describe(tmp_path)
    assert (found.kind, found.facts["schema_version"], found.facts["graphs"]) == ("bundle", 1, ["train", "sample"])
    assert found.facts["files"]["train.onnx"] == 5


def test_folder_with_a_single_lora(tmp_path):
    save_file(pairs(sd3_targets([0]), **PEFT), tmp_path / "pytorch_lora_weights.safetensors")
    assert inspect(tmp_path).kind == "lora"
    save_file({"x": np.ones(1)}, tmp_path / "other.safetensors")
    assert "found 2 of the latter" in fault(tmp_path)
