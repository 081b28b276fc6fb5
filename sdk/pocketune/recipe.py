"""The recipe: all that a user asks of a personalization, as one frozen, validated value."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pocketune.errors import RecipeError
from pocketune.rules import contradictions, without_effect


class Recipe(BaseModel):
    """What is asked. Targets, optimizer, loss and timestep density default to those of diffusers' SD3 DreamBooth-LoRA script.

    For other architectures, fields that are not given take the defaults of their own script; the report shows what was used.
    Steps, batch, class images and checkpoints have defaults of Pocketune's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    instance_prompt: str = Field(min_length=1, description='Names the subject with a rare word, as in "a photo of sks toy".')
    class_prompt: str | None = Field(
        default=None, min_length=1, description='Turns prior preservation on, as in "a photo of a toy".'
    )
    class_images: int = Field(default=8, ge=1, description="Images of the class, made by the base model beforehand.")
    prior_loss_weight: float = Field(default=1.0, ge=0)

    skip: str = Field(
        default="none",
        description='Blocks not trained: "none", "auto", a share such as "auto:0.3" or "hollow:0.3", or ranges such as "0-3".',
    )
    use_residuals: bool = Field(default=True, description="Add cached residuals for skipped blocks; false is the ablation.")
    cache_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        default="float32", description="How residuals are stored; int8 has a scale for each token."
    )
    cache_limit_mb: int = Field(default=4096, ge=1, description="Bound of the feature cache on disk, in MB of 1e6 bytes.")
    draws: int | None = Field(
        default=None, ge=1, description="Distinct (photo, timestep, noise) draws; default: one for every sample of every step."
    )
    refresh_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps after which the pool is drawn anew and its features are computed again, so that fewer lie on disk.",
    )

    resolution: int | None = Field(
        default=None, ge=16, description="Side of the training images in pixels; default: the model's."
    )
    patches: Literal["none", "dynamic", "resize", "high-to-low", "random"] = Field(
        default="none",
        description="Train on patches of the photos: dynamic ones are larger at more noise; the rest are ablations.",
    )
    patch_min: int | None = Field(
        default=None, ge=16, description="Side of the smallest patch and of all training images; default: half the resolution."
    )
    patch_max: int | None = Field(default=None, ge=16, description="Side of the largest patch; default: the resolution.")
    positions: Literal["canvas", "own"] | None = Field(
        default=None,
        description="Positions of patches and of images at low resolution: those of their place on the canvas, or those of an "
        "image of their own size; default: the canvas', but for FLUX and models without positions.",
    )

    steps: int = Field(default=500, ge=1, description="Optimizer steps.")
    batch_size: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = Field(default=1.0, gt=0)
    mode_scale: float = 1.29
    timestep_low: int = Field(
        default=0,
        ge=0,
        lt=1000,
        description="Where the least noisy training timesteps begin, in thousandths of the noise schedule before its shift: "
        "with a shift of 3, 500 is timestep 750.",
    )
    timestep_high: int = Field(default=1000, gt=0, le=1000, description="Where the noisiest ones end.")
    precondition_outputs: bool = Field(default=True, description="Compare clean latents (EDM preconditioning), not velocities.")

    gradient: Literal["backprop", "zeroth_order", "mixed"] = Field(
        default="backprop",
        description="How the gradient is had; zeroth order needs forward passes alone. Mixed: each step either backpropagates "
        "at low_resolution or takes a zeroth-order step at the training resolution.",
    )
    low_resolution: int | None = Field(
        default=None, ge=16, description="Side of the images that mixed training backpropagates on; default: half."
    )
    mix_start: float = Field(
        default=1.2, description="Noise, 0 to 1, at which zeroth order has half of mix_largest at first; above 1: nowhere."
    )
    mix_end: float = Field(default=0.4, description="Noise at which it has half of mix_largest in the end.")
    mix_width: float = Field(default=0.1, gt=0, description="How gradually zeroth order takes over with rising noise.")
    mix_largest: float = Field(default=1.0, ge=0, le=1, description="Largest probability of a zeroth-order step.")
    zo_learning_rate: float = Field(default=1e-4, gt=0, description="Of zeroth-order steps.")
    zo_epsilon: float = Field(default=1e-2, gt=0, description="How far a zeroth-order step looks along its directions.")
    zo_queries: int = Field(default=1, ge=1, description="Random directions a zeroth-order step.")
    zo_optimizer: Literal["descent", "adam"] = Field(
        default="descent", description="What takes zeroth-order steps; adam only where all steps are."
    )
    zo_two_sided: bool = Field(default=True, description="Look both ways along a direction, or one way and from the centre.")

    method: Literal["lora", "scales", "token"] = Field(
        default="lora", description="What is tuned: LoRA, scales of packed weights, or the embedding of a word."
    )
    quantizer: Literal["minmax", "hqq"] = Field(default="minmax", description='How codes are chosen; "hqq" needs torchao.')
    scale_intervals: int = Field(default=2, ge=1, le=1000, description="Intervals of timesteps with scales of their own.")
    scale_inputs: bool = Field(default=True, description="Tune the scales of input channels too; false: PEQA.")
    scale_targets: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        default=None,
        min_length=1,
        description='Parts of a block with scales that train, as "attn"; default: those of the model.',
    )
    scale_learning_rate: float = Field(default=3e-3, gt=0, description="Of output scales, relative to the quantizer's.")
    scale_in_learning_rate: float = Field(default=1e-3, gt=0, description="Of input scales.")
    token: str = Field(default="sks", min_length=1, description="The word of the prompt whose embedding is tuned.")
    token_start: str | None = Field(default=None, description="A word whose embedding it begins as; default: its own.")
    subspace_steps: int = Field(default=0, ge=0, description="Steps after which unused directions are found; 0: never.")
    subspace_noise: float = Field(default=1e-3, ge=0, lt=1, description="Share of the variance that counts as unused.")

    rank: int = Field(default=4, ge=1, description="LoRA rank; alpha equals it.")
    lora_targets: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        default=None, min_length=1, description="Linear names inside a block; default: attention."
    )

    seed: int = Field(default=0, ge=0, lt=2**63)
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="Of the frozen weights.")
    checkpoint_every: int = Field(default=100, ge=1, description="Steps between checkpoints.")

    weights: Literal["resident", "streamed"] = Field(
        default="resident",
        description="Frozen weights in memory, or on disk and read by layer; the numbers are the same.",
    )
    weight_bits: Literal[4, 8] | None = Field(
        default=None,
        description="Pack the denoiser's frozen weights: resident ones with a scale to a row, streamed ones as a copy on disk, "
        "made once; default: the weights as they are.",
    )
    activations: Literal["kept", "recomputed", "on_disk"] = Field(
        default="kept",
        description="What backward needs of a block: kept; computed again; or that, and meanwhile in a scratch file.",
    )
    optimizer_in_backward: bool = Field(
        default=False,
        description="Update a block as soon as backward has passed it; gradients are then clipped block by block.",
    )
    vae_tile: int | None = Field(
        default=None, ge=64, description="Side in pixels of the tiles in which the VAE works; default: whole images."
    )

    sample_prompts: tuple[str, ...] = Field(default=(), description="Prompts of the before/after images; default: a few.")
    sample_steps: int = Field(default=28, ge=1)
    guidance_scale: float = Field(default=7.0, ge=0)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        reason = next(contradictions(dict(self), defaults), None)
        if reason is not None:
            raise ValueError(reason)
        return self

    def why_without_effect(self, name: str) -> str | None:
        """Because of which other setting a field cannot have an effect, as a sentence; None: it can."""
        return without_effect(dict(self), name)

    @property
    def saves_memory(self) -> bool:
        """Whether weights, activations or gradients are kept small, so that what else lies in memory matters."""
        return self.streams_parts or self.activations != "kept" or self.gradient == "zeroth_order"

    @property
    def streams_parts(self) -> bool:
        """Whether text encoders, VAE and what samples are read from disk: where the weights that train are streamed or packed.

        Held in memory they would take many times what packed weights do.
        """
        return self.weights == "streamed" or self.weight_bits is not None

    def changed(self, **values: Any) -> Self:
        """The recipe with other values, validated; what was given stays known as given.

        Raises:
            RecipeError: they do not fit the others.
        """
        return type(self).create(**({name: getattr(self, name) for name in self.model_fields_set} | values))

    @classmethod
    def create(cls, **values: Any) -> Self:
        """Validate values given by a person.

        Raises:
            RecipeError: a field is unknown or its value is out of range; the message names each one.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg'].removeprefix('Value error, ').rstrip('.')}"
                for e in error.errors()
            )
            msg = f"the recipe is not valid: {faults}. docs/recipe.md lists all fields."
            raise RecipeError(msg) from error

    @classmethod
    def relevant(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Of some values, those that have an effect beside the others.

        For settings that several recipes share, and for records of versions that let more pass.
        """
        recipe = cls.model_construct(**values)
        return {name: value for name, value in values.items() if recipe.why_without_effect(name) is None}

    @classmethod
    def from_toml(cls, path: Path, **overrides: Any) -> Self:
        """Read a TOML file whose top-level keys are the fields; `overrides` that are not None win.

        Raises:
            RecipeError: the file is missing, is no TOML, or holds an invalid value.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            msg = f"cannot read the recipe {path}: {error.strerror}."
            raise RecipeError(msg) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            msg = f"the recipe {path} is not valid TOML: {error}."
            raise RecipeError(msg) from error
        return cls.create(**(values | {name: value for name, value in overrides.items() if value is not None}))
