"""One row of a whole personalization in this process, which must be a fresh one: the peak of every phase."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory.jobs import Job
from benchmarks.memory.measure import PROMPT, RANK, identity_of
from benchmarks.rows import Row
from pocketune.allocator import name_allocator
from pocketune.job import personalize
from pocketune.memory import read_peak_rss
from pocketune.recipe import Recipe

PHOTOS = Path(__file__).parent.parent.parent / "demo" / "photos" / "toy" / "toy-1.jpg"


def measure_whole(name: str, job: Job, folder: Path, *, steps: int, photos: Sequence[Path] = (PHOTOS,)) -> Row:
    """Photos, text encoders, VAE, features, training, checkpoint and samples, with one prompt and two sampling steps."""
    asked: dict[str, Any] = {
        "instance_prompt": PROMPT,
        "sample_prompts": (PROMPT,),
        "sample_steps": 2,
        "learning_rate": 1e-2,
        "rank": RANK,
        "steps": steps,
        "checkpoint_every": steps,
        "skip": job.skip,
        "resolution": job.resolution,
    }
    recipe = Recipe.create(**Recipe.relevant(asked | job.settings))
    floor = read_peak_rss() or 0
    with tempfile.TemporaryDirectory(dir=folder) as work:
        record = personalize(photos, recipe=recipe, out=Path(work) / "run", model=folder, device="cpu")
    peaks = record.peaks
    return {
        **identity_of(name, job),
        "steps": steps,
        "peak_rss_bytes": read_peak_rss(),
        "peak_anonymous_bytes": max(reading.anonymous_bytes for reading in peaks.values()),
        "peak_file_bytes": max(reading.file_bytes for reading in peaks.values()),
        "floor_bytes": floor,
        "phase_peak_rss_bytes": {phase: reading.rss_bytes for phase, reading in peaks.items()},
        "phase_wall_s": {phase: round(seconds, 1) for phase, seconds in record.seconds.items()},
        "threads": torch.get_num_threads(),
        "allocator": name_allocator(),
        "torch": torch.__version__,
    }
