"""The frozen pass that fills the feature cache, and the bound that is said before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pocketune.errors import PlanError
from pocketune.features.cache import FeatureCache
from pocketune.features.storage import stored_bytes
from pocketune.models.base import DenoiserAdapter, Prompt, SkipConnected
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan, Span
from pocketune.sampling.batches import BatchMaker
from pocketune.sampling.draws import Draw
from pocketune.step import Batch, span_features
from pocketune.units import readable_size


def cache_bytes(plan: BlockPlan, *, draws: int, image_tokens: int, text_tokens: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of the features of all draws: both streams of each skipped span, the image alone where the text stream ends."""
    tokens = sum(image_tokens + (0 if span.stop == plan.block_count else text_tokens) for span in plan.skipped_spans)
    return draws * stored_bytes((1, tokens, width), dtype)


def predicted_bytes(
    folder: ModelFolder, plan: BlockPlan, *, side: int, text_tokens: int, draws: int, dtype: torch.dtype
) -> int:
    """Bytes of the features of all draws, said before anything is computed.

    Args:
        folder: the model.
        plan: what is skipped.
        side: of the training images in pixels.
        text_tokens: of the longest prompt.
        draws: distinct ones.
        dtype: of the cache.
    """
    if issubclass(folder.family.adapter, SkipConnected):
        shape = feature_shape(folder, plan, side=side // folder.vae_scale)
        return draws * stored_bytes(shape, dtype)
    return cache_bytes(
        plan,
        draws=draws,
        image_tokens=(side // folder.resolution_unit) ** 2,
        text_tokens=text_tokens if folder.has_text_stream else 0,
        width=folder.width,
        dtype=dtype,
    )


def feature_shape(folder: ModelFolder, plan: BlockPlan, *, side: int) -> torch.Size:
    """Of one draw's features in a U-Net: the image that leaves the skipped middle, found by a run without numbers.

    Args:
        folder: the model.
        plan: what is skipped.
        side: of the latents.
    """
    sizes = folder.sizes
    latents = _shape(1, sizes.channels, side, side)
    prompt = Prompt(
        hidden=_shape(1, 1, sizes.text_width),
        pooled=_shape(1, sizes.pooled_width) if sizes.pooled_width else None,
        sizes=_shape(1, 6) if folder.family.takes_sizes else None,
    )
    one = _shape(1)
    batch = Batch(latents=latents, noise=latents, timesteps=one, sigmas=one, prompt=prompt, loss_weights=one)
    adapter = folder.empty_denoiser()
    adapter.model.to("meta")  # buffers too
    features = span_features(adapter, plan, batch)
    return features[plan.skipped_spans[0]][0].shape


def _shape(*sides: int) -> torch.Tensor:
    return torch.empty(sides, device="meta")


def check_bound(needed_bytes: int, *, limit_mb: int, draws: int) -> None:
    """Refuse a cache that would be too large, before anything is written.

    Raises:
        PlanError: with the settings that would make it fit.
    """
    limit = limit_mb * 1_000_000
    if needed_bytes <= limit:
        return
    fitting = max(1, draws * limit // needed_bytes)
    msg = (
        f"the feature cache needs {readable_size(needed_bytes)} for {draws} draws, the limit is {readable_size(limit)}. "
        f"Set draws = {fitting}, or refresh_every, so that fewer steps' features lie on disk at once, or cache_dtype = "
        '"bfloat16" or "int8" (a half or a quarter of the size), or raise cache_limit_mb.'
    )
    raise PlanError(msg)


def precompute(
    adapter: DenoiserAdapter,
    plan: BlockPlan,
    batches: Sequence[Sequence[Draw]],
    make_batch: BatchMaker,
    cache: FeatureCache,
    *,
    on_sample: Callable[[int, int], None],
) -> None:
    """Store the features of every draw that the cache does not hold yet.

    Draws are run in the batches in which they will train, so that the cached numbers are those of the full step. A draw of two
    batches is stored of the first.

    Args:
        adapter: the frozen denoiser with every block up to the last skipped one.
        plan: what is skipped.
        batches: the draws of each step.
        make_batch: turns draws into tensors.
        cache: filled shard by shard; what was there stays.
        on_sample: called with (done, total) draws.
    """
    distinct = list(dict.fromkeys(tuple(draws) for draws in batches))
    total = sum(len(draws) for draws in distinct)
    done = 0
    try:
        for draws in distinct:
            if not all(draw.cache_number in cache for draw in draws):
                features = span_features(adapter, plan, make_batch(draws))
                for row, draw in enumerate(draws):
                    if draw.cache_number not in cache:
                        cache.put(draw.cache_number, _row(features, row))
            done += len(draws)
            on_sample(done, total)
    finally:
        cache.flush()


def _row(features: dict[Span, tuple[torch.Tensor, ...]], row: int) -> dict[Span, tuple[torch.Tensor, ...]]:
    return {span: tuple(stream[row : row + 1] for stream in streams) for span, streams in features.items()}
