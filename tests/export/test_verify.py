"""What verify judges: no number is no pass, each kind of steps has its own bar, and older bundles are judged too."""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketune.errors import RunError
from pocketune.models.load import ModelFolder
from pocketune_edge.bundle import Bundle, open_bundle
from pocketune_edge.state import State
from pocketune_edge.steps import Parts, Stepped
from pocketune_export.verify import open_steps, verify
from tests.edge.handmade import read_manifest_json, seal


@pytest.fixture
def changed(bundles: Mapping[str, Bundle], tmp_path: Path) -> Callable[..., Bundle]:
    """A copy of a bundle with another manifest."""

    def change(by: Callable[[dict[str, Any]], None]) -> Bundle:
        folder = Path(shutil.copytree(bundles["fp32"].path, tmp_path / "changed"))
        manifest = read_manifest_json(folder)
        by(manifest)
        seal(folder, manifest, list_files=False)
        return open_bundle(folder)

    return change


def test_a_bundle_that_gives_no_numbers_does_not_pass(
    bundles: Mapping[str, Bundle], small_model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_step = open_steps(bundles["fp32"])

    def without_numbers(state: State, parts: Parts) -> Stepped:
        result = true_step(state, parts)
        return Stepped(replace(result.state, losses=(math.nan,)), result.gradients * np.float32(math.nan))

    monkeypatch.setattr("pocketune_export.verify.open_steps", lambda *_: without_numbers)
    found = verify(bundles["fp32"], model=small_model.path, steps=1)
    assert not found.passed
    assert found.loss == found.gradients[str(found.worst_gradient)] == np.inf


def test_nothing_is_verified_where_pytorch_gives_no_numbers_either(
    changed: Callable[..., Bundle], small_model: ModelFolder
) -> None:
    def explode(manifest: dict[str, Any]) -> None:
        manifest["recipe"]["learning_rate"] = manifest["optimizer"]["learning_rate"] = 1e30

    with pytest.raises(RunError, match="gradient became"):
        verify(changed(explode), model=small_model.path, steps=2)


@pytest.mark.parametrize(("rates", "bar"), [({"learning_rate": 5e-3}, 5e-4), ({"in_learning_rate": 2e-3}, 2e-4)])
def test_the_bar_is_a_tenth_of_the_optimizers_rate(
    rates: dict[str, float], bar: float, changed: Callable[..., Bundle], small_model: ModelFolder
) -> None:
    bundle = changed(lambda manifest: manifest["optimizer"].update(rates))
    assert verify(bundle, model=small_model.path, steps=1).parameter_tolerance == pytest.approx(bar)


def test_a_bundle_of_the_first_schema_is_verified(changed: Callable[..., Bundle], small_model: ModelFolder) -> None:
    def age(manifest: dict[str, Any]) -> None:
        del manifest["schema_minor"], manifest["recipe"]["draws"], manifest["recipe"]["refresh_every"]
        del manifest["noise_schedule"]["ddim"], manifest["model"]["zero_negative"]

    assert verify(changed(age), model=small_model.path, steps=1).passed
