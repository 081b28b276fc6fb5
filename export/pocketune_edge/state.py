"""The state of a training and its checkpoints, in the very files of PyTorch's side: a run may move between the two."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pocketune.atomic import replacing
from pocketune.errors import RunError
from pocketune_edge.delta import Adapter, by_name, flatten
from pocketune_edge.denoiser import Floats
from pocketune_edge.manifest import Lora

KEEP = 2


@dataclass(frozen=True)
class State:
    """Where a training stands.

    Attributes:
        parameters: flat vector.
        exp_avg: AdamW's first moments, flat.
        exp_avg_sq: AdamW's second moments, flat.
        losses: of each finished optimizer step.
        fixed: by name, parameters that never change.
        updates: how often AdamW updated the parameters; steps of plain descent do not count.
    """

    parameters: Floats
    exp_avg: Floats
    exp_avg_sq: Floats
    losses: tuple[float, ...]
    fixed: dict[str, Floats]
    updates: int

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return len(self.losses)

    @property
    def adapter(self) -> Adapter:
        """The LoRA as it is now."""
        return Adapter(self.parameters, self.fixed)

    def after(self, loss: float, parameters: Floats, moments: tuple[Floats, Floats] | None = None) -> State:
        """The state after one more step; `moments` are those of AdamW, where it took the step."""
        updates = self.updates + (moments is not None)
        exp_avg, exp_avg_sq = moments or (self.exp_avg, self.exp_avg_sq)
        return State(parameters, exp_avg, exp_avg_sq, (*self.losses, loss), self.fixed, updates)


def fresh_state(adapter: Adapter) -> State:
    """The state before the first step."""
    return State(adapter.flat, *_no_moments(adapter.flat.size), (), adapter.fixed, 0)


def _no_moments(elements: int) -> tuple[Floats, Floats]:
    # Unlike those of zeros_like, pages of zeros take no memory before they are written, which plain descent never does.
    return np.zeros(elements, np.float32), np.zeros(elements, np.float32)


class CheckpointFolder:
    """`step-NNNNNN.safetensors` files, laid out as `pocketune.checkpoint` does; the newest two are kept."""

    def __init__(self, folder: Path, lora: Lora, *, fingerprint: str) -> None:
        """Use a folder; it is created at the first save."""
        self.folder = folder
        self._lora = lora
        self._fingerprint = fingerprint

    def save(self, state: State) -> Path:
        """Write a checkpoint and remove the oldest beyond two."""
        tensors = {f"parameter.{name}": value for name, value in state.fixed.items()}
        for kind, flat in (("parameter", state.parameters), ("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
            if kind == "parameter" or state.updates:
                tensors |= {f"{kind}.{name}": value for name, value in by_name(self._lora, flat).items()}
        metadata = {"step": str(state.step), "losses": json.dumps(state.losses), "fingerprint": self._fingerprint}
        path = self.folder / f"step-{state.step:06d}.safetensors"
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=metadata)
        for old in self._all()[:-KEEP]:
            old.unlink()
        return path

    def restore(self, start: Adapter) -> State:
        """The newest checkpoint's state; the fresh one if there is none.

        Raises:
            RunError: the checkpoint is damaged, or belongs to another recipe, model or set of photos.
        """
        found = self._all()
        if not found:
            return fresh_state(start)
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
        groups: dict[str, dict[str, Floats]] = {"parameter": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for key, value in tensors.items():
            kind, name = key.split(".", 1)
            groups[kind][name] = value
        parameters = flatten(self._lora, groups["parameter"])
        moments = _no_moments(parameters.size)
        if groups["exp_avg"]:
            moments = flatten(self._lora, groups["exp_avg"]), flatten(self._lora, groups["exp_avg_sq"])
        fixed = {item.name: groups["parameter"][item.name] for item in self._lora.parameters if item.offset is None}
        return State(parameters, *moments, losses, fixed, len(losses) if groups["exp_avg"] else 0)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))
