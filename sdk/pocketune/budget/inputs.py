"""A training batch in the shapes of a job, made of whatever fills shapes: nothing on the meta device, or random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pocketune.features.precompute import feature_shape
from pocketune.models.base import DenoiserAdapter, Prompt, SkipConnected
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan, Span
from pocketune.step import Batch, Features

Make = Callable[..., Tensor]
"""Called with the sides of a tensor."""

CLIP_TOKENS = 77


def text_tokens(folder: ModelFolder) -> int:
    """Tokens of an encoded prompt: those of CLIP where the model takes them, and those of the long text encoder."""
    return (clip_tokens(folder, "text_encoder") if folder.family.clip_text else 0) + folder.text_padding


def clip_tokens(folder: ModelFolder, part: str) -> int:
    """Tokens that a CLIP text encoder is given."""
    longest = folder.config(part).get("max_position_embeddings") if folder.has(part) else None
    return min(CLIP_TOKENS, longest or CLIP_TOKENS)


def shaped_batch(
    folder: ModelFolder,
    adapter: DenoiserAdapter,
    plan: BlockPlan,
    make: Make,
    *,
    samples: int,
    side: int,
    tokens: int,
    placed: bool = False,
) -> Batch:
    """A batch, with features of the skipped spans.

    Args:
        folder: the model.
        adapter: its denoiser.
        plan: what is skipped.
        make: makes tensors.
        samples: of the batch.
        side: of the latents.
        tokens: of the text.
        placed: whether images have a place on a canvas.
    """
    sizes, flow = folder.sizes, folder.family.flow_matching
    latents = make(samples, sizes.channels, side, side)
    sigmas = make(samples)
    batch = Batch(
        latents=latents,
        noise=make(samples, sizes.channels, side, side),
        timesteps=make(samples),
        sigmas=sigmas,
        alphas=None if flow else make(samples),
        objective="flow" if flow else "epsilon",
        prompt=Prompt(
            hidden=make(samples, tokens, sizes.text_width),
            pooled=make(samples, sizes.pooled_width) if sizes.pooled_width else None,
            sizes=make(samples, 6) if folder.family.takes_sizes else None,
            place=make(samples, 4) if placed else None,
        ),
        loss_weights=make(samples),
    )
    if not plan.skipped:
        return batch
    return replace(batch, features=_features(folder, adapter, plan, make, samples=samples, side=side, tokens=tokens))


def _features(
    folder: ModelFolder, adapter: DenoiserAdapter, plan: BlockPlan, make: Make, *, samples: int, side: int, tokens: int
) -> Features:
    if isinstance(adapter, SkipConnected):
        shape = feature_shape(folder, plan, side=side)
        return {plan.skipped_spans[0]: (make(samples, *shape[1:]),)}
    image = (side // adapter.patch_size) ** 2

    def streams(span: Span) -> tuple[Tensor, ...]:
        text = [tokens] if folder.has_text_stream and span.stop != plan.block_count else []
        return tuple(make(samples, count, folder.width) for count in (image, *text))

    return {span: streams(span) for span in plan.skipped_spans}


def empty(*sides: int) -> Tensor:
    """A float32 tensor without memory."""
    return torch.empty(sides, device="meta")
