"""The graphs around the denoiser: text encoders and the join of their results, VAE encoder and VAE decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL
from torch import Tensor, nn

from pocketune.errors import ModelError
from pocketune.models import unet
from pocketune.models.load import ModelFolder
from pocketune.models.quiet import loading
from pocketune_export.capture import Capture, capture, frozen_weights
from pocketune_export.graphspec import TensorSpec
from pocketune_export.training import Named, spec

_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_CLIP_POOLED, _CLIP, _T5 = "CLIPTextModelWithProjection", "CLIPTextModel", "T5EncoderModel"
_KINDS = (_CLIP_POOLED, _CLIP, _T5)


@dataclass(frozen=True)
class Part:
    """A captured component of the model.

    Attributes:
        name: of the graph and of its weight file.
        capture: the graph.
        load: a weight by name.
    """

    name: str
    capture: Capture
    load: Callable[[str], Tensor]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as the `tokenizers` library reads it, and how ids are padded."""

    content: bytes
    tokens: int
    pad_id: int
    pad_token: str


@dataclass(frozen=True)
class TextSizes:
    """Of an encoded prompt: tokens, width, width of the pooled vector or 0."""

    tokens: int
    width: int
    pooled: int


def encoder_numbers(folder: ModelFolder) -> tuple[int, ...]:
    """The text encoders that the model has, by their place in the pipeline."""
    return tuple(number for number, name in enumerate(_ENCODERS) if folder.has(name))


def read_tokenizer(folder: ModelFolder, number: int) -> Tokenizer:
    """The tokenizer of a text encoder.

    Raises:
        ModelError: it is missing, or no fast tokenizer.
    """
    path = folder.path / _ENCODERS[number].replace("text_encoder", "tokenizer")
    with loading(f"the tokenizer {path}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.pad_token_id is None:
        msg = f"the tokenizer in {path} is not of the tokenizers library, or has no padding token; it cannot go to a device."
        raise ModelError(msg)
    backend.no_padding()
    backend.no_truncation()
    is_t5 = _class_of(folder, number) == _T5
    tokens = folder.text_padding if is_t5 else int(tokenizer.model_max_length)
    return Tokenizer(backend.to_str().encode(), tokens, int(tokenizer.pad_token_id), str(tokenizer.pad_token))


def text_encoder(folder: ModelFolder, number: int, tokens: int) -> Part:
    """One text encoder, as diffusers' pipeline uses it.

    Raises:
        ModelError: it is of an unknown class, or cannot be read.
    """
    name, kind = _ENCODERS[number], _class_of(folder, number)
    if kind not in _KINDS:
        msg = f"{folder.name} has the text encoder {kind}; only {', '.join(_KINDS)} can be exported."
        raise ModelError(msg)
    model = _load(getattr(transformers, kind), folder.path / name)

    def encode(given: Named) -> dict[str, Tensor]:
        if kind == _T5 or (kind == _CLIP and folder.family is not unet.SDXL):
            return {"hidden": model(given["ids"])[0]}
        result = model(given["ids"], output_hidden_states=True)
        found = {"hidden": result.hidden_states[-2]}
        return found | {"pooled": result[0]} if kind == _CLIP_POOLED else found

    ids = TensorSpec(name="ids", shape=(1, tokens), dtype="int64", meaning="token ids, cut and padded")
    meanings = {"hidden": "encoded tokens", "pooled": "the prompt as one vector"}
    return Part(f"text_encoder-{number}", capture(model, encode, (ids,), meanings), frozen_weights(model).__getitem__)


def text_join(encoders: Mapping[int, Capture], folder: ModelFolder) -> tuple[Capture, TextSizes]:
    """What makes one prompt of the encoders' results, as `encode_prompt` of diffusers' pipelines does.

    A single encoder without a pooled vector is taken as it is. Of SDXL, the tokens of both lie side by side, and the second is
    pooled. Of Stable Diffusion 3, CLIP's tokens lie side by side, padded to the denoiser's text width; T5's follow, or as many
    zeros where there is no T5.
    """
    clips = [number for number, encoder in encoders.items() if any(out.name == "pooled" for out in encoder.outputs)]
    others = [number for number in encoders if number not in clips]

    def join(given: Named) -> dict[str, Tensor]:
        if not clips:
            return {"prompt_hidden": given[f"hidden_{others[0]}"]}
        if folder.family is unet.SDXL:
            hidden = torch.cat([given[f"hidden_{number}"] for number in encoders], dim=-1)
            return {"prompt_hidden": hidden, "prompt_pooled": given[f"pooled_{clips[-1]}"]}
        width = int(folder.denoiser_config["joint_attention_dim"])
        side_by_side = torch.cat([given[f"hidden_{number}"] for number in clips], dim=-1)
        padded = torch.nn.functional.pad(side_by_side, (0, width - side_by_side.shape[-1]))
        rows = [padded, *(given[f"hidden_{number}"] for number in others)]
        if not others and folder.text_padding:
            rows.append(torch.zeros(1, folder.text_padding, width))
        return {
            "prompt_hidden": torch.cat(rows, dim=1) if len(rows) > 1 else rows[0],
            "prompt_pooled": torch.cat([given[f"pooled_{number}"] for number in clips], dim=-1),
        }

    inputs = [
        spec(f"{out.name}_{number}", out.shape, f"{out.name} of text encoder {number}")
        for number, encoder in encoders.items()
        for out in encoder.outputs
    ]
    meanings = {"prompt_hidden": "encoded text for the denoiser", "prompt_pooled": "pooled text for the denoiser"}
    joined = capture(nn.Module(), join, inputs, meanings)
    hidden, *pooled = (out.shape for out in joined.outputs)
    return joined, TextSizes(tokens=hidden[1], width=hidden[2], pooled=pooled[0][1] if pooled else 0)


def vae_parts(vae: AutoencoderKL, *, resolution: int, latents: tuple[int, int, int]) -> Iterator[Part]:
    """VAE encoder and decoder for one image; scaling and shifting is inside the graphs.

    Args:
        vae: in float32.
        resolution: image side in pixels.
        latents: channels, height, width.
    """
    scale, shift = float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0)

    def encode(given: Named) -> dict[str, Tensor]:
        posterior = vae.encode(given["pixels"]).latent_dist
        return {"mean": (posterior.mean - shift) * scale, "std": posterior.std * scale}

    def decode(given: Named) -> dict[str, Tensor]:
        return {"pixels": vae.decode(given["latents"] / scale + shift).sample}

    load = frozen_weights(vae).__getitem__
    pixels = spec("pixels", (1, 3, resolution, resolution), "image, RGB in [-1, 1]")
    meanings = {"mean": "of the latents, scaled and shifted", "std": "their standard deviation, scaled"}
    yield Part("vae_encoder", capture(vae, encode, (pixels,), meanings), load)
    code = spec("latents", (1, *latents), "scaled and shifted, as the denoiser leaves them")
    yield Part("vae_decoder", capture(vae, decode, (code,), {"pixels": "RGB, about [-1, 1], not clipped"}), load)


def _class_of(folder: ModelFolder, number: int) -> str:
    return str(folder.index[_ENCODERS[number]][1])


def _load(kind: Any, path: Path) -> nn.Module:
    with loading(f"the text encoder {path}"):
        model: nn.Module = kind.from_pretrained(path, dtype="auto", use_safetensors=True)
    return model.eval().requires_grad_(False)
