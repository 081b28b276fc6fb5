"""Places: a crop's tokens get the positions that they have on the canvas, and a whole canvas is what it was, bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pocketune import Recipe, personalize
from pocketune.errors import PlanError, RecipeError
from pocketune.models.base import DenoiserAdapter, Prompt, denoise
from pocketune.models.load import ModelFolder
from pocketune.models.positions import token_places
from pocketune.models.registry import FAMILIES
from pocketune.sampling.batches import BatchMaker, Posterior
from pocketune.sampling.draws import Crop, centre_crop, draw_samples
from pocketune.sampling.places import canvas_of, place_of
from tests.reliability.test_job import quick_recipe
from tests.tiny_models import TEXT_WIDTH

CPU = torch.device("cpu")
PLACED = ("sd3", "pixart", "flux")
SIDE, PATCH, CROP = 8, 2, 4  # latent pixels: the canvas, a token's side, and a crop of it
Pipelines = Callable[[str], ModelFolder]


def recipe(**changes: object) -> Recipe:
    return Recipe.create(**({"instance_prompt": "a photo of sks toy"} | changes))


def denoiser(name: str, pipelines: Pipelines, tiny_model: ModelFolder, *, side: int | None = SIDE) -> DenoiserAdapter:
    folder = tiny_model if name == "sd3" else pipelines(name)
    return folder.load_denoiser(dtype=torch.float32, device=CPU, latent_side=side)


def inputs(name: str, side: int, *, places: tuple[tuple[float, ...], ...]) -> tuple[Tensor, Tensor, Prompt]:
    g = torch.Generator().manual_seed(3)
    batch = len(places)
    prompt = Prompt(
        hidden=torch.randn(batch, 5, 128 if name == "sd3" else TEXT_WIDTH, generator=g),
        pooled=None if name == "pixart" else torch.randn(batch, 128 if name == "sd3" else 64, generator=g),
        mask=torch.ones(batch, 5) if name == "pixart" else None,
        place=torch.tensor(places),
    )
    return torch.randn(batch, 4, side, side, generator=g), torch.full((batch,), 500.0), prompt


@given(st.integers(16, 4000), st.integers(16, 4000), st.data())
def test_a_crop_lies_on_the_canvas(width: int, height: int, data: st.DataObject) -> None:
    square = centre_crop((width, height))
    side = data.draw(st.integers(1, square.side))
    left, top = (data.draw(st.integers(start, start + square.side - side)) for start in (square.left, square.top))
    place = place_of((width, height), Crop(left, top, side), canvas=64)
    assert min(place) >= 0
    assert max(place.top, place.left) + place.side <= 64 * (1 + 1e-9)
    assert place_of((width, height), square, canvas=64) == (0, 0, 64, 64)


def test_tokens_lie_at_the_centres_of_what_they_show() -> None:
    whole, half, corner = (token_places(torch.tensor([place]), 4, patch=2) for place in PLACES)
    assert whole[0].tolist() == [[0, 1, 2, 3]]
    assert half[0].tolist() == half[1].tolist() == [[0.5, 2.5, 4.5, 6.5]]
    assert [along.tolist() for along in corner] == [[[1, 2, 3, 4]], [[3, 4, 5, 6]]]


PLACES = ((0.0, 0.0, 8.0, 8.0), (0.0, 0.0, 16.0, 16.0), (2.0, 6.0, 8.0, 16.0))
"""Of an image of four tokens: all of the canvas, all of one of twice the side, and a part of that."""


@pytest.mark.parametrize("name", PLACED)
def test_a_whole_canvas_is_what_it_was(name: str, tiny_pipelines: Pipelines, tiny_model: ModelFolder) -> None:
    for side in (SIDE, None):  # the table cropped, and whole
        adapter = denoiser(name, tiny_pipelines, tiny_model, side=side)
        latents, timesteps, prompt = inputs(name, SIDE, places=((0.0, 0.0, SIDE, SIDE),))
        expected = denoise(adapter, latents, timesteps, replace(prompt, place=None))
        assert torch.equal(denoise(adapter, latents, timesteps, prompt), expected)


@pytest.mark.parametrize("name", PLACED)
def test_a_crop_has_the_positions_of_its_place(name: str, tiny_pipelines: Pipelines, tiny_model: ModelFolder) -> None:
    """Those of the tokens that it has in common with the whole canvas; a crop of its own has other ones."""
    adapter = denoiser(name, tiny_pipelines, tiny_model)
    canvas, timesteps, prompt = inputs(name, SIDE, places=((2.0, 4.0, CROP, SIDE),))
    crop = canvas[..., 2 : 2 + CROP, 4 : 4 + CROP]
    alone = replace(prompt, place=None)
    assert torch.allclose(
        positions(adapter, crop, timesteps, prompt),
        positions(adapter, canvas, timesteps, alone)[1:3, 2:4],
        atol=1e-6,
    )
    assert not torch.allclose(
        positions(adapter, crop, timesteps, prompt), positions(adapter, crop, timesteps, alone), atol=1e-2
    )


def positions(adapter: DenoiserAdapter, latents: Tensor, timesteps: Tensor, prompt: Prompt) -> Tensor:
    """What image tokens know of their positions, (rows, columns, width): their embeddings, or the angles they are turned by."""
    side = latents.shape[-1] // PATCH
    rotary = adapter.context(latents, timesteps, prompt).rotary
    tokens = adapter.embed(latents, prompt)[0][0] if rotary is None else torch.cat(rotary, dim=-1)[-(side**2) :]
    return tokens.view(side, side, -1)


def test_each_image_of_a_batch_has_its_own_place(tiny_pipelines: Pipelines, tiny_model: ModelFolder) -> None:
    places = ((0.0, 0.0, CROP, SIDE), (3.0, 1.0, 5.0, SIDE))
    for name in ("sd3", "pixart"):
        adapter = denoiser(name, tiny_pipelines, tiny_model)
        latents, _, prompt = inputs(name, CROP, places=places)
        together = adapter.embed(latents, prompt)[0]
        for row, place in enumerate(places):
            alone = replace(prompt, hidden=prompt.hidden[row : row + 1], place=torch.tensor([place]))
            assert torch.allclose(together[row], adapter.embed(latents[row : row + 1], alone)[0][0], atol=1e-6)
    adapter = denoiser("flux", tiny_pipelines, tiny_model)
    latents, timesteps, prompt = inputs("flux", CROP, places=places)
    with pytest.raises(PlanError, match=r'share their positions in FLUX\. Set positions = "own"'):
        adapter.context(latents, timesteps, prompt)


def test_places_are_the_default_where_images_are_smaller_and_positions_are_added() -> None:
    def side(family: str, **changes: object) -> int | None:
        return canvas_of(recipe(**changes), positions_for=FAMILIES[family].positions_for, side=64)

    sd3, flux, unet = "SD3Transformer2DModel", "FluxTransformer2DModel", "UNet2DConditionModel"
    assert side(sd3) is None
    assert side(sd3, patches="dynamic") == side(sd3, gradient="mixed") == 64
    assert side(flux, patches="dynamic", positions="canvas") == 64
    assert side(sd3, patches="dynamic", class_prompt="a photo of a toy", batch_size=2) == 64
    assert side(sd3, patches="dynamic", positions="own") is None
    assert side(unet, patches="dynamic") is None
    assert side(flux, patches="dynamic") is None
    with pytest.raises(PlanError, match="the 2 images of a step"):
        side(flux, patches="dynamic", positions="canvas", batch_size=2)
    with pytest.raises(PlanError, match=r"this model has no positions\. Leave positions out"):
        side(unet, patches="dynamic", positions="canvas")
    with pytest.raises(RecipeError, match=r"and there are none\. Set patches"):
        recipe(positions="own")


def test_coordinates_stay_exact_in_half_precision(tiny_model: ModelFolder) -> None:
    draw = draw_samples(recipe(steps=1), [(64, 64)], kind="instance")[0]
    place = torch.tensor([place_of((64, 64), Crop(5, 3, 41), canvas=8)])
    zeros = torch.zeros(1, 4, 8, 8)
    make = BatchMaker(
        {("instance", 0, draw.crop, False): Posterior(zeros, zeros, torch.zeros(1, 6), place)},
        {"instance": Prompt(hidden=torch.zeros(1, 5, 128), pooled=torch.zeros(1, 128))},
        tiny_model.scheduler(),
        prior_loss_weight=1.0,
        device=CPU,
        dtype=torch.bfloat16,
    )
    made = make([draw]).prompt
    assert made.hidden.dtype == torch.bfloat16
    assert made.place is not None
    assert torch.equal(made.place, place)


@pytest.mark.parametrize("asked", [{"patches": "dynamic"}, {"gradient": "mixed", "mix_start": 9.0, "mix_end": 9.0}])
def test_a_job_trains_on_places(asked: dict[str, str], tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    """With blocks skipped as well: both the frozen pass and the training place the crops."""
    losses = {}
    for positions in ("canvas", "own"):
        changes = asked | {"positions": positions, "skip": "0", "steps": 3, "resolution": 64}
        record = personalize(toy_photos, model=str(tiny_folder), recipe=quick_recipe(**changes), out=tmp_path / positions)
        assert record.plan["positions"] == positions
        losses[positions] = record.losses
    assert losses["canvas"] != losses["own"]


def test_places_that_a_model_cannot_give_are_refused_before_anything_is_made(
    tiny_pipelines: Pipelines, toy_photos: Path, tmp_path: Path
) -> None:
    asked = quick_recipe(patches="dynamic", positions="canvas", resolution=64)
    with pytest.raises(PlanError, match="this model has no positions"):
        personalize(toy_photos, model=tiny_pipelines("sd15").path, recipe=asked, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
