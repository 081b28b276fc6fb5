"""Denoisers of any configuration without weights."""

from __future__ import annotations

from typing import Any

from accelerate import init_empty_weights

from pocketune.models.base import DenoiserAdapter
from pocketune.models.family import Family
from pocketune.models.positions import promise_table, without_table
from pocketune.models.quiet import building


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
