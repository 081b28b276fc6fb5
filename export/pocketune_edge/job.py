"""The main job on a device: photos in, a LoRA or scales out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime

from pocketune.allocator import return_freed_memory
from pocketune.atomic import write_text
from pocketune.memory import MemoryLog
from pocketune.photos import MAX_PHOTO_SIDE, load_photos
from pocketune.progress import OnProgress, ignore
from pocketune.runfolder import CHECKPOINTS, DEVICE_RECORD_FILE, hash_of, newest_step, run_fingerprint, run_folder
from pocketune.sampling.draws import refresh_periods
from pocketune.watch import Watch
from pocketune_edge.bundle import Bundle, open_bundle, telling
from pocketune_edge.delta import RESULTS
from pocketune_edge.phases import Job
from pocketune_edge.session import check_threads
from pocketune_edge.settings import check_changes, settings_of
from pocketune_edge.state import CheckpointFolder
from pocketune_edge.versions import installed_version

_LIBRARIES = ("pocketune", "numpy", "pillow", "safetensors", "tokenizers")


def personalize(
    bundle: str | Path,
    photos: str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    changes: dict[str, Any] | None = None,
    streaming: bool = False,
    resume: bool = False,
    threads: int | None = None,
    on_progress: OnProgress = ignore,
) -> dict[str, Any]:
    """Train what the bundle trains, LoRA or scales, on the subject in some photos.

    Args:
        bundle: folder or archive written by `export-trainable`.
        photos: a folder, a file, or several of either.
        out: the RUN folder to make; it must not exist unless `resume` is set.
        changes: settings that differ from the bundle's recipe, of `settings.CHANGEABLE`.
        streaming: run block by block, for less memory.
        resume: go on from the newest checkpoint in `out`, whichever runtime wrote it.
        threads: of ONNX Runtime; None leaves the choice to it.
        on_progress: called with every bit of progress.

    Returns:
        What RUN/edge.json holds.

    Raises:
        BundleError, PhotoError, SettingError, PlanError, RunError: bad input; nothing is left behind.
        Interrupted: on Ctrl-C, after a checkpoint was saved.
        NoEffectError: training changed nothing.
    """
    run = Path(out)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    versions = {name: installed_version(name) for name in _LIBRARIES} | {"onnxruntime": onnxruntime.__version__}
    check_threads(threads)
    check_changes(changes or {})
    if streaming:
        return_freed_memory()
    with MemoryLog() as memory:
        memory.phase("bundle")
        opened = open_bundle(bundle, on_bytes=telling(on_progress))
        settings, recipe = settings_of(opened.manifest, changes or {})
        job = Job(opened, settings, run, streaming, threads, Watch(memory, on_progress))
        with job.phase("photos"):
            loaded = load_photos(photos, max_side=MAX_PHOTO_SIDE)
        hashes = [photo.sha256 for photo in loaded]
        identity = run_fingerprint(recipe, model=opened.manifest.model.sha256, photos=hashes)
        job.check()
        with run_folder(run, resume=resume, fingerprint=identity):
            prompts = job.encode_prompts()
            batches, make_batch = job.prepare_samples(loaded, job.make_class_images(), prompts)
            checkpoints = CheckpointFolder(run / CHECKPOINTS, opened.manifest.tuned, fingerprint=identity)
            content = {"run": identity, "bundle": _content(opened)}
            for steps in refresh_periods(settings):
                if steps.stop <= newest_step(checkpoints.folder) and steps.stop < settings.steps:
                    continue  # trained before the run was stopped; its features may be gone
                period = batches[steps.start : steps.stop]
                of_pool = {"from": steps.start} if settings.refresh_every else {}
                cache = job.fill_cache(period, make_batch, hash_of(content | of_pool))
                state = job.train(batches, make_batch, cache, checkpoints, stop=steps.stop)
            record = {
                "model": asdict(opened.manifest.model),
                "recipe": recipe,
                "streaming": streaming,
                "method": opened.manifest.tuned.method,
                "result": RESULTS[opened.manifest.tuned.method].as_posix(),
                "weights": asdict(opened.manifest.weights),
                "losses": state.losses,
                "feature_cache_bytes": job.cache_bytes,
                "peaks": {name: asdict(reading) for name, reading in memory.peaks().items()},
                "seconds": job.watch.seconds,
                "step_cpu_seconds": job.step_cpu_seconds,
                "photos": [photo.name for photo in loaded],
                "versions": versions,
                "started": started,
            }
            write_text(run / DEVICE_RECORD_FILE, json.dumps(record, indent=1) + "\n")
    return record


def _content(bundle: Bundle) -> list[list[str]]:
    """What features depend on: bundles of other precision give other features."""
    return [[file.path, file.sha256] for file in bundle.manifest.files]
