"""Recipes that a bundle cannot hold are refused with the reason."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest

from pocketune.errors import PlanError, RecipeError
from pocketune.recipe import Recipe
from pocketune_export.decisions import check_exportable
from pocketune_export.weights import WeightStore
from pocketune_export.writer import BundleWriter, Described


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"patches": "dynamic"}, "devices cut whole squares"),
        ({"skip": "auto", "cache_dtype": "int8"}, "float32 or bfloat16"),
        ({"gradient": "mixed"}, "one resolution"),
        ({"method": "token", "token": "x"}, "train the denoiser"),
        ({"timestep_low": 500}, "all timesteps"),
        ({"weights": "streamed", "weight_bits": 8}, "a packed copy"),
        ({"optimizer_in_backward": True, "activations": "recomputed"}, "norm of all blocks"),
        ({"vae_tile": 64}, "whole images"),
        ({"dtype": "bfloat16"}, "compute in float32"),
    ],
)
def test_what_devices_cannot_do_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        check_exportable(Recipe.create(instance_prompt="x", **changes))


def test_plain_recipes_are_exportable() -> None:
    check_exportable(Recipe.create(instance_prompt="x", skip="auto", cache_dtype="bfloat16", draws=3))
    check_exportable(Recipe.create(instance_prompt="x", gradient="zeroth_order"))
    check_exportable(Recipe.create(instance_prompt="x", method="scales", weight_bits=8))


def test_what_changes_no_number_is_exportable() -> None:
    check_exportable(Recipe.create(instance_prompt="x", weights="streamed", activations="on_disk"))
    check_exportable(Recipe.create(instance_prompt="x", weight_bits=4))


def test_a_block_that_divides_no_row_is_refused(tmp_path: Path) -> None:
    for block, divides in ((7, False), (32, True)):
        store = WeightStore(tmp_path, wanted="int8", block=block)
        store.put("a", "a.bin", lambda: np.ones((64, 64), np.float32), matmul=True)
        assert store.blocked == divides
    with pytest.raises(PlanError, match="a block of 7 weights divides no row"):
        BundleWriter(tmp_path, weights="int8", block=7).finish(cast(Described, None))
