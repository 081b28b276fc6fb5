"""Every combination of options either makes sense or is refused with the reason; those that make sense train together."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketune import personalize
from pocketune.errors import PlanError, RecipeError
from pocketune.models.load import ModelFolder
from pocketune.plan.skipping import plan_for
from pocketune.recipe import Recipe
from tests.reliability.test_architectures import quick_recipe

Values = Mapping[str, Any]

OPTIONS: dict[str, tuple[Any, ...]] = {
    "skip": ("none", "auto:0", "hollow:0.0", "auto", "auto:0.3", "first:0.3", "last:0.3", "hollow:0.3", "1-2"),
    "use_residuals": (True, False),
    "patches": ("none", "dynamic", "resize"),
    "patch_min": (None, 16),
    "patch_max": (None, 32),
    "cache_dtype": ("float32", "int8"),
    "draws": (None, 2),
    "refresh_every": (None, 1),
    "gradient": ("backprop", "zeroth_order", "mixed"),
    "activations": ("kept", "recomputed"),
    "optimizer_in_backward": (False, True),
}


def skips(v: Values) -> bool:
    return v["skip"] not in ("none", "auto:0", "hollow:0.0")


def cached(v: Values) -> bool:
    return skips(v) and bool(v["use_residuals"])


# Why a combination makes no sense, whatever the model.
NONSENSE: dict[str, Callable[[Values], bool]] = {
    "there are none": lambda v: v["patches"] == "none" and (v["patch_min"] or v["patch_max"]) is not None,
    "no largest patch": lambda v: v["patches"] == "resize" and v["patch_max"] is not None,
    "use_residuals has no effect": lambda v: not skips(v) and not v["use_residuals"],
    "cache_dtype has no effect": lambda v: v["cache_dtype"] != "float32" and not cached(v),
    "renews a pool": lambda v: (
        v["refresh_every"] is not None and not cached(v) and v["draws"] is None and v["patches"] != "dynamic"
    ),
    "zeroth order has none": lambda v: v["gradient"] == "zeroth_order" and v["activations"] != "kept",
    "must be run again in backward": lambda v: v["optimizer_in_backward"] and v["activations"] == "kept",
}
# And what a U-Net cannot do besides.
U_NET: dict[str, Callable[[Values], bool]] = {
    "cannot skip": lambda v: v["skip"] in ("first:0.3", "last:0.3", "1-2"),
    "nothing would enter the decoder": lambda v: skips(v) and not v["use_residuals"],
}


def combinations() -> list[dict[str, Any]]:
    return [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]


def test_every_combination_is_sound_or_refused_with_a_true_reason() -> None:
    sound = 0
    for values in combinations():
        reasons = [reason for reason, applies in NONSENSE.items() if applies(values)]
        try:
            Recipe.create(instance_prompt="a photo of sks toy", **values)
        except RecipeError as error:
            assert any(reason in str(error) for reason in reasons), (values, str(error))
        else:
            assert not reasons, values
            sound += 1
    assert sound > 500


@pytest.mark.parametrize(("name", "further"), [("flux", {}), ("pixart", {}), ("sd15", U_NET), ("sdxl", U_NET)])
def test_every_architecture_takes_every_plan_or_says_why(
    tiny_pipelines: Callable[[str], ModelFolder], name: str, further: dict[str, Callable[[Values], bool]]
) -> None:
    adapter = tiny_pipelines(name).empty_denoiser()
    for skip, use_residuals in itertools.product(OPTIONS["skip"], (True, False)):
        values = {"skip": skip, "use_residuals": use_residuals}
        reasons = [reason for reason, applies in further.items() if applies(values)]
        try:
            plan = plan_for(adapter, skip, use_residuals=use_residuals)
        except PlanError as error:
            assert any(reason in str(error) for reason in reasons), (values, str(error))
        else:
            assert not reasons, values
            assert bool(plan.skipped) == skips(values)


TOGETHER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("flux", {"skip": "auto:0.3", "patches": "dynamic", "cache_dtype": "int8", "refresh_every": 1, "gradient": "mixed"}),
    ("sana", {"skip": "auto", "patches": "random", "draws": 1, "gradient": "zeroth_order"}),
    ("pixart", {"skip": "last:0.3", "use_residuals": False, "patches": "high-to-low", "activations": "recomputed"}),
    ("sd15", {"skip": "hollow:0.5", "patches": "dynamic", "cache_dtype": "bfloat16", "refresh_every": 2, "draws": 1}),
    ("sdxl", {"skip": "auto", "patches": "resize", "gradient": "mixed", "class_prompt": "a toy", "class_images": 1}),
    ("sd2", {"patches": "dynamic", "refresh_every": 1, "activations": "recomputed", "optimizer_in_backward": True}),
)


@pytest.mark.parametrize(
    ("name", "changes"), [TOGETHER[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in TOGETHER[1:])]
)
def test_what_makes_sense_trains_together(
    tiny_pipelines: Callable[[str], ModelFolder], toy_photos: Path, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    record = personalize(
        toy_photos, model=tiny_pipelines(name).path, recipe=quick_recipe(**zo_defaults(changes)), out=tmp_path / "run"
    )
    assert len(record.losses) == 3 and np.isfinite(record.losses).all()
    assert record.check.image_change > 0


def zo_defaults(changes: dict[str, Any]) -> dict[str, Any]:
    """A larger step where there are so few that they would not show in the images."""
    return changes if changes.get("gradient", "backprop") == "backprop" else {"zo_learning_rate": 1.0, **changes}
