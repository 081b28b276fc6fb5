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
    key = family_key(kind, config)
    if key not in FAMILIES:
        msg = f"{name} is a {kind} that takes {config.get('addition_embed_type')} inputs, for which there is no adapter."
        raise ModelError(msg)
    return FAMILIES[key]


def check_kind(kind: str, *, name: str) -> None:
    """Refuse a denoiser class that no family has.

    Raises:
        ModelError: there is no adapter for it.
    """
    kinds = list(dict.fromkeys(family.kind for family in FAMILIES.values()))
    if kind not in kinds:
        msg = f"{name} has the denoiser {kind}, for which there is no adapter; supported: {', '.join(kinds)}."
        raise ModelError(msg)
