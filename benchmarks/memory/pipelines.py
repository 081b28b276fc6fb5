"""The whole pipeline of Stable Diffusion 3.5 medium in its true size, with random weights: text encoders, VAE and denoiser.

Tokenizers are those of the built-in model and a letter-by-letter one: their vocabularies are small, which saves some MB.
"""

from __future__ import annotations

import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from benchmarks.memory.weights import model_folder, shapes_of, write_random
from pocketune.atomic import write_text

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_T5_XXL: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}


def sd35_pipeline(root: Path) -> Path:
    """The folder of the whole pipeline, made if it is not there yet; the denoiser is that of `model_folder`."""
    folder = root / "sd35-medium-pipeline"
    if (folder / "model_index.json").exists():
        return folder
    denoiser = model_folder("sd35-medium", root)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "transformer", ignore_errors=True)
    shutil.copytree(denoiser / "transformer", folder / "transformer", copy_function=_link)
    with init_empty_weights():
        encoders: dict[str, Any] = {
            "text_encoder": CLIPTextModelWithProjection(_clip(_CLIP_L)),
            "text_encoder_2": CLIPTextModelWithProjection(_clip(_CLIP_G)),
            "text_encoder_3": T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **_T5_XXL)),
        }
        vae = AutoencoderKL(**_VAE)
    for part, encoder in encoders.items():
        encoder.config.save_pretrained(folder / part)
        tied = getattr(encoder, "_tied_weights_keys", None) or {}
        shapes = {name: shape for name, shape in shapes_of(encoder).items() if name not in tied}
        write_random(folder / part / "model.safetensors", shapes)
    vae.save_config(folder / "vae")
    write_random(folder / "vae" / "diffusion_pytorch_model.safetensors", shapes_of(vae))
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    with as_file(files("pocketune.pocket") / "weights" / "pocket-sd3" / "tokenizer") as tokenizer:
        for part in ("tokenizer", "tokenizer_2"):
            shutil.copytree(tokenizer, folder / part, dirs_exist_ok=True)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *_LETTERS]
    T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0).save_pretrained(folder / "tokenizer_3")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5Tokenizer"],
    }
    write_text(folder / "model_index.json", json.dumps(index))
    return folder


def _clip(sizes: dict[str, Any]) -> CLIPTextConfig:
    return CLIPTextConfig(vocab_size=49408, projection_dim=sizes["hidden_size"], max_position_embeddings=77, **sizes)


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
