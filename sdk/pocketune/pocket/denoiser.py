"""Train the denoiser of a built-in model (stage 3 of the training script); one loop for every architecture.

Latents are computed once; every sample then draws its own noise, timestep and caption. The learning rate warms up, stays, and
decays at the end, so that a longer run can go on from any restart point of the plateau.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pocketune.pocket.pool import LatentPool, training_caption
from pocketune.pocket.runs import StageRun

DECAY_SHARE = 0.25
EMA_DECAY = 0.999


class Objective(Protocol):
    """What an architecture is trained for."""

    def draw(
        self, latents: Tensor, captions: list[str], rng: np.random.Generator, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """The inputs of `loss`, each (batch, ...), with everything that is random in them."""

    def loss(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """The mean loss of a batch, or of a process's share of it."""


@dataclass(frozen=True, kw_only=True)
class PocketDenoiser:
    """What the training of a built-in model must know of its architecture.

    Attributes:
        component: folder and attribute of the denoiser in the pipeline.
        new: an untrained denoiser, from the global random state.
        objective: called with the denoiser, the folder of the trained text encoders, and the device.
        pipeline: the parts of the working folder as a stock diffusers pipeline.
        learning_rate: of the plateau.
        batches: samples a batch by image side in pixels.
        small_share: the share of batches of the small side, from the share of steps that are done.
        summary: of the model card, lines.
        example: of the model card, lines of code.
    """

    component: str
    new: Callable[[], Any]
    objective: Callable[[Any, Path, torch.device], Objective]
    pipeline: Callable[[Path], Any]
    learning_rate: float
    batches: Mapping[int, int]
    small_share: Callable[[float], float]
    summary: tuple[str, ...]
    example: tuple[str, ...]


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm up for 150 steps, stay at 1, then fall along a half cosine to 1 % over the last quarter."""
    decay_from = steps * (1 - DECAY_SHARE)
    warm = min(1.0, (step + 1) / 150)
    if step < decay_from:
        return warm
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - decay_from) / (steps - decay_from))))


def train_denoiser(
    pocket: PocketDenoiser,
    folder: Path,
    pool: LatentPool,
    *,
    steps: int,
    seed: int,
    run: StageRun,
    start_from: Path | None = None,
) -> None:
    """Train on the pool and save the averaged weights (EMA), fp16; processes share each batch.

    Args:
        pocket: what is trained.
        folder: holds the text encoders; the denoiser is saved in it too.
        pool: what it is trained on.
        steps: of the whole training.
        seed: of everything that is drawn.
        run: log and restart point.
        start_from: a pipeline folder whose denoiser is trained further.
    """
    accelerator = Accelerator()
    torch.manual_seed(seed + 2)
    model = pocket.new()
    if start_from is not None:
        model.load_state_dict(type(model).from_pretrained(start_from / pocket.component).float().state_dict())
    objective = pocket.objective(model, folder, accelerator.device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=pocket.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    both = nn.ModuleDict({"model": model, "average": average})
    done = run.restore(both, optimizer, schedule)
    model, optimizer = accelerator.prepare(model, optimizer)
    average.to(accelerator.device)
    drawable = pool.drawable()
    for step in range(done, steps):
        rng = np.random.default_rng([seed, 5, step])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        side = 64 if rng.random() < pocket.small_share(step / steps) else 128
        chosen = drawable[rng.integers(len(drawable), size=pocket.batches[side])]
        latents = pool.latents[side][torch.from_numpy(chosen)].float()
        drawn = objective.draw(latents, [training_caption(pool.scenes[i], rng) for i in chosen], rng, generator)
        # Every process draws the whole batch and takes its share, so the number of processes does not change the stream.
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        loss = objective.loss(model, *(tensor[mine].to(accelerator.device) for tensor in drawn))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        if accelerator.is_main_process:
            run.after_step(step + 1, steps, {f"loss{side}": loss.item()}, both, optimizer, schedule)
    if accelerator.is_main_process:
        save_average(pocket, folder, average)


def save_average(pocket: PocketDenoiser, folder: Path, average: AveragedModel) -> None:
    """Save the averaged denoiser as a diffusers folder, fp16, with diffusers' own attention."""
    trained = pocket.new()
    trained.load_state_dict(average.module.state_dict())
    trained.half().save_pretrained(folder / pocket.component)
