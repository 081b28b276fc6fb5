"""Draws follow from the seed alone, batches from the draws."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image

from pocketune.models.base import Prompt
from pocketune.models.load import ModelFolder
from pocketune.recipe import Recipe
from pocketune.sampling.batches import BatchMaker, encode_crops
from pocketune.sampling.draws import centre_crop, cut, draw_samples, noise_for, step_draws, timestep_density
from pocketune.sampling.philox import Stream, normals, words

CPU = torch.device("cpu")


def recipe(**changes: object) -> Recipe:
    return Recipe.create(**({"instance_prompt": "a photo of sks toy", "steps": 50, "batch_size": 2} | changes))


def test_equal_seeds_equal_draws_and_longer_runs_begin_alike() -> None:
    sizes = [(10, 20)] * 3
    short, long = draw_samples(recipe(), sizes, kind="instance"), draw_samples(recipe(steps=80), sizes, kind="instance")
    assert len(short) == 100
    assert long[:100] == short
    assert draw_samples(recipe(seed=1), sizes, kind="instance") != short
    assert {draw.noise_seed for draw in short}.isdisjoint(
        draw.noise_seed for draw in draw_samples(recipe(), sizes, kind="class")
    )


def test_every_photo_comes_once_a_round() -> None:
    draws = draw_samples(recipe(), [(10, 20)] * 5, kind="instance")
    for start in range(0, 100, 5):
        assert {draw.image for draw in draws[start : start + 5]} == set(range(5))


def test_a_cache_holds_draws_by_number() -> None:
    photo = draw_samples(recipe(), [(10, 20)], kind="instance")[3]
    of_class = replace(photo, kind="class")
    assert (photo.cache_number, of_class.cache_number) == (6, 7)
    assert (replace(photo, low=True).cache_number, replace(of_class, low=True).cache_number) == (-7, -8)


def test_timesteps_follow_the_logit_normal_density() -> None:
    indices = [draw.timestep_index for draw in draw_samples(recipe(steps=1000), [(8, 8)], kind="instance")]
    u = (np.array(indices) + 0.5) / 1000
    logits = np.log(u / (1 - u))
    assert abs(logits.mean()) < 0.08 and abs(logits.std() - 1) < 0.06


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "none"])
def test_density_equals_the_scripts(scheme: str) -> None:
    asked = recipe(weighting_scheme=scheme, **({"logit_mean": 0.3, "logit_std": 1.7} if scheme == "logit_normal" else {}))
    for seed in range(20):
        expected = compute_density_for_timestep_sampling(
            scheme, 1, 0.3, 1.7, asked.mode_scale, generator=torch.Generator().manual_seed(seed)
        )
        normal = torch.randn(1, generator=torch.Generator().manual_seed(seed)).item()
        uniform = torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()
        assert timestep_density(asked, uniform=uniform, normal=normal) == pytest.approx(expected.item(), abs=1e-6)


def philox_block(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x64-10 as the paper writes it."""
    mask = 2**64 - 1
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & mask, (p0 >> 64) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c0, c1, c2, c3


def test_random_words_are_those_of_the_paper() -> None:
    blocks = [philox_block((7, Stream.NOISE), (n, 3, 11, 0)) for n in (1, 2)]
    assert words(7, Stream.NOISE, 8, purpose=3, index=11).tolist() == [*blocks[0], *blocks[1]]


def test_draws_never_change() -> None:
    """Other runtimes make these numbers again, so a change would part them from checkpoints in the field."""
    assert normals(7, Stream.NOISE, (3,)).tolist() == pytest.approx([0.81827831, -0.62558916, -1.15657666], abs=1e-8)
    draw = draw_samples(recipe(), [(8, 8)] * 3, kind="instance")[5]
    assert (draw.image, draw.timestep_index, draw.noise_seed) == (0, 351, 6851612954928451372)


def test_noise_is_standard_normal_and_posterior_noise_is_other_noise() -> None:
    noise, posterior = noise_for(draw_samples(recipe(), [(8, 8)], kind="instance")[0], (1, 16, 64, 65))
    for values in (noise, posterior):
        assert values.dtype == np.float32 and values.shape == (1, 16, 64, 65)
        assert abs(values.mean()) < 0.015 and abs(values.std() - 1) < 0.01 and abs((values**4).mean() - 3) < 0.1
    assert abs((noise * posterior).mean()) < 0.015
    assert abs((noise[..., :-1] * noise[..., 1:]).mean()) < 0.015


def test_a_bounded_pool_is_replayed_in_order() -> None:
    bounded = recipe(draws=6)
    draws = draw_samples(bounded, [(8, 8)], kind="instance")
    assert [draw.index for step in step_draws(bounded, draws) for draw in step][:8] == [0, 1, 2, 3, 4, 5, 0, 1]


def test_cut_is_the_centred_square() -> None:
    image = Image.new("RGB", (30, 20), (255, 0, 0))
    image.paste((0, 0, 255), (5, 0, 25, 20))
    pixels = cut(image, centre_crop(image.size), resolution=16)
    assert pixels.shape == (3, 16, 16)
    inner = pixels[:, :, 1:-1]  # as in the script, pixels beside the crop bleed into its edge
    assert inner[2].min() == 1.0 and inner[0].max() == -1.0


@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
def test_batches_replay_exactly_and_weigh_both_kinds(tiny_model: ModelFolder, toy_photos: Path, prior_weight: float) -> None:
    images = {"instance": [Image.open(path) for path in sorted(toy_photos.iterdir())], "class": [Image.new("RGB", (64, 64))]}
    photos = draw_samples(recipe(), [image.size for image in images["instance"]], kind="instance")
    others = draw_samples(recipe(), [(64, 64)], kind="class")
    vae = tiny_model.load_vae(device=CPU)
    posteriors = encode_crops(vae, images, (*photos, *others), resolution=64, on_crop=lambda *_: None)
    assert len(posteriors) == 4
    prompt = Prompt(hidden=torch.zeros(1, 20, 128), pooled=torch.zeros(1, 128))
    make = BatchMaker(
        posteriors,
        {"instance": prompt, "class": prompt},
        tiny_model.scheduler(),
        prior_loss_weight=prior_weight,
        device=CPU,
        dtype=torch.float32,
    )
    draws = step_draws(recipe(), photos, others)[3]
    first, again = make(draws), make(draws)
    assert torch.equal(first.noisy, again.noisy)
    assert first.loss_weights.tolist() == [0.5, 0.5, prior_weight / 2, prior_weight / 2]
    alone = make(draws[:1])
    assert torch.equal(alone.noise[0], first.noise[0])
    scheduler = tiny_model.scheduler()
    assert torch.equal(first.sigmas, scheduler.sigmas[[draw.timestep_index for draw in draws]])
