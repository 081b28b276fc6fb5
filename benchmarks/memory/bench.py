"""What a job is measured on: a denoiser of random weights, loaded as the job asks, and random batches for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory.jobs import Job
from pocketune.budget.inputs import shaped_batch
from pocketune.methods.scales import quantization_of
from pocketune.models.base import DenoiserAdapter
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan, parse_plan
from pocketune.recipe import Recipe
from pocketune.sampling.draws import Draw
from pocketune.step import Batch
from pocketune.weights.fill import RESIDENT, Residence


@dataclass(frozen=True)
class Bench:
    """A denoiser with the blocks that a job keeps, and what to feed it with."""

    recipe: Recipe
    plan: BlockPlan
    adapter: DenoiserAdapter
    batches: RandomBatches

    @classmethod
    def of(cls, folder: ModelFolder, job: Job, recipe: Recipe) -> Bench:
        """Load a folder's denoiser in float32 on the CPU, with weights where the recipe wants them."""
        plan = parse_plan(job.skip, folder.block_count)
        side = job.resolution // (folder.native_resolution // folder.sizes.native)
        adapter = folder.load_denoiser(
            dtype=torch.float32,
            device=torch.device("cpu"),
            blocks=plan.kept,
            weights=Residence(streamed=True, bits=recipe.weight_bits) if recipe.weights == "streamed" else RESIDENT,
            quantization=quantization_of(recipe),
            latent_side=side,
        )
        return cls(recipe, plan, adapter, RandomBatches(folder, adapter, plan, side=side, text_tokens=job.text_tokens))


class RandomBatches:
    """Stands for a `BatchMaker`: random tensors in the shapes of a job, with features of the skipped spans."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, model: ModelFolder, adapter: DenoiserAdapter, plan: BlockPlan, *, side: int, text_tokens: int) -> None:
        self._model, self._adapter, self._plan = model, adapter, plan
        self._side, self._text_tokens = side, text_tokens
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, draws: Sequence[Draw], features: Any = None) -> Batch:  # noqa: ARG002 - all is random here
        """The inputs of a step, with features of the skipped spans."""
        sigma = torch.full((1,), 0.6)
        alphas = None if self._model.family.flow_matching else (1 - sigma**2) ** 0.5
        batch = shaped_batch(
            self._model, self._adapter, self._plan, self._random, samples=1, side=self._side, tokens=self._text_tokens
        )
        return replace(batch, timesteps=1000 * sigma, sigmas=sigma, alphas=alphas, loss_weights=torch.ones(1))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)
