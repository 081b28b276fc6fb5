"""One row: a few steps of the SDK's own training loop in this process, which must be a fresh one."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.memory.bench import Bench
from benchmarks.memory.jobs import Job
from benchmarks.rows import Row
from pocketune.allocator import name_allocator, return_freed_memory
from pocketune.checkpoint import CheckpointFolder
from pocketune.memory import MemoryLog, read_peak_rss
from pocketune.methods.base import Tuned
from pocketune.models.base import DenoiserAdapter
from pocketune.models.load import ModelFolder
from pocketune.recipe import Recipe
from pocketune.sampling.batches import BatchMaker
from pocketune.scratch import Scratch
from pocketune.step import predict
from pocketune.train import train
from pocketune.tuning import METHODS
from pocketune.weights.layers import PackedLayer

RANK = 16
PROMPT = "a photo of sks toy"


def measure(name: str, job: Job, folder: Path, *, steps: int) -> Row:
    """Train for some steps on random latents and text, or run the adapted model so many times, and say what it took.

    The autoencoder is not loaded, nor are text encoders unless a word trains: their phases lie before. Libraries and
    interpreter are counted.
    """
    recipe = recipe_of(job, steps=steps)
    allocator = name_allocator() + (", freed memory returned" if recipe.saves_memory and return_freed_memory() else "")
    model = ModelFolder(job.model, folder)
    floor = read_peak_rss() or 0
    with MemoryLog(interval_s=0.02) as memory, tempfile.TemporaryDirectory(dir=folder) as work:
        memory.phase("loading")
        bench = Bench.of(model, job, recipe)
        tuned = METHODS[recipe.method].attach(bench.adapter, plan=bench.plan, recipe=recipe, folder=model)
        memory.phase("inference" if job.inference else "training")
        marks = [_now()]

        def on_step(*_: Any) -> None:
            marks.append(_now())

        found = _infer(bench, tuned, on_step) if job.inference else _train(bench, tuned, Path(work), on_step)
    peaks = memory.peaks()
    spans = list(zip(marks[1:], marks[:-1], strict=True))
    return {
        **identity_of(name, job),
        **found,
        "packed_bytes": _packed_bytes(bench.adapter),
        "steps": steps,
        "peak_rss_bytes": read_peak_rss(),
        "peak_anonymous_bytes": max(reading.anonymous_bytes for reading in peaks.values()),
        "peak_file_bytes": max(reading.file_bytes for reading in peaks.values()),
        "floor_bytes": floor,
        "loading_rss_bytes": peaks["loading"].rss_bytes,
        "cpu_s_per_step": [round(a[0] - b[0], 2) for a, b in spans],
        "wall_s_per_step": [round(a[1] - b[1], 2) for a, b in spans],
        "threads": torch.get_num_threads(),
        "allocator": allocator,
        "torch": torch.__version__,
    }


def _train(bench: Bench, tuned: Tuned, work: Path, on_step: Callable[..., None]) -> Row:
    recipe = bench.recipe
    scratch = Scratch(work) if recipe.activations == "on_disk" else None
    losses = train(
        bench.adapter,
        tuned,
        bench.plan,
        recipe,
        [()] * recipe.steps,
        cast(BatchMaker, bench.batches),
        cache=None,
        checkpoints=CheckpointFolder(work, fingerprint=""),
        scratch=scratch,
        on_step=on_step,
    )
    return {
        "trained_parameters": sum(parameter.numel() for parameter in tuned.parameters.values()),
        "finite": all(torch.isfinite(torch.tensor(losses)).tolist()),
        "spilled_bytes_per_step": 0 if scratch is None else scratch.written_bytes // recipe.steps,
    }


@torch.no_grad()
def _infer(bench: Bench, tuned: Tuned, on_step: Callable[..., None]) -> Row:
    finite = True
    for _ in range(bench.recipe.steps):
        finite = finite and bool(torch.isfinite(predict(bench.adapter, bench.plan, bench.batches(()))).all())
        on_step()
    adapted = sum(parameter.numel() for parameter in tuned.parameters.values())
    return {"trained_parameters": 0, "adapter_parameters": adapted, "finite": finite, "spilled_bytes_per_step": 0}


def _packed_bytes(adapter: DenoiserAdapter) -> int:
    """Of weights that are held in few bits."""
    layers = [module for module in adapter.model.modules() if isinstance(module, PackedLayer)]
    return sum(buffer.nbytes for layer in layers for buffer in layer.buffers(recurse=False))


def _now() -> tuple[float, float]:
    """CPU seconds of the process, and seconds of the wall's clock."""
    return time.process_time(), time.monotonic()


def recipe_of(job: Job, *, steps: int) -> Recipe:
    """What is asked of a row's training."""
    asked = {"instance_prompt": PROMPT, "steps": steps, "checkpoint_every": steps, "skip": job.skip, "rank": RANK}
    return Recipe.create(**Recipe.relevant(asked | job.settings))


def identity_of(name: str, job: Job) -> Row:
    """What was asked, and a hash of it."""
    return {
        "job": name,
        "settings": hashlib.sha256(repr((job.asked, RANK)).encode()).hexdigest()[:8],
        "title": job.title,
        "compared": job.compared,
        "recipe": {key: value for key, value in job.settings.items() if key != "lora_targets"},
        "rank": job.settings.get("rank", RANK),
        "weights": "random bfloat16, a block of 64 MB repeated; arithmetic in float32",
    }
