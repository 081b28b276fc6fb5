"""Open a model folder and load its parts one at a time, so that what one phase needed is gone before the next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from pocketune.errors import FileFormatError, ModelError, reading
from pocketune.jsonfile import read_object
from pocketune.models.base import DenoiserAdapter, Prompt
from pocketune.models.empty import empty_denoiser
from pocketune.models.encoders import streamed_vae, text_encoder, use_tiles
from pocketune.models.hub import download
from pocketune.models.positions import crop_table
from pocketune.models.quiet import loading, quiet_libraries
from pocketune.models.registry import check_kind, family_named
from pocketune.weights.files import plain_weights, variant_of, weight_files, weights_digest
from pocketune.weights.fill import RESIDENT, Residence, fill
from pocketune.weights.packed import packed_copy
from pocketune.weights.quantizers import Quantization, pack_layers
from pocketune.weights.store import WeightStore
from pocketune.weights.stream import Tiles, layer_weights

_WEIGHTS = Path(str(files("pocketune.pocket") / "weights"))
BUILT_IN = tuple(sorted(path.parent.name for path in _WEIGHTS.glob("*/model_index.json")))
"""Models that come with the package."""


class ModelFolder:
    """A diffusers pipeline folder: what it holds, and loaders for each part."""

    def __init__(self, name: str, path: Path, *, source: str | None = None) -> None:
        """Read the folder's index; no weights are loaded. source: what finds the model again; default: the path.

        Raises:
            ModelError: the folder is no diffusers pipeline, or its denoiser has no adapter here.
        """
        self.name = name
        self.path = path
        self.source = source or str(path.resolve())
        self.index = _read_json(path / "model_index.json", f"{path} is not a diffusers model folder")
        component = "transformer" if self.has("transformer") else "unet"
        kind = str((self.index.get(component) or [None, "none"])[1])
        check_kind(kind, name=name)
        self.denoiser_config = self.config(component)
        self.family = family_named(kind, self.denoiser_config, name=name)
        self.denoiser_kind = self.family.kind
        self.vae_config = self.config("vae")
        self.sizes = self.family.sizes(self.denoiser_config)

    def has(self, part: str) -> bool:
        """Whether the pipeline has a part, as "text_encoder_3"."""
        return (self.index.get(part) or [None, None])[1] is not None

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a part.

        Raises:
            ModelError: there is none, or it is damaged.
        """
        return _read_json(self.path / part / "config.json", f"{self.name} has no {part}")

    @property
    def block_count(self) -> int:
        """Blocks of the denoiser."""
        return self.sizes.blocks

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.sizes.width

    @property
    def has_text_stream(self) -> bool:
        """Whether text flows from block to block and is changed by them; otherwise blocks only attend to it."""
        return bool("text" in self.family.adapter.stream_names)

    @property
    def vae_scale(self) -> int:
        """Image pixels along the side of a latent pixel."""
        stages = self.vae_config.get("block_out_channels") or self.vae_config["encoder_block_out_channels"]
        return int(2 ** (len(stages) - 1))

    @property
    def resolution_unit(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return self.vae_scale * self.sizes.patch

    @property
    def native_resolution(self) -> int:
        """The side, in pixels, that the model was made for."""
        return self.sizes.native * self.vae_scale

    @property
    def largest_resolution(self) -> int | None:
        """The side, in pixels, that the position table allows; None: no bound."""
        return None if self.sizes.largest is None else self.sizes.largest * self.vae_scale

    @property
    def text_padding(self) -> int:
        """The `max_sequence_length` for the long part of a prompt."""
        return self.family.text_length(self)

    def note(self) -> str | None:
        """What a report should say about a built-in model that is not fully trained."""
        path = self.path / "training.json"
        training = _read_json(path, "the training record is damaged") if path.exists() else {}
        if training.get("finished", True):
            return None
        return f"{self.name} is an interim checkpoint (denoiser step {training.get('step')}); its training goes on."

    def fingerprint(self) -> str:
        """Changes when the weights do, and is the same on every machine.

        A hash of the configurations and, of every weight file, of its header and the first bytes of each tensor, so that it
        takes no time with a large model.
        """
        parts: list[Any] = [self.denoiser_config, self.vae_config]
        for folder in (self.family.component, "vae", *self.family.text_encoders):
            for file in plain_weights(found.name for found in (self.path / folder).glob("*.safetensors")):
                parts.append([folder, file, weights_digest(self.path / folder / file)])
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def scheduler(self) -> Any:
        """The noise schedule that trains."""
        with loading(self.name):  # quietly: a sampler's configuration has entries that it does not know
            return self.family.noise.from_pretrained(self.path, subfolder="scheduler")

    def empty_denoiser(self) -> DenoiserAdapter:
        """The denoiser's structure, frozen, with its parameters on the meta device."""
        return empty_denoiser(self.denoiser_config, self.family)

    def denoiser_files(self) -> list[Path]:
        """The safetensors files with the denoiser's weights.

        Raises:
            ModelError: there are none.
        """
        return weight_files(self.path / self.family.component, name=self.name)

    def load_denoiser(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        blocks: Collection[int] | None = None,
        weights: Residence = RESIDENT,
        quantization: Quantization | None = None,
        latent_side: int | None = None,
        tiles: Tiles | None = None,
    ) -> DenoiserAdapter:
        """Load the denoiser, frozen, with the weights of the named blocks only (all by default).

        The model is built without memory and filled in place from memory-mapped safetensors.

        Args:
            dtype: of the weights in memory and of the arithmetic.
            device: where it runs.
            blocks: the others are taken out.
            weights: whether they are held in memory.
            quantization: hold the weights of Linears and convolutions packed in memory.
            latent_side: the largest that it will work at, which saves the rest of a table of positions (`table_side` says
                which smaller ones it works at too); default: any.
            tiles: the buffer of streamed weights; default: one of its own.

        Raises:
            ModelError: weights are missing or damaged.
        """
        adapter = self.empty_denoiser()
        names = layer_weights(adapter.model)
        if blocks is not None:
            for index in set(range(adapter.block_count)) - set(blocks):
                adapter.remove_block(index)
        windows = crop_table(adapter.model, latent_side // adapter.patch_size) if latent_side else None
        store = self._store(self.family.component, names, weights)
        held = (
            set() if quantization is None else pack_layers(adapter.model, quantization, store.load, dtype=dtype, device=device)
        )
        tiles = (tiles or Tiles()) if weights.streamed else None
        fill(adapter.model, store, dtype=dtype, device=device, tiles=tiles, held=held, windows=windows)
        adapter.model.requires_grad_(False).eval()
        return adapter

    def load_vae(self, *, device: torch.device, weights: Residence = RESIDENT, tile: int | None = None) -> Any:
        """The VAE in float32, frozen.

        Args:
            device: where it runs.
            weights: whether they are held in memory; they are never packed.
            tile: side in pixels of the overlapping tiles in which it works, which changes results a little; default: none.
        """
        if weights.streamed:
            vae = self._streamed_vae(torch.float32, device, Tiles())
        else:
            with loading(self.name):
                vae = self.family.vae.from_pretrained(
                    self.path, subfolder="vae", dtype=torch.float32, variant=self._variant("vae"), use_safetensors=True
                ).to(device)
        if tile:
            use_tiles(vae, tile, scale=self.vae_scale)
        return vae.requires_grad_(False).eval()

    def pipeline(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        weights: Residence = RESIDENT,
        quantization: Quantization | None = None,
        latent_side: int | None = None,
        tile: int | None = None,
    ) -> Any:
        """The stock diffusers pipeline, for sampling; arguments as of `load_denoiser` and `load_vae`.

        With `quantization` the denoiser is held packed, wherever the weights of all else are.
        """
        vae_dtype, text_dtype = self.family.vae_dtype(dtype), self.family.text_dtype(dtype)
        tiles = Tiles() if weights.streamed else None  # one for all parts, which run one after the other
        denoiser = self.load_denoiser(
            dtype=dtype,
            device=device,
            weights=weights if quantization is None else RESIDENT,
            quantization=quantization,
            latent_side=latent_side,
            tiles=tiles,
        )
        parts: dict[str, Any] = {self.family.component: denoiser.model}
        if tiles is not None:
            parts["vae"] = self._streamed_vae(vae_dtype, device, tiles)
        if tiles is not None or text_dtype == torch.float32:  # 16 bits of files in 16 bits need no conversion
            parts |= self._text_encoders(text_dtype, device, tiles)
        of_text = dict.fromkeys(filter(self.has, self.family.text_encoders), text_dtype)
        pipeline = self.stock_pipeline(dtype={"vae": vae_dtype, "default": dtype} | of_text, **parts)
        if tile is not None:
            use_tiles(pipeline.vae, tile, scale=self.vae_scale)
        return pipeline if weights.streamed else pipeline.to(device)

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], *, device: torch.device, weights: Residence = RESIDENT
    ) -> dict[str, Prompt]:
        """Encode prompts with diffusers' own code, float32 on the CPU, each with a batch of 1."""
        pipeline = self.text_pipeline(device=device, weights=weights)
        encoded: dict[str, Prompt] = {}
        for prompt in dict.fromkeys(prompts):
            with quiet_libraries():
                found = self.family.encode(pipeline, prompt, device=device, length=self.text_padding)
            encoded[prompt] = Prompt(**{name: tensor.cpu() for name, tensor in vars(found).items() if tensor is not None})
        return encoded

    def text_pipeline(
        self, *, device: torch.device, weights: Residence = RESIDENT, quantization: Quantization | None = None
    ) -> Any:
        """The stock pipeline with tokenizers and float32 text encoders alone, for `family.encode`.

        With `quantization`, encoders of the CLIP kind are held packed, and their tables of words stay on disk.
        """
        # diffusers asks the denoiser for its text width or type, and for nothing else.
        parts: dict[str, Any] = {"vae": None, self.family.component: self.empty_denoiser().model}
        parts |= self._text_encoders(torch.float32, device, Tiles() if weights.streamed else None, quantization)
        return self.stock_pipeline(dtype=torch.float32, **parts)

    def stock_pipeline(self, **parts: Any) -> Any:
        """The stock pipeline with some parts that are there already, or None; the others are loaded."""
        held = (self.family.component, "vae", *self.family.text_encoders)
        variant = next(filter(None, map(self._variant, held)), None)
        with loading(self.name):
            return self.family.pipeline.from_pretrained(
                self.path, variant=variant, use_safetensors=True, **parts, **self._absent_parts()
            )

    def _variant(self, part: str) -> str | None:
        """Of the weights of a part, where they are there as a variant alone; diffusers must be told."""
        return variant_of(file.name for file in (self.path / part).glob("*.safetensors"))

    def _streamed_vae(self, dtype: torch.dtype, device: torch.device, tiles: Tiles) -> Any:
        kind, config = self.family.vae, self.vae_config
        return streamed_vae(self.path / "vae", kind, config, dtype=dtype, device=device, tiles=tiles)

    def _text_encoders(
        self, dtype: torch.dtype, device: torch.device, tiles: Tiles | None, quantization: Quantization | None = None
    ) -> dict[str, Any]:
        how: dict[str, Any] = {"dtype": dtype, "device": device, "tiles": tiles, "quantization": quantization}
        return {
            part: text_encoder(self.path / part, self.index[part][1], **how)
            for part in filter(self.has, self.family.text_encoders)
        }

    def _store(self, part: str, names: Collection[str], weights: Residence) -> WeightStore:
        store = WeightStore(weight_files(self.path / part, name=self.name))
        if weights.bits is None:
            return store
        chosen = set(names) & set(store.names)
        return WeightStore([packed_copy(store, chosen, bits=weights.bits, fingerprint=self.fingerprint())])

    def _absent_parts(self) -> dict[str, None]:
        # diffusers 0.42 does not accept an absent part from the index; it must be said again.
        return {part: None for part in self.family.optional if not self.has(part)} | dict.fromkeys(self.family.left_out)


def open_model(model: str | Path) -> ModelFolder:
    """Find a model: a built-in name, a local diffusers folder, or a hub id.

    Raises:
        ModelError: there is no such model, or it cannot be downloaded.
    """
    name = str(model)
    if name in BUILT_IN:
        return ModelFolder(name, _WEIGHTS / name, source=name)
    path = Path(name)
    with reading(path, failure=ModelError):
        there = path.exists()
    if there:
        return ModelFolder(path.name, path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):  # no hub id either
        msg = f"no model {name}: give a built-in name ({', '.join(BUILT_IN)}), a diffusers folder, or a hub id (owner/name)."
        raise ModelError(msg)
    return ModelFolder(name, download(name), source=name)


def _read_json(path: Path, complaint: str) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileFormatError as error:
        msg = f"{complaint}: {error} Expected a folder as diffusers' save_pretrained writes it."
        raise ModelError(msg) from error
