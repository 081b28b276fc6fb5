"""What the phases of one personalization share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pocketune.methods.base import TuningMethod
from pocketune.methods.scales import quantization_of
from pocketune.models.base import DenoiserAdapter
from pocketune.models.load import ModelFolder
from pocketune.models.positions import table_side
from pocketune.plan.blocks import BlockPlan
from pocketune.recipe import Recipe
from pocketune.sample import BATCH
from pocketune.sampling.batches import CropKey, NoiseSchedule, Posterior
from pocketune.sampling.choices import Choice, low_side
from pocketune.sampling.draws import refresh_periods
from pocketune.sampling.patches import Patches, patches_of
from pocketune.sampling.places import canvas_of
from pocketune.tuning import METHODS
from pocketune.watch import Watch
from pocketune.weights.fill import RESIDENT, Residence


@dataclass
class Job:
    """One personalization under way.

    Attributes:
        recipe: what is asked, complete.
        folder: the model.
        run: the RUN folder.
        device: where the arithmetic is done.
        watch: times phases and reports progress.
        trained_parameters: how many numbers train.
        choices: of each step of mixed training, how its gradient is had.
        posteriors: latents of the crops that are in use.
        cache_bytes: of the largest feature cache so far.
        cache_error: the most that storing changed in one of them, relative.
    """

    recipe: Recipe
    folder: ModelFolder
    run: Path
    device: torch.device
    watch: Watch
    trained_parameters: int = 0
    choices: tuple[Choice, ...] = ()
    posteriors: dict[CropKey, Posterior] = field(default_factory=dict)
    cache_bytes: int = 0
    cache_error: float = 0.0

    @property
    def resolution(self) -> int:
        """Side, in pixels, of sampled images and, unless patches are asked for, of the training images."""
        return self.recipe.resolution or self.folder.native_resolution

    @cached_property
    def patches(self) -> Patches:
        """What each draw sees of its photo; `smallest` is the side of the training images."""
        return patches_of(
            self.recipe,
            resolution=self.resolution,
            unit=self.folder.resolution_unit,
            noise=NoiseSchedule.of(self.folder.scheduler()).shares(),
        )

    @property
    def method(self) -> TuningMethod:
        """What is tuned."""
        return METHODS[self.recipe.method]

    @property
    def low_resolution(self) -> int:
        """Side of the images that mixed training backpropagates on."""
        return low_side(self.recipe.low_resolution, side=self.patches.smallest, unit=self.folder.resolution_unit)

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights and of the arithmetic."""
        return getattr(torch, self.recipe.dtype)  # type: ignore[no-any-return]

    @property
    def residence(self) -> Residence:
        """Where the denoiser's frozen weights are."""
        if self.recipe.weights == "resident":
            return RESIDENT
        return Residence(streamed=True, bits=self.recipe.weight_bits)

    @property
    def parts_residence(self) -> Residence:
        """Where the weights of text encoders, VAE and the denoiser that samples are; they are not packed."""
        return Residence(streamed=self.recipe.streams_parts)

    @property
    def sampling_batch(self) -> int:
        """Images sampled at a time."""
        return 1 if self.parts_residence.streamed else BATCH

    @property
    def canvas(self) -> int | None:
        """Side, in latent pixels, of what training images have their place on; None: each has positions of its own."""
        side = self.resolution // self.folder.vae_scale
        return canvas_of(self.recipe, positions_for=self.folder.family.positions_for, side=side)

    @property
    def latent_side(self) -> int | None:
        """Side of the latents to which a table of positions is cropped for training; None: it stays whole."""
        if self.canvas is not None:
            return self.canvas
        scale = self.folder.vae_scale
        low_side = self.low_resolution // scale if self.recipe.gradient == "mixed" else None
        return table_side(self.patches.smallest // scale, low_side, patch=self.folder.sizes.patch)

    def denoiser(self, blocks: Collection[int]) -> DenoiserAdapter:
        """The denoiser with some of its blocks, as the recipe wants its weights held."""
        return self.folder.load_denoiser(
            dtype=self.dtype,
            device=self.device,
            blocks=blocks,
            weights=self.residence,
            quantization=quantization_of(self.recipe),
            latent_side=self.latent_side,
        )

    def pipeline(self, *, packed: bool = False) -> Any:
        """The whole pipeline, for sampling. packed: hold the denoiser's weights packed, as scales need them."""
        return self.folder.pipeline(
            dtype=self.dtype,
            device=self.device,
            weights=self.parts_residence,
            quantization=quantization_of(self.recipe) if packed else None,
            latent_side=self.resolution // self.folder.vae_scale,
            tile=self.recipe.vae_tile,
        )

    def describe(self, plan: BlockPlan) -> dict[str, Any]:
        """The plan as plain data for the report."""
        mixed: dict[str, Any] = {}
        if self.choices:
            taken = [choice.as_dict() for choice in self.choices]
            mixed = {
                "low_resolution": self.low_resolution,
                "zeroth_order_steps": sum(choice.zeroth_order for choice in self.choices),
                "choices": taken,
            }
        return {
            "blocks": plan.block_count,
            "skipped": plan.describe(),
            "chosen_by": plan.chosen_by,
            "trained_blocks": list(plan.kept),
            "trained_parameters": self.trained_parameters,
            "residuals": bool(plan.skipped) and self.recipe.use_residuals,
            "feature_cache_bytes": self.cache_bytes,
            "feature_cache_error": self.cache_error,
            "feature_pools": len(refresh_periods(self.recipe)),
            "resolution": self.patches.smallest,
            "patches": self.patches.describe(),
            "positions": "own" if self.canvas is None else "canvas",
            "method": self.recipe.method,
            "gradient": self.recipe.gradient,
            "device": str(self.device),
            "dtype": self.recipe.dtype,
            "weights": self.recipe.weights,
            "weight_bits": self.recipe.weight_bits,
            "activations": self.recipe.activations,
            **mixed,
        }
