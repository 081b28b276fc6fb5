"""One optimizer step on a device, by backpropagation or by forward passes alone, in one graph or block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from pocketune.sampling.directions import Directions, Probing
from pocketune.sampling.intervals import interval_of
from pocketune_edge.delta import flatten
from pocketune_edge.denoiser import Denoiser, Floats
from pocketune_edge.errors import SettingError
from pocketune_edge.manifest import Graph, Manifest, Tuned
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


def check_mode(manifest: Manifest, settings: Settings, *, mode: Mode) -> None:
    """Refuse a mode that a bundle has no graphs for.

    Raises:
        SettingError: it cannot be trained block by block.
    """
    backward = any(graph.role == "block_vjp" for graph in manifest.graphs)
    if mode == "streaming" and settings.gradient == "backprop" and not backward:
        msg = (
            "this bundle trains scales outside of blocks, and block by block it has no backward graphs for them. Run without "
            "--streaming, or export with skipped blocks, where only scales of kept blocks train."
        )
        raise SettingError(msg)


def stepper_of(sessions: Sessions, settings: Settings, *, mode: Mode) -> Stepper:
    """What computes the steps of a bundle.

    Args:
        sessions: those for one graph keep graphs open, those for streaming do not.
        settings: of the run.
        mode: one graph a step, or block by block.

    Raises:
        SettingError: as of `check_mode`.
    """
    check_mode(sessions.bundle.manifest, settings, mode=mode)
    way = OneGraph(sessions) if mode == "one graph" else Denoiser(sessions)
    if settings.gradient == "zeroth_order":
        return ZerothOrder(sessions, settings, way)
    return Backprop(sessions, settings, way)


class Backprop:
    """Exact gradients, clipped, and AdamW."""

    def __init__(self, sessions: Sessions, settings: Settings, way: OneGraph | Denoiser) -> None:
        """Use sessions of a bundle whose graphs backpropagate."""
        self._sessions, self._settings, self._way = sessions, settings, way
        self._tuned = sessions.bundle.manifest.tuned

    def __call__(self, state: State, parts: Parts) -> Stepped:
        """The state after one step."""
        shares = by_interval(self._tuned, parts)
        if len(shares) == 1 and isinstance(self._way, OneGraph):
            interval, part = shares[0]
            place = self._tuned.place(interval)
            given = optimizer_inputs(self._sessions, self._settings, state, interval)
            found = self._sessions.run(self._way.graph, {**given, **part})
            total = np.zeros_like(state.parameters)
            total[place] = found["gradients"]
            return Stepped(_updated(_and_loss(state, float(found["loss"])), found, interval, place), total)
        places = [self._tuned.place(interval) for interval, _ in shares]
        vectors = [state.parameters[place] for place in places]
        losses, gradients = self._way.losses_and_gradients([part for _, part in shares], vectors)
        total = np.zeros_like(state.parameters)
        for place, gradient in zip(places, gradients, strict=True):
            total[place] += gradient
        used = sorted({interval for interval, _ in shares})
        return Stepped(adamw(self._sessions, self._settings, _and_loss(state, _sum(losses)), total, used), total)


class ZerothOrder:
    """Slopes of the loss along random directions, as `pocketune.gradients.zeroth_order` takes them, then descent or Adam.

    Paper: MeZO (arXiv 2305.17333), algorithm 1; with Adam ZOODiP (arXiv 2503.14868).
    """

    def __init__(self, sessions: Sessions, settings: Settings, way: Losses) -> None:
        """Use sessions of any bundle that can compute losses."""
        self._sessions, self._settings, self._way = sessions, settings, way
        self._probing = Probing(queries=settings.zo_queries, epsilon=settings.zo_epsilon, two_sided=settings.zo_two_sided)
        self._tuned = sessions.bundle.manifest.tuned
        names = [parameter.name for parameter in self._tuned.parameters]
        self._directions = Directions(names, seed=settings.seed, queries=settings.zo_queries)

    def __call__(self, state: State, parts: Parts) -> Stepped:
        """The state after one step; with streaming, each block is opened once for all that is measured."""
        shares = by_interval(self._tuned, parts)
        used = sorted({interval for interval, _ in shares})
        directions = [self.direction(used, step=state.step, query=query) for query in range(self._probing.queries)]
        points = self._probing.points
        moved = [state.parameters + np.float32(scale) * directions[query] for query, scale in points]
        vectors = [vector[self._tuned.place(interval)] for vector in moved for interval, _ in shares]
        losses = self._way.losses([part for _, part in shares] * len(points), vectors)
        count = len(shares)
        loss, slopes = self._probing.slopes([_sum(losses[at * count : (at + 1) * count]) for at in range(len(points))])
        gradients = np.zeros_like(state.parameters)
        for direction, slope in zip(directions, slopes, strict=True):
            gradients += np.float32(slope / len(slopes)) * direction
        optimizer, rate = self._sessions.bundle.manifest.optimizer, self._settings.zo_learning_rate
        if optimizer.kind == "adamw":
            return Stepped(adamw(self._sessions, self._settings, _and_loss(state, loss), gradients, used), gradients)
        parameters = state.parameters.copy()
        for place in (self._tuned.place(interval) for interval in used):
            kept = np.float32(1 - rate * optimizer.weight_decay)
            parameters[place] = parameters[place] * kept - np.float32(rate) * gradients[place]
        return Stepped(state.after(loss, parameters), gradients)

    def direction(self, intervals: Sequence[int], *, step: int, query: int) -> Floats:
        """A direction as vectors of all intervals, zero for those that the step does not use."""
        values = {
            item.name: self._directions.along(item.name, item.shape, step=step, query=query).astype(np.float32)
            if item.interval in intervals
            else np.zeros(item.shape, np.float32)
            for item in self._tuned.parameters
            if item.offset is not None
        }
        return flatten(self._tuned, values)


def by_interval(tuned: Tuned, parts: Parts) -> list[tuple[int, Mapping[str, Array]]]:
    """The parts of a batch with the interval of their timesteps; where rows differ, one for each, the others weighing 0."""
    shares: list[tuple[int, Mapping[str, Array]]] = []
    for part in parts:
        if tuned.intervals == 1:
            shares.append((0, part))
            continue
        weights = part["loss_weights"]
        intervals = np.array([interval_of(float(timestep), tuned.intervals) for timestep in part["timesteps"]])
        for interval in sorted(set(intervals[weights != 0])):
            shares.append((int(interval), {**part, "loss_weights": np.where(intervals == interval, weights, np.float32(0))}))
    return shares


def adamw(sessions: Sessions, settings: Settings, state: State, gradients: Floats, intervals: Sequence[int]) -> State:
    """The state after the update of some intervals' parameters, clipped by the norm of all of them."""
    tuned, limit = sessions.bundle.manifest.tuned, sessions.bundle.manifest.optimizer.max_grad_norm
    clipped = limit if len(intervals) == 1 else None
    if limit is not None and clipped is None:
        norm = np.sqrt(np.sum(gradients * gradients, dtype=np.float32))
        gradients = gradients * np.minimum(np.float32(limit) / (norm + np.float32(1e-6)), np.float32(1))
    for interval in intervals:
        given = optimizer_inputs(sessions, settings, state, interval)
        given |= {"gradients": gradients[tuned.place(interval)]}
        if clipped is None:
            given |= {"max_grad_norm": np.array(NOT_CLIPPED, np.float32)}
        found = sessions.run(sessions.bundle.manifest.graph("adamw"), given)
        state = _updated(state, found, interval, tuned.place(interval))
    return state


def optimizer_inputs(sessions: Sessions, settings: Settings, state: State, interval: int) -> dict[str, Array]:
    """What AdamW takes besides gradients, for the parameters of an interval."""
    manifest = sessions.bundle.manifest
    optimizer, place = manifest.optimizer, manifest.tuned.place(interval)
    rate = np.asarray(learning_rate(manifest, settings), np.float32)
    scalars = {
        "weight_decay": optimizer.weight_decay,
        "epsilon": optimizer.epsilon,
        "max_grad_norm": NOT_CLIPPED if optimizer.max_grad_norm is None else optimizer.max_grad_norm,
    }
    return {
        "parameters": state.parameters[place],
        "exp_avg": state.exp_avg[place],
        "exp_avg_sq": state.exp_avg_sq[place],
        "step": np.array(state.updates[interval] + 1, np.int64),
        "learning_rate": np.broadcast_to(rate, manifest.graph("adamw").shape_of("learning_rate")),
        **{name: np.array(value, np.float32) for name, value in scalars.items()},
    }


def learning_rate(manifest: Manifest, settings: Settings) -> float | Floats:
    """Of this bundle's steps; of scales one for each element, as rows and columns have their own."""
    if settings.gradient == "zeroth_order":
        return settings.zo_learning_rate
    if manifest.tuned.method == "lora":
        return settings.learning_rate
    rates = {"s_out": settings.scale_learning_rate, "s_in": settings.scale_in_learning_rate}
    return np.concatenate(
        [
            np.full(item.shape, rates[item.name.rpartition(".")[2]], np.float32)
            for item in manifest.tuned.parameters
            if item.interval == 0 and item.offset is not None
        ]
    )


def _updated(state: State, found: Mapping[str, Array], interval: int, place: slice) -> State:
    return replace(
        state,
        parameters=_with(state.parameters, place, _floats(found["new_parameters"])),
        exp_avg=_with(state.exp_avg, place, _floats(found["new_exp_avg"])),
        exp_avg_sq=_with(state.exp_avg_sq, place, _floats(found["new_exp_avg_sq"])),
        updates=tuple(count + (number == interval) for number, count in enumerate(state.updates)),
    )


def _with(vector: Floats, place: slice, values: Floats) -> Floats:
    if values.size == vector.size:
        return values
    changed = vector.copy()
    changed[place] = values
    return changed


def _and_loss(state: State, loss: float) -> State:
    return replace(state, losses=(*state.losses, loss))


def _sum(losses: Sequence[float]) -> float:
    return float(np.sum(losses, dtype=np.float32))


def _floats(value: Array) -> Floats:
    return np.asarray(value, dtype=np.float32)
