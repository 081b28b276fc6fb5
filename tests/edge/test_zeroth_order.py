"""Zeroth-order runs on a device: the steps that PyTorch takes, in both modes, and a run may change sides."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from pocketune import personalize as personalize_with_torch
from pocketune.errors import Interrupted
from pocketune_edge.errors import SettingError
from pocketune_edge.job import personalize
from pocketune_export.exporter import export_trainable
from tests.edge.both_sides import largest_difference, stop_at
from tests.edge.conftest import edge_recipe
from tests.tolerances import EDGE_LOSS, EDGE_PARAMETER

RECIPE = edge_recipe(gradient="zeroth_order", zo_learning_rate=1e-2, zo_queries=2, skip="0-1,3,5", steps=4)


@pytest.fixture(scope="module")
def bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "zeroth-order"
    export_trainable(recipe=RECIPE, out=out, model=tiny_folder)
    return out


@pytest.fixture(scope="module")
def torch_run(tiny_folder: Path, toy_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("runs") / "torch"
    return out, personalize_with_torch(toy_photos, model=tiny_folder, recipe=RECIPE, out=out)


@pytest.mark.parametrize("streaming", [False, True])
def test_trains_as_pytorch_does(
    bundle: Path, torch_run: tuple[Path, Any], toy_photos: Path, tmp_path: Path, streaming: bool
) -> None:
    record = personalize(bundle, toy_photos, out=tmp_path / "run", threads=1, streaming=streaming)
    assert list(record["losses"]) == pytest.approx(list(torch_run[1].losses), rel=EDGE_LOSS)
    assert largest_difference(tmp_path / "run", torch_run[0]) < EDGE_PARAMETER


def test_a_run_changes_sides_and_back(
    tiny_folder: Path, bundle: Path, toy_photos: Path, torch_run: tuple[Path, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match="step 1 of 4"):
        personalize_with_torch(toy_photos, model=tiny_folder, recipe=RECIPE, out=out, on_progress=stop_at(1))
    with pytest.raises(Interrupted, match="step 3 of 4"):
        personalize(bundle, toy_photos, out=out, resume=True, threads=1, on_progress=stop_at(3))
    saved = load_file(out / "checkpoints" / "step-000003.safetensors")
    assert all(name.startswith("parameter.") for name in saved), "plain descent has no moments"
    personalize_with_torch(toy_photos, model=tiny_folder, recipe=RECIPE, out=out, resume=True)
    assert largest_difference(out, torch_run[0]) < EDGE_PARAMETER


def test_the_rate_of_its_steps_may_change_and_no_other(bundle: Path, toy_photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="learning_rate has no effect"):
        personalize(bundle, toy_photos, out=tmp_path / "run", threads=1, changes={"learning_rate": 1e-3})
    record = personalize(bundle, toy_photos, out=tmp_path / "run", threads=1, changes={"zo_learning_rate": 1e-3, "steps": 1})
    assert record["recipe"]["zo_learning_rate"] == 1e-3
