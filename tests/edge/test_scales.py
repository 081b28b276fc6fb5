"""Scales on a device: the steps that PyTorch takes, the file that it writes, and pictures that follow the timestep."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pocketune import generate
from pocketune import personalize as personalize_with_torch
from pocketune.errors import Interrupted
from pocketune_edge.bundle import open_bundle
from pocketune_edge.delta import RESULTS, load_result, neutral
from pocketune_edge.errors import LoraError
from pocketune_edge.job import personalize
from pocketune_edge.sample import render
from pocketune_edge.session import Sessions
from pocketune_export.exporter import export_trainable
from tests.edge.both_sides import largest_difference, stop_at
from tests.edge.conftest import edge_recipe
from tests.tolerances import EDGE_LOSS, EDGE_PARAMETER

RECIPE = edge_recipe(method="scales", weight_bits=8, skip="0-1,3,5", steps=5, scale_learning_rate=5e-3)
RESULT = RESULTS["scales"]


@pytest.fixture(scope="module")
def bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "scales"
    export_trainable(recipe=RECIPE, out=out, model=tiny_folder)
    return out


@pytest.fixture(scope="module")
def torch_run(tiny_folder: Path, toy_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("runs") / "torch"
    return out, personalize_with_torch(toy_photos, model=tiny_folder, recipe=RECIPE, out=out)


def test_a_run_changes_sides_and_ends_in_the_file_that_pytorch_writes(
    tiny_folder: Path, bundle: Path, toy_photos: Path, torch_run: tuple[Path, Any], tmp_path: Path
) -> None:
    """PC, device, PC, and the last step on the device block by block: moments and counts of updates travel."""
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match="step 1 of 5"):
        personalize_with_torch(toy_photos, model=tiny_folder, recipe=RECIPE, out=out, on_progress=stop_at(1))
    with pytest.raises(Interrupted, match="step 3 of 5"):
        personalize(bundle, toy_photos, out=out, resume=True, threads=1, on_progress=stop_at(3))
    with pytest.raises(Interrupted, match="step 4 of 5"):
        personalize_with_torch(toy_photos, model=tiny_folder, recipe=RECIPE, out=out, resume=True, on_progress=stop_at(4))
    record = personalize(bundle, toy_photos, out=out, resume=True, threads=1, streaming=True)
    assert list(record["losses"]) == pytest.approx(list(torch_run[1].losses), rel=EDGE_LOSS)
    assert largest_difference(out, torch_run[0], RESULT) < EDGE_PARAMETER
    moved = load_file(out / RESULT)
    assert max(float(np.abs(value - 1).max()) for value in moved.values()) > 100 * EDGE_PARAMETER

    (image,) = generate(tiny_folder, ["a photo of sks toy"], lora=out, seeds=[0], steps=2)
    (expected,) = generate(tiny_folder, ["a photo of sks toy"], lora=torch_run[0], seeds=[0], steps=2)
    assert np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16)).max() <= 1


def test_pictures_follow_the_timestep(bundle: Path) -> None:
    """The scales of each interval show by themselves, and each step uses those of its own."""
    opened = open_bundle(bundle)
    base = neutral(opened.manifest.tuned)
    changed = (base + 0.3 * np.random.default_rng(0).standard_normal(base.size)).astype(np.float32)
    pictures = set()
    for intervals in ((), (0,), (1,), (0, 1)):
        parameters = base.copy()
        for place in map(opened.manifest.tuned.place, intervals):
            parameters[place] = changed[place]
        sessions = Sessions(opened, keep=True, threads=1)
        settings: dict[str, Any] = {"seeds": [0], "steps": 8, "guidance": 1.0, "parameters": parameters}
        (image,) = render(sessions, ["toy"], **settings, on_step=lambda *_: None)
        sessions.close()
        pictures.add(image.tobytes())
    assert len(pictures) == 4


def test_scales_of_other_weights_are_refused(bundle: Path, torch_run: tuple[Path, Any], tmp_path: Path) -> None:
    opened, path = open_bundle(bundle), tmp_path / "other.safetensors"
    assert load_result(opened, torch_run[0]).flat.any()
    for name in ("bits", "codes"):
        with safe_open(torch_run[0] / RESULT, "np") as file:
            save_file({key: file.get_tensor(key) for key in file.keys()}, path, {**file.metadata(), name: "4"})  # noqa: SIM118
        with pytest.raises(LoraError, match=f"its {name} is 4"):
            load_result(opened, path)
    with pytest.raises(LoraError, match="no scales at"):
        load_result(opened, tmp_path / "nowhere")
