"""One row: a few steps of the SDK's own training loop in this process, which must be a fresh one."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.memory.jobs import Job
from benchmarks.rows import Row
from pocketune.allocator import name_allocator, return_freed_memory
from pocketune.budget.inputs import shaped_batch
from pocketune.checkpoint import CheckpointFolder
from pocketune.memory import MemoryLog, read_peak_rss
from pocketune.methods.scales import quantization_of
from pocketune.models.base import DenoiserAdapter
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan, parse_plan
from pocketune.recipe import Recipe
from pocketune.sampling.batches import BatchMaker
from pocketune.sampling.draws import Draw
from pocketune.scratch import Scratch
from pocketune.step import Batch, predict
from pocketune.train import train
from pocketune.tuning import METHODS
from pocketune.weights.fill import RESIDENT, Residence
from pocketune.weights.layers import PackedLayer

RANK = 16


def measure(name: str, job: Job, folder: Path, *, steps: int) -> Row:
    """Train for some steps on random latents and text, or run the adapted model so many times, and say what it took.

    Text encoders and the autoencoder are not loaded: their phases lie before. Libraries and interpreter are counted.
    """
    recipe = recipe_of(job, steps=steps)
    allocator = name_allocator() + (", freed memory returned" if recipe.saves_memory and return_freed_memory() else "")
    model = ModelFolder(job.model, folder)
    floor = read_peak_rss() or 0
    with MemoryLog(interval_s=0.02) as memory, tempfile.TemporaryDirectory(dir=folder) as work:
        memory.phase("loading")
        plan = parse_plan(job.skip, model.block_count)
        side = job.resolution // (model.native_resolution // model.sizes.native)
        adapter = model.load_denoiser(
            dtype=torch.float32,
            device=torch.device("cpu"),
            blocks=plan.kept,
            weights=Residence(streamed=True, bits=recipe.weight_bits) if recipe.weights == "streamed" else RESIDENT,
            quantization=quantization_of(recipe),
            latent_side=side,
        )
        batches = RandomBatches(model, adapter, plan, side=side, text_tokens=job.text_tokens)
        marks: list[tuple[float, float]] = []
        run = _infer if job.inference else _train
        found = run(adapter, model, plan, recipe, batches, memory=memory, work=Path(work), marks=marks)
    peaks = memory.peaks()
    spans = list(zip(marks[1:], marks[:-1], strict=True))
    return {
        **identity_of(name, job),
        **found,
        "packed_bytes": _packed_bytes(adapter),
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


def _train(
    adapter: DenoiserAdapter,
    model: ModelFolder,
    plan: BlockPlan,
    recipe: Recipe,
    batches: RandomBatches,
    *,
    memory: MemoryLog,
    work: Path,
    marks: list[tuple[float, float]],
) -> Row:
    tuned = METHODS[recipe.method].attach(adapter, plan=plan, recipe=recipe, folder=model)
    memory.phase("training")
    scratch = Scratch(work) if recipe.activations == "on_disk" else None
    marks.append(_now())
    losses = train(
        adapter,
        tuned,
        plan,
        recipe,
        [()] * recipe.steps,
        cast(BatchMaker, batches),
        cache=None,
        checkpoints=CheckpointFolder(work, fingerprint=""),
        scratch=scratch,
        on_step=lambda *_: marks.append(_now()),
    )
    return {
        "trained_parameters": sum(parameter.numel() for parameter in tuned.parameters.values()),
        "finite": all(torch.isfinite(torch.tensor(losses)).tolist()),
        "spilled_bytes_per_step": 0 if scratch is None else scratch.written_bytes // recipe.steps,
    }


@torch.no_grad()
def _infer(
    adapter: DenoiserAdapter,
    model: ModelFolder,
    plan: BlockPlan,
    recipe: Recipe,
    batches: RandomBatches,
    *,
    memory: MemoryLog,
    work: Path,  # noqa: ARG001 - as of _train
    marks: list[tuple[float, float]],
) -> Row:
    tuned = METHODS[recipe.method].attach(adapter, plan=plan, recipe=recipe, folder=model)
    memory.phase("inference")
    marks.append(_now())
    finite = True
    for _ in range(recipe.steps):
        finite = finite and bool(torch.isfinite(predict(adapter, plan, batches(()))).all())
        marks.append(_now())
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
    settings = {"rank": RANK} | job.settings
    return Recipe.create(instance_prompt=job.title, steps=steps, checkpoint_every=steps, skip=job.skip, **settings)


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


class RandomBatches:
    """Stands for a `BatchMaker`: random tensors in the shapes of a job, with features of the skipped spans."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, model: ModelFolder, adapter: DenoiserAdapter, plan: BlockPlan, *, side: int, text_tokens: int) -> None:
        self._model, self._adapter, self._plan = model, adapter, plan
        self._side, self._text_tokens = side, text_tokens
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, draws: Sequence[Draw], features: Any = None) -> Batch:  # noqa: ARG002 - all is random here
        """The inputs of a step, with features of the skipped spans."""
        sigma = torch.full((1,), 0.6)
        alphas = None if self._model.family.flow_matching else (1 - sigma**2) ** 0.5
        batch = shaped_batch(
            self._model, self._adapter, self._plan, self._random, samples=1, side=self._side, tokens=self._text_tokens
        )
        return replace(batch, timesteps=1000 * sigma, sigmas=sigma, alphas=alphas, loss_weights=torch.ones(1))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)
