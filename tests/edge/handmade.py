"""A small bundle made by hand: sound in every respect, but with few graphs, of which only the head computes anything."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper
from safetensors.numpy import save

WIDTH, TOKENS, RANK, SIDE = 64, 4, 2, 64
LATENTS = (4, 8, 8)
RECIPE = {
    "instance_prompt": "a photo of sks toy",
    "class_prompt": None,
    "class_images": 8,
    "prior_loss_weight": 1.0,
    "cache_dtype": "float32",
    "cache_limit_mb": 4096,
    "draws": None,
    "refresh_every": None,
    "steps": 5,
    "batch_size": 1,
    "learning_rate": 1e-3,
    "weighting_scheme": "logit_normal",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "seed": 0,
    "checkpoint_every": 2,
    "sample_steps": 2,
    "guidance_scale": 7.0,
    "gradient": "backprop",
    "scale_learning_rate": 3e-3,
    "scale_in_learning_rate": 1e-3,
    "zo_learning_rate": 1e-4,
    "zo_epsilon": 1e-2,
    "zo_queries": 1,
    "zo_two_sided": True,
}


def make_bundle(folder: Path) -> Path:
    """Write the bundle; its head multiplies the image by an external matrix and adds the embedding."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "head.bin").write_bytes(b"\0" * 64 + matrix.tobytes())
    (folder / "head.onnx").write_bytes(head_graph().SerializeToString())
    (folder / "embed.onnx").write_bytes(copy_graph("noisy", 1, *LATENTS).SerializeToString())
    (folder / "vae.onnx").write_bytes(copy_graph("pixels", 1, 3, SIDE, SIDE).SerializeToString())
    names = ("A", "B")
    shapes = ((RANK, WIDTH), (WIDTH, RANK))
    keys = [f"transformer.block.lora_{name}.weight" for name in names]
    values = [rng.standard_normal(shapes[0]).astype(np.float32), np.zeros(shapes[1], np.float32)]
    (folder / "lora").mkdir()
    (folder / "lora" / "start.safetensors").write_bytes(save(dict(zip(keys, values, strict=True)), {"format": "pt"}))
    parameters = [
        {
            "name": f"block.lora_{name}.default.weight",
            "key": key,
            "shape": list(shape),
            "interval": 0,
            "block": 0,
            "offset": offset,
        }
        for name, key, shape, offset in zip(names, keys, shapes, (0, RANK * WIDTH), strict=True)
    ]
    manifest: dict[str, Any] = {
        "schema_version": 1,
        "schema_minor": 1,
        "pocketune_version": "0.1.0",
        "backend": "onnx",
        "opset": 18,
        "model": {
            "name": "handmade",
            "kind": "SD3Transformer2DModel",
            "sha256": "0" * 64,
            "note": None,
            "block_count": 1,
            "streams": ["image", "text"],
            "zero_negative": False,
        },
        "recipe": RECIPE,
        "plan": {
            "spans": [{"start": 0, "stop": 1, "skipped": False, "features": [], "replaces": False}],
            "use_residuals": True,
        },
        "batch": {
            "rows": 1,
            "photos": 1,
            "class_images": 0,
            "resolution": SIDE,
            "latent_shape": list(LATENTS),
            "text_tokens": 4,
            "text_width": 8,
            "pooled_width": 8,
        },
        "weights": {"storage": "fp32", "block": None},
        "tuned": {
            "method": "lora",
            "lora": {"rank": RANK, "alpha": float(RANK), "targets": ["attn.to_q"]},
            "intervals": 1,
            "parameters": parameters,
            "flat_elements": 2 * RANK * WIDTH,
            "initial": "lora/start.safetensors",
        },
        "optimizer": {
            "kind": "adamw",
            "beta1": 0.9,
            "beta2": 0.999,
            "learning_rate": 1e-3,
            "in_learning_rate": None,
            "weight_decay": 1e-4,
            "epsilon": 1e-8,
            "max_grad_norm": 1.0,
        },
        "noise_schedule": {
            "kind": "flow_match_euler",
            "objective": "flow",
            "train_timesteps": 1000,
            "shift": 3.0,
            "signal": None,
            "ddim": None,
        },
        "text_encoders": [],
        "vae": {"encoder": ["vae"], "decoder": ["head"], "scaling_factor": 0.9, "shift_factor": 0.1, "downscale": 8},
        "memory": dict.fromkeys(("one_graph_anonymous", "one_graph_mapped", "streaming_anonymous", "streaming_mapped"), 1000),
        "graphs": [
            {
                "name": "head",
                "file": "head.onnx",
                "role": "head",
                "block": None,
                "part": 0,
                "parameters": None,
                "inputs": [port("image", 1, TOKENS, WIDTH), port("embedding", 1, WIDTH)],
                "outputs": [port("velocity", 1, TOKENS, WIDTH)],
                "weights": ["weights/head.bin"],
                "weight_bytes": matrix.nbytes,
                "activation_bytes": 4 * TOKENS * WIDTH,
            },
            copying("embed", "embed", "noisy", 1, *LATENTS),
            copying("vae", "vae_encoder", "pixels", 1, 3, SIDE, SIDE),
        ],
        "files": [],
    }
    block = {"name": "block_forward.00", "role": "block_forward", "block": 0}
    manifest["graphs"].append(manifest["graphs"][0] | block)
    seal(folder, manifest)
    return folder


def head_graph() -> Any:
    """image @ W + embedding, W in weights/head.bin."""
    weight = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights/head.bin"), ("offset", "64"), ("length", str(4 * WIDTH * WIDTH))):
        weight.external_data.add(key=key, value=value)
    float32 = TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["image", "W"], ["product"]),
            helper.make_node("Add", ["product", "embedding"], ["velocity"]),
        ],
        "main",
        [
            helper.make_tensor_value_info("image", float32, [1, TOKENS, WIDTH]),
            helper.make_tensor_value_info("embedding", float32, [1, WIDTH]),
        ],
        [helper.make_tensor_value_info("velocity", float32, [1, TOKENS, WIDTH])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def copy_graph(name: str, *shape: int) -> Any:
    """Gives its only input back."""
    ports = [helper.make_tensor_value_info(port, TensorProto.FLOAT, shape) for port in (name, "same")]
    graph = helper.make_graph([helper.make_node("Identity", [name], ["same"])], "main", ports[:1], ports[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def copying(file: str, role: str, name: str, *shape: int) -> dict[str, Any]:
    """What the manifest says of such a graph."""
    return {
        "name": file,
        "file": f"{file}.onnx",
        "role": role,
        "block": 0 if role == "vae_encoder" else None,
        "part": 0,
        "parameters": None,
        "inputs": [port(name, *shape)],
        "outputs": [port("same", *shape)],
        "weights": [],
        "weight_bytes": 0,
        "activation_bytes": 0,
    }


def port(name: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "dtype": "float32", "meaning": "of the test"}


def read_manifest_json(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest


def seal(folder: Path, manifest: dict[str, Any], *, list_files: bool = True) -> None:
    """Write manifest and seal, with the true sizes and hashes of the files."""
    if list_files:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("manifest.")]
        manifest["files"] = [
            {
                "path": path.relative_to(folder).as_posix(),
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in files
        ]
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")


def pack(folder: Path, archive: Path, *, compression: int = zipfile.ZIP_STORED) -> Path:
    """The folder as a zip."""
    with zipfile.ZipFile(archive, "w", compression) as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(folder).as_posix())
    return archive
