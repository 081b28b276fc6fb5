"""The folder of a run, whichever runtime makes it: new or taken up again, and never left half-made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pocketune.atomic import write_text
from pocketune.errors import Interrupted, RunError

JOB_FILE = "job.json"
SLOW = ("checkpoints/*.safetensors", "class_images/*.png", "features/*/*.safetensors")
"""What takes long to make, and is found again by a resumed run."""


@contextmanager
def run_folder(run: Path, *, resume: bool, fingerprint: str) -> Iterator[None]:
    """Make RUN, or take up an interrupted one; a new RUN that fails before anything in it took long to make is removed again.

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
    if not resume:
        write_text(job_file, json.dumps({"fingerprint": fingerprint}) + "\n")
    try:
        yield
    except BaseException as error:
        worth_keeping = isinstance(error, Interrupted) or any(any(run.glob(made)) for made in SLOW)
        if not existed and not worth_keeping:
            shutil.rmtree(run, ignore_errors=True)
        raise


def _fingerprint(job_file: Path) -> Any:
    try:
        found = json.loads(job_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"cannot read {job_file} ({error}). Choose another --out."
        raise RunError(msg) from error
    return found.get("fingerprint") if isinstance(found, dict) else None
