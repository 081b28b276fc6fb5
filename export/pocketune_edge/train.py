"""The training loop on a device, replaying the draws of PyTorch's side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from pocketune.errors import Interrupted, RunError
from pocketune.sampling.draws import Draw
from pocketune_edge.batches import BatchMaker
from pocketune_edge.cache import FeatureCache
from pocketune_edge.settings import Settings
from pocketune_edge.state import CheckpointFolder, State
from pocketune_edge.steps import Stepper


def train(
    stepper: Stepper,
    settings: Settings,
    batches: Sequence[Sequence[Draw]],
    make_batch: BatchMaker,
    *,
    cache: FeatureCache | None,
    checkpoints: CheckpointFolder,
    state: State,
    on_step: Callable[[int, int, float], None],
    stop: int,
) -> State:
    """Train to a step, and save a checkpoint there.

    Args:
        stepper: computes steps.
        settings: number of steps and checkpoint interval.
        batches: the draws of each step.
        make_batch: turns draws into graph inputs.
        cache: features of the draws; None when nothing is skipped or residuals are off.
        checkpoints: where to save.
        state: fresh or restored.
        on_step: called with (finished steps, steps, loss).
        stop: steps that are finished then.

    Raises:
        Interrupted: on Ctrl-C, after a checkpoint was saved.
        RunError: the loss, or what trains, is no number any more.
    """
    try:
        while state.step < stop:
            draws = batches[state.step]
            features = [cache.get(draw.cache_number) for draw in draws] if cache is not None else ()
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below, in one line
                following = stepper(state, make_batch(draws, features)).state
            loss = following.losses[-1]
            if not math.isfinite(loss):
                msg = f"the loss became {loss} at step {following.step}. Try a lower learning rate, in a new run."
                raise RunError(msg)
            if not np.isfinite(following.parameters).all():
                msg = f"step {following.step} led to infinity or NaN. Try a lower learning rate, in a new run."
                raise RunError(msg)
            state = following
            on_step(state.step, settings.steps, loss)
            if state.step % settings.checkpoint_every == 0 or state.step == stop:
                checkpoints.save(state)
    except KeyboardInterrupt as error:
        checkpoints.save(state)
        msg = f"stopped after step {state.step} of {settings.steps}; a checkpoint is saved. Add --resume to go on."
        raise Interrupted(msg) from error
    return state
