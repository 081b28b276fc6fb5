"""The pass that stores what skipped blocks contribute."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from pocketune.budget.inputs import text_tokens
from pocketune.errors import Interrupted
from pocketune.features.cache import FeatureCache
from pocketune.features.precompute import check_bound, precompute, predicted_bytes
from pocketune.features.shards import remove_other_caches
from pocketune.models.fingerprint import training_fingerprint
from pocketune.phases.state import Job
from pocketune.photos import Photo
from pocketune.plan.blocks import BlockPlan
from pocketune.runfolder import hash_of
from pocketune.sampling.batches import BatchMaker
from pocketune.sampling.draws import Draw, refresh_periods


def check_cache(job: Job, plan: BlockPlan, batches: Sequence[Sequence[Draw]]) -> None:
    """Refuse features that would take more disk than `cache_limit_mb`, before anything is made.

    Args:
        job: the personalization.
        plan: what is skipped.
        batches: the draws of all steps; of those, only a pool at a time lies on disk.

    Raises:
        PlanError: with the settings that would make them fit.
    """
    if not plan.skipped or not job.recipe.use_residuals:
        return
    pools = [
        {draw.cache_number: draw.low for draws in batches[steps.start : steps.stop] for draw in draws}
        for steps in refresh_periods(job.recipe)
    ]
    draw_bytes = {
        low: predicted_bytes(
            job.folder,
            plan,
            side=job.low_resolution if low else job.patches.smallest,
            text_tokens=text_tokens(job.folder),
            draws=1,
            dtype=getattr(torch, job.recipe.cache_dtype),
        )
        for low in {low for pool in pools for low in pool.values()}
    }
    needed, draws = max((sum(draw_bytes[low] for low in pool.values()), len(pool)) for pool in pools)
    check_bound(needed, limit_mb=job.recipe.cache_limit_mb, draws=draws)


def fill_cache(
    job: Job,
    plan: BlockPlan,
    batches: Sequence[Sequence[Draw]],
    make_batch: BatchMaker,
    root: Path,
    photos: Sequence[Photo],
    class_images: Sequence[Image.Image],
) -> FeatureCache | None:
    """Run the frozen model over the draws of some steps and store what skipped spans contribute.

    Where the pool is refreshed, what earlier steps needed is removed first.
    """
    if not plan.skipped or not job.recipe.use_residuals:
        return None
    cache_dtype: torch.dtype = getattr(torch, job.recipe.cache_dtype)
    key = features_key(job, plan, batches, photos, class_images)
    if job.recipe.refresh_every:
        remove_other_caches(root, keep=key)
    cache = FeatureCache(root / key, spans=plan.skipped_spans, dtype=cache_dtype)
    with job.watch.phase("features"):
        adapter = job.denoiser(range(plan.skipped_spans[-1].stop))
        try:
            precompute(
                adapter,
                plan,
                batches,
                make_batch,
                cache,
                on_sample=lambda done, total: job.watch.tell("features", done, total, "sample"),
            )
        except KeyboardInterrupt as error:
            msg = "stopped while computing features; what is done is kept. Give the same command with --resume to go on."
            raise Interrupted(msg) from error
        del adapter
    job.cache_bytes = max(job.cache_bytes, cache.size_bytes)
    job.cache_error = max(job.cache_error, cache.relative_error)
    return cache


def features_key(
    job: Job,
    plan: BlockPlan,
    batches: Sequence[Sequence[Draw]],
    photos: Sequence[Photo],
    class_images: Sequence[Image.Image],
) -> str:
    """The name of the cache: a hash of all that features follow from, so that runs may share a folder of caches."""
    return hash_of(
        {
            "model": training_fingerprint(job.folder),
            "photos": photo_hashes(photos),
            "class_images": [hashlib.sha256(image.tobytes()).hexdigest() for image in class_images],
            "prompts": [job.recipe.instance_prompt, job.recipe.class_prompt],
            "skipped": plan.skipped,
            "draws": [[draw.as_dict() for draw in draws] for draws in batches],
            "resolution": [job.patches.smallest, job.low_resolution, job.recipe.vae_tile],
            "canvas": job.canvas,
            "dtypes": [
                job.recipe.dtype,
                job.recipe.cache_dtype,
                job.recipe.weights,
                job.recipe.weight_bits,
                job.recipe.quantizer,
            ],
        }
    )


def photo_hashes(photos: Sequence[Photo]) -> list[str]:
    """The sha256 of each photo's file."""
    return [photo.sha256 for photo in photos]
