"""Open a model folder and load its parts one at a time, so that what one phase needed is gone before the next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors import SafetensorError, safe_open

from pocketune.errors import ModelError
from pocketune.models.base import DenoiserAdapter, Prompt
from pocketune.models.mmdit import SD3Adapter
from pocketune.models.quiet import quiet_libraries

BUILT_IN = ("pocket-sd3",)
_DENOISERS: dict[str, tuple[Any, Any]] = {"SD3Transformer2DModel": (SD3Transformer2DModel, SD3Adapter)}


class ModelFolder:
    """A diffusers pipeline folder: what it holds, and loaders for each part."""

    def __init__(self, name: str, path: Path) -> None:
        """Read the folder's index; no weights are loaded.

        Raises:
            ModelError: the folder is no diffusers pipeline, or its denoiser has no adapter here.
        """
        self.name = name
        self.path = path
        self.source = name if name in BUILT_IN or "/" in name else str(path.resolve())
        self.index = _read_json(path / "model_index.json", f"{path} is not a diffusers model folder")
        kind = (self.index.get("transformer") or self.index.get("unet") or [None, "none"])[1]
        if kind not in _DENOISERS:
            msg = f"{name} has the denoiser {kind}, for which there is no adapter; supported: {', '.join(_DENOISERS)}."
            raise ModelError(msg)
        self.denoiser_kind: str = kind
        self.denoiser_config = _read_json(path / "transformer" / "config.json", f"{name} has no transformer")
        self.vae_config = _read_json(path / "vae" / "config.json", f"{name} has no VAE")

    @property
    def block_count(self) -> int:
        """Blocks of the denoiser."""
        return int(self.denoiser_config["num_layers"])

    @property
    def width(self) -> int:
        """Channels of a token."""
        return int(self.denoiser_config["num_attention_heads"]) * int(self.denoiser_config["attention_head_dim"])

    @property
    def vae_scale(self) -> int:
        """Image pixels along the side of a latent pixel."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def resolution_unit(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return self.vae_scale * int(self.denoiser_config["patch_size"])

    @property
    def native_resolution(self) -> int:
        """The side, in pixels, that the model was made for."""
        return int(self.denoiser_config["sample_size"]) * self.vae_scale

    @property
    def largest_resolution(self) -> int:
        """The side, in pixels, that the position table allows."""
        return int(self.denoiser_config["pos_embed_max_size"]) * self.resolution_unit

    @property
    def text_padding(self) -> int:
        """The `max_sequence_length` for the T5 part of a prompt.

        A model whose text width is just that of its CLIP encoders was made without T5; diffusers would append zeros for it.
        """
        if (self.index.get("text_encoder_3") or [None, None])[1] is not None:
            return 256
        widths = [
            _read_json(self.path / part / "config.json", f"{self.name} has no {part}")["hidden_size"] for part in _CLIP_PARTS
        ]
        return 0 if sum(widths) == self.denoiser_config["joint_attention_dim"] else 256

    def note(self) -> str | None:
        """What a report should say about an embedded model that is not fully trained."""
        path = self.path / "training.json"
        if not path.exists():
            return None
        training = _read_json(path, "the training record is damaged")
        if training.get("finished", True):
            return None
        return f"{self.name} is an interim checkpoint (denoiser step {training.get('step')}); its training goes on."

    def fingerprint(self) -> str:
        """Changes when the model does, and is the same on every machine.

        A hash of the configurations and, of every weight file, of its header and the first bytes of each tensor, so that it
        takes no time with a large model.
        """
        parts: list[Any] = [self.denoiser_config, self.vae_config]
        for folder in ("transformer", "vae", *_CLIP_PARTS, "text_encoder_3"):
            for file in sorted((self.path / folder).glob("*.safetensors")):
                parts.append([folder, file.name, _weights_digest(file)])
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The noise schedule."""
        return FlowMatchEulerDiscreteScheduler.from_pretrained(self.path, subfolder="scheduler")

    def empty_denoiser(self) -> DenoiserAdapter:
        """The denoiser's structure, frozen, with its parameters on the meta device."""
        model_class, adapter_class = _DENOISERS[self.denoiser_kind]
        with init_empty_weights():
            model = model_class.from_config(self.denoiser_config)
        model.requires_grad_(False)
        adapter: DenoiserAdapter = adapter_class(model.eval())
        return adapter

    def denoiser_files(self) -> list[Path]:
        """The safetensors files with the denoiser's weights.

        Raises:
            ModelError: there are none.
        """
        return _weight_files(self.path / "transformer", self.name)

    def load_denoiser(
        self, *, dtype: torch.dtype, device: torch.device, blocks: Collection[int] | None = None
    ) -> DenoiserAdapter:
        """Load the denoiser, frozen, with the weights of the named blocks only (all by default).

        The model is built without memory and filled in place from memory-mapped safetensors.

        Raises:
            ModelError: weights are missing or damaged.
        """
        adapter = self.empty_denoiser()
        model = adapter.model
        if blocks is not None:
            for index in set(range(adapter.block_count)) - set(blocks):
                adapter.remove_block(index)
        _fill(model, self.denoiser_files(), dtype=dtype, device=device)
        model.requires_grad_(False)
        model.eval()
        return adapter

    def load_vae(self, *, device: torch.device) -> AutoencoderKL:
        """The VAE in float32, frozen."""
        with quiet_libraries():
            vae = AutoencoderKL.from_pretrained(self.path, subfolder="vae", dtype=torch.float32).to(device)
        vae.requires_grad_(False)
        return vae.eval()

    def pipeline(self, *, dtype: torch.dtype, device: torch.device) -> StableDiffusion3Pipeline:
        """The stock diffusers pipeline, for sampling."""
        with quiet_libraries():
            return StableDiffusion3Pipeline.from_pretrained(self.path, dtype=dtype, **self._absent_parts()).to(device)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], *, device: torch.device) -> dict[str, Prompt]:
        """Encode prompts with diffusers' own code, float32 on the CPU, each (1, tokens, width) and (1, width)."""
        with init_empty_weights():  # diffusers asks the denoiser for its text width, and for nothing else
            denoiser = _DENOISERS[self.denoiser_kind][0].from_config(self.denoiser_config)
        with quiet_libraries():
            pipeline = StableDiffusion3Pipeline.from_pretrained(
                self.path, dtype=torch.float32, transformer=denoiser, vae=None, **self._absent_parts()
            )
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
            if encoder is not None:
                encoder.to(device)
        encoded: dict[str, Prompt] = {}
        for prompt in dict.fromkeys(prompts):
            hidden, _, pooled, _ = pipeline.encode_prompt(
                prompt=prompt,
                prompt_2=prompt,
                prompt_3=prompt,
                device=device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.text_padding,
            )
            encoded[prompt] = Prompt(hidden=hidden.cpu(), pooled=pooled.cpu())
        return encoded

    def _absent_parts(self) -> dict[str, None]:
        # diffusers 0.42 does not accept an absent T5 from the index; it must be said again.
        return {} if (self.index.get("text_encoder_3") or [None, None])[1] else {"text_encoder_3": None, "tokenizer_3": None}


def open_model(model: str | Path) -> ModelFolder:
    """Find a model: a built-in name, a local diffusers folder, or a hub id.

    Raises:
        ModelError: there is no such model, or it cannot be downloaded.
    """
    name = str(model)
    if name in BUILT_IN:
        return ModelFolder(name, Path(str(files("pocketune.pocket") / "weights" / name)))
    path = Path(name)
    if path.exists():
        return ModelFolder(path.name, path)
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        msg = f"no model {name}: give a built-in name ({', '.join(BUILT_IN)}), a diffusers folder, or a hub id (owner/name)."
        raise ModelError(msg)
    return ModelFolder(name, _download(name))


_CLIP_PARTS = ("text_encoder", "text_encoder_2")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.txt", "*.model", "*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        msg = f"cannot download {hub_id}: {first}. Check the name and the network, or give a local diffusers folder."
        raise ModelError(msg) from error


def _weight_files(folder: Path, name: str) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    plain = [file for file in found if ".fp16." not in file.name and ".bf16." not in file.name]
    if not found:
        msg = f"{name} has no safetensors weights in {folder}. Other formats are not read; convert the model with diffusers."
        raise ModelError(msg)
    return plain or found


def _weights_digest(path: Path) -> str:
    """Hash a safetensors file's header and the first KiB of each tensor: retraining changes every tensor from its start."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, 2**27))
            digest.update(header)
            for name, entry in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    file.seek(8 + length + start)
                    digest.update(file.read(min(end - start, 1024)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"the weights {path} are damaged ({str(error)[:100]}). Download the model again."
        raise ModelError(msg) from error
    return digest.hexdigest()


def _fill(model: torch.nn.Module, shards: list[Path], *, dtype: torch.dtype, device: torch.device) -> None:
    wanted = {name for name, _ in model.named_parameters()} | set(model.state_dict())
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as weights:
                for name in wanted & set(weights.keys()):
                    set_module_tensor_to_device(model, name, device, value=weights.get_tensor(name), dtype=dtype)
        except (SafetensorError, ValueError) as error:
            msg = f"the weights {shard} are damaged or do not fit the configuration: {error}. Download the model again."
            raise ModelError(msg) from error
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        msg = f"{len(missing)} weights are missing from {shards[0].parent}, first {missing[0]}. Download the model again."
        raise ModelError(msg)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and (buffer.dtype != dtype or buffer.device != device):
            set_module_tensor_to_device(model, name, device, value=buffer, dtype=dtype)


def _read_json(path: Path, complaint: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{complaint}: cannot read {path}. Expected a folder as diffusers' save_pretrained writes it."
        raise ModelError(msg) from error
    if not isinstance(content, dict):
        msg = f"{complaint}: {path} does not hold a JSON object."
        raise ModelError(msg)
    return content
