"""Dynamic patches: sizes follow the noise, crops lie in the photo, and no patches is what it was."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pocketune import Progress, Recipe, personalize
from pocketune.errors import Interrupted, PlanError, RecipeError
from pocketune.models.load import ModelFolder
from pocketune.sampling.batches import NoiseSchedule
from pocketune.sampling.draws import Crop, centre_crop, draw_samples
from pocketune.sampling.patches import Patches, patches_of
from tests.reliability.test_job import LORA, quick_recipe

NOISE = np.arange(1000, 0, -1) / 1000
SCHEMES = ("dynamic", "resize", "high-to-low", "random")


def recipe(**changes: object) -> Recipe:
    return Recipe.create(**({"instance_prompt": "a photo of sks toy", "steps": 60} | changes))


def patches(scheme: str, *, smallest: int = 64, largest: int = 128, reference: int = 128, unit: int = 16) -> Patches:
    asked = recipe(patches=scheme, patch_min=smallest, **({} if scheme == "resize" else {"patch_max": largest}))
    return patches_of(asked, resolution=reference, unit=unit, noise=NOISE)


def test_none_is_what_it_was() -> None:
    sizes = [(100, 80), (60, 90)]
    off = patches_of(recipe(), resolution=128, unit=16, noise=NOISE)
    assert draw_samples(recipe(), sizes, kind="instance", choose_crop=off) == draw_samples(recipe(), sizes, kind="instance")
    assert off.smallest == 128


def test_patches_change_nothing_but_the_crop() -> None:
    sizes = [(100, 80), (60, 90)]
    plain = draw_samples(recipe(), sizes, kind="instance")
    for scheme in SCHEMES:
        draws = draw_samples(recipe(), sizes, kind="instance", choose_crop=patches(scheme))
        assert [vars(d) | {"crop": None} for d in draws] == [vars(d) | {"crop": None} for d in plain]
    longer = draw_samples(recipe(steps=90), sizes, kind="instance", choose_crop=patches("dynamic"))
    assert longer[:60] == draw_samples(recipe(), sizes, kind="instance", choose_crop=patches("dynamic"))


def test_crops_never_change() -> None:
    """Other runtimes cut the same crops."""
    draw = draw_samples(recipe(seed=7), [(200, 160)], kind="instance", choose_crop=patches("dynamic"))[3]
    assert (draw.timestep_index, draw.crop) == (448, Crop(left=21, top=32, side=120))


def test_sizes_go_from_the_smallest_to_the_largest_with_the_noise() -> None:
    for scheme, order in (("dynamic", 1), ("high-to-low", -1)):
        sides = [patches(scheme).side(share, uniform=0.5) for share in np.linspace(0, 1, 101)]
        assert sides[::order] == sorted(sides)
        assert set(sides) == {64, 80, 96, 112, 128}
    # s(t) = s_min + t/T (s_max - s_min), to the nearest multiple of the unit
    assert all(abs(patches("dynamic").side(t, uniform=0) - (64 + t * 64)) <= 8 for t in np.linspace(0, 1, 101))


def test_random_sizes_do_not_follow_the_noise() -> None:
    found = patches("random")
    uniforms = np.linspace(0, 1, 1000, endpoint=False)
    counts = np.bincount([found.side(0.3, uniform=float(u)) for u in uniforms], minlength=129)
    assert {int(side) for side in np.flatnonzero(counts)} == {64, 80, 96, 112, 128}
    assert counts.max() - counts[counts > 0].min() <= 1
    assert found.side(0.1, uniform=0.6) == found.side(0.9, uniform=0.6)


def test_resize_takes_whole_photos_at_the_small_size() -> None:
    small = patches("resize")
    assert small.smallest == 64
    assert small((100, 80), 500, np.array([0.9, 0.9, 0.9])) == centre_crop((100, 80))


@given(
    st.sampled_from(SCHEMES),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(0, 999),
    st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3),
)
def test_crops_lie_in_the_centred_square(
    scheme: str, width: int, height: int, index: int, numbers: tuple[float, float, float]
) -> None:
    square = centre_crop((width, height))
    crop = patches(scheme)((width, height), index, np.array(numbers))
    assert 1 <= crop.side <= square.side
    assert square.left <= crop.left <= square.left + square.side - crop.side
    assert square.top <= crop.top <= square.top + square.side - crop.side
    if scheme == "dynamic" and index == 0:
        assert crop == square


def test_places_are_uniform() -> None:
    draws = draw_samples(recipe(steps=2000), [(128, 128)], kind="instance", choose_crop=patches("dynamic"))
    places = np.array([(d.crop.left, d.crop.top) / np.array(max(1, 128 - d.crop.side)) for d in draws if d.crop.side < 128])
    assert np.abs(places.mean(0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.06


def test_noise_shares_are_those_of_the_schedule(tiny_model: ModelFolder) -> None:
    shares = NoiseSchedule.of(tiny_model.scheduler()).shares()
    assert shares[0] == 1.0 and shares.shape == (1000,) and (np.diff(shares) < 0).all()
    assert shares[500] > 0.7  # this schedule is shifted towards noise, and patches follow t, not the index


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"patch_min": 24}, "patch_min 24 does not fit: expected a multiple of 16"),
        ({"patch_min": 128}, "nothing between"),
        ({"patch_max": 144}, "patch_max 144 does not fit"),
        ({"patch_min": 96, "patch_max": 64}, "nothing between"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        patches_of(recipe(patches="dynamic", **changes), resolution=128, unit=16, noise=NOISE)


def test_sizes_without_patches_are_refused() -> None:
    with pytest.raises(RecipeError, match="there are none"):
        recipe(patch_min=64)
    with pytest.raises(RecipeError, match="no largest patch"):
        recipe(patches="resize", patch_max=128)


def test_training_on_patches_resumes_and_samples_at_the_full_size(tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    asked = quick_recipe(patches="dynamic", skip="0-1,5", checkpoint_every=100, class_prompt="a toy", class_images=1)
    record = personalize(toy_photos, model=tiny_folder, recipe=asked, out=tmp_path / "whole")
    assert record.plan["resolution"] == 32
    assert record.plan["patches"].startswith("32 to 64 pixels, larger at more noise")
    assert Image.open(tmp_path / "whole" / record.samples[0].after).size == (64, 64)
    assert Image.open(tmp_path / "whole" / "class_images" / "000.png").size == (64, 64)
    # 2 x 2 image tokens, and 20 text tokens behind the first span alone
    assert 0 < record.plan["feature_cache_bytes"] - 4 * (2 * 4 + 20 + 4) * 32 * 4 < 20_000

    def stop_at_two(event: Progress) -> None:
        if event.phase == "training" and event.done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="step 2 of 4"):
        personalize(toy_photos, model=tiny_folder, recipe=asked, out=tmp_path / "broken", on_progress=stop_at_two)
    personalize(toy_photos, model=tiny_folder, recipe=asked, out=tmp_path / "broken", resume=True)
    assert (tmp_path / "broken" / LORA).read_bytes() == (tmp_path / "whole" / LORA).read_bytes()


def test_global_random_state_is_untouched() -> None:
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    draw_samples(recipe(), [(9, 9)], kind="instance", choose_crop=patches("random"))
    assert np.array_equal(before, np.random.get_state()[1]) and torch.equal(torch_before, torch.get_rng_state())  # noqa: NPY002
