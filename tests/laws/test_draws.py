"""Draws follow from the seed alone, batches from the draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pocketune.models.base import Prompt
from pocketune.models.load import ModelFolder
from pocketune.recipe import Recipe
from pocketune.sampling.batches import BatchMaker, encode_crops
from pocketune.sampling.draws import centre_crop, cut, draw_samples
from pocketune.train import step_draws

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


def test_timesteps_follow_the_logit_normal_density() -> None:
    indices = [draw.timestep_index for draw in draw_samples(recipe(steps=1000), [(8, 8)], kind="instance")]
    u = (np.array(indices) + 0.5) / 1000
    logits = np.log(u / (1 - u))
    assert abs(logits.mean()) < 0.08 and abs(logits.std() - 1) < 0.06


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
