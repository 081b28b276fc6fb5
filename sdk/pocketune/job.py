"""The main job: photos in, a LoRA, pictures and a report out. Its phases run one after the other, each freeing what it used."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image

from pocketune.allocator import return_freed_memory
from pocketune.atomic import replacing, write_text
from pocketune.checkpoint import CheckpointFolder
from pocketune.errors import Interrupted, RecipeError, RunError
from pocketune.features.cache import cache_key
from pocketune.memory import MemoryLog
from pocketune.models.load import open_model
from pocketune.phases import Phases, photo_hashes
from pocketune.photos import Photo, load_photos
from pocketune.progress import OnProgress, ignore
from pocketune.recipe import Recipe
from pocketune.record import CheckResult, RunRecord
from pocketune.report import write_report
from pocketune.sample import default_device
from pocketune.sampling.draws import Kind, refresh_periods

MAX_PHOTO_SIDE = 2048
_LIBRARIES = ("pocketune", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "pillow")


def personalize(
    photos: str | Path | Sequence[str | Path],
    *,
    recipe: Recipe,
    out: str | Path,
    model: str | Path = "pocket-sd3",
    features: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    on_progress: OnProgress = ignore,
) -> RunRecord:
    """Train a LoRA of the subject in some photos.

    Args:
        photos: a folder, a file, or several of either.
        recipe: what is asked.
        out: the RUN folder to make; it must not exist unless `resume` is set.
        model: built-in name, diffusers folder or hub id.
        features: folder of feature caches that runs share; default: inside RUN.
        resume: go on from the newest checkpoint in `out`.
        device: torch device; default: CUDA where there is one.
        on_progress: called with every bit of progress.

    Returns:
        What was measured; RUN holds the LoRA, the pictures, `report.html` and `run.json`.

    Raises:
        PhotoError, ModelError, PlanError, RecipeError, RunError: bad input; nothing is left behind.
        Interrupted: on Ctrl-C, after a checkpoint was saved.
        NoEffectError: the trained adapter does nothing.
    """
    if features is not None and recipe.refresh_every:
        msg = "runs cannot share features that refresh_every removes while they train. Leave out the one or the other."
        raise RecipeError(msg)
    run = Path(out)
    if recipe.weights == "streamed" or recipe.activations != "kept":
        return_freed_memory()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with MemoryLog() as memory:
        folder = open_model(model)
        recipe = folder.family.complete(recipe)
        job = Phases(recipe, folder, run, torch.device(device or default_device()), memory, on_progress)
        with job.phase("photos"):
            pictures = load_photos(photos, max_side=MAX_PHOTO_SIDE)
        job.check_resolution()
        plan = job.plan_blocks()
        fingerprint = cache_key(
            {"recipe": recipe.model_dump(), "model": job.folder.fingerprint(), "photos": photo_hashes(pictures)}
        )
        with _run_folder(run, resume=resume, fingerprint=fingerprint):
            prompts = job.encode_prompts()
            images: dict[Kind, Sequence[Image.Image]] = {
                "instance": [photo.image for photo in pictures],
                "class": job.make_class_images(),
            }
            batches = job.draw(images)
            root = Path(features) if features else run / "features"
            checkpoints = CheckpointFolder(run / "checkpoints", fingerprint=fingerprint)
            for steps in refresh_periods(recipe):
                if steps.stop <= checkpoints.newest_step and steps.stop < recipe.steps:
                    continue  # trained before the run was stopped; its features may be gone
                period = batches[steps.start : steps.stop]
                make_batch = job.encode(images, period, prompts)
                cache = job.fill_cache(plan, period, make_batch, prompts, root, pictures)
                losses, norms = job.train(plan, batches, make_batch, cache, checkpoints, stop=steps.stop)
            pairs, change = job.sample_pairs()
            record = RunRecord(
                model=job.folder.source,
                model_kind=job.folder.denoiser_kind,
                model_note=job.folder.note(),
                recipe=recipe,
                plan=job.describe(plan),
                losses=losses,
                memory=memory.rows,
                peaks=memory.peaks(),
                seconds=dict(job.seconds),
                photos=tuple(photo.name for photo in pictures),
                samples=pairs,
                check=CheckResult(nonzero=any(norms.values()), loads=True, image_change=change, norms=norms),
                versions={name: version(name) for name in _LIBRARIES},
                started=started,
            )
            _save_thumbnails(pictures, run / "photos")
            write_report(record, run)
    return record


@contextmanager
def _run_folder(run: Path, *, resume: bool, fingerprint: str) -> Iterator[None]:
    """Make RUN, or take up an interrupted one; a new RUN that fails before its first checkpoint is removed again."""
    job_file = run / "job.json"
    existed = run.exists() and (not run.is_dir() or any(run.iterdir()))
    if existed and not resume:
        msg = f"{run} exists already. Choose another --out, or go on with --resume."
        raise RunError(msg)
    if resume and not job_file.exists():
        msg = f"{run} holds no interrupted run to resume. Start one without --resume."
        raise RunError(msg)
    if resume and json.loads(job_file.read_text(encoding="utf-8")).get("fingerprint") != fingerprint:
        msg = f"{run} was started with another recipe, model or photos. Resume with the same ones, or choose another --out."
        raise RunError(msg)
    if not resume:
        write_text(job_file, json.dumps({"fingerprint": fingerprint}) + "\n")
    try:
        yield
    except BaseException as error:
        worth_keeping = isinstance(error, Interrupted) or any((run / "checkpoints").glob("*.safetensors"))
        if not existed and not worth_keeping:
            shutil.rmtree(run, ignore_errors=True)
        raise


def _save_thumbnails(pictures: Sequence[Photo], folder: Path) -> None:
    for photo in pictures:
        small = photo.image.copy()
        small.thumbnail((256, 256))
        with replacing(folder / f"{hashlib.sha256(photo.name.encode()).hexdigest()[:8]}.jpg") as partial:
            small.save(partial, format="JPEG", quality=85)
