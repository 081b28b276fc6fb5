"""Run a bundle's training steps on the edge runtime, from any inputs: what `verify` and the tests compare with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pocketune_edge.bundle import Bundle
from pocketune_edge.denoiser import Denoiser
from pocketune_edge.session import Sessions

Floats = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]
Mode = Literal["one graph", "streaming"]


@dataclass(frozen=True)
class State:
    """Flat float32 vectors: LoRA matrices and AdamW's moments."""

    parameters: Floats
    exp_avg: Floats
    exp_avg_sq: Floats

    @classmethod
    def start(cls, parameters: Floats) -> State:
        """Before the first step."""
        return cls(parameters, np.zeros_like(parameters), np.zeros_like(parameters))


@dataclass(frozen=True)
class Stepped:
    """The result of one step."""

    loss: float
    gradients: Floats
    state: State


class Replay:
    """Steps by the graph `train_step`, which stays open, or by the graphs of single blocks, each opened, run and closed."""

    def __init__(self, bundle: Bundle, mode: Mode = "one graph", *, threads: int = 1) -> None:
        """Open nothing yet. bundle: checked. threads: of ONNX Runtime."""
        self._manifest = bundle.manifest
        self._mode = mode
        self._sessions = Sessions(bundle, keep=mode == "one graph", threads=threads)

    def step(self, state: State, batch: Arrays, *, number: int) -> Stepped:
        """The state after one step.

        Args:
            state: before it.
            batch: by name, every input of `train_step` and `embed` that is not the optimizer's.
            number: of the step, 1 at first.

        Raises:
            RuntimeFault: ONNX Runtime refuses a graph.
        """
        given = {**batch, **vars(state), **self._optimizer_inputs(number)}
        if self._mode == "one graph":
            found = self._sessions.run(self._manifest.graph("train_step"), given)
            loss, gradients = float(found["loss"]), np.asarray(found["gradients"], np.float32)
        else:
            loss, gradients = Denoiser(self._sessions).loss_and_gradients([batch], state.parameters)
            found = self._sessions.run(self._manifest.graph("adamw"), {**given, "gradients": gradients})
        names = ("new_parameters", "new_exp_avg", "new_exp_avg_sq")
        return Stepped(loss, gradients, State(*(np.asarray(found[name], np.float32) for name in names)))

    def _optimizer_inputs(self, number: int) -> Arrays:
        optimizer = self._manifest.optimizer
        names = ("learning_rate", "weight_decay", "epsilon", "max_grad_norm")
        return {"step": np.array(number, np.int64)} | {name: np.array(getattr(optimizer, name), np.float32) for name in names}
