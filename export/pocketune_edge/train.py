"""The training loop on a device: one graph a step, or block by block, replaying the draws of PyTorch's side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from pocketune.errors import Interrupted, RunError
from pocketune.sampling.draws import Draw
from pocketune_edge.batches import BatchMaker
from pocketune_edge.cache import FeatureCache
from pocketune_edge.denoiser import Denoiser, Floats
from pocketune_edge.features import key_of
from pocketune_edge.manifest import Graph
from pocketune_edge.session import Array, Sessions
from pocketune_edge.settings import Settings
from pocketune_edge.state import CheckpointFolder, State

Parts = Sequence[Mapping[str, Array]]


class Stepper(Protocol):
    """A way to compute one optimizer step; `sessions` are those it keeps open."""

    sessions: Sessions

    def __call__(self, state: State, parts: Parts) -> State:
        """The state after one step, its loss appended."""


class OneGraph:
    """The whole step in one graph: fastest, and the weights of all trained blocks are mapped at once."""

    def __init__(self, sessions: Sessions, settings: Settings) -> None:
        """Use sessions that keep graphs open."""
        self.sessions = sessions
        self._graph: Graph = sessions.bundle.manifest.graph("train_step")
        self._settings = settings

    def __call__(self, state: State, parts: Parts) -> State:
        """The state after one step. With more rows than the graph's, gradients of the parts are added before the update."""
        given = optimizer_inputs(self.sessions, self._settings, state)
        if len(parts) == 1:
            found = self.sessions.run(self._graph, {**given, **parts[0]})
            return _updated(state, found, float(found["loss"]))
        loss, gradients = np.float32(0.0), np.zeros_like(state.parameters)
        for part in parts:
            found = self.sessions.run(self._graph, {**given, **part})
            loss += np.float32(found["loss"])
            gradients += np.asarray(found["gradients"], np.float32)
        return _update(self.sessions, given, state, gradients, float(loss))


class Streaming:
    """Block by block, each graph opened and closed: memory is bounded by one block."""

    def __init__(self, sessions: Sessions, settings: Settings) -> None:
        """Use sessions that do not keep graphs open."""
        self.sessions = sessions
        self._denoiser = Denoiser(sessions)
        self._settings = settings

    def __call__(self, state: State, parts: Parts) -> State:
        """The state after one step."""
        loss, gradients = self._denoiser.loss_and_gradients(parts, state.parameters)
        return _update(self.sessions, optimizer_inputs(self.sessions, self._settings, state), state, gradients, loss)


def optimizer_inputs(sessions: Sessions, settings: Settings, state: State) -> dict[str, Array]:
    """What AdamW takes besides gradients."""
    scalars = {
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "epsilon": sessions.bundle.manifest.optimizer.epsilon,
        "max_grad_norm": settings.max_grad_norm,
    }
    return {
        "parameters": state.parameters,
        "exp_avg": state.exp_avg,
        "exp_avg_sq": state.exp_avg_sq,
        "step": np.array(state.step + 1, np.int64),
        **{name: np.array(value, np.float32) for name, value in scalars.items()},
    }


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
) -> State:
    """Train to the last step.

    Args:
        stepper: computes steps.
        settings: number of steps and checkpoint interval.
        batches: the draws of each step.
        make_batch: turns draws into graph inputs.
        cache: features of the draws; None when nothing is skipped or residuals are off.
        checkpoints: where to save.
        state: fresh or restored.
        on_step: called with (finished steps, steps, loss).

    Raises:
        Interrupted: on Ctrl-C, after a checkpoint was saved.
        RunError: the loss is no number any more.
    """
    try:
        while state.step < settings.steps:
            draws = batches[state.step]
            features = [cache.get(key_of(draw)) for draw in draws] if cache is not None else ()
            following = stepper(state, make_batch(draws, features))
            loss = following.losses[-1]
            if not math.isfinite(loss):
                msg = f"the loss became {loss} at step {following.step}. Try a lower learning rate, in a new run."
                raise RunError(msg)
            state = following
            on_step(state.step, settings.steps, loss)
            if state.step % settings.checkpoint_every == 0 or state.step == settings.steps:
                checkpoints.save(state)
    except KeyboardInterrupt as error:
        checkpoints.save(state)
        msg = f"stopped after step {state.step} of {settings.steps}; a checkpoint is saved. Add --resume to go on."
        raise Interrupted(msg) from error
    return state


def _update(sessions: Sessions, given: Mapping[str, Array], state: State, gradients: Floats, loss: float) -> State:
    found = sessions.run(sessions.bundle.manifest.graph("adamw"), {**given, "gradients": gradients})
    return _updated(state, found, loss)


def _updated(state: State, found: Mapping[str, Array], loss: float) -> State:
    parameters, exp_avg, exp_avg_sq = (
        np.asarray(found[name], np.float32) for name in ("new_parameters", "new_exp_avg", "new_exp_avg_sq")
    )
    return State(parameters, exp_avg, exp_avg_sq, (*state.losses, loss), state.fixed)
