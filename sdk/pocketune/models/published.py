"""Published models in their true size, of which only the denoiser's configuration is here: for plans and memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pocketune.errors import ModelError
from pocketune.models.base import DenoiserAdapter
from pocketune.models.load import ModelFolder
from pocketune.models.registry import family_named

PUBLISHED = (
    "sd3-medium",
    "sd35-medium",
    "flux1-dev",
    "pixart-sigma-xl-1024",
    "sana-1600m-1024",
    "sana-600m-1024",
    "sd15",
    "sd21",
    "sdxl",
)


def published_config(name: str) -> dict[str, Any]:
    """The configuration of a published model's denoiser, as diffusers writes it.

    Args:
        name: one of `PUBLISHED`.

    Raises:
        ModelError: there is no such configuration.
    """
    if name not in PUBLISHED:
        msg = f"no published configuration {name}; there are {', '.join(PUBLISHED)}."
        raise ModelError(msg)
    text = (files("pocketune.models") / "configs" / f"{name}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def published(name: str) -> DenoiserAdapter:
    """A published model's denoiser on the meta device, without weights.

    Args:
        name: one of `PUBLISHED`.

    Raises:
        ModelError: there is no such configuration.
    """
    return PublishedModel(name).empty_denoiser()


class PublishedModel(ModelFolder):
    """Stands for a folder that has only the denoiser's configuration; it has no text encoders and no autoencoder."""

    def __init__(self, name: str) -> None:
        """Read a configuration.

        Raises:
            ModelError: there is no such configuration.
        """
        config = published_config(name)
        self.name = self.source = name
        self.path = Path(name)
        self.denoiser_config, self.denoiser_kind = config, config["_class_name"]
        self.family = family_named(self.denoiser_kind, config, name=name)
        self.sizes = self.family.sizes(config)
        self.index = {self.family.component: ["diffusers", self.denoiser_kind]}
        self.vae_config = {}

    @property
    def vae_scale(self) -> int:
        """That of the autoencoder that was published with it."""
        return self.family.vae_scale

    @property
    def text_padding(self) -> int:
        """That of the whole pipeline as it was published."""
        return self.family.text_length(_AllParts(self.denoiser_config))


@dataclass
class _AllParts:
    """A pipeline that has every part, of which only the denoiser's configuration is known."""

    denoiser_config: dict[str, Any]

    def has(self, part: str) -> bool:  # noqa: ARG002
        return True

    def config(self, part: str) -> dict[str, Any]:
        msg = f"the configuration of {part} is not here. Give a folder of the whole pipeline."
        raise ModelError(msg)
