"""Training itself, and saving what it gives."""

from __future__ import annotations

from collections.abc import Sequence

from pocketune.checkpoint import CheckpointFolder
from pocketune.errors import NoEffectError
from pocketune.features.cache import FeatureCache
from pocketune.phases.state import Job
from pocketune.plan.blocks import BlockPlan
from pocketune.sampling.batches import BatchMaker
from pocketune.sampling.draws import Draw
from pocketune.scratch import Scratch
from pocketune.train import train


def train_and_save(
    job: Job,
    plan: BlockPlan,
    batches: Sequence[Sequence[Draw]],
    make_batch: BatchMaker,
    cache: FeatureCache | None,
    checkpoints: CheckpointFolder,
    *,
    stop: int,
) -> tuple[tuple[float, ...], dict[str, float]]:
    """Train to a step, and save the result; the losses so far and how far each trained tensor has come.

    Raises:
        NoEffectError: training is over and changed nothing.
    """
    with job.watch.phase("training"):
        adapter = job.denoiser(plan.kept)
        tuned = job.method.attach(adapter, plan=plan, recipe=job.recipe, folder=job.folder)
        job.trained_parameters = sum(parameter.numel() for parameter in tuned.parameters.values())
        losses = train(
            adapter,
            tuned,
            plan,
            job.recipe,
            batches,
            make_batch,
            cache=cache,
            checkpoints=checkpoints,
            scratch=Scratch(job.run) if job.recipe.activations == "on_disk" else None,
            on_step=lambda done, total, loss: job.watch.tell("training", done, total, "step", loss),
            stop=stop,
        )
        change = job.method.change(tuned)
        if stop == job.recipe.steps:
            if not any(change.values()):
                msg = f"training changed none of {len(change)} tensors. Check the learning rate and the number of steps."
                raise NoEffectError(msg)
            job.method.save(adapter, tuned, job.run / job.method.result, recipe=job.recipe)
        return losses, change
