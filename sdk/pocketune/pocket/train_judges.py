"""Train the judges of generated images: `python -m pocketune.pocket.train_judges --out FOLDER`.

One pool of renders serves both: four photographs each of thousands of subjects, toys and named classes. The classifier learns
their labels; the embedder starts from the classifier's convolutions and learns which renders show the same subject. Every
family of toys holds twins, equal in colours or in shape, so that neither alone is enough. Then the classifier goes on with a
pool of mostly small subjects, the hardest to read; what ships is the mean of its weights before and after. All see softened
renders too, for they will judge what a diffusion model paints.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from pocketune.atomic import replacing, write_text
from pocketune.pocket.judge_data import FAMILY, IGNORED, VIEWS, RenderPool, render_pool, soften, to_floats
from pocketune.pocket.judge_measures import measure_judges
from pocketune.pocket.judges import HEADS, AttributeClassifier, SubjectEmbedder
from pocketune.pocket.runs import StageRun

logger = logging.getLogger(__name__)
_Judge = TypeVar("_Judge", bound=nn.Module)
BATCH = 64
FAMILIES_A_BATCH = 10
TEMPERATURE = 0.1
LEARNING_RATE = 3e-3


Pool = Callable[[], RenderPool]
"""Renders when first called: a finished stage that is only loaded needs no pool."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast a stage learns; `seed` decides its batches."""

    steps: int
    seed: int
    learning_rate: float = LEARNING_RATE


def classification_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Sum over the attributes of the mean cross-entropy; toys have no colour to get wrong."""
    return torch.stack([F.cross_entropy(logits[name], labels[name], ignore_index=IGNORED) for name in HEADS]).sum()


def contrastive_loss(embeddings: Tensor, subjects: Tensor) -> Tensor:
    """How badly each image picks the others of its subject out of the batch.

    Paper: Khosla et al. 2020, supervised contrastive learning, equation 2 (the sum outside the logarithm).

    Args:
        embeddings: unit vectors (batch, 64).
        subjects: (batch,); every value stands at least twice.
    """
    others = ~torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    same = (subjects[:, None] == subjects[None, :]) & others
    logits = (embeddings @ embeddings.T / TEMPERATURE).masked_fill(~others, -1e9)
    log_share = logits - logits.logsumexp(dim=1, keepdim=True)
    return -((log_share * same).sum(dim=1) / same.sum(dim=1)).mean()


def train_classifier(model: AttributeClassifier, pool: Pool, schedule: Schedule, run: StageRun) -> AttributeClassifier:
    """Train the classifier on random batches of the pool."""

    def loss(step: int, model: nn.Module, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + step)
        chosen = torch.randint(len(pool().pixels), (BATCH,), generator=generator)
        pixels = soften(to_floats(pool().pixels[chosen]), generator).to(device)
        return classification_loss(model(pixels), {name: column[chosen].to(device) for name, column in pool().labels.items()})

    return _train(model, loss, schedule, run)


def train_embedder(model: SubjectEmbedder, pool: Pool, schedule: Schedule, run: StageRun) -> SubjectEmbedder:
    """Train the embedder on two renders each of the subjects of random families."""
    size = FAMILY * VIEWS

    def loss(step: int, model: nn.Module, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + 500_000 + step)
        families = torch.randperm(len(pool().pixels) // size, generator=generator)[:FAMILIES_A_BATCH]
        subjects = (families[:, None] * FAMILY + torch.arange(FAMILY)).flatten()
        views = torch.rand(len(subjects), VIEWS, generator=generator).argsort(dim=1)[:, :2]
        chosen = (subjects[:, None] * VIEWS + views).flatten()
        pixels = soften(to_floats(pool().pixels[chosen]), generator).to(device)
        return contrastive_loss(model(pixels), pool().subjects[chosen].to(device))

    return _train(model, loss, schedule, run)


def train_judges(
    out: Path, *, families: int, small_families: int, steps: int, embedder_steps: int, small_steps: int, seed: int
) -> None:
    """Train, store both in half precision, and measure what was stored."""
    work = out / ".training"
    pool = cache(partial(render_pool, families=families, seed=seed))
    classifier = _seeded(AttributeClassifier, seed)
    train_classifier(classifier, pool, Schedule(steps=steps, seed=seed), StageRun(work / "attributes"))
    embedder = _seeded(SubjectEmbedder, seed + 1)
    embedder.trunk.load_state_dict(classifier.trunk.state_dict())
    train_embedder(embedder, pool, Schedule(steps=embedder_steps, seed=seed), StageRun(work / "subjects"))
    pool.cache_clear()
    small_pool = cache(partial(render_pool, families=small_families, seed=seed, mostly_small=True))
    refinement = Schedule(steps=small_steps, seed=seed + 1, learning_rate=LEARNING_RATE / 2)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    train_classifier(classifier, small_pool, refinement, StageRun(work / "small"))
    classifier.load_state_dict(mean_weights(before, classifier.state_dict()))
    _store(classifier, out / "attributes.safetensors")
    _store(embedder, out / "subjects.safetensors")
    settings = {"families": families, "small_families": small_families, "steps": steps, "embedder_steps": embedder_steps}
    settings |= {"small_steps": small_steps, "seed": seed}
    write_text(out / "judges.json", json.dumps({"heads": HEADS}))
    measured = measure_judges(out)
    write_text(out / "judges.json", json.dumps({"heads": HEADS, "training": settings, "held_out": measured}, indent=2) + "\n")
    logger.info("held out: %s", measured)


def mean_weights(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Halfway between two states of one model; counters are those of `after`.

    Paper: Wortsman et al. 2022 (WiSE-FT), equation 1 with mixing coefficient 1/2: keeps what was known before.
    """
    return {name: (before[name] + value) / 2 if value.is_floating_point() else value for name, value in after.items()}


class _LossOfStep(Protocol):
    def __call__(self, step: int, model: nn.Module, device: torch.device) -> Tensor: ...


def _train(model: _Judge, loss_of_step: _LossOfStep, plan: Schedule, run: StageRun) -> _Judge:
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, plan.steps))
    prepared, optimizer = accelerator.prepare(model.train(), optimizer)
    for step in range(run.restore(model, optimizer, schedule), plan.steps):
        loss = loss_of_step(step, prepared, accelerator.device)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.after_step(step + 1, plan.steps, {"loss": loss.item()}, model, optimizer, schedule)
    return model.cpu().eval()


def _learning_rate_factor(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 50)
    return warm * (0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def _seeded(make: Callable[[], _Judge], seed: int) -> _Judge:
    """Make a module from `seed`, leaving the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _store(model: nn.Module, path: Path) -> None:
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    with replacing(path) as partial:
        save_file(tensors, partial)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; WEIGHTS of pocketune.pocket.judges ships")
    parser.add_argument("--families", type=int, default=1200, help="24 renders each")
    parser.add_argument("--small-families", type=int, default=500, help="the same, mostly with small subjects")
    parser.add_argument("--steps", type=int, default=1300, help="classifier steps")
    parser.add_argument("--embedder-steps", type=int, default=500)
    parser.add_argument("--small-steps", type=int, default=450, help="further classifier steps on small subjects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    train_judges(
        options.out,
        families=options.families,
        small_families=options.small_families,
        steps=options.steps,
        embedder_steps=options.embedder_steps,
        small_steps=options.small_steps,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
