"""Real bundles of the tiny model: the edge runtime trains and samples as PyTorch does, and a run may change sides."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pocketune import Progress
from pocketune import personalize as personalize_with_torch
from pocketune.errors import Interrupted, PhotoError, PlanError, PocketuneError, RunError
from pocketune.inspection import inspect
from pocketune_edge import job, phases
from pocketune_edge.bundle import open_bundle
from pocketune_edge.delta import neutral
from pocketune_edge.errors import BundleError, SettingError
from pocketune_edge.job import personalize
from pocketune_edge.sample import render
from pocketune_edge.session import Sessions
from tests.edge.both_sides import LORA, assert_alike, largest_difference, sample_on_device, stop_at
from tests.edge.conftest import edge_recipe, recipe_of
from tests.tolerances import EDGE_LOSS, EDGE_PARAMETER


@pytest.fixture(scope="module")
def torch_run(tiny_folder: Path, toy_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("runs") / "torch"
    return out, personalize_with_torch(toy_photos, model=tiny_folder, recipe=edge_recipe(skip="0-1,3,5"), out=out)


@pytest.fixture(scope="module")
def edge_run(skipping_bundle: Path, toy_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("runs") / "edge"
    return out, personalize(skipping_bundle, toy_photos, out=out, threads=1)


def test_trains_as_pytorch_does(torch_run: tuple[Path, Any], edge_run: tuple[Path, Any]) -> None:
    """The whole way: own text embeddings, latents, residual features and six AdamW steps."""
    (torch_out, torch_record), (edge_out, edge_record) = torch_run, edge_run
    assert recipe_of(edge_record) == torch_record.recipe
    assert list(edge_record["losses"]) == pytest.approx(list(torch_record.losses), rel=EDGE_LOSS)
    assert largest_difference(edge_out, torch_out) < EDGE_PARAMETER
    moved = load_file(edge_out / LORA)
    assert max(float(np.abs(value).max()) for name, value in moved.items() if "lora_B" in name) > 100 * EDGE_PARAMETER


def test_pocketune_inspects_the_run_of_a_device(edge_run: tuple[Path, Any]) -> None:
    facts = inspect(edge_run[0]).facts
    assert facts["finished"] and facts["checkpoint_step"] == 6 and facts["model"]["name"] == "tiny-sd3"


def test_streaming_trains_as_one_graph_does(
    skipping_bundle: Path, edge_run: tuple[Path, Any], toy_photos: Path, tmp_path: Path
) -> None:
    record = personalize(skipping_bundle, toy_photos, out=tmp_path / "run", streaming=True, threads=1)
    assert list(record["losses"]) == pytest.approx(list(edge_run[1]["losses"]), rel=EDGE_LOSS)
    assert largest_difference(tmp_path / "run", edge_run[0]) < EDGE_PARAMETER


def test_stock_diffusers_loads_the_result(tiny_folder: Path, edge_run: tuple[Path, Any]) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.load_lora_weights(edge_run[0] / "lora")
    loaded = {name for name, _ in pipeline.transformer.named_parameters() if "lora_" in name}
    assert len(loaded) == len(load_file(edge_run[0] / LORA)) > 0


def test_samples_as_diffusers_does(tiny_folder: Path, skipping_bundle: Path, edge_run: tuple[Path, Any]) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(edge_run[0] / "lora")
    prompts = ["a photo of sks toy", "a red ball on grass"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline(prompts, latents=noise, num_inference_steps=3, guidance_scale=5.0, height=64, width=64,
                        max_sequence_length=0).images  # fmt: skip
    found = sample_on_device(skipping_bundle, edge_run[0], prompts, noise)
    assert_alike(found, expected)


def test_a_run_changes_sides_and_back(
    tiny_folder: Path, skipping_bundle: Path, toy_photos: Path, torch_run: tuple[Path, Any], tmp_path: Path
) -> None:
    """Two steps on the PC, two on the device, two on the PC: the end is that of an unbroken run."""
    out, recipe = tmp_path / "run", edge_recipe(skip="0-1,3,5")
    with pytest.raises(Interrupted, match="step 2 of 6"):
        personalize_with_torch(toy_photos, model=tiny_folder, recipe=recipe, out=out, on_progress=stop_at(2))
    with pytest.raises(Interrupted, match="step 4 of 6"):
        personalize(skipping_bundle, toy_photos, out=out, resume=True, threads=1, on_progress=stop_at(4))
    personalize_with_torch(toy_photos, model=tiny_folder, recipe=recipe, out=out, resume=True)
    assert largest_difference(out, torch_run[0]) < EDGE_PARAMETER


def test_stopped_and_resumed_equals_unbroken_bit_for_bit(
    skipping_bundle: Path, edge_run: tuple[Path, Any], toy_photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match="step 4 of 6"):
        personalize(skipping_bundle, toy_photos, out=out, threads=1, on_progress=stop_at(4))
    with pytest.raises(RunError, match="exists already"):
        personalize(skipping_bundle, toy_photos, out=out, threads=1)
    with pytest.raises(RunError, match="another recipe, model or photos"):
        personalize(skipping_bundle, toy_photos, out=out, threads=1, resume=True, changes={"seed": 1})
    record = personalize(skipping_bundle, toy_photos, out=out, threads=1, resume=True)
    assert (out / LORA).read_bytes() == (edge_run[0] / LORA).read_bytes()
    assert record["losses"] == edge_run[1]["losses"]


def test_of_pools_that_are_refreshed_one_lies_on_disk_at_a_time(
    skipping_bundle: Path, edge_run: tuple[Path, Any], toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a bound of their number, the draws are those of one pool, and so is the result; stopped and resumed meanwhile."""
    opened = open_bundle(skipping_bundle)
    opened.manifest = replace(opened.manifest, recipe=opened.manifest.recipe | {"refresh_every": 2})
    monkeypatch.setattr(job, "open_bundle", lambda *_, **__: opened)
    monkeypatch.setattr(phases, "check_bound", lambda _, **asked: bounded.append(asked["draws"]))
    bounded: list[int] = []
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match="step 3 of 6"):
        personalize(skipping_bundle, toy_photos, out=out, threads=1, on_progress=stop_at(3))
    (second,) = (out / "features").iterdir()
    record = personalize(skipping_bundle, toy_photos, out=out, threads=1, resume=True)
    (third,) = (out / "features").iterdir()
    assert second.name != third.name and bounded == [2, 2]
    assert 0 < record["feature_cache_bytes"] < edge_run[1]["feature_cache_bytes"] / 2
    assert (out / LORA).read_bytes() == (edge_run[0] / LORA).read_bytes()
    assert record["losses"] == edge_run[1]["losses"]


@pytest.mark.parametrize("phase", ["features", "training"])
def test_a_stop_at_the_first_word_of_a_phase_says_how_to_go_on(
    skipping_bundle: Path, toy_photos: Path, tmp_path: Path, phase: str
) -> None:
    def stop(event: Progress) -> None:
        if event.phase == phase:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=f"stopped at {phase}.*--resume"):
        personalize(skipping_bundle, toy_photos, out=tmp_path / "run", threads=1, on_progress=stop)


def test_threads_that_the_runtime_would_misread_are_refused(skipping_bundle: Path, toy_photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="between 1 and 1024"):
        personalize(skipping_bundle, toy_photos, out=tmp_path / "run", threads=-1)


@pytest.mark.parametrize(("seeds", "steps"), [([], 2), ([-1], 2), ([0], 0)])
def test_what_cannot_be_sampled_is_refused(skipping_bundle: Path, seeds: list[int], steps: int) -> None:
    bundle = open_bundle(skipping_bundle)
    images = render(
        Sessions(bundle, keep=False),
        ["x"],
        seeds=seeds,
        steps=steps,
        guidance=1.0,
        parameters=neutral(bundle.manifest.tuned),
        on_step=lambda *_: None,
    )
    with pytest.raises(SettingError, match="cannot sample"):
        next(images)


@pytest.mark.slow
def test_features_stopped_and_resumed(
    skipping_bundle: Path, edge_run: tuple[Path, Any], toy_photos: Path, tmp_path: Path
) -> None:
    def stop(event: Progress) -> None:
        if event.phase == "features" and event.done == event.total > 0:
            signal.raise_signal(signal.SIGINT)

    out = tmp_path / "run"
    with pytest.raises(Interrupted, match="stopped at features"):
        personalize(skipping_bundle, toy_photos, out=out, threads=1, on_progress=stop)
    personalize(skipping_bundle, toy_photos, out=out, threads=1, resume=True)
    assert (out / LORA).read_bytes() == (edge_run[0] / LORA).read_bytes()


@pytest.mark.slow
def test_class_images_and_larger_batches(tiny_folder: Path, whole_bundle: Path, toy_photos: Path, tmp_path: Path) -> None:
    """From an archive: two photos and two class images a step; five of each run in turns through the same graphs."""
    out = tmp_path / "edge"
    record = personalize(whole_bundle, toy_photos, out=out, threads=1, changes={"steps": 2})
    shutil.copytree(out / "class_images", tmp_path / "torch" / "class_images")
    (tmp_path / "torch" / "job.json").write_text((out / "job.json").read_text())
    expected = personalize_with_torch(
        toy_photos, model=tiny_folder, recipe=recipe_of(record), out=tmp_path / "torch", resume=True
    )
    assert list(record["losses"]) == pytest.approx(list(expected.losses), rel=EDGE_LOSS)
    assert largest_difference(out, tmp_path / "torch") < EDGE_PARAMETER

    runs = {}
    for streaming in (False, True):
        out = tmp_path / f"larger-{streaming}"
        shutil.copytree(tmp_path / "edge" / "class_images", out / "class_images")
        changes = {"steps": 2, "batch_size": 5}
        (out / "job.json").write_text(json.dumps({"fingerprint": _fingerprint(whole_bundle, changes, toy_photos)}))
        runs[streaming] = personalize(
            whole_bundle, toy_photos, out=out, threads=1, changes=changes, streaming=streaming, resume=True
        )
    recipe = recipe_of(runs[False])
    assert recipe.batch_size == 5
    shutil.copytree(tmp_path / "edge" / "class_images", tmp_path / "larger" / "class_images")
    (tmp_path / "larger" / "job.json").write_text((tmp_path / "larger-False" / "job.json").read_text())
    expected = personalize_with_torch(toy_photos, model=tiny_folder, recipe=recipe, out=tmp_path / "larger", resume=True)
    for streaming, found in runs.items():
        assert list(found["losses"]) == pytest.approx(list(expected.losses), rel=EDGE_LOSS)
        assert largest_difference(tmp_path / f"larger-{streaming}", tmp_path / "larger") < EDGE_PARAMETER


def _fingerprint(bundle: Path, changes: dict[str, Any], photos: Path) -> str:
    from pocketune.photos import load_photos
    from pocketune.runfolder import run_fingerprint
    from pocketune_edge.settings import settings_of

    manifest = open_bundle(bundle).manifest
    hashes = [photo.sha256 for photo in load_photos(photos)]
    return run_fingerprint(settings_of(manifest, changes)[1], model=manifest.model.sha256, photos=hashes)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    ("rate", "steps", "message"),
    [(1e30, 6, r"the loss became (nan|inf) at step"), (1e39, 1, r"step 1 led to infinity or NaN")],
)
def test_what_explodes_is_said_and_not_saved(
    rate: float, steps: int, message: str, skipping_bundle: Path, toy_photos: Path, tmp_path: Path
) -> None:
    """Also by the last step, after which no loss is computed."""
    changes = {"learning_rate": rate, "steps": steps, "cache_limit_mb": 100}
    with pytest.raises(RunError, match=message):
        personalize(skipping_bundle, toy_photos, out=tmp_path / "run", threads=1, changes=changes)
    assert not (tmp_path / "run" / LORA).exists()


def test_a_cache_that_is_too_large_is_refused_before_the_work(skipping_bundle: Path, toy_photos: Path, tmp_path: Path) -> None:
    phases = []
    changes = {"steps": 5000, "cache_limit_mb": 1}
    with pytest.raises(PlanError, match="feature cache needs"):
        personalize(
            skipping_bundle,
            toy_photos,
            out=tmp_path / "run",
            threads=1,
            changes=changes,
            on_progress=lambda event: phases.append(event.phase),
        )
    assert set(phases) == {"bundle", "photos"}
    assert not (tmp_path / "run").exists()


def test_bad_input_leaves_nothing_behind(skipping_bundle: Path, toy_photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "empty").mkdir()
    cases: list[tuple[type[PocketuneError], Path, Path, dict[str, Any]]] = [
        (BundleError, tmp_path / "empty", toy_photos, {}),
        (BundleError, tmp_path / "nowhere", toy_photos, {}),
        (PhotoError, skipping_bundle, tmp_path / "empty", {}),
        (SettingError, skipping_bundle, toy_photos, {"steps": 0}),
        (SettingError, skipping_bundle, toy_photos, {"learning_rate": float("nan")}),
        (SettingError, skipping_bundle, toy_photos, {"rank": 8}),
        (PlanError, skipping_bundle, toy_photos, {"steps": 5000, "cache_limit_mb": 1}),
    ]
    for error, bundle, photos, changes in cases:
        with pytest.raises(error):
            personalize(bundle, photos, out=out, threads=1, changes=changes)
        assert not out.exists(), (error, bundle, photos, changes)
