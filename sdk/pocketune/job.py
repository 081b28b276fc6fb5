"""The main job: photos in, a LoRA, images and a report out. Its phases run one after the other, each freeing what it used."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from pocketune.allocator import return_freed_memory
from pocketune.atomic import replacing
from pocketune.budget.planning import measured_floor
from pocketune.budget.search import MemoryPlan
from pocketune.checkpoint import CheckpointFolder
from pocketune.errors import Interrupted, RecipeError
from pocketune.memory import MemoryLog
from pocketune.models.fingerprint import training_fingerprint
from pocketune.models.load import open_model
from pocketune.phases.blocks import check_resolution, plan_blocks
from pocketune.phases.budget import exceeded, guard_of, keep_memory_plan, memory_plan_of, predicted
from pocketune.phases.features import check_cache, fill_cache, photo_hashes
from pocketune.phases.images import make_class_images, sample_pairs
from pocketune.phases.inputs import draw, encode, encode_prompts
from pocketune.phases.state import Job
from pocketune.phases.training import train_and_save
from pocketune.photos import MAX_PHOTO_SIDE, Photo, load_photos
from pocketune.progress import OnProgress, ignore
from pocketune.recipe import Recipe
from pocketune.record import CheckResult, RunRecord
from pocketune.report import write_report
from pocketune.runfolder import CHECKPOINTS, FEATURES, JOB_FILE, run_fingerprint, run_folder
from pocketune.sample import check_steps, device_named
from pocketune.sampling.draws import Kind, refresh_periods
from pocketune.units import parse_size
from pocketune.watch import Watch

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
    memory_budget: str | int | None = None,
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
        memory_budget: main memory that the job may take, in bytes or as "1GiB". The fastest settings that fit are planned
            before anything starts, and the job stops with a checkpoint rather than take more.
        on_progress: called with every bit of progress.

    Returns:
        What was measured; RUN holds the LoRA, the images, `report.html` and `run.json`.

    Raises:
        PhotoError, ModelError, PlanError, RecipeError, RunError: bad input; nothing is left behind.
        Interrupted: on Ctrl-C, after a checkpoint was saved.
        BudgetError: memory came near the budget; what was done is kept.
        NoEffectError: the trained adapter does nothing.
    """
    return run_job(
        photos,
        recipe=recipe,
        out=out,
        model=model,
        features=features,
        resume=resume,
        device=device,
        memory_budget=memory_budget,
        on_progress=on_progress,
    )


def run_job(
    photos: str | Path | Sequence[str | Path],
    *,
    recipe: Recipe,
    out: str | Path,
    model: str | Path,
    features: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    memory_budget: str | int | None = None,
    made_plan: dict[str, Any] | None = None,
    on_progress: OnProgress = ignore,
) -> RunRecord:
    """What `personalize` does, for the command line, which plans memory before this process has its libraries.

    `made_plan` is that memory plan, of `pocketune.budget.apart`; without one it is made now, by a process beside this one. All
    other arguments are those of `personalize`, and so are the errors.
    """
    if features is not None and recipe.refresh_every:
        msg = "runs cannot share features that refresh_every removes while they train. Leave out the one or the other."
        raise RecipeError(msg)
    budget_bytes = None if memory_budget is None else parse_size(str(memory_budget))
    torch_device = device_named(device)
    run = Path(out)
    if recipe.saves_memory or memory_budget is not None:
        return_freed_memory()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with MemoryLog() as memory:
        folder = open_model(model)
        recipe = folder.family.complete(recipe)
        watch = Watch(memory, on_progress)
        floor_bytes = 0 if budget_bytes is None else measured_floor(folder)
        with watch.phase("photos"):
            loaded = load_photos(photos, max_side=MAX_PHOTO_SIDE)
        if budget_bytes is None:
            job = Job(recipe, folder, run, torch_device, watch)
            return _run(job, loaded, features=features, resume=resume, started=started)
        memory_plan = memory_plan_of(
            recipe,
            budget_bytes,
            model=str(model),
            floor_bytes=floor_bytes,
            run=run,
            resume=resume,
            photos=[str(one) for one in ([photos] if isinstance(photos, str | Path) else photos)],
            device=torch_device,
            made=made_plan,
            watch=watch,
        )
        guard = guard_of(memory_plan, torch_device)
        watch.guarded_by(guard)
        try:
            job = Job(memory_plan.recipe, folder, run, torch_device, watch)
            return _run(job, loaded, features=features, resume=resume, started=started, memory_plan=memory_plan)
        except (Interrupted, KeyboardInterrupt) as error:
            if guard.tripped is None:
                raise
            raise exceeded(guard, memory_plan, watch.current, kept=(run / JOB_FILE).is_file()) from error


def _run(
    job: Job,
    photos: Sequence[Photo],
    *,
    features: str | Path | None,
    resume: bool,
    started: str,
    memory_plan: MemoryPlan | None = None,
) -> RunRecord:
    """All phases but the photos and the memory plan."""
    recipe = job.recipe
    check_resolution(job)
    check_steps(job.folder, recipe.sample_steps)
    plan = plan_blocks(job)
    fingerprint = run_fingerprint(recipe.model_dump(), model=training_fingerprint(job.folder), photos=photo_hashes(photos))
    batches = draw(job, photos)
    check_cache(job, plan, batches)
    with run_folder(job.run, resume=resume, fingerprint=fingerprint):
        if memory_plan is not None:
            keep_memory_plan(memory_plan, job.run)
        prompts = encode_prompts(job)
        images: dict[Kind, Sequence[Image.Image]] = {
            "instance": [photo.image for photo in photos],
            "class": make_class_images(job),
        }
        root = Path(features) if features else job.run / FEATURES
        checkpoints = CheckpointFolder(job.run / CHECKPOINTS, fingerprint=fingerprint)
        for steps in refresh_periods(recipe):
            if steps.stop <= checkpoints.newest_step and steps.stop < recipe.steps:
                continue  # trained before the run was stopped; its features may be gone
            period = batches[steps.start : steps.stop]
            make_batch = encode(job, images, period, prompts)
            cache = fill_cache(job, plan, period, make_batch, root, photos, images["class"])
            losses, norms = train_and_save(job, plan, batches, make_batch, cache, checkpoints, stop=steps.stop)
        pairs, change = sample_pairs(job)
        record = RunRecord(
            model=job.folder.source,
            model_kind=job.folder.denoiser_kind,
            model_note=job.folder.note(),
            recipe=recipe,
            plan=job.describe(plan),
            losses=losses,
            memory=job.watch.memory.rows,
            peaks=job.watch.memory.peaks(),
            seconds=dict(job.watch.seconds),
            photos=tuple(photo.name for photo in photos),
            samples=pairs,
            check=CheckResult(image_change=change, norms=norms),
            versions={name: version(name) for name in _LIBRARIES},
            started=started,
            prediction=None if memory_plan is None else predicted(memory_plan),
        )
        _save_thumbnails(photos, job.run / "photos")
        write_report(record, job.run)
    return record


def _save_thumbnails(photos: Sequence[Photo], folder: Path) -> None:
    for photo in photos:
        small = photo.image.copy()
        small.thumbnail((256, 256))
        with replacing(folder / f"{hashlib.sha256(photo.name.encode()).hexdigest()[:8]}.jpg") as partial:
            small.save(partial, format="JPEG", quality=85)
