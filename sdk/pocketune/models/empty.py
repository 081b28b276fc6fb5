"""Denoisers without weights: of any configuration, and those of published models in their true size."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from accelerate import init_empty_weights

from pocketune.errors import ModelError
from pocketune.models.base import DenoiserAdapter
from pocketune.models.family import Family
from pocketune.models.positions import promise_table, without_table
from pocketune.models.quiet import building
from pocketune.models.registry import family_named

PUBLISHED = ("sd35-medium", "flux1-dev", "pixart-sigma-xl-1024", "sana-1600m-1024", "sana-600m-1024", "sd15", "sdxl")


def empty_denoiser(config: dict[str, Any], family: Family) -> DenoiserAdapter:
    """A denoiser's structure, frozen, with its parameters on the meta device.

    Args:
        config: as diffusers writes it.
        family: its architecture.
    """
    with building(), init_empty_weights():
        model = family.denoiser.from_config(without_table(config))
    promise_table(model, config)
    model.requires_grad_(False)
    adapter: DenoiserAdapter = family.adapter(model.eval())
    return adapter


def published(name: str) -> DenoiserAdapter:
    """A published model's denoiser in its true size, on the meta device: for plans and memory, without weights.

    Args:
        name: one of `PUBLISHED`.

    Raises:
        ModelError: there is no such configuration.
    """
    if name not in PUBLISHED:
        msg = f"no published configuration {name}; there are {', '.join(PUBLISHED)}."
        raise ModelError(msg)
    config = json.loads((files("pocketune.models") / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    return empty_denoiser(config, family_named(config["_class_name"], config, name=name))
