"""A training batch in the shapes of a job, made of whatever fills shapes: nothing on the meta device, or random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pocketune.models.base import DenoiserAdapter, Prompt, SkipConnected
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan, Span
from pocketune.step import Batch, Features

Make = Callable[..., Tensor]
"""Called with the sides of a tensor."""

CLIP_TOKENS = 77


def text_tokens(folder: ModelFolder) -> int:
    """Tokens of an encoded prompt: U-Nets take those of CLIP, and Stable Diffusion 3 joins those of T5."""
    kind = folder.denoiser_kind
    if kind not in ("SD3Transformer2DModel", "UNet2DConditionModel"):
        return folder.text_padding
    longest = folder.config("text_encoder").get("max_position_embeddings") if folder.has("text_encoder") else None
    return min(CLIP_TOKENS, longest or CLIP_TOKENS) + (folder.text_padding if kind == "SD3Transformer2DModel" else 0)


def latent_channels(folder: ModelFolder) -> int:
    """Channels of the autoencoder's latents; FLUX takes four neighbours of them as one."""
    channels: int = folder.denoiser_config["in_channels"]
    return channels // (4 if folder.denoiser_kind == "FluxTransformer2DModel" else 1)


def shaped_batch(
    folder: ModelFolder, adapter: DenoiserAdapter, plan: BlockPlan, make: Make, *, samples: int, side: int, tokens: int
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
    """
    config, flow = folder.denoiser_config, folder.family.flow_matching
    width = config.get("joint_attention_dim") or config.get("cross_attention_dim")
    if config.get("caption_channels"):
        width = config["caption_channels"]
    pooled = config.get("pooled_projection_dim")
    if folder.family.takes_sizes:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    channels = latent_channels(folder)
    latents = make(samples, channels, side, side)
    sigmas = make(samples)
    batch = Batch(
        latents=latents,
        noise=make(samples, channels, side, side),
        timesteps=make(samples),
        sigmas=sigmas,
        alphas=None if flow else make(samples),
        objective="flow" if flow else "epsilon",
        prompt=Prompt(
            hidden=make(samples, tokens, width),
            pooled=make(samples, pooled) if pooled else None,
            sizes=make(samples, 6) if folder.family.takes_sizes else None,
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
        from pocketune.features.precompute import feature_shape

        shape = feature_shape(folder.empty_denoiser(), plan, side=side)
        return {plan.skipped_spans[0]: (make(samples, *shape[1:]),)}
    image = (side // adapter.patch_size) ** 2

    def streams(span: Span) -> tuple[Tensor, ...]:
        text = [tokens] if folder.has_text_stream and span.stop != plan.block_count else []
        return tuple(make(samples, count, folder.width) for count in (image, *text))

    return {span: streams(span) for span in plan.skipped_spans}


def empty(*sides: int) -> Tensor:
    """A float32 tensor without memory."""
    return torch.empty(sides, device="meta")
