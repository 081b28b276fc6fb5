"""The denoiser of a bundle, block by block: forward for features and sampling, and there and back for training.

Work comes in parts of the graphs' static number of rows. Each block is opened once for all parts, so that streaming reads its
weights once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pocketune_edge.manifest import Graph, Manifest, Span
from pocketune_edge.session import Array, Sessions, Values

Floats = NDArray[np.float32]


@dataclass
class Part:
    """Some rows on their way through the denoiser.

    Attributes:
        context: what every block may take, by name: the embedding of timestep and pooled text, and more of some models.
        streams: by name, (rows, tokens, width) or (rows, channels, height, width); a stream that has ended is absent.
    """

    context: dict[str, Array]
    streams: dict[str, Array]


@dataclass
class Tape:
    """What entered each trained block, by block and part."""

    entered: dict[int, list[dict[str, Array]]] = field(default_factory=dict)


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

    def begin(self, batches: Iterable[Values]) -> list[Part]:
        """Embed each part: `noisy`, `timesteps` and the encoded prompt."""
        with self.sessions.opened(self.manifest.graph("embed")) as session:
            results = [session.run(batch) for batch in batches]
        streams = set(self.manifest.model.streams)
        return [
            Part(
                {name: value for name, value in found.items() if name not in streams},
                {name: value for name, value in found.items() if name in streams},
            )
            for found in results
        ]

    def run_blocks(self, start: int, stop: int, parts: Sequence[Part], parameters: Floats, tape: Tape | None = None) -> None:
        """Run the blocks from `start` to before `stop` on all parts, in place.

        Args:
            start: first block.
            stop: one past the last block.
            parts: changed to the streams that leave.
            parameters: the flat vector of the LoRA; zeros for the frozen model.
            tape: where to keep what entered each block.
        """
        for block in range(start, stop):
            if tape is not None:
                tape.entered[block] = [dict(part.streams) for part in parts]
            graph = self.manifest.graph("block_forward", block)
            own = _slice(graph, parameters)
            with self.sessions.opened(graph) as session:
                for part in parts:
                    found = session.run({**part.streams, **part.context, **own})
                    passing = {name: value for name, value in part.streams.items() if not graph.takes(name)}
                    part.streams = passing | {name.removeprefix("new_"): value for name, value in found.items()}

    def finish(self, parts: Sequence[Part]) -> list[Floats]:
        """What the denoiser predicts for each part, (rows, channels, height, width)."""
        with self.sessions.opened(self.manifest.graph("head")) as session:
            return [_floats(session.run({**part.streams, **part.context})["prediction"]) for part in parts]

    def predict(self, batches: Sequence[Values], parameters: Floats) -> list[Floats]:
        """What the whole model predicts for each part."""
        parts = self.begin(batches)
        self.run_blocks(0, self.manifest.model.block_count, parts, parameters)
        return self.finish(parts)

    def loss_and_gradients(self, batches: Sequence[Mapping[str, Array]], parameters: Floats) -> tuple[float, Floats]:
        """The loss of all parts together and its gradients, with one block in memory at a time.

        Each trained block's activations are computed again on the way back, from what entered it.

        Args:
            batches: of each part, the inputs of `train_step` that are the batch, features of skipped spans among them.
            parameters: the flat vector.

        Returns:
            The loss, and the gradient as a flat vector.
        """
        plan = self.manifest.plan
        parts = self.begin([{**batch, "noisy": noisy(batch)} for batch in batches])
        tape = Tape()
        for span in plan.spans:
            if not span.skipped:
                self.run_blocks(span.start, span.stop, parts, parameters, tape)
            elif plan.use_residuals:
                for part, batch in zip(parts, batches, strict=True):
                    part.streams = _skip(part.streams, span, batch)
        loss, leaving = self._loss(parts, batches)
        return loss, self._backward(parts, parameters, tape, leaving)

    def _loss(self, parts: Sequence[Part], batches: Sequence[Values]) -> tuple[float, list[dict[str, Array]]]:
        loss = np.float32(0.0)
        gradients = []
        with self.sessions.opened(self.manifest.graph("head_loss")) as session:
            for part, batch in zip(parts, batches, strict=True):
                found = session.run({**batch, **part.streams, **part.context})
                loss += np.float32(found["loss"])
                gradients.append({"image": found["grad_image"]})
        return float(loss), gradients

    def _backward(self, parts: Sequence[Part], parameters: Floats, tape: Tape, leaving: Sequence[dict[str, Array]]) -> Floats:
        """Walk the trained blocks backwards; skipped spans pass gradients on unchanged."""
        gradient = np.zeros_like(parameters)
        for block in sorted(tape.entered, reverse=True):
            if not any(item.role == "block_vjp" and item.block == block for item in self.manifest.graphs):
                break  # nothing trains from here on down
            graph = self.manifest.graph("block_vjp", block)
            own = _slice(graph, parameters)
            following = []
            changed = {spec.name for spec in self.manifest.graph("block_forward", block).outputs}
            with self.sessions.opened(graph) as session:
                for part, entered, grads in zip(parts, tape.entered.pop(block), leaving, strict=True):
                    given = {f"grad_new_{name}": value for name, value in grads.items()}
                    found = session.run({**entered, **given, **part.context, **own})
                    if graph.parameters is not None:
                        gradient[slice(*graph.parameters)] += _floats(found["gradients"])
                    passing = {name: value for name, value in grads.items() if f"new_{name}" not in changed}
                    following.append(passing | {name: found[f"grad_{name}"] for name in entered if f"grad_{name}" in found})
            leaving = following
        return gradient


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
