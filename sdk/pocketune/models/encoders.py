"""Text encoders and autoencoders filled from files of weights, or streamed from them, and the names in files of any age."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights

from pocketune.models.quiet import building, loading
from pocketune.weights.files import weight_files
from pocketune.weights.fill import fill
from pocketune.weights.quantizers import Quantization, pack_layers
from pocketune.weights.store import WeightStore
from pocketune.weights.stream import Tiles

Renamings = Callable[[str], tuple[str, ...]]
"""From a parameter's name to the names that it may have in a file."""

_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def text_encoder(
    folder: Path,
    kind: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tiles: Tiles | None,
    quantization: Quantization | None = None,
) -> Any:
    """A text encoder, frozen, whose weights come into memory one at a time, or of which the large ones stay on disk.

    transformers would map whole files beside the model while it converts them.

    Args:
        folder: with its configuration and weights.
        kind: the class's name in transformers.
        dtype: of the arithmetic.
        device: where it runs.
        tiles: the buffer for weights that stay on disk; None: hold all.
        quantization: hold the weights of Linears packed, and leave the table of words, of which a prompt needs a few rows, on
            disk; only for encoders that `packs_text` names.

    Raises:
        ModelError: weights are missing or damaged.
    """
    model = getattr(transformers, kind)
    with loading(str(folder)), init_empty_weights():
        encoder = model(model.config_class.from_pretrained(folder))
    store = WeightStore(weight_files(folder, name=kind))
    names = stored_names(store, text_encoder_names(encoder))
    held: set[str] = set()
    if quantization is not None and packs_text(kind):
        tiles = tiles or Tiles()
        held = pack_layers(encoder, quantization, lambda name: store.load(names(name), dtype=dtype), dtype=dtype, device=device)
    # transformers computes other buffers, such as the frequencies of rotary positions, in float32 whatever the model's type is.
    fill(
        encoder,
        store,
        dtype=dtype,
        device=device,
        tiles=tiles,
        held=held,
        stored_name=names,
        cast_buffers=False,
        in_float32=kept_in_float32(encoder, dtype),
    )
    if tiles is None:
        encoder.tie_weights()
    return encoder.requires_grad_(False).eval()


def packs_text(kind: str) -> bool:
    """Whether text encoders of a class are packed where that is asked for: those of CLIP, as they are what a word trains by."""
    return kind.startswith("CLIP")


def streamed_vae(
    folder: Path, kind: Any, config: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device, tiles: Tiles
) -> Any:
    """An autoencoder, frozen, whose large weights stay on disk.

    Args:
        folder: with its weights.
        kind: its class in diffusers.
        config: as diffusers writes it.
        dtype: of the arithmetic.
        device: where it runs.
        tiles: the buffer for its weights.

    Raises:
        ModelError: weights are missing or damaged.
    """
    with building(), init_empty_weights():
        vae = kind.from_config(config)
    store = WeightStore(weight_files(folder, name="the autoencoder"))
    fill(vae, store, dtype=dtype, device=device, tiles=tiles, stored_name=stored_names(store, vae_names))
    return vae.requires_grad_(False).eval()


def kept_in_float32(encoder: Any, dtype: torch.dtype) -> set[str]:
    """Names of the weights that transformers leaves in float32 in a float16 model: T5's that would overflow."""
    modules = set(encoder._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    return {name for name, _ in encoder.named_parameters() if modules & set(name.split("."))}


def text_encoder_names(encoder: Any) -> Renamings:
    """As it is; with the prefix that older files have; or that of the parameter that it is tied to."""
    tied: dict[str, str] = dict(getattr(encoder, "_tied_weights_keys", None) or {})
    prefix = getattr(encoder, "base_model_prefix", "") or "model"

    def names(name: str) -> tuple[str, ...]:
        return name, f"text_model.{name}", f"{prefix}.{name}", *((tied[name],) if name in tied else ())

    return names


def vae_names(name: str) -> tuple[str, ...]:
    """As it is, or as diffusers named attention layers before version 0.17."""
    old = name
    for new_part, old_part in _OLD_ATTENTION.items():
        old = old.replace(f".{new_part}.", f".{old_part}.")
    return name, old


def stored_names(store: WeightStore, renamings: Renamings) -> Callable[[str], str]:
    """The first of a parameter's possible names that the store has; its own if it has none of them."""
    return lambda name: next((candidate for candidate in renamings(name) if candidate in store), name)


def use_tiles(vae: Any, side: int, *, scale: int) -> None:
    """Make an autoencoder work in overlapping tiles.

    Args:
        vae: changed in place.
        side: of a tile in pixels.
        scale: image pixels along the side of a latent pixel.
    """
    vae.enable_tiling()
    if hasattr(vae, "tile_sample_min_size"):
        vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // scale
    else:
        vae.tile_sample_min_height = vae.tile_sample_min_width = side
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = side * 7 // 8
        vae.tile_latent_min_height = vae.tile_latent_min_width = side // scale
