"""The denoiser of a bundle, block by block: forward for features and sampling, and there and back for training.

Work comes in parts of the graphs' static number of rows. Each block is opened once for all parts, so that streaming reads its
weights once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pocketune_edge.agreement import CARRIED
from pocketune_edge.manifest import Graph, Manifest, Span
from pocketune_edge.session import Array, Sessions, Values

Floats = NDArray[np.float32]
Tape = dict[int, list[dict[str, Array]]]
"""What entered each trained block, by block; of each part, its streams."""


@dataclass
class Part:
    """Some rows on their way through the denoiser.

    Attributes:
        context: what every block may take, by name: the embedding of timestep and pooled text, and more of some models.
        streams: by name, (rows, tokens, width) or (rows, channels, height, width); a stream that has ended is absent.
        parameters: the flat vector that these rows are run with.
    """

    context: dict[str, Array]
    streams: dict[str, Array]
    parameters: Floats


class Denoiser:
    """Runs the block graphs of a bundle."""

    def __init__(self, sessions: Sessions) -> None:
        """Use sessions of a bundle, which may keep graphs open or not."""
        self.sessions = sessions
        self.manifest: Manifest = sessions.bundle.manifest

    @property
    def rows(self) -> int:
        """Rows of a part."""
        return self.manifest.batch.rows

    def begin(self, batches: Iterable[Values], parameters: Iterable[Floats]) -> list[Part]:
        """Embed each part: `noisy`, `timesteps` and the encoded prompt; `parameters` has a flat vector for each."""
        streams = set(self.manifest.model.streams)
        parts = []
        with self.sessions.opened(self.manifest.graph("embed")) as session:
            for batch, vector in zip(batches, parameters, strict=False):
                found = session.run({**batch, **_slice(session.graph, vector)})
                context = {name: value for name, value in found.items() if name not in streams}
                parts.append(Part(context, {name: value for name, value in found.items() if name in streams}, vector))
        return parts

    def run_blocks(self, start: int, stop: int, parts: Sequence[Part], tape: Tape | None = None) -> None:
        """Run the blocks from `start` to before `stop` on all parts, in place.

        Args:
            start: first block.
            stop: one past the last block.
            parts: changed to the streams that leave.
            tape: where to keep what entered each block.
        """
        for block in range(start, stop):
            if tape is not None:
                tape[block] = [dict(part.streams) for part in parts]
            pieces = self.manifest.pieces("block_forward", block)
            given = [{**part.streams, **part.context, **_slice(pieces[0], part.parameters)} for part in parts]
            for part, found in zip(parts, self._run_pieces(pieces, given), strict=True):
                passing = {
                    name: value for name, value in part.streams.items() if not any(piece.takes(name) for piece in pieces)
                }
                part.streams = passing | {name.removeprefix("new_"): value for name, value in found.items()}

    def finish(self, parts: Sequence[Part]) -> list[Floats]:
        """What the denoiser predicts for each part, (rows, channels, height, width)."""
        with self.sessions.opened(self.manifest.graph("head")) as session:
            return [
                _floats(session.run({**part.streams, **part.context, **_slice(session.graph, part.parameters)})["prediction"])
                for part in parts
            ]

    def predict(self, batches: Sequence[Values], parameters: Floats) -> list[Floats]:
        """What the whole model predicts for each part."""
        parts = self.begin(batches, [parameters] * len(batches))
        self.run_blocks(0, self.manifest.model.block_count, parts)
        return self.finish(parts)

    def losses(self, batches: Sequence[Values], parameters: Sequence[Floats]) -> list[float]:
        """The loss of each part, with one block in memory at a time. Arguments as of `losses_and_gradients`."""
        return [float(found["loss"]) for found in self._losses(self._run(batches, parameters), batches)]

    def losses_and_gradients(self, batches: Sequence[Values], parameters: Sequence[Floats]) -> tuple[list[float], list[Floats]]:
        """The loss of each part and its gradient, with one block in memory at a time.

        Each trained block's activations are computed again on the way back, from what entered it.

        Args:
            batches: of each part, the inputs of `train_step` that are the batch, features of skipped spans among them.
            parameters: of each part, the flat vector.

        Returns:
            The losses, and the gradients as flat vectors.
        """
        tape: Tape = {}
        parts = self._run(batches, parameters, tape)
        found = self._losses(parts, batches)
        gradients = self._backward(parts, tape, [{"image": of["grad_image"]} for of in found])
        return [float(of["loss"]) for of in found], gradients

    def _run(self, batches: Sequence[Values], parameters: Sequence[Floats], tape: Tape | None = None) -> list[Part]:
        """All that is before the head, as the plan wants it."""
        plan = self.manifest.plan
        parts = self.begin(({**batch, "noisy": noisy(batch)} for batch in batches), parameters)
        for span in plan.spans:
            if not span.skipped:
                self.run_blocks(span.start, span.stop, parts, tape)
            elif plan.use_residuals:
                for part, batch in zip(parts, batches, strict=True):
                    part.streams = _skip(part.streams, span, batch)
        return parts

    def _losses(self, parts: Sequence[Part], batches: Sequence[Values]) -> list[dict[str, Array]]:
        with self.sessions.opened(self.manifest.graph("head_loss")) as session:
            return [
                session.run({**batch, **part.streams, **part.context, **_slice(session.graph, part.parameters)})
                for part, batch in zip(parts, batches, strict=True)
            ]

    def _backward(self, parts: Sequence[Part], tape: Tape, leaving: Sequence[dict[str, Array]]) -> list[Floats]:
        """Walk the trained blocks backwards; skipped spans pass gradients on unchanged."""
        gradients = [np.zeros_like(part.parameters) for part in parts]
        for block in sorted(tape, reverse=True):
            pieces = self.manifest.pieces("block_vjp", block)
            if not pieces:
                break  # nothing trains from here on down
            changed = _results(self.manifest.pieces("block_forward", block))
            entered = tape.pop(block)
            given = [
                {**streams, **part.context, **_slice(pieces[0], part.parameters)}
                | {f"grad_new_{name}": value for name, value in grads.items()}
                for part, streams, grads in zip(parts, entered, leaving, strict=True)
            ]
            following = []
            for found, streams, grads, gradient in zip(
                self._run_pieces(pieces, given), entered, leaving, gradients, strict=True
            ):
                if pieces[0].parameters is not None:
                    gradient[slice(*pieces[0].parameters)] += _floats(found["gradients"])
                passing = {name: value for name, value in grads.items() if f"new_{name}" not in changed}
                following.append(passing | {name: found[f"grad_{name}"] for name in streams if f"grad_{name}" in found})
            leaving = following
        return gradients

    def _run_pieces(self, pieces: Sequence[Graph], given: Sequence[Values]) -> list[dict[str, Array]]:
        """The results of a block's pieces for each part, without what they hand to each other."""
        return self.sessions.run_parts_of_all(pieces, given, _results(pieces))


def _results(pieces: Sequence[Graph]) -> set[str]:
    return {spec.name for piece in pieces for spec in piece.outputs if not spec.name.startswith(CARRIED)}


def noisy(batch: Values) -> Array:
    """The noisy latents, alpha latents + sigma noise, where alpha is 1 - sigma for rectified flow."""
    sigma = _floats(batch["sigmas"]).reshape(-1, 1, 1, 1)
    alpha = _floats(batch["alphas"]).reshape(-1, 1, 1, 1) if "alphas" in batch else np.float32(1.0) - sigma
    return alpha * _floats(batch["latents"]) + sigma * _floats(batch["noise"])


def _skip(streams: dict[str, Array], span: Span, batch: Values) -> dict[str, Array]:
    """The streams behind a skipped span; one that the span ends, and that no later block takes, may stay."""
    prefix = f"features_{span.start}_{span.stop}_"
    cached = {name.removeprefix(prefix): batch[name] for name in span.features}
    if span.replaces:
        return streams | cached
    return {name: streams[name] + value for name, value in cached.items()}


def _slice(graph: Graph, parameters: Floats) -> dict[str, Array]:
    return {} if graph.parameters is None else {"parameters": parameters[slice(*graph.parameters)]}


def _floats(value: Array) -> Floats:
    return np.asarray(value, dtype=np.float32)
