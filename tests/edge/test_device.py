"""`pocketune-edge` as a process of its own, with a bundle of pocket-sd3: on this machine, and on aarch64 under emulation."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from pocketune import Progress, Recipe
from pocketune import personalize as personalize_with_torch
from pocketune.errors import Interrupted
from pocketune.models.load import open_model
from pocketune_export.exporter import export_trainable
from tests.tolerances import EDGE_IMAGE_LEVELS, EDGE_LOSS, EDGE_SHARE_OF_A_STEP

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "demo" / "photos" / "toy"
AARCH64 = Path(os.environ.get("POCKETUNE_AARCH64", ROOT / "build" / "aarch64")) / "python"
LORA = Path("lora") / "pytorch_lora_weights.safetensors"
RECIPE = Recipe(
    instance_prompt="a photo of sks toy",
    skip="auto",
    steps=12,
    draws=2,
    learning_rate=1e-3,
    rank=8,
    sample_steps=2,
    sample_prompts=("a photo of sks toy",),
)
PARAMETER = EDGE_SHARE_OF_A_STEP * RECIPE.learning_rate


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "pocket-sd3"
    export_trainable(recipe=RECIPE, out=out)
    return out


@pytest.fixture(scope="module")
def torch_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("runs") / "torch"
    return out, personalize_with_torch(PHOTOS, recipe=RECIPE, out=out)


@pytest.fixture(scope="module")
def device_run(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "device"
    return out, personalized(sys.executable, bundle, out)


def command(python: str | Path, name: str, *arguments: str | Path) -> list[str]:
    return [str(python), "-m", "pocketune_edge.cli", name, *map(str, arguments), "--threads", "1"]


def edge(python: str | Path, name: str, *arguments: str | Path) -> dict[str, Any]:
    done = subprocess.run(
        [*command(python, name, *arguments), "--json", "--quiet"], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def personalized(python: str | Path, bundle: Path, out: Path, *more: str) -> dict[str, Any]:
    result = edge(python, "personalize", bundle, PHOTOS, "--out", out, *more)
    record: dict[str, Any] = json.loads(Path(result["record"]).read_text())
    return record


def largest_difference(first: Path, second: Path) -> float:
    ours, theirs = load_file(first / LORA), load_file(second / LORA)
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


def test_trains_as_pytorch_does(torch_run: tuple[Path, Any], device_run: tuple[Path, dict[str, Any]]) -> None:
    assert list(device_run[1]["losses"]) == pytest.approx(list(torch_run[1].losses), rel=EDGE_LOSS)
    assert largest_difference(device_run[0], torch_run[0]) < PARAMETER


def test_streaming_trains_as_one_graph_does(bundle: Path, device_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    record = personalized(sys.executable, bundle, tmp_path / "run", "--streaming")
    assert record["losses"] == pytest.approx(device_run[1]["losses"], rel=EDGE_LOSS)
    assert largest_difference(tmp_path / "run", device_run[0]) < PARAMETER
    assert record["peaks"]["training"]["rss_bytes"] < device_run[1]["peaks"]["training"]["rss_bytes"]


def test_stock_diffusers_loads_the_result(device_run: tuple[Path, dict[str, Any]]) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(open_model("pocket-sd3").path, text_encoder_3=None, tokenizer_3=None)
    pipeline.load_lora_weights(device_run[0] / "lora")
    expected = load_file(device_run[0] / LORA)
    loaded = {
        "transformer." + name.replace(".default_0.", "."): parameter.detach().numpy()
        for name, parameter in pipeline.transformer.named_parameters()
        if "lora_" in name
    }
    assert loaded.keys() == expected.keys()
    assert all(np.array_equal(loaded[name], expected[name]) for name in expected)


def test_a_run_changes_sides_and_back(bundle: Path, torch_run: tuple[Path, Any], tmp_path: Path) -> None:
    """PC, then a device that is stopped by Ctrl-C somewhere, then the PC again: the end is that of an unbroken run."""

    def stop(event: Progress) -> None:
        if event.phase == "training" and event.done == 3:
            signal.raise_signal(signal.SIGINT)

    out = tmp_path / "run"
    with pytest.raises(Interrupted, match="step 3 of 12"):
        personalize_with_torch(PHOTOS, recipe=RECIPE, out=out, on_progress=stop)
    arguments = command(sys.executable, "personalize", bundle, PHOTOS, "--out", out, "--resume", "--streaming")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "loss" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130, rest
    steps = sorted(int(path.stem.removeprefix("step-")) for path in (out / "checkpoints").iterdir())
    assert 3 < steps[-1] < 12
    personalize_with_torch(PHOTOS, recipe=RECIPE, out=out, resume=True)
    assert largest_difference(out, torch_run[0]) < PARAMETER


@pytest.mark.skipif(not AARCH64.is_file(), reason="no emulated aarch64: make it with tests/aarch64/prepare.sh")
@pytest.mark.parametrize("mode", [(), ("--streaming",)], ids=["one graph", "streaming"])
def test_aarch64_trains_and_samples_as_this_machine_does(bundle: Path, mode: tuple[str, ...], tmp_path: Path) -> None:
    """Under emulation; a run of two steps, because emulated arithmetic is slow."""
    images = []
    for name, python in (("here", sys.executable), ("there", AARCH64)):
        personalized(python, bundle, tmp_path / name, "--steps", "2", *mode)
        image = tmp_path / f"{name}.png"
        prompt = ("--prompt", "a photo of sks toy", "--steps", "2", "--guidance", "1")
        edge(python, "sample", bundle, "--lora", tmp_path / name, *prompt, "--out", image, *mode)
        with Image.open(image) as opened:
            images.append(np.asarray(opened, np.int16))
    losses = [json.loads((tmp_path / name / "edge.json").read_text())["losses"] for name in ("here", "there")]
    assert losses[1] == pytest.approx(losses[0], rel=EDGE_LOSS)
    assert largest_difference(tmp_path / "here", tmp_path / "there") < PARAMETER
    assert np.abs(images[0] - images[1]).max() <= EDGE_IMAGE_LEVELS
