"""The pool of cached residuals: what is stored, how well, for which runs of blocks, and how it is refreshed."""

import json
import math
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from pocketune import Progress, Recipe, personalize
from pocketune.budget.inputs import text_tokens
from pocketune.errors import Interrupted, RecipeError
from pocketune.features import precompute as passes
from pocketune.features import shards
from pocketune.features.cache import FeatureCache
from pocketune.features.precompute import cache_bytes, precompute
from pocketune.features.shards import remove_other_caches
from pocketune.features.storage import pack, stored_bytes, unpack
from pocketune.memory import MemoryLog, read_memory
from pocketune.methods.lora import add_lora
from pocketune.models.base import Prompt, Streams, denoise
from pocketune.models.load import ModelFolder
from pocketune.phases.features import features_key
from pocketune.phases.state import Job
from pocketune.plan.blocks import BlockPlan, Span, parse_plan, skip_ends
from pocketune.progress import ignore
from pocketune.sampling.draws import Draw, draw_samples, refresh_periods, step_draws
from pocketune.step import Batch, predict, span_features
from pocketune.watch import Watch
from tests.reliability.test_job import LORA, quick_recipe
from tests.tiny_models import with_values

CPU = torch.device("cpu")
SHAPES = ((1, 20, 32), (1, 8, 5, 7))


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_errs_by_half_a_level_of_its_token(shape: tuple[int, ...]) -> None:
    stream = normal(shape)
    axis = 1 if len(shape) == 4 else 2
    stream.select(axis, 3).mul_(50)  # an outlying channel, as residual streams have
    stream[:, :2] = 0
    if len(shape) == 4:
        stream[..., 0, 0] = 0
    stored = pack("a", stream, torch.int8)
    assert stored["a"].dtype == torch.int8 and stored["a"].shape == shape
    found = unpack("a", stored)
    half_level = stream.abs().amax(dim=axis, keepdim=True) / 127 / 2
    assert ((found - stream).abs() <= half_level * (1 + 1e-5)).all()
    assert (found[stream == 0] == 0).all()
    assert found.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_stored_bytes_are_those_of_the_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    stored = pack("a", normal(shape), dtype)
    assert stored_bytes(shape, dtype) == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize(("dtype", "bounds"), [("float32", (0, 0)), ("bfloat16", (5e-4, 3e-3)), ("int8", (3e-3, 1e-2))])
def test_cache_measures_what_storing_changes(dtype: str, bounds: tuple[float, float], tmp_path: Path) -> None:
    span = Span(2, 4, skipped=True)
    streams = {draw: {span: (normal((1, 9, 32), draw), normal((1, 5, 32), 100 + draw))} for draw in range(4)}
    for half in ((0, 1), (2, 3)):  # the second time the cache is opened anew, as after a stop
        cache = FeatureCache(tmp_path / "c", spans=[span], dtype=getattr(torch, dtype))
        for draw in half:
            cache.put(draw, streams[draw])
            assert draw in cache
        cache.flush()
    found = FeatureCache(tmp_path / "c", spans=[span], dtype=getattr(torch, dtype))
    squared_error = squared = 0.0
    for draw in range(4):
        got = found.get([draw], device=CPU, dtype=torch.float32)[span]
        for stream, whole in zip(got, streams[draw][span], strict=True):
            squared_error += float((stream - whole).double().square().sum())
            squared += float(whole.double().square().sum())
    assert found.relative_error == pytest.approx(math.sqrt(squared_error / squared), rel=1e-6)
    assert bounds[0] <= found.relative_error <= bounds[1]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_each_draw_is_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Of a pool that is no multiple of a batch, by a pass that stops before a put, also in the middle of a batch."""
    span, puts = Span(2, 4, skipped=True), 0
    recipe = Recipe.create(instance_prompt="x", steps=3, batch_size=2, draws=3)
    batches = step_draws(recipe, draw_samples(recipe, [(9, 9)], kind="instance"))
    assert [[draw.index for draw in draws] for draws in batches] == [[0, 1], [2, 0], [1, 2]]

    def rows(draws: Sequence[Draw]) -> dict[Span, Streams]:
        return {span: (torch.cat([normal((1, 9, 4), draw.index) for draw in draws]),)}

    class Stopping(FeatureCache):
        def put(self, draw: int, features: dict[Span, Streams]) -> None:
            nonlocal puts
            if puts == stop:
                raise KeyboardInterrupt
            puts += 1
            super().put(draw, features)

    def fill(kind: type[FeatureCache]) -> FeatureCache:
        cache = kind(tmp_path / "c", spans=[span], dtype=torch.int8)
        precompute(None, BlockPlan(6), batches, list, cache, on_sample=lambda *_: None)
        return cache

    monkeypatch.setattr(shards, "SHARD_BYTES", 1)  # each draw is a shard
    monkeypatch.setattr(passes, "span_features", lambda _, __, draws: rows(draws))
    with suppress(KeyboardInterrupt):
        fill(Stopping)
    fill(FeatureCache)
    cache = FeatureCache(tmp_path / "c", spans=[span], dtype=torch.int8)
    once = FeatureCache(tmp_path / "once", spans=[span], dtype=torch.int8)
    for draw in (*batches[0], batches[1][0]):
        once.put(2 * draw.index, rows([draw]))
    once.flush()
    assert cache.relative_error == pytest.approx(once.relative_error) and cache.size_bytes == once.size_bytes
    found, expected = (one.get([0, 2, 4], device=CPU, dtype=torch.float32)[span][0] for one in (cache, once))
    assert torch.equal(found, expected)


def test_reading_a_cache_does_not_bring_it_into_memory(tmp_path: Path) -> None:
    span, width, draws = Span(2, 4, skipped=True), 250_000, 60  # 60 MB in four shards
    cache = FeatureCache(tmp_path / "c", spans=[span], dtype=torch.float32)
    for draw in range(draws):
        cache.put(draw, {span: (torch.ones(1, 1, width),)})
    cache.flush()
    cache.get([0], device=CPU, dtype=torch.float32)  # brings in the code that reads
    before = read_memory()
    if not before.file_bytes:
        pytest.skip("this system does not tell mapped files apart")
    for draw in range(draws):
        cache.get([draw], device=CPU, dtype=torch.float32)
    assert read_memory().file_bytes - before.file_bytes < cache.size_bytes / 10


def test_caches_have_names_of_all_that_features_follow_from(tiny_model: ModelFolder, tmp_path: Path) -> None:
    """Runs that share a folder may differ in how class images were made, or in how the VAE saw them."""

    def name(pixel: int, **values: object) -> str:
        recipe = quick_recipe(skip="0-1", class_prompt="a toy", class_images=1, **values)
        job = Job(recipe, tiny_model, tmp_path, CPU, Watch(MemoryLog(), ignore))
        return features_key(job, parse_plan("0-1", 6), [], [], [Image.new("RGB", (4, 4), (pixel, 0, 0))])

    assert name(0) == name(0, learning_rate=0.5)
    assert len({name(0), name(1), name(0, vae_tile=64), name(0, cache_dtype="int8")}) == 4


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("scheduler/scheduler_config.json", {"shift": 1.0}),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 5}),
        ("text_encoder/config.json", {"eos_token_id": 5}),
    ],
)
def test_the_same_weights_used_otherwise_have_caches_of_their_own(
    tiny_model: ModelFolder, tmp_path: Path, file: str, values: dict[str, object]
) -> None:
    """Packed copies and measured splits are of the weights alone, and stay valid."""
    models = [ModelFolder("m", with_values(tiny_model.path, tmp_path / str(len(new)), file, new)) for new in ({}, values)]
    jobs = [Job(quick_recipe(), model, tmp_path, CPU, Watch(MemoryLog(), ignore)) for model in models]
    names = [features_key(job, parse_plan("0-1", 6), [], [], []) for job in jobs]
    assert names[0] != names[1]
    assert {model.fingerprint() for model in models} == {tiny_model.fingerprint()}


def test_other_caches_are_removed(tmp_path: Path) -> None:
    for name in ("old", "half", "keep"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-0000.safetensors").write_bytes(b"x")
    (tmp_path / "old" / "index.json").write_text("{}")
    remove_other_caches(tmp_path, keep="keep")
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]
    remove_other_caches(tmp_path / "nowhere", keep="keep")


def test_pools_follow_one_another_and_are_replayed_within() -> None:
    recipe = Recipe.create(instance_prompt="x", steps=8, batch_size=2, draws=3, refresh_every=3)
    draws = draw_samples(recipe, [(9, 9)], kind="instance")
    assert [len(period) for period in refresh_periods(recipe)] == [3, 3, 2]
    steps = [[draw.index for draw in step] for step in step_draws(recipe, draws)]
    assert steps == [[0, 1], [2, 0], [1, 2], [3, 4], [5, 3], [4, 5], [6, 7], [8, 6]]
    assert len({draw.noise_seed for draw in draws}) == 9


def test_refreshing_a_whole_pool_draws_what_one_pool_would() -> None:
    plain = Recipe.create(instance_prompt="x", skip="0", steps=8, batch_size=2)
    refreshed = plain.model_copy(update={"refresh_every": 3})
    draws = [draw_samples(recipe, [(9, 9)] * 3, kind="instance") for recipe in (plain, refreshed)]
    assert draws[0] == draws[1]
    assert step_draws(plain, draws[0], draws[0]) == step_draws(refreshed, draws[1], draws[1])


def test_refreshed_features_train_the_same_and_take_less_disk(tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    """The first and last run of blocks, with every residual recomputed; equal bytes, one pool on disk at a time."""
    asked = quick_recipe(skip="0-1,5", steps=5, class_prompt="a toy", class_images=1, checkpoint_every=100)
    whole = personalize(toy_photos, model=tiny_folder, recipe=asked, out=tmp_path / "whole")
    folders: set[int] = set()

    def count(event: Progress) -> None:
        if event.phase in ("features", "training"):
            folders.add(len(list((tmp_path / "parts" / "features").glob("*/"))))

    parts = personalize(
        toy_photos,
        model=tiny_folder,
        recipe=asked.model_copy(update={"refresh_every": 2}),
        out=tmp_path / "parts",
        on_progress=count,
    )
    assert (tmp_path / "parts" / LORA).read_bytes() == (tmp_path / "whole" / LORA).read_bytes()
    assert parts.losses == whole.losses
    assert max(folders) == 1
    assert parts.plan["feature_pools"] == 3
    assert parts.plan["feature_cache_bytes"] < 0.5 * whole.plan["feature_cache_bytes"]


def test_the_error_of_refreshed_features_is_that_of_the_worst_pool(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[float] = []

    def falling(_: FeatureCache) -> float:
        errors.append(0.5 / (1 + len(errors)))
        return errors[-1]

    monkeypatch.setattr(FeatureCache, "relative_error", property(falling))
    asked = quick_recipe(skip="0-1", steps=3, refresh_every=1, cache_dtype="int8")
    record = personalize(toy_photos, model=tiny_folder, recipe=asked, out=tmp_path / "run")
    assert len(errors) == 3
    assert record.plan["feature_cache_error"] == max(errors) == errors[0]


@pytest.mark.parametrize(
    ("phase", "nth"),
    [
        ("training", 3),
        pytest.param("features", 2, marks=pytest.mark.slow),
        pytest.param("training", 2, marks=pytest.mark.slow),
    ],
)
def test_stopped_across_a_refresh_equals_unbroken(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path, phase: str, nth: int
) -> None:
    asked = quick_recipe(
        skip="0-1,5", steps=4, draws=1, refresh_every=2, cache_dtype="int8", patches="dynamic", checkpoint_every=100
    )
    whole = personalize(toy_photos, model=tiny_folder, recipe=asked, out=tmp_path / "whole")
    assert 0.0 < whole.plan["feature_cache_error"] < 0.02
    seen = 0

    def stop(event: Progress) -> None:
        nonlocal seen
        seen += event.phase == phase and event.done > 0
        if seen == nth:
            seen += 1
            signal.raise_signal(signal.SIGINT)

    broken = tmp_path / "broken"
    with pytest.raises(Interrupted):
        personalize(toy_photos, model=tiny_folder, recipe=asked, out=broken, on_progress=stop)
    personalize(toy_photos, model=tiny_folder, recipe=asked, out=broken, resume=True)
    assert (broken / LORA).read_bytes() == (tmp_path / "whole" / LORA).read_bytes()
    record = json.loads((broken / "run.json").read_text())
    assert record["plan"]["feature_pools"] == 2


def test_shared_features_are_not_removed_under_other_runs(tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot share"):
        personalize(
            toy_photos, model=tiny_folder, recipe=quick_recipe(skip="0", refresh_every=2), out=tmp_path / "r", features=tmp_path
        )


def joint_batch(model: ModelFolder) -> Batch:
    prompt = model.encode_prompts(["a photo of sks toy"], device=CPU)["a photo of sks toy"]
    latents = model.sizes.channels
    return Batch(
        latents=normal((1, latents, 8, 8)),
        noise=normal((1, latents, 8, 8), 1),
        timesteps=torch.tensor([500.0]),
        sigmas=torch.tensor([0.5]),
        prompt=Prompt(hidden=prompt.hidden, pooled=prompt.pooled),
        loss_weights=torch.ones(1),
    )


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("text", ["0-1,4-5", "0-3,5", "0-1,3-4"])
def test_first_and_last_runs_carry_both_streams_through_the_cache(
    tiny_model: ModelFolder, tiny_pipelines: Callable[[str], ModelFolder], tmp_path: Path, name: str, text: str
) -> None:
    """FLUX's runs cross from double to single blocks; the last block of both ends the text stream."""
    model = tiny_model if name == "sd3" else tiny_pipelines(name)
    adapter = model.load_denoiser(dtype=torch.float32, device=CPU)
    plan = parse_plan(text, 6)
    batch = joint_batch(model)
    features = span_features(adapter, plan, batch)
    prefix, last = plan.skipped_spans
    assert len(features[prefix]) == 2
    assert len(features[last]) == (1 if last.stop == 6 else 2)

    cache = FeatureCache(tmp_path / "c", spans=plan.skipped_spans, dtype=torch.float32)
    cache.put(0, features)
    cache.flush()
    stored = cache.get([0], device=CPU, dtype=torch.float32)
    assert all(torch.equal(a, b) for span in features for a, b in zip(features[span], stored[span], strict=True))
    image, _ = features[prefix]
    needed = cache_bytes(
        plan, draws=1, image_tokens=image.shape[1], text_tokens=text_tokens(model), width=model.width, dtype=torch.float32
    )
    assert needed == sum(stream.nbytes for streams in stored.values() for stream in streams)

    batch = Batch(**{**vars(batch), "features": stored})
    with torch.no_grad():
        whole = denoise(adapter, batch.noisy, batch.timesteps, batch.prompt)
        torch.testing.assert_close(predict(adapter, plan, batch), whole, rtol=1e-4, atol=1e-5)
    partial = model.load_denoiser(dtype=torch.float32, device=CPU, blocks=plan.kept)
    parameters = add_lora(partial, blocks=plan.kept, rank=2)
    gradients = torch.autograd.grad(predict(partial, plan, batch).square().mean(), list(parameters.values()), allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in gradients)


def test_the_papers_splits_are_first_and_last_runs() -> None:
    plan = BlockPlan(57, skip_ends(57, 19, 10))
    assert [(span.start, span.stop) for span in plan.skipped_spans] == [(0, 19), (47, 57)]
