"""The folder of a run, whichever runtime makes it: its files, and that it is new or taken up again and never left half-made.

What is here is agreed between both runtimes: a run that the one began the other goes on with, and reads the result of.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pocketune.atomic import write_text
from pocketune.errors import Interrupted, RunError

# The result, by what is tuned.
LORA_FILE = Path("lora/pytorch_lora_weights.safetensors")
SCALES_FILE = Path("scales/pocketune_scales.safetensors")
TOKEN_FILE = Path("token/learned_embeds.safetensors")
METHOD_KEY = "pocketune_method"
"""Metadata of a result: the method that made it; a LoRA names none."""
JOB_FILE = "job.json"
# What was measured, here or on a device; its presence says that the run is complete.
RECORD_FILE = "run.json"
DEVICE_RECORD_FILE = "edge.json"
REPORT_FILE = "report.html"
CHECKPOINTS, CLASS_IMAGES, FEATURES = "checkpoints", "class_images", "features"
SLOW = (f"{CHECKPOINTS}/*.safetensors", f"{CLASS_IMAGES}/*.png", f"{FEATURES}/*/*.safetensors")
"""What takes long to make, and is found again by a resumed run."""
CHECKPOINTS_KEPT = 2
"""The newest: one may be damaged."""


def hash_of(parts: Mapping[str, Any]) -> str:
    """A short hash of plain data: the name of what follows from it. Tuples count as lists, 1 and 1.0 differ."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def run_fingerprint(recipe: Mapping[str, Any], *, model: str, photos: Sequence[str]) -> str:
    """A hash of what must not change between the parts of a run.

    Args:
        recipe: all of its fields.
        model: its training fingerprint.
        photos: the sha256 of each file.
    """
    return hash_of({"recipe": recipe, "model": model, "photos": list(photos)})


def checkpoint_file(step: int) -> str:
    """The name of the checkpoint after some steps."""
    return f"step-{step:06d}.safetensors"


def checkpoint_paths(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    return sorted(folder.glob("step-*.safetensors"))


def newest_step(folder: Path) -> int:
    """Finished steps of the newest checkpoint in a folder; 0 if there is none."""
    found = checkpoint_paths(folder)
    return int(found[-1].stem.removeprefix("step-")) if found else 0


def remove_old_checkpoints(folder: Path) -> None:
    """Keep the newest `CHECKPOINTS_KEPT`."""
    for old in checkpoint_paths(folder)[:-CHECKPOINTS_KEPT]:
        old.unlink()


def class_image_paths(run: Path, count: int) -> list[Path]:
    """Where a run keeps the images that the base model makes of the class."""
    return [run / CLASS_IMAGES / f"{number:03d}.png" for number in range(count)]


@contextmanager
def run_folder(run: Path, *, resume: bool, fingerprint: str) -> Iterator[None]:
    """Make RUN, or take up an interrupted one; a new one that fails with nothing in it that took long to make leaves no trace.

    Args:
        run: the folder.
        resume: go on in a folder that is there.
        fingerprint: of all that must not change between the parts of a run.

    Raises:
        RunError: the folder is there and is not to be resumed, holds no such run, or cannot be read.
    """
    job_file = run / JOB_FILE
    try:
        existed = run.exists() and (not run.is_dir() or any(run.iterdir()))
        resumable = job_file.is_file()
        folder = Path(os.path.realpath(run))  # through links, which stay
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
    except OSError as error:
        msg = f"cannot read {run}: {error.strerror or error}. Check its permissions, or choose another --out."
        raise RunError(msg) from error
    if existed and not resume:
        msg = f"{run} exists already. Choose another --out, or go on with --resume."
        raise RunError(msg)
    if resume and not resumable:
        msg = f"{run} holds no interrupted run to resume. Start one without --resume."
        raise RunError(msg)
    if resume and _fingerprint(job_file) != fingerprint:
        msg = f"{run} was started with another recipe, model or photos. Resume with the same ones, or choose another --out."
        raise RunError(msg)
    try:
        if not resume:
            write_text(job_file, json.dumps({"fingerprint": fingerprint}) + "\n")
        yield
    except BaseException as error:
        worth_keeping = isinstance(error, Interrupted) or any(any(folder.glob(made)) for made in SLOW)
        if not existed and not worth_keeping:
            _remove(folder, missing)
        raise


def _remove(folder: Path, missing: Sequence[Path]) -> None:
    """Make a folder empty again, and remove those, innermost first, that were not there before and now are empty."""
    with suppress(OSError):  # what went wrong before is what to tell
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
    with suppress(OSError):
        for place in missing:
            if place.exists():
                place.rmdir()


def _fingerprint(job_file: Path) -> Any:
    try:
        found = json.loads(job_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"cannot read {job_file} ({error}). Choose another --out."
        raise RunError(msg) from error
    return found.get("fingerprint") if isinstance(found, dict) else None
