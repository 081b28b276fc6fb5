"""Whole pipelines of published models in their true size, with random weights: text encoders, VAE and denoiser.

Tokenizers are those of the built-in model and a letter-by-letter one: their vocabularies are small, which saves some MB.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from benchmarks.memory.weights import model_folder, shapes_of, write_random
from pocketune.atomic import write_text
from pocketune.models.published import PublishedModel

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CLIP_TOKENS = 77
_CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_T5_XXL: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
_SD35_VAE: dict[str, Any] = _VAE | {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
_SD15_VAE: dict[str, Any] = _VAE | {"latent_channels": 4, "sample_size": 512}


def _sd35() -> dict[str, Any]:
    return {
        "text_encoder": CLIPTextModelWithProjection(_clip(_CLIP_L)),
        "text_encoder_2": CLIPTextModelWithProjection(_clip(_CLIP_G)),
        "text_encoder_3": T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **_T5_XXL)),
        "vae": AutoencoderKL(**_SD35_VAE),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _sd15() -> dict[str, Any]:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return {
        "text_encoder": CLIPTextModel(_clip(_CLIP_L)),
        "vae": AutoencoderKL(**_SD15_VAE),
        "scheduler": PNDMScheduler(**betas, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
    }


_PARTS: dict[str, Callable[[], dict[str, Any]]] = {"sd35-medium": _sd35, "sd15": _sd15}
"""What pipelines have besides denoiser and tokenizers."""


def pipeline_folder(name: str, root: Path) -> Path:
    """The folder of a whole pipeline, made if it is not there yet; the denoiser is that of `model_folder`.

    Args:
        name: "sd35-medium" or "sd15".
        root: where such folders lie.
    """
    folder = root / f"{name}-pipeline"
    if (folder / "model_index.json").exists():
        return folder
    component = PublishedModel(name).family.component
    shutil.rmtree(folder / component, ignore_errors=True)
    shutil.copytree(model_folder(name, root) / component, folder / component, copy_function=_link)
    for part, model in write_configs(name, folder).items():
        file = "diffusion_pytorch_model" if part == "vae" else "model"
        tied = getattr(model, "_tied_weights_keys", None) or {}
        shapes = {key: shape for key, shape in shapes_of(model).items() if key not in tied}
        write_random(folder / part / f"{file}.safetensors", shapes)
    return folder


def write_configs(name: str, folder: Path) -> dict[str, nn.Module]:
    """Write all of a pipeline but its weights, which is enough to plan by.

    Args:
        name: as of `pipeline_folder`.
        folder: made if it is not there.

    Returns:
        The models besides the denoiser, by part, without weights.
    """
    denoiser = PublishedModel(name)
    component = denoiser.family.component
    with init_empty_weights():
        parts = _PARTS[name]()
    index = {"_class_name": denoiser.family.pipeline.__name__, component: ["diffusers", denoiser.denoiser_kind]}
    for part, made in parts.items():
        index[part] = [type(made).__module__.partition(".")[0], type(made).__name__]
        if part == "scheduler":
            made.save_pretrained(folder / part)
        elif part == "vae":
            made.save_config(folder / part)
        else:
            made.config.save_pretrained(folder / part)
            index[part.replace("text_encoder", "tokenizer")] = ["transformers", _write_tokenizer(folder, part, made)]
    write_text(folder / component / "config.json", json.dumps(denoiser.denoiser_config))
    write_text(folder / "model_index.json", json.dumps(index))
    return {part: made for part, made in parts.items() if isinstance(made, nn.Module)}


def _write_tokenizer(folder: Path, part: str, encoder: nn.Module) -> str:
    """Of a text encoder; the name of its class."""
    target = folder / part.replace("text_encoder", "tokenizer")
    if isinstance(encoder, T5EncoderModel):
        pieces = ["<pad>", "</s>", "<unk>", "▁", *_LETTERS]
        T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0).save_pretrained(target)
        return "T5Tokenizer"
    with as_file(files("pocketune.pocket") / "weights" / "pocket-sd3" / "tokenizer") as tokenizer:
        shutil.copytree(tokenizer, target, dirs_exist_ok=True)
    config = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_text(target / "tokenizer_config.json", json.dumps(config | {"model_max_length": _CLIP_TOKENS}))
    return "CLIPTokenizer"


def _clip(sizes: dict[str, Any]) -> CLIPTextConfig:
    width = sizes["hidden_size"]
    return CLIPTextConfig(vocab_size=49408, projection_dim=width, max_position_embeddings=_CLIP_TOKENS, **sizes)


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
