"""Which steps of a mixed training are of zeroth order: plain data, by a probability that rises with noise and progress."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pocketune.models.base import Prompt
from pocketune.models.load import ModelFolder
from pocketune.recipe import Recipe
from pocketune.sampling.batches import BatchMaker, encode_crops
from pocketune.sampling.choices import choose, lower, zeroth_order_probability
from pocketune.sampling.draws import draw_samples, step_draws

NOISE = 1.0 - np.arange(1000) / 1000


def recipe(**changes: object) -> Recipe:
    settings = {"instance_prompt": "a photo of sks toy", "steps": 400, "batch_size": 2, "gradient": "mixed"}
    return Recipe.create(**(settings | changes))


def batches(asked: Recipe) -> list[tuple]:
    return step_draws(asked, draw_samples(asked, [(64, 64)] * 3, kind="instance"))


def test_probability_rises_with_noise_and_with_progress() -> None:
    levels = np.linspace(0, 1, 21)
    table = np.array([[zeroth_order_probability(recipe(), noise=t, progress=u) for t in levels] for u in levels])
    assert (np.diff(table, axis=0) > 0).all() and (np.diff(table, axis=1) > 0).all()
    assert table.min() >= 0 and table.max() <= recipe().mix_largest


def test_probability_is_half_of_the_largest_at_the_middle() -> None:
    asked = recipe(mix_start=0.8, mix_end=0.2, mix_largest=0.6)
    for progress, middle in ((0.0, 0.8), (0.5, 0.5), (1.0, 0.2)):
        assert zeroth_order_probability(asked, noise=middle, progress=progress) == pytest.approx(0.3)


def test_choices_follow_from_the_seed_alone_and_keep_to_the_probability() -> None:
    asked = recipe(steps=2000)
    found = choose(asked, batches(asked), NOISE)
    assert found == choose(asked, batches(asked), NOISE)
    assert found != choose(recipe(steps=2000, seed=1), batches(asked), NOISE)
    expected, taken = (np.array([getattr(c, name) for c in found], float) for name in ("probability", "zeroth_order"))
    assert abs(taken.mean() - expected.mean()) < 0.03
    assert taken[1000:].mean() > taken[:1000].mean() + 0.2


def test_backpropagated_steps_alone_are_at_low_resolution() -> None:
    asked = recipe()
    plain = batches(asked)
    choices = choose(asked, plain, NOISE)
    for draws, before, choice in zip(lower(plain, choices), plain, choices, strict=True):
        assert all(draw.low is not choice.zeroth_order for draw in draws)
        assert [draw.noise_seed for draw in draws] == [draw.noise_seed for draw in before]


def test_never_and_always() -> None:
    asked = recipe(mix_largest=0.0)
    assert not any(choice.zeroth_order for choice in choose(asked, batches(asked), NOISE))
    asked = recipe(mix_start=-9, mix_end=-9)
    assert all(choice.zeroth_order for choice in choose(asked, batches(asked), NOISE))


def test_one_draw_at_two_resolutions(tiny_model: ModelFolder, toy_photos: Path) -> None:
    """The same photo, timestep and prompt; latents of half the side, which are those of a training at that resolution."""
    images = {"instance": [Image.open(sorted(toy_photos.iterdir())[0])]}
    asked = recipe(steps=2, batch_size=1)
    high, low = lower(batches(asked)[:1] * 2, [choice(True), choice(False)])
    high, low = ((draws[0],) for draws in (high, low))
    vae = tiny_model.load_vae(device=torch.device("cpu"))
    posteriors = encode_crops(vae, images, (*high, *low), resolution=64, low_resolution=32, on_crop=lambda *_: None)
    make = maker(posteriors, tiny_model)
    assert make(high).latents.shape == (1, 4, 8, 8)
    small = encode_crops(vae, images, high, resolution=32, on_crop=lambda *_: None)
    assert torch.equal(make(low).latents, maker(small, tiny_model)(high).latents)
    assert torch.equal(make(low).timesteps, make(high).timesteps)


def choice(zeroth_order: bool):
    from pocketune.sampling.choices import Choice

    return Choice(noise=0.5, probability=0.5, zeroth_order=zeroth_order)


def maker(posteriors, model: ModelFolder) -> BatchMaker:
    prompt = Prompt(hidden=torch.zeros(1, 20, 128), pooled=torch.zeros(1, 128))
    return BatchMaker(
        posteriors,
        {"instance": prompt},
        model.scheduler(),
        prior_loss_weight=1.0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
