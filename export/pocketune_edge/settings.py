"""What is asked of a run: the recipe that the bundle was exported with, and what the user changes on the device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_type_hints

from pocketune_edge.agreement import SCHEMA_MINOR
from pocketune_edge.errors import BundleError, SettingError
from pocketune_edge.fields import NotNegative, Positive
from pocketune_edge.manifest import Manifest
from pocketune_edge.strict import MisfitError, Rule, read

CHANGEABLE = (
    "instance_prompt",
    "steps",
    "seed",
    "learning_rate",
    "scale_learning_rate",
    "zo_learning_rate",
    "batch_size",
    "checkpoint_every",
    "cache_limit_mb",
    "sample_steps",
    "guidance_scale",
)
"""Settings that are not fixed in a bundle's graphs."""

RATES = frozenset({"learning_rate", "scale_learning_rate", "zo_learning_rate"})
"""Of which one has an effect on the steps of a bundle."""

_Count = Annotated[int, Rule(low=1)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The fields of a recipe that matter on the device; `pocketune.Recipe` describes them.

    Those with defaults are younger than the first bundles, whose runs did what the default says.
    """

    instance_prompt: Annotated[str, Rule(low=1)]
    class_prompt: str | None
    class_images: _Count
    prior_loss_weight: NotNegative
    cache_dtype: Literal["float32", "bfloat16"]
    cache_limit_mb: _Count
    draws: _Count | None = None
    refresh_every: _Count | None = None
    steps: _Count
    batch_size: _Count
    learning_rate: Positive
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"]
    logit_mean: float
    logit_std: Positive
    mode_scale: float
    seed: Annotated[int, Rule(low=0, below=2**63)]
    checkpoint_every: _Count
    sample_steps: _Count
    guidance_scale: NotNegative
    gradient: Literal["backprop", "zeroth_order"]
    scale_learning_rate: Positive
    scale_in_learning_rate: Positive
    zo_learning_rate: Positive
    zo_epsilon: Positive
    zo_queries: _Count
    zo_two_sided: bool

    @classmethod
    def of(cls, recipe: dict[str, Any], *, older: bool = False) -> Self:
        """Read the fields that matter. older: those that have a default may be missing.

        Raises:
            MisfitError: one is missing or out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        return read(cls, {name: value for name, value in recipe.items() if name in names}, older=older)


def check_changes(changes: dict[str, Any]) -> None:
    """Refuse what no bundle can be asked for, before gigabytes of one are hashed.

    Args:
        changes: as of `settings_of`.

    Raises:
        SettingError: a change is not possible on the device, or out of range.
    """
    given = _given(changes)
    fixed = sorted(set(given) - set(CHANGEABLE))
    if fixed:
        msg = f"{', '.join(fixed)} cannot change on the device. Export a bundle with the wanted recipe."
        raise SettingError(msg)
    kinds = get_type_hints(Settings, include_extras=True)
    for name, value in given.items():
        try:
            read(kinds[name], value)
        except MisfitError as error:
            msg = f"a setting is not valid: {name}: {error}. Give another value."
            raise SettingError(msg) from error


def settings_of(manifest: Manifest, changes: dict[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """The settings of a run, and the whole recipe as PyTorch's side would write it.

    Args:
        manifest: holds the recipe.
        changes: by field, those of `CHANGEABLE` alone; None keeps the bundle's value.

    Raises:
        BundleError: the bundle's recipe is not valid.
        SettingError: as of `check_changes`, or a change has no effect with this bundle.
    """
    check_changes(changes)
    older = manifest.schema_minor < SCHEMA_MINOR
    try:
        Settings.of(manifest.recipe, older=older)
    except MisfitError as error:
        msg = f"the bundle's recipe is not valid: {error}. Export the bundle again."
        raise BundleError(msg) from error
    given = _given(changes)
    effective = "learning_rate" if manifest.tuned.method == "lora" else "scale_learning_rate"
    effective = effective if manifest.recipe.get("gradient", "backprop") == "backprop" else "zo_learning_rate"
    inert = sorted(set(given) & RATES - {effective})
    if inert:
        msg = f"{inert[0]} has no effect on the steps of this bundle. Leave it out, or export a bundle with another gradient."
        raise SettingError(msg)
    settings = Settings.of(manifest.recipe | given, older=older)
    # As they were read: 1 for a rate is 1.0, which has another fingerprint.
    return settings, manifest.recipe | {name: getattr(settings, name) for name in given}


def _given(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if value is not None}
