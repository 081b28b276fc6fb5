"""Who judges: the pocket judges for rendered subjects, DINO and CLIP for real photographs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.quality.subjects import IDENTIFIER, AskedPrompt
from pocketune.errors import ModelError
from pocketune.pocket.judges import load_attribute_classifier, load_subject_embedder

DEFAULT_MODELS = {"dino": "facebook/dino-vits16", "clip": "openai/clip-vit-base-patch32"}
"""Those of the DreamBooth paper (Ruiz et al. 2023): ViT-S/16 DINO and CLIP ViT-B/32."""
_CHUNK = 16


class ImageEmbedder(Protocol):
    """Says where images lie in a space in which subjects are apart."""

    name: str

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, width)."""


class PromptJudge(Protocol):
    """Says how well images do what prompts ask."""

    name: str

    def fidelity(self, images: Sequence[Image.Image], prompts: Sequence[AskedPrompt]) -> list[float]:
        """One score an image, larger is better."""


class PocketEmbedder:
    """The shipped embedding network of rendered subjects."""

    name = "pocket"

    def __init__(self) -> None:
        """Load the weights."""
        self._network = load_subject_embedder()

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, 64)."""
        return self._network.embed(images)


class PocketPromptJudge:
    """The share of the asked attributes that the shipped classifier finds in the image."""

    name = "pocket"

    def __init__(self) -> None:
        """Load the weights."""
        self._classifier = load_attribute_classifier()

    def fidelity(self, images: Sequence[Image.Image], prompts: Sequence[AskedPrompt]) -> list[float]:
        """Between 0 and 1 an image."""
        pairs = zip(self._classifier.classify(images), prompts, strict=True)
        return [sum(seen[name] == value for name, value in prompt.asked.items()) / len(prompt.asked) for seen, prompt in pairs]


class DinoEmbedder:
    """The class token of a DINO vision transformer, as DreamBooth's DINO score takes it."""

    name = "dino"

    def __init__(self, model: str = DEFAULT_MODELS["dino"]) -> None:
        """Load from a local folder or a hub id."""
        self._network, self._processor = _load(model)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, width of the transformer)."""
        parts = [self._network(**_pixels(self._processor, chunk)).last_hidden_state[:, 0] for chunk in _chunks(images)]
        return F.normalize(torch.cat(parts), dim=1)


class Clip:
    """CLIP's image embedding (CLIP-I), and its agreement of image and text as prompt fidelity (CLIP-T)."""

    name = "clip"

    def __init__(self, model: str = DEFAULT_MODELS["clip"]) -> None:
        """Load from a local folder or a hub id."""
        from transformers import AutoTokenizer

        self._network, self._processor = _load(model)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            msg = f"cannot load the tokenizer of {model}: {_first_line(error)}. Give a CLIP model's folder or hub id."
            raise ModelError(msg) from error

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, projection width)."""
        parts = [_projected(self._network.get_image_features(**_pixels(self._processor, chunk))) for chunk in _chunks(images)]
        return F.normalize(torch.cat(parts), dim=1)

    @torch.no_grad()
    def fidelity(self, images: Sequence[Image.Image], prompts: Sequence[AskedPrompt]) -> list[float]:
        """Cosine of image and prompt, without the identifier, which means nothing to CLIP."""
        texts = [prompt.text.replace(f"{IDENTIFIER} ", "") for prompt in prompts]
        tokens = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        features = self._network.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return [float(value) for value in (self.embed(images) * F.normalize(_projected(features), dim=1)).sum(dim=1)]


def open_embedder(name: str, model: str | None = None) -> ImageEmbedder:
    """The embedder "pocket", "dino" or "clip", the latter two from a local folder or hub id.

    Raises:
        ModelError: its model cannot be loaded.
    """
    if name == "pocket":
        return PocketEmbedder()
    return DinoEmbedder(model or DEFAULT_MODELS["dino"]) if name == "dino" else Clip(model or DEFAULT_MODELS["clip"])


def open_prompt_judge(name: str, model: str | None = None) -> PromptJudge:
    """The prompt judge "pocket" or "clip", the latter from a local folder or hub id.

    Raises:
        ModelError: its model cannot be loaded.
    """
    return PocketPromptJudge() if name == "pocket" else Clip(model or DEFAULT_MODELS["clip"])


def _load(model: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModel

    try:
        network: Any = AutoModel.from_pretrained(model, dtype=torch.float32)
        load_processor: Any = AutoImageProcessor.from_pretrained
        processor = load_processor(model)
    except (OSError, ValueError) as error:
        msg = f"cannot load the judge {model}: {_first_line(error)}. Give a local folder or a hub id, and check the network."
        raise ModelError(msg) from error
    return network.eval().requires_grad_(False), processor


def _pixels(processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    return {"pixel_values": processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]}


def _chunks(images: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
    return [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]


def _projected(features: Any) -> Tensor:
    """Take the projected embedding out of the object that transformers 5 wraps it in."""
    pooled: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return pooled


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
