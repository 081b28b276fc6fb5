"""Who judges: the pocket judges for rendered subjects, DINO and CLIP for real photographs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.quality.subjects import IDENTIFIER, AskedPrompt
from pocketune.embedders import DEFAULT_MODELS, ClipEmbedder, DinoEmbedder, ImageEmbedder, projected
from pocketune.errors import ModelError, first_line
from pocketune.pocket.judges import load_attribute_classifier, load_subject_embedder


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


class Clip(ClipEmbedder):
    """CLIP's image embedding (CLIP-I), and its agreement of image and text as prompt fidelity (CLIP-T)."""

    def __init__(self, model: str = DEFAULT_MODELS["clip"]) -> None:
        """Load from a local folder or a hub id."""
        from transformers import AutoTokenizer

        super().__init__(model)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            msg = f"cannot load the tokenizer of {model}: {first_line(error)}. Give a CLIP model's folder or hub id."
            raise ModelError(msg) from error

    @torch.no_grad()
    def fidelity(self, images: Sequence[Image.Image], prompts: Sequence[AskedPrompt]) -> list[float]:
        """Cosine of image and prompt, without the identifier, which means nothing to CLIP."""
        texts = [prompt.text.replace(f"{IDENTIFIER} ", "") for prompt in prompts]
        tokens = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        features = self._network.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return [float(value) for value in (self.embed(images) * F.normalize(projected(features), dim=1)).sum(dim=1)]


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
