"""What training is fed with: encoded prompts, the draws of every step, and the latents of their crops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from pocketune.models.base import Prompt
from pocketune.phases.state import Job
from pocketune.photos import Photo
from pocketune.sampling.batches import BatchMaker, NoiseSchedule, crop_key, encode_crops
from pocketune.sampling.choices import choose, lower
from pocketune.sampling.draws import Draw, Kind, draw_samples, step_draws


def encode_prompts(job: Job) -> dict[Kind, Prompt]:
    """Text embeddings of the prompts that training uses."""
    wanted: dict[Kind, str] = {"instance": job.recipe.instance_prompt}
    if job.recipe.class_prompt:
        wanted["class"] = job.recipe.class_prompt
    with job.watch.phase("text"):
        encoded = job.folder.encode_prompts(list(wanted.values()), device=job.device, weights=job.parts_residence)
    return {kind: encoded[text] for kind, text in wanted.items()}


def draw(job: Job, photos: Sequence[Photo]) -> list[tuple[Draw, ...]]:
    """The draws of every step; class images need not be there yet."""
    class_count = 0 if job.recipe.class_prompt is None else job.recipe.class_images
    sizes: dict[Kind, list[tuple[int, int]]] = {
        "instance": [photo.image.size for photo in photos],
        "class": [(job.resolution, job.resolution)] * class_count,
    }
    positions = 1.0 - job.recipe.timestep_high / 1000, 1.0 - job.recipe.timestep_low / 1000
    of_photos, of_class = (
        draw_samples(job.recipe, found, kind=kind, choose_crop=job.patches, positions=positions) if found else ()
        for kind, found in sizes.items()
    )
    batches = step_draws(job.recipe, of_photos, of_class)
    if job.recipe.gradient == "mixed":
        job.choices = choose(job.recipe, batches, NoiseSchedule.of(job.folder.scheduler()).shares())
        batches = lower(batches, job.choices)
    return batches


def encode(
    job: Job,
    images: Mapping[Kind, Sequence[Image.Image]],
    batches: Sequence[Sequence[Draw]],
    prompts: dict[Kind, Prompt],
) -> BatchMaker:
    """Encode the crops of some steps' draws; of those encoded before, the ones that occur again are kept."""
    draws = {crop_key(draw): draw for draws in batches for draw in draws}
    for key in job.posteriors.keys() - draws.keys():
        del job.posteriors[key]
    missing = [draw for key, draw in draws.items() if key not in job.posteriors]
    if missing:
        with job.watch.phase("latents"):
            vae = job.folder.load_vae(device=job.device, weights=job.parts_residence, tile=job.recipe.vae_tile)
            job.posteriors |= encode_crops(
                vae,
                images,
                missing,
                resolution=job.patches.smallest,
                low_resolution=job.low_resolution,
                canvas=job.canvas,
                on_crop=lambda done, total: job.watch.tell("latents", done, total, "photo"),
            )
            del vae
    return BatchMaker(
        job.posteriors,
        prompts,
        job.folder.scheduler(),
        prior_loss_weight=job.recipe.prior_loss_weight,
        device=job.device,
        dtype=job.dtype,
        with_sizes=job.folder.family.takes_sizes,
    )
