"""The whole job on the tiny model: what a person gets, resume, repeatability, and what bad input leaves behind."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pocketune.train
from pocketune import Progress, Recipe, personalize, step
from pocketune.errors import Interrupted, ModelError, NoEffectError, PhotoError, PlanError, RecipeError, RunError
from pocketune.features import precompute
from pocketune.models.base import DenoiserAdapter, Streams
from pocketune.models.load import open_model
from pocketune.photos import load_made_images
from pocketune.plan.blocks import BlockPlan, Span
from pocketune.sample import generate
from pocketune.sampling.batches import BatchMaker, encode_crops
from pocketune.sampling.draws import draw_samples
from pocketune.step import Batch
from pocketune.train import loss_of
from pocketune.tuning import METHODS
from tests.tiny_models import with_values
from tests.tolerances import SCRIPT_LOSS

LORA = Path("lora") / "pytorch_lora_weights.safetensors"
SCALES: dict[str, object] = {"method": "scales", "weight_bits": 4, "batch_size": 2}


def quick_recipe(**changes: object) -> Recipe:
    settings: dict[str, object] = {
        "instance_prompt": "a photo of sks toy",
        "steps": 4,
        "learning_rate": 1e-2,
        "sample_steps": 2,
        "sample_prompts": ("a photo of sks toy",),
        "checkpoint_every": 2,
    }
    return Recipe.create(**Recipe.relevant(settings | changes))


def test_run_holds_what_was_promised(tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    events: list[Progress] = []
    run = tmp_path / "run"
    record = personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(skip="0-1,5"), out=run, on_progress=events.append)
    assert len(record.losses) == 4
    assert any(record.check.norms.values()) and record.check.image_change > 0
    assert record.plan["feature_cache_bytes"] > 0
    assert (run / "report.html").stat().st_size > 10_000
    assert (run / "run.json").exists()
    assert all((run / pair.before).exists() and (run / pair.after).exists() for pair in record.samples)
    assert {"photos", "text", "latents", "features", "training", "samples"} <= {event.phase for event in events}
    assert set(record.seconds) <= set(record.peaks)

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.load_lora_weights(run / "lora")
    stored = load_file(run / LORA)
    loaded = {name for name, _ in pipeline.transformer.named_parameters() if "lora_" in name}
    assert len(loaded) == len(stored)
    assert record.model == str(tiny_folder)
    assert all(".transformer_blocks." in name for name in stored)
    assert not any(f".transformer_blocks.{block}." in name for block in (0, 1, 5) for name in stored)


def test_equal_seed_gives_equal_bytes_and_leaves_the_global_random_state(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    files = []
    for name in ("a", "b"):
        personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(skip="0-1"), out=tmp_path / name)
        files.append((tmp_path / name / LORA).read_bytes())
    assert files[0] == files[1]
    personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(skip="0-1", seed=1), out=tmp_path / "c")
    assert (tmp_path / "c" / LORA).read_bytes() != files[0]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "changes", [{}, {"gradient": "zeroth_order", "zo_queries": 2}, {"gradient": "mixed", "mix_start": 0.7}, SCALES]
)
def test_interrupted_and_resumed_equals_unbroken(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    recipe = quick_recipe(skip="0-1,5", steps=5, checkpoint_every=100, **changes)
    personalize(toy_photos, model=tiny_folder, recipe=recipe, out=tmp_path / "whole")

    def stop_at_three(event: Progress) -> None:
        if event.phase == "training" and event.done == 3:
            signal.raise_signal(signal.SIGINT)

    broken = tmp_path / "broken"
    with pytest.raises(Interrupted, match="step 3 of 5"):
        personalize(toy_photos, model=tiny_folder, recipe=recipe, out=broken, on_progress=stop_at_three)
    record = personalize(toy_photos, model=tiny_folder, recipe=recipe, out=broken, resume=True)
    assert len(record.losses) == 5
    if "mix_start" in changes:
        assert 0 < record.plan["zeroth_order_steps"] < 5
        assert "Steps by kind" in (broken / "report.html").read_text(encoding="utf-8")
    result = METHODS[recipe.method].result
    assert (broken / result).read_bytes() == (tmp_path / "whole" / result).read_bytes()


@pytest.mark.parametrize("changes", [{}, {"gradient": "zeroth_order"}])
def test_interrupted_inside_an_update_and_resumed_equals_unbroken(
    tiny_folder: Path,
    toy_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
) -> None:
    """Parameters that moved belong to a step that counts: it is not taken again."""
    recipe = quick_recipe(skip="0-3", steps=3, checkpoint_every=100, **changes)
    personalize(toy_photos, model=tiny_folder, recipe=recipe, out=tmp_path / "whole")
    owner, name = (torch.optim.AdamW, "step") if not changes else (pocketune.train, "descend")
    update, calls = getattr(owner, name), []

    def interrupted(*given: object, **named: object) -> None:
        calls.append(None)
        update(*given, **named)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="after step 2 of 3"):
        patched.setattr(owner, name, interrupted)
        personalize(toy_photos, model=tiny_folder, recipe=recipe, out=tmp_path / "broken")
    personalize(toy_photos, model=tiny_folder, recipe=recipe, out=tmp_path / "broken", resume=True)
    assert (tmp_path / "broken" / LORA).read_bytes() == (tmp_path / "whole" / LORA).read_bytes()


def test_prior_preservation_adds_the_loss_of_class_images(tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    """With their prompt and their weight, at the first step, where LoRA is zero; this is computed here from their files."""
    plain, recipe = (
        quick_recipe(skip="0-1", steps=1, **changes)
        for changes in ({}, {"class_prompt": "a photo of a toy", "class_images": 2, "prior_loss_weight": 0.25})
    )
    losses = [
        personalize(toy_photos, model=tiny_folder, recipe=asked, out=tmp_path / f"run{number}").losses[0]
        for number, asked in enumerate((plain, recipe))
    ]
    paths = sorted((tmp_path / "run1" / "class_images").glob("*.png"))
    assert len(paths) == 2
    model, cpu = open_model(tiny_folder), torch.device("cpu")
    images = load_made_images(paths)
    draws = draw_samples(recipe, [image.size for image in images], kind="class")
    make_batch = BatchMaker(
        encode_crops(model.load_vae(device=cpu), {"class": images}, draws, resolution=64, on_crop=lambda *_: None),
        {"class": model.encode_prompts(["a photo of a toy"], device=cpu)["a photo of a toy"]},
        model.scheduler(),
        prior_loss_weight=1.0,
        device=cpu,
        dtype=torch.float32,
    )
    adapter = model.load_denoiser(dtype=torch.float32, device=cpu)
    prior = float(loss_of(adapter, BlockPlan(adapter.block_count), recipe, make_batch(draws)))
    assert losses[1] == pytest.approx(losses[0] + 0.25 * prior, rel=SCRIPT_LOSS)


def test_feature_cache_is_reused(tiny_folder: Path, toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []

    def span_features(adapter: DenoiserAdapter, plan: BlockPlan, batch: Batch) -> dict[Span, Streams]:
        computed.append(plan.describe())
        return step.span_features(adapter, plan, batch)

    monkeypatch.setattr(precompute, "span_features", span_features)
    shared = tmp_path / "shared"
    other_training = {"rank": 8, "learning_rate": 1e-3}
    for name, changes, passes in (
        ("a", {"skip": "0-1"}, 4),
        ("b", {"skip": "0-1"} | other_training, 0),
        ("c", {"skip": "0-2"}, 4),
    ):
        computed.clear()
        personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(**changes), out=tmp_path / name, features=shared)
        assert computed == [changes["skip"]] * passes


def test_a_training_that_changed_nothing_is_no_success(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda _: None)
    with pytest.raises(NoEffectError, match="changed none of"):
        personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(skip="0-3", steps=1), out=tmp_path / "run")


def test_what_is_no_number_is_not_stored(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(optimizer: torch.optim.AdamW) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(RunError, match="became nan at step 1"):
        personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(skip="0-3", steps=1), out=tmp_path / "run")
    assert not (tmp_path / "run" / LORA).exists() and not list((tmp_path / "run").rglob("step-*"))


def test_bad_input_leaves_nothing_behind(tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    text_file = tmp_path / "words.jpg"
    text_file.write_text("not a picture")
    truncated = tmp_path / "half.jpg"
    truncated.write_bytes((toy_photos / "0.jpg").read_bytes()[:800])
    (tmp_path / "empty").mkdir()
    cases: list[tuple[type[Exception], Path, Path, dict[str, object]]] = [
        (PhotoError, tmp_path / "empty", tiny_folder, {}),
        (PhotoError, tmp_path / "nowhere", tiny_folder, {}),
        (PhotoError, text_file, tiny_folder, {}),
        (PhotoError, truncated, tiny_folder, {}),
        (ModelError, toy_photos, tmp_path / "no-model", {}),
        (ModelError, toy_photos, tmp_path / "empty", {}),
        (PlanError, toy_photos, tiny_folder, {"skip": "0-9"}),
        (PlanError, toy_photos, tiny_folder, {"skip": "0-5"}),
        (PlanError, toy_photos, tiny_folder, {"resolution": 72}),
        (RecipeError, toy_photos, tiny_folder, {"lora_targets": ("attn.to_q", "attn.to_Q")}),
        (PlanError, toy_photos, tiny_folder, {"gradient": "mixed", "low_resolution": 64}),
        (PlanError, toy_photos, tiny_folder, {"skip": "0-1", "steps": 2000, "cache_limit_mb": 1}),
    ]
    for error, photos, model, changes in cases:
        with pytest.raises(error):
            personalize(photos, model=model, recipe=quick_recipe(**changes), out=out)
        assert not out.exists(), (error, photos, changes)


@pytest.mark.parametrize("changes", [{"steps": 2000}, {"steps": 4000, "refresh_every": 2000, "gradient": "mixed"}])
def test_a_cache_that_is_too_large_is_refused_before_the_work(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    phases = set()
    recipe = quick_recipe(skip="0-1", cache_limit_mb=1, class_prompt="a toy", class_images=1, **changes)
    with pytest.raises(PlanError, match=r"the feature cache needs .* for 4000 draws"):
        personalize(
            toy_photos,
            model=tiny_folder,
            recipe=recipe,
            out=tmp_path / "run",
            on_progress=lambda event: phases.add(event.phase),
        )
    assert phases <= {"photos"} and not (tmp_path / "run").exists()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("missing", ["scheduler", "text_encoder"])
def test_an_incomplete_model_or_an_impossible_size_is_said(
    tiny_folder: Path, tmp_path: Path, missing: str, streamed: bool
) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "pocket-sd3", copy_function=os.link))
    for resolution in (100, 4096):
        with pytest.raises(PlanError, match="multiple of 16 up to 128"):
            generate(model, ["a toy"], resolution=resolution, streamed=streamed)
    assert open_model(model).source == str(model), "it only bears the name of a built-in model"
    shutil.rmtree(model / missing)
    with pytest.raises(ModelError, match="cannot load"):
        generate(model, ["a toy"], streamed=streamed)


def test_existing_run_and_wrong_resume_are_refused(tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(), out=out)
    with pytest.raises(RunError, match="exists already"):
        personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(), out=out)
    with pytest.raises(RunError, match="another recipe"):
        personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(rank=2), out=out, resume=True)
    other = with_values(tiny_folder, tmp_path / "other", "scheduler/scheduler_config.json", {"shift": 1.0})
    with pytest.raises(RunError, match="another recipe, model or photos"):  # the weights are the same
        personalize(toy_photos, model=other, recipe=quick_recipe(), out=out, resume=True)
    with pytest.raises(RunError, match="no interrupted run"):
        personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(), out=tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_full_disk_is_reported_and_leaves_nothing(tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(RunError, match="No space left"):
            personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(skip="0-1,5", steps=20), out=disk / "run")
        assert not (disk / "run").exists()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
