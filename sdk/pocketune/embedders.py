"""Image embeddings of the field, DINO and CLIP, from a local folder or a hub id."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pocketune.errors import ModelError, first_line
from pocketune.models.quiet import quiet_hub

DEFAULT_MODELS = {"dino": "facebook/dino-vits16", "clip": "openai/clip-vit-base-patch32"}
"""Those of the DreamBooth paper (Ruiz et al. 2023): ViT-S/16 DINO and CLIP ViT-B/32."""
_DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
"""Vision transformers whose first token is the class token, by the `model_type` of their configurations."""
_CHUNK = 16


class ImageEmbedder(Protocol):
    """Says where images lie in a space in which subjects are apart."""

    name: str

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, width)."""


class _Transformer(ABC):
    """A vision model of transformers with its image processor."""

    name: str

    def __init__(self, model: str | None = None) -> None:
        """Load from a local folder or a hub id; default: that of the DreamBooth paper.

        Raises:
            ModelError: it cannot be loaded, or is of another kind.
        """
        self._network, self._processor = _load(model or DEFAULT_MODELS[self.name], name=self.name, fits=self._fits)

    @property
    def digest(self) -> str:
        """The sha256 of the weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self._network.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.reshape(-1).contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    @staticmethod
    @abstractmethod
    def _fits(network: Any) -> bool:
        """Whether a model is of this kind."""


class DinoEmbedder(_Transformer):
    """The class token of a DINO vision transformer, as DreamBooth's DINO score takes it."""

    name = "dino"

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, width of the transformer)."""
        parts = [self._network(**_pixels(self._processor, chunk)).last_hidden_state[:, 0] for chunk in _chunks(images)]
        return F.normalize(torch.cat(parts), dim=1)

    @staticmethod
    def _fits(network: Any) -> bool:
        return network.config.model_type in _DINO_TYPES


class ClipEmbedder(_Transformer):
    """CLIP's image embedding (CLIP-I)."""

    name = "clip"

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, projection width)."""
        parts = [projected(self._network.get_image_features(**_pixels(self._processor, chunk))) for chunk in _chunks(images)]
        return F.normalize(torch.cat(parts), dim=1)

    @staticmethod
    def _fits(network: Any) -> bool:
        return hasattr(network, "get_image_features")


def projected(features: Any) -> Tensor:
    """Take the projected embedding out of the object that transformers 5 wraps it in."""
    pooled: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return pooled


def _load(model: str, *, name: str, fits: Callable[[Any], bool]) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModel

    try:
        with quiet_hub():
            network: Any = AutoModel.from_pretrained(model, dtype=torch.float32)
            if not fits(network):
                msg = (
                    f"{model} is a {type(network).__name__}, expected a {name.upper()} such as {DEFAULT_MODELS[name]}. "
                    "Give one, or choose the embedder that fits the model."
                )
                raise ModelError(msg)
            load_processor: Any = AutoImageProcessor.from_pretrained
            processor = load_processor(model)
    except (OSError, ValueError) as error:
        msg = f"cannot load the judge {model}: {first_line(error)}. Give a local folder or a hub id, and check the network."
        raise ModelError(msg) from error
    return network.eval().requires_grad_(False), processor


def _pixels(processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    return {"pixel_values": processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]}


def _chunks(images: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
    return [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
