"""Every architecture that has an adapter, one line each."""

from __future__ import annotations

from typing import Any

from pocketune.errors import ModelError
from pocketune.models import dit, flux, mmdit, unet
from pocketune.models.family import Config, Family, family_key

FAMILIES: dict[str, Family] = {
    family.key: family
    for family in (
        mmdit.FAMILY,
        flux.FAMILY,
        dit.PIXART,
        dit.SANA,
        unet.SD,
        unet.SDXL,
    )
}

_FORMER_KINDS = {("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel"}
"""Classes that diffusers has split since, by their `norm_type`, and what to take for them; published models still name them."""


def family_of(model: Any) -> Family:
    """The family of a denoiser.

    Raises:
        ModelError: it has no adapter here.
    """
    return family_named(type(model).__name__, model.config, name="the model")


def family_named(kind: str, config: Config, *, name: str) -> Family:
    """The family of a denoiser class with a configuration.

    Args:
        kind: the class's name.
        config: of the denoiser.
        name: of the model, for the message.

    Raises:
        ModelError: it has no adapter here.
    """
    check_kind(kind, name=name)
    kind = _FORMER_KINDS.get((kind, str(config.get("norm_type"))), kind)
    key = family_key(kind, config)
    if key not in FAMILIES:
        told = ", ".join(f"{field} {config[field]}" for field in ("addition_embed_type", "norm_type") if config.get(field))
        msg = f"{name} is a {kind} with {told or 'an unknown configuration'}, for which there is no adapter."
        raise ModelError(msg)
    return FAMILIES[key]


def check_kind(kind: str, *, name: str) -> None:
    """Refuse a denoiser class that no family has, whatever its configuration.

    Raises:
        ModelError: there is no adapter for it.
    """
    kinds = list(dict.fromkeys(family.kind for family in FAMILIES.values()))
    if kind not in {*kinds, *(former for former, _ in _FORMER_KINDS)}:
        msg = f"{name} has the denoiser {kind}, for which there is no adapter; supported: {', '.join(kinds)}."
        raise ModelError(msg)
