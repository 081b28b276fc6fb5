"""One optimizer step on a device, by backpropagation or by forward passes alone, in one graph or block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from pocketune.sampling.directions import Directions, Probing
from pocketune_edge.delta import flatten
from pocketune_edge.denoiser import Denoiser, Floats
from pocketune_edge.manifest import Graph
from pocketune_edge.session import Array, Sessions
from pocketune_edge.settings import Settings
from pocketune_edge.state import State

Mode = Literal["one graph", "streaming"]
Parts = Sequence[Mapping[str, Array]]
NOT_CLIPPED = float("inf")


@dataclass(frozen=True)
class Stepped:
    """The state after a step, and the gradient that led there, a flat vector that is not clipped."""

    state: State
    gradients: Floats


class Stepper(Protocol):
    """Computes optimizer steps."""

    def __call__(self, state: State, parts: Parts) -> Stepped:
        """The state after one step, its loss appended. The losses of `parts` add up to the step's."""


class Losses(Protocol):
    """A way to run the denoiser: losses, and gradients where the bundle has graphs for them, of parts with their parameters."""

    def losses(self, batches: Parts, parameters: Sequence[Floats]) -> list[float]:
        """The loss of each part."""

    def losses_and_gradients(self, batches: Parts, parameters: Sequence[Floats]) -> tuple[list[float], list[Floats]]:
        """The loss of each part, and its gradient."""


class OneGraph:
    """All trained blocks in one graph: fastest, and all their weights are mapped at once."""

    def __init__(self, sessions: Sessions) -> None:
        """Use sessions that keep graphs open."""
        self._sessions = sessions
        self.graph: Graph = sessions.bundle.manifest.step_graph

    def losses(self, batches: Parts, parameters: Sequence[Floats]) -> list[float]:
        """The loss of each part."""
        given = ({**batch, "parameters": vector} for batch, vector in zip(batches, parameters, strict=True))
        return [float(self._sessions.run(self.graph, values)["loss"]) for values in given]

    def losses_and_gradients(self, batches: Parts, parameters: Sequence[Floats]) -> tuple[list[float], list[Floats]]:
        """The loss of each part, and its gradient; the update that the graph makes of it is passed over."""
        optimizer = self._sessions.bundle.manifest.graph("adamw")
        anything = {spec.name: np.ones(spec.shape, spec.dtype) for spec in optimizer.inputs}
        given = ({**anything, **batch, "parameters": vector} for batch, vector in zip(batches, parameters, strict=True))
        found = [self._sessions.run(self.graph, values) for values in given]
        return [float(of["loss"]) for of in found], [_floats(of["gradients"]) for of in found]


def stepper_of(sessions: Sessions, settings: Settings, *, mode: Mode) -> Stepper:
    """What computes the steps of a bundle.

    Args:
        sessions: those for one graph keep graphs open, those for streaming do not.
        settings: of the run.
        mode: one graph a step, or block by block.
    """
    way = OneGraph(sessions) if mode == "one graph" else Denoiser(sessions)
    if settings.gradient == "zeroth_order":
        return ZerothOrder(sessions, settings, way)
    return Backprop(sessions, settings, way)


class Backprop:
    """Exact gradients, clipped, and AdamW."""

    def __init__(self, sessions: Sessions, settings: Settings, way: OneGraph | Denoiser) -> None:
        """Use sessions of a bundle whose graphs backpropagate."""
        self._sessions, self._settings, self._way = sessions, settings, way

    def __call__(self, state: State, parts: Parts) -> Stepped:
        """The state after one step."""
        if len(parts) == 1 and isinstance(self._way, OneGraph):
            given = optimizer_inputs(self._sessions, self._settings, state)
            found = self._sessions.run(self._way.graph, {**given, **parts[0]})
            return Stepped(_updated(state, found, float(found["loss"])), _floats(found["gradients"]))
        losses, gradients = self._way.losses_and_gradients(parts, [state.parameters] * len(parts))
        total = _floats(np.stack(gradients).sum(axis=0))
        return Stepped(adamw(self._sessions, self._settings, state, total, _sum(losses)), total)


class ZerothOrder:
    """Slopes of the loss along random directions, as `pocketune.gradients.zeroth_order` takes them, then descent or Adam.

    Paper: MeZO (arXiv 2305.17333), algorithm 1; with Adam ZOODiP (arXiv 2503.14868).
    """

    def __init__(self, sessions: Sessions, settings: Settings, way: Losses) -> None:
        """Use sessions of any bundle that can compute losses."""
        self._sessions, self._settings, self._way = sessions, settings, way
        self._probing = Probing(queries=settings.zo_queries, epsilon=settings.zo_epsilon, two_sided=settings.zo_two_sided)
        self._lora = sessions.bundle.manifest.lora
        names = [parameter.name for parameter in self._lora.parameters]
        self._directions = Directions(names, seed=settings.seed, queries=settings.zo_queries)

    def __call__(self, state: State, parts: Parts) -> Stepped:
        """The state after one step; with streaming, each block is opened once for all that is measured."""
        directions = [self.direction(step=state.step, query=query) for query in range(self._probing.queries)]
        points = self._probing.points
        moved = [state.parameters + np.float32(scale) * directions[query] for query, scale in points]
        losses = self._way.losses([*parts] * len(points), [vector for vector in moved for _ in parts])
        count = len(parts)
        loss, slopes = self._probing.slopes([_sum(losses[at * count : (at + 1) * count]) for at in range(len(points))])
        gradients = np.zeros_like(state.parameters)
        for direction, slope in zip(directions, slopes, strict=True):
            gradients += np.float32(slope / len(slopes)) * direction
        optimizer, rate = self._sessions.bundle.manifest.optimizer, self._settings.zo_learning_rate
        if optimizer.kind == "adamw":
            return Stepped(adamw(self._sessions, self._settings, state, gradients, loss), gradients)
        parameters = state.parameters * np.float32(1 - rate * optimizer.weight_decay) - np.float32(rate) * gradients
        return Stepped(state.after(loss, parameters), gradients)

    def direction(self, *, step: int, query: int) -> Floats:
        """A direction as a flat vector."""
        values = {
            item.name: self._directions.along(item.name, item.shape, step=step, query=query).astype(np.float32)
            for item in self._lora.parameters
            if item.offset is not None
        }
        return flatten(self._lora, values)


def adamw(sessions: Sessions, settings: Settings, state: State, gradients: Floats, loss: float) -> State:
    """The state after the update by a gradient."""
    given = optimizer_inputs(sessions, settings, state)
    found = sessions.run(sessions.bundle.manifest.graph("adamw"), {**given, "gradients": gradients})
    return _updated(state, found, loss)


def optimizer_inputs(sessions: Sessions, settings: Settings, state: State) -> dict[str, Array]:
    """What AdamW takes besides gradients."""
    optimizer = sessions.bundle.manifest.optimizer
    scalars = {
        "learning_rate": settings.zo_learning_rate if settings.gradient == "zeroth_order" else settings.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "epsilon": optimizer.epsilon,
        "max_grad_norm": NOT_CLIPPED if optimizer.max_grad_norm is None else optimizer.max_grad_norm,
    }
    return {
        "parameters": state.parameters,
        "exp_avg": state.exp_avg,
        "exp_avg_sq": state.exp_avg_sq,
        "step": np.array(state.updates + 1, np.int64),
        **{name: np.array(value, np.float32) for name, value in scalars.items()},
    }


def _updated(state: State, found: Mapping[str, Array], loss: float) -> State:
    moments = (_floats(found["new_exp_avg"]), _floats(found["new_exp_avg_sq"]))
    return state.after(loss, _floats(found["new_parameters"]), moments)


def _sum(losses: Sequence[float]) -> float:
    return float(np.sum(losses, dtype=np.float32))


def _floats(value: Array) -> Floats:
    return np.asarray(value, dtype=np.float32)
