"""What Pocketune knows of an architecture besides its adapter: its parts, sizes, text encoding and its script's defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from pocketune.errors import RecipeError
from pocketune.models.base import Prompt
from pocketune.recipe import Recipe

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Figures that follow from a denoiser's configuration.

    Attributes:
        blocks: how many there are.
        width: channels of a token.
        patch: latent pixels along a token's side.
        native: latent pixels along the side of the images that the model was made for.
        channels: of the latents.
        text_width: channels of a token of the encoded text.
        pooled_width: channels of the pooled text; 0: the model takes none.
        largest: latent pixels along the largest side that the model can work at; None: no bound.
    """

    blocks: int
    width: int
    patch: int
    native: int
    channels: int
    text_width: int
    pooled_width: int = 0
    largest: int | None = None


class Parts(Protocol):
    """A pipeline folder's configurations."""

    denoiser_config: dict[str, Any]

    def has(self, part: str) -> bool:
        """Whether the pipeline has such a part."""

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a part."""


class Encode(Protocol):
    """Encodes one prompt with the pipeline's own code; `length` is the longest text of the long text encoder."""

    def __call__(self, pipeline: Any, prompt: str, *, device: torch.device, length: int) -> Prompt:
        """The prompt, each tensor with a batch of 1."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Attributes:
        title: as people call it.
        denoiser: diffusers' model class.
        adapter: its adapter class, called with a model.
        pipeline: diffusers' pipeline class.
        text_encoders: folders of the text encoders.
        sizes: figures from the denoiser's configuration.
        encode: encodes a prompt.
        text_length: the `length` that `encode` and the pipeline are called with; 0 where there is no long text encoder.
        sampling: further arguments of the pipeline's call, given that length.
        recipe_defaults: recipe fields whose default in the architecture's script is not the recipe's own.
        clip_text: whether the tokens of CLIP stand in the encoded text; elsewhere CLIP gives the pooled text, if anything.
        guided_passes: of the denoiser for each image and step when the pipeline samples with guidance.
        timestep_divisor: by which the pipeline divides timesteps, 0 to 1000, before it calls the denoiser.
        vae: the autoencoder's class.
        vae_scale: image pixels along the side of a latent pixel, in published models; a folder's own configuration wins.
        overflows_in_float16: whether text encoder and autoencoder do: images are then decoded in float32, whatever the type of
            the denoiser, and prompts encoded in bfloat16 beside a denoiser in float16.
        component: folder and attribute of the denoiser in the pipeline.
        variant: the `addition_embed_type` of the configuration, where models of one class differ in it.
        optional: parts that may be missing from the folder, and are then told to diffusers as None.
        left_out: parts that neither training nor sampling loads.
        takes_sizes: whether the denoiser takes the sizes of image and crop as inputs.
        positions_for: what the denoiser gives positions to: each image, or all images of a batch in common; None: nothing.
        noise: class of the noise schedule that trains.
    """

    title: str
    denoiser: Any
    adapter: Any  # a class that is a DenoiserAdapter
    pipeline: Any
    text_encoders: tuple[str, ...]
    sizes: Callable[[Config], Sizes]
    encode: Encode
    text_length: Callable[[Parts], int]
    sampling: Callable[[int], dict[str, Any]]
    recipe_defaults: Mapping[str, Any] = field(default_factory=dict)
    clip_text: bool = False
    guided_passes: int = 2
    timestep_divisor: int = 1
    vae: Any = AutoencoderKL
    vae_scale: int = 8
    overflows_in_float16: bool = False
    component: str = "transformer"
    variant: str = ""
    optional: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    takes_sizes: bool = False
    positions_for: Literal["image", "batch"] | None = None
    noise: Any = FlowMatchEulerDiscreteScheduler

    @property
    def kind(self) -> str:
        """The denoiser's class name, by which model folders name it."""
        return str(self.denoiser.__name__)

    @property
    def key(self) -> str:
        """Of the registry."""
        return family_key(self.kind, {"addition_embed_type": self.variant})

    @property
    def flow_matching(self) -> bool:
        """Whether the model predicts a velocity of rectified flow; otherwise noise, or the v of a diffusion."""
        return self.noise is FlowMatchEulerDiscreteScheduler

    def vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the autoencoder in a pipeline. dtype: of the denoiser."""
        return torch.float32 if self.overflows_in_float16 else dtype

    def text_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the text encoders in a pipeline. dtype: of the denoiser."""
        return torch.bfloat16 if self.overflows_in_float16 and dtype == torch.float16 else dtype

    @property
    def guidance(self) -> float:
        """The guidance scale of samples where none is asked for."""
        return float(self.recipe_defaults.get("guidance_scale", Recipe.model_fields["guidance_scale"].default))

    def complete(self, recipe: Recipe) -> Recipe:
        """The recipe with the architecture's defaults where it names no value.

        Raises:
            RecipeError: the recipe asks for what the architecture's loss does not have, or its dtype cannot hold.
        """
        missing = {
            name: value
            for name, value in self.recipe_defaults.items()
            if name not in recipe.model_fields_set and not recipe.why_without_effect(name)
        }
        completed = recipe.changed(**missing)
        if not self.flow_matching and completed.precondition_outputs:
            msg = f"precondition_outputs is of rectified flow; {self.title} predicts noise. Leave it out, or set it to false."
            raise RecipeError(msg)
        if not self.flow_matching and completed.weighting_scheme in ("sigma_sqrt", "cosmap"):
            msg = (
                f"weighting_scheme {completed.weighting_scheme} weighs the loss of rectified flow, and {self.title} predicts "
                'noise. Use "none", or "logit_normal" or "mode" to change how often each timestep is drawn.'
            )
            raise RecipeError(msg)
        bounded = completed.precondition_outputs or completed.gradient == "zeroth_order"
        if completed.weighting_scheme == "sigma_sqrt" and completed.dtype == "float16" and not bounded:
            msg = (
                "weighting_scheme sigma_sqrt weighs the gradients of velocities by up to a million, and float16 ends at 65504. "
                'Set precondition_outputs to true, which takes the weight back, or dtype to "bfloat16" or "float32".'
            )
            raise RecipeError(msg)
        return completed


def family_key(kind: str, config: Config) -> str:
    """The registry's name for a denoiser class with a configuration."""
    variant = config.get("addition_embed_type")
    return f"{kind}/{variant}" if variant else kind


def fixed_length(tokens: int) -> Callable[[Parts], int]:
    """A text length that does not depend on the model."""
    return lambda _: tokens
