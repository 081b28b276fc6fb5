"""The state of a training and its checkpoints, in the very files of PyTorch's side: a run may move between the two."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pocketune.atomic import replacing
from pocketune.errors import RunError
from pocketune.runfolder import checkpoint_file, checkpoint_paths, remove_old_checkpoints
from pocketune_edge.delta import Adapter, by_name, flatten
from pocketune_edge.denoiser import Floats
from pocketune_edge.manifest import Tuned


@dataclass(frozen=True)
class State:
    """Where a training stands.

    Attributes:
        parameters: vectors of all intervals.
        exp_avg: AdamW's first moments, likewise.
        exp_avg_sq: AdamW's second moments, likewise.
        losses: of each finished optimizer step.
        fixed: by name, parameters that never change.
        updates: how often AdamW updated the parameters of each interval; steps of plain descent do not count.
    """

    parameters: Floats
    exp_avg: Floats
    exp_avg_sq: Floats
    losses: tuple[float, ...]
    fixed: dict[str, Floats]
    updates: tuple[int, ...]

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return len(self.losses)

    @property
    def adapter(self) -> Adapter:
        """The LoRA as it is now."""
        return Adapter(self.parameters, self.fixed)

    def after(self, loss: float, parameters: Floats) -> State:
        """The state after a step of plain descent."""
        return replace(self, parameters=parameters, losses=(*self.losses, loss))


def fresh_state(adapter: Adapter, *, intervals: int = 1) -> State:
    """The state before the first step."""
    return State(adapter.flat, *_no_moments(adapter.flat.size), (), adapter.fixed, (0,) * intervals)


def _no_moments(elements: int) -> tuple[Floats, Floats]:
    # Unlike those of zeros_like, pages of zeros take no memory before they are written, which plain descent never does.
    return np.zeros(elements, np.float32), np.zeros(elements, np.float32)


class CheckpointFolder:
    """`step-NNNNNN.safetensors` files, laid out as `pocketune.checkpoint` does; the newest two are kept."""

    def __init__(self, folder: Path, tuned: Tuned, *, fingerprint: str) -> None:
        """Use a folder; it is created at the first save."""
        self.folder = folder
        self._tuned = tuned
        self._fingerprint = fingerprint

    def save(self, state: State) -> Path:
        """Write a checkpoint and remove the oldest beyond two."""
        tensors = {f"parameter.{name}": value for name, value in state.fixed.items()}
        tensors |= {f"parameter.{name}": value for name, value in by_name(self._tuned, state.parameters).items()}
        updates = self._updates(state.updates)
        for kind, flat in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
            tensors |= {f"{kind}.{name}": value for name, value in by_name(self._tuned, flat).items() if updates[name]}
        counts = {name: count for name, count in updates.items() if count not in (0, state.step)}
        tensors |= {f"updates.{name}": np.array(count, np.float32) for name, count in counts.items()}
        metadata = {"step": str(state.step), "losses": json.dumps(state.losses), "fingerprint": self._fingerprint}
        path = self.folder / checkpoint_file(state.step)
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=metadata)
        remove_old_checkpoints(self.folder)
        return path

    def restore(self, start: Adapter) -> State:
        """The newest checkpoint's state; the fresh one if there is none.

        Raises:
            RunError: the checkpoint is damaged, or belongs to another recipe, model or set of photos.
        """
        found = checkpoint_paths(self.folder)
        if not found:
            return fresh_state(start, intervals=self._tuned.intervals)
        try:
            with safe_open(found[-1], framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("fingerprint") == self._fingerprint:
                return self._state(tensors, metadata)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            msg = f"the checkpoint {found[-1]} is damaged ({error}). Delete it; the run goes on from the one before."
            raise RunError(msg) from error
        msg = f"{found[-1]} was made with another recipe, model or photos. Resume with those, or choose another --out."
        raise RunError(msg)

    def _state(self, tensors: dict[str, Floats], metadata: dict[str, str]) -> State:
        losses = tuple(float(loss) for loss in json.loads(metadata["losses"]))
        if int(metadata["step"]) != len(losses):
            msg = f"it says step {metadata['step']} but has {len(losses)} losses"
            raise ValueError(msg)
        groups: dict[str, dict[str, Floats]] = {"parameter": {}, "exp_avg": {}, "exp_avg_sq": {}, "updates": {}}
        for key, value in tensors.items():
            kind, name = key.split(".", 1)
            groups[kind][name] = value
        updates = [0] * self._tuned.intervals
        for item in self._tuned.parameters:
            if item.name in groups["exp_avg"]:
                updates[item.interval] = int(groups["updates"].get(item.name, np.float32(len(losses))))
        parameters = flatten(self._tuned, groups["parameter"])
        moments = _no_moments(parameters.size)
        if any(updates):
            without = (item for item in self._tuned.parameters if not updates[item.interval])
            never = {item.name: np.zeros(item.shape, np.float32) for item in without}
            moments = flatten(self._tuned, groups["exp_avg"] | never), flatten(self._tuned, groups["exp_avg_sq"] | never)
        fixed = {item.name: groups["parameter"][item.name] for item in self._tuned.parameters if item.offset is None}
        return State(parameters, *moments, losses, fixed, tuple(updates))

    def _updates(self, updates: tuple[int, ...]) -> dict[str, int]:
        """By name, how often AdamW updated a parameter."""
        return {item.name: updates[item.interval] for item in self._tuned.parameters}
