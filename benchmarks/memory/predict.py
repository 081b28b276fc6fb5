"""What the planner says of the benchmark's jobs, beyond interpreter and libraries, from their configurations alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.memory.jobs import Job
from benchmarks.memory.measure import recipe_of
from benchmarks.memory.pipelines import write_configs
from pocketune.atomic import write_text
from pocketune.budget.constants import LEFT_BYTES
from pocketune.budget.training import Shapes, training_phase
from pocketune.models.load import ModelFolder
from pocketune.models.published import PublishedModel
from pocketune.plan.blocks import parse_plan
from pocketune.recipe import Recipe

_PIXELS = 8  # of a latent's side, with the autoencoder that the benchmark's folders name


def predict_job(job: Job) -> int | None:
    """Bytes above the floor at the peak of training.

    None for jobs that do not train, or do more; and for those that leave glibc to keep what was freed, as no job with a memory
    budget does.
    """
    recipe = recipe_of(job, steps=3)
    if job.whole or job.inference or not recipe.saves_memory:
        return None
    if job.wants_text:
        with tempfile.TemporaryDirectory() as root:
            write_configs(job.model, Path(root))
            # Of text encoders and their pipeline, training alone sees first what a whole job's earlier phases leave.
            return _training_bytes(job, recipe, ModelFolder(job.model, Path(root))) + LEFT_BYTES
    return _training_bytes(job, recipe, PublishedModel(job.model))


def _training_bytes(job: Job, recipe: Recipe, folder: ModelFolder) -> int:
    plan = parse_plan(job.skip, folder.block_count)
    shapes = Shapes(side=job.resolution // _PIXELS, tokens=job.text_tokens)
    return training_phase(folder, recipe, plan, shapes, device=torch.device("cpu")).bytes()


def write_predictions(jobs: dict[str, Job], names: Sequence[str], path: Path) -> dict[str, int]:
    """Predict jobs and keep the figures."""
    found = {name: predict_job(jobs[name]) for name in names if name in jobs}
    known = {name: size for name, size in found.items() if size is not None}
    write_text(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return known
