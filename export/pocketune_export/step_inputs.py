"""What a batch gives to the graphs of a denoiser: names, shapes and meanings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pocketune.models.base import Prompt
from pocketune.step import Batch, Features, Objective
from pocketune_export.graphspec import TensorSpec
from pocketune_export.training import Named, spec


@dataclass(frozen=True)
class Sizes:
    """The static sizes of a step: rows of a batch, latent (channels, height, width), text tokens and widths; and its objective.

    A pooled width of 0 stands for a denoiser that takes no pooled text. takes_sizes: of photo and crop, as SDXL does.
    """

    rows: int
    latents: tuple[int, int, int]
    text_tokens: int
    text_width: int
    pooled_width: int
    objective: Objective
    takes_sizes: bool = False


def batch_inputs(sizes: Sizes) -> dict[str, TensorSpec]:
    """The inputs of a training step that are the batch, without the features of skipped blocks."""
    rows = sizes.rows
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "latents": ((rows, *sizes.latents), "clean, scaled and shifted"),
        "noise": ((rows, *sizes.latents), "Gaussian"),
        "timesteps": ((rows,), "as the denoiser takes them"),
        "sigmas": ((rows,), "share of noise at each timestep"),
        "prompt_hidden": ((rows, sizes.text_tokens, sizes.text_width), "encoded text"),
        "prompt_pooled": ((rows, sizes.pooled_width), "encoded text, pooled"),
        "prompt_sizes": ((rows, 6), "height and width of photo, top and left of crop, height and width of result"),
        "loss_weights": ((rows,), "1 / photos for a photo, prior_loss_weight / class_images for a class image"),
    }
    if not sizes.pooled_width:
        del shapes["prompt_pooled"]
    if not sizes.takes_sizes:
        del shapes["prompt_sizes"]
    if sizes.objective != "flow":
        shapes["alphas"] = ((rows,), "share of the clean latents at each timestep")
    return {name: spec(name, shape, meaning) for name, (shape, meaning) in shapes.items()}


def batch_of(given: Named, sizes: Sizes, features: Features) -> Batch:
    """The batch of named inputs; what a graph does not take is empty, and must not be needed."""
    return Batch(
        latents=given["latents"],
        noise=given["noise"],
        timesteps=given.get("timesteps", torch.empty(0)),
        sigmas=given["sigmas"],
        alphas=given.get("alphas"),
        objective=sizes.objective,
        prompt=prompt_of(given),
        loss_weights=given["loss_weights"],
        features=features,
    )


def prompt_of(given: Named) -> Prompt:
    """The encoded prompt among named inputs; what a graph does not take is empty, and must not be needed."""
    return Prompt(
        hidden=given.get("prompt_hidden", torch.empty(0)), pooled=given.get("prompt_pooled"), sizes=given.get("prompt_sizes")
    )
