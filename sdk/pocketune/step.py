"""The training step as pure functions: everything random is an input, nothing is remembered.

What is true here can be captured as a graph, lowered, and replayed on a phone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from pocketune.errors import PlanError
from pocketune.models.base import DenoiserAdapter, Prompt, Streams, run_blocks
from pocketune.plan.blocks import BlockPlan, Span
from pocketune.plan.skipping import skipping_of

Features = Mapping[Span, Streams]
"""What was cached of each skipped span, as the denoiser's `Skipping` collects it."""

Objective = Literal["flow", "epsilon", "v_prediction"]
"""What the denoiser predicts: the velocity of rectified flow, the noise, or the v of a diffusion."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The inputs of one step.

    Attributes:
        latents: clean, scaled and shifted, (batch, channels, height, width).
        noise: like latents.
        timesteps: (batch,), as the denoiser takes them.
        sigmas: (batch,), the noise level of each timestep.
        alphas: (batch,), the share of the clean latents in a diffusion; None for rectified flow, where it is 1 - sigma.
        objective: what the denoiser predicts.
        prompt: encoded text, batched.
        loss_weights: (batch,), 1 / photos for each photo and prior_loss_weight / class images for each class image.
        features: cached streams of the skipped spans; empty when nothing is skipped.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    sigmas: Tensor
    prompt: Prompt
    loss_weights: Tensor
    features: Features = field(default_factory=dict)
    alphas: Tensor | None = None
    objective: Objective = "flow"

    @property
    def noisy(self) -> Tensor:
        """x_t = alpha x_0 + sigma noise.

        Paper: Esser et al. 2024, equation 4, with alpha = 1 - sigma for rectified flow; Ho et al. 2020 (DDPM), equation 4, with
        alpha^2 + sigma^2 = 1 for a diffusion.
        """
        sigma = self.sigmas.view(-1, 1, 1, 1)
        alpha = 1.0 - sigma if self.alphas is None else self.alphas.view(-1, 1, 1, 1)
        return alpha * self.latents + sigma * self.noise


def predict(adapter: DenoiserAdapter, plan: BlockPlan, batch: Batch, *, use_residuals: bool = True) -> Tensor:
    """The denoiser's output with skipped spans replaced by what was cached for them.

    `pocketune.plan.skipping` says how, and after which papers.

    Args:
        adapter: the denoiser; skipped blocks may have been removed.
        plan: what is skipped.
        batch: inputs; `features` must hold every skipped span, unless `use_residuals` is false.
        use_residuals: false drops skipped spans altogether (the ablation without residuals).
    """
    skipping = skipping_of(adapter)
    skipping.check(plan, use_residuals=use_residuals)
    noisy = batch.noisy
    context = adapter.context(noisy, batch.timesteps, batch.prompt)
    first = plan.spans[0]
    cached_prefix = first.skipped and use_residuals
    streams: Streams = () if cached_prefix else adapter.embed(noisy, batch.prompt)
    for span in plan.spans:
        if not span.skipped:
            streams = run_blocks(adapter, span.start, span.stop, streams, context)
        elif use_residuals:
            streams = skipping.enter(span, streams, _cached(batch.features, span))
    return adapter.head(streams, context)


def flow_matching_loss(
    output: Tensor, batch: Batch, *, weighting_scheme: str = "logit_normal", precondition_outputs: bool = True
) -> Tensor:
    """The loss of diffusers' `train_dreambooth_lora_sd3.py`, a scalar.

    Paper: Esser et al. 2024 (SD3), equations 5 and 14; preconditioning as in Karras et al. 2022.
    Differs: per-sample weights stand for the script's separate sum over class images; the value is the same.

    Args:
        output: the denoiser's velocity, (batch, channels, height, width).
        batch: the inputs that made it.
        weighting_scheme: how sigmas weigh, as in the script.
        precondition_outputs: compare clean latents instead of velocities.
    """
    sigma = batch.sigmas.view(-1, 1, 1, 1)
    # The script weighs in the type of the training; but 1 / sigma^2 goes up to 10^6, and float16 to 65504.
    level = sigma.float() if sigma.dtype == torch.float16 else sigma
    weighting = compute_loss_weighting_for_sd3(weighting_scheme=weighting_scheme, sigmas=level)
    if precondition_outputs:
        output, target = output * (-sigma) + batch.noisy, batch.latents
    else:
        target = batch.noise - batch.latents
    per_sample: Tensor = (weighting.float() * (output.float() - target.float()) ** 2).flatten(1).mean(1)
    return (per_sample * batch.loss_weights).sum()


def diffusion_loss(output: Tensor, batch: Batch) -> Tensor:
    """The loss of diffusers' `train_dreambooth_lora.py` and `train_dreambooth_lora_sdxl.py`, a scalar.

    Paper: Ho et al. 2020 (DDPM), equation 14; v-prediction as in Salimans and Ho 2022.
    Differs: per-sample weights stand for the script's separate sum over class images; the value is the same.

    Args:
        output: the denoiser's noise or v, (batch, channels, height, width). Channels beyond those of the latents are a learned
            variance and do not count.
        batch: the inputs that made it.
    """
    target = batch.noise
    if batch.objective == "v_prediction" and batch.alphas is not None:
        target = batch.alphas.view(-1, 1, 1, 1) * batch.noise - batch.sigmas.view(-1, 1, 1, 1) * batch.latents
    output = output[:, : target.shape[1]]
    per_sample: Tensor = ((output.float() - target.float()) ** 2).flatten(1).mean(1)
    return (per_sample * batch.loss_weights).sum()


@torch.no_grad()
def span_features(adapter: DenoiserAdapter, plan: BlockPlan, batch: Batch) -> dict[Span, Streams]:
    """Run the frozen model and return what `predict` needs for each skipped span.

    Blocks behind the last skipped span are not run.
    """
    skipping = skipping_of(adapter)
    skipping.check(plan)
    noisy = batch.noisy
    context = adapter.context(noisy, batch.timesteps, batch.prompt)
    streams = adapter.embed(noisy, batch.prompt)
    features: dict[Span, Streams] = {}
    position = 0
    for span in plan.skipped_spans:
        entering = run_blocks(adapter, position, span.start, streams, context)
        streams = run_blocks(adapter, span.start, span.stop, entering, context)
        position = span.stop
        features[span] = skipping.collect(span, entering, streams)
    return features


def _cached(features: Features, span: Span) -> Streams:
    if span not in features:
        msg = f"no cached features for blocks {span.start}-{span.stop - 1}: run the precompute pass with this plan first."
        raise PlanError(msg)
    return features[span]
