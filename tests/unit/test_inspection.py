"""Inspection of single files says what they are, and survives hostile headers."""

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pocketune.errors import FileFormatError
from pocketune.tensorfile import open_tensor_file
from tests.unit.inspected import PEFT, describe, fault, pairs, sd3_targets

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
