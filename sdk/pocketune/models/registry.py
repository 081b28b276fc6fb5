"""Every architecture that has an adapter, one line each."""

from __future__ import annotations

from typing import Any

from pocketune.errors import ModelError
from pocketune.models import dit, flux, mmdit
from pocketune.models.family import Family

FAMILIES: dict[str, Family] = {
    family.kind: family
    for family in (
        mmdit.FAMILY,
        flux.FAMILY,
        dit.PIXART,
        dit.SANA,
    )
}


def family_of(model: Any) -> Family:
    """The family of a denoiser.

    Raises:
        ModelError: it has no adapter here.
    """
    return family_named(type(model).__name__, name="the model")


def family_named(kind: str, *, name: str) -> Family:
    """The family of a denoiser class.

    Args:
        kind: the class's name.
        name: of the model, for the message.

    Raises:
        ModelError: it has no adapter here.
    """
    if kind not in FAMILIES:
        msg = f"{name} has the denoiser {kind}, for which there is no adapter; supported: {', '.join(FAMILIES)}."
        raise ModelError(msg)
    return FAMILIES[kind]
