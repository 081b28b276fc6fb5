"""Checkpoints of a training: parameters, AdamW moments, step and losses in one safetensors file, written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pocketune.atomic import replacing
from pocketune.errors import RunError
from pocketune.runfolder import CHECKPOINTS_KEPT, checkpoint_file, checkpoint_paths, newest_step, remove_old_checkpoints

_MOMENTS = ("exp_avg", "exp_avg_sq")
CHECKPOINT_COPIES = (CHECKPOINTS_KEPT + 1) * (1 + len(_MOMENTS))
"""Of the parameters on disk, at most: a checkpoint holds moments too, and the next is written before the oldest goes."""


@dataclass(frozen=True)
class Progressed:
    """How far a checkpoint got: finished optimizer steps and the loss of each."""

    step: int
    losses: tuple[float, ...]


class CheckpointFolder:
    """`step-NNNNNN.safetensors` files; the newest two are kept.

    Tensors are named "parameter.NAME", "exp_avg.NAME" and "exp_avg_sq.NAME", and "updates.NAME" holds how often AdamW updated
    a parameter where that is not once a step; the metadata holds step, losses and a fingerprint of all that must not change
    between the parts of a run.
    """

    def __init__(self, folder: Path, *, fingerprint: str) -> None:
        """Use a folder; it is created at the first save."""
        self.folder = folder
        self._fingerprint = fingerprint

    @property
    def newest_step(self) -> int:
        """Finished steps of the newest checkpoint; 0 if there is none."""
        return newest_step(self.folder)

    def save(
        self, parameters: Mapping[str, Tensor], optimizer: torch.optim.AdamW, *, step: int, losses: tuple[float, ...]
    ) -> Path:
        """Write a checkpoint and remove the oldest beyond two."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach().cpu().contiguous()
            state = optimizer.state.get(parameter, {})
            tensors |= {f"{moment}.{name}": state[moment].cpu().contiguous() for moment in _MOMENTS if moment in state}
            if "step" in state and int(state["step"]) != step:
                tensors[f"updates.{name}"] = state["step"].cpu()
        metadata = {"step": str(step), "losses": json.dumps(losses), "fingerprint": self._fingerprint}
        path = self.folder / checkpoint_file(step)
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=metadata)
        remove_old_checkpoints(self.folder)
        return path

    def restore(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.AdamW) -> Progressed:
        """Load the newest checkpoint in place; step 0 if there is none.

        Raises:
            RunError: the checkpoint is damaged, or belongs to another recipe, model or set of photos.
        """
        found = checkpoint_paths(self.folder)
        if not found:
            return Progressed(0, ())
        try:
            with safe_open(found[-1], framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            msg = f"the checkpoint {found[-1]} is damaged ({error}). Delete it; the run goes on from the one before."
            raise RunError(msg) from error
        if metadata.get("fingerprint") != self._fingerprint:
            msg = f"{found[-1]} was made with another recipe, model or photos. Resume with those, or choose another --out."
            raise RunError(msg)
        step = int(metadata["step"])
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"parameter.{name}"])
            if f"exp_avg.{name}" in tensors:
                moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
                updates = tensors.get(f"updates.{name}", torch.tensor(float(step)))
                optimizer.state[parameter] = {"step": updates.to(parameter.device), **moments}
        return Progressed(step, tuple(json.loads(metadata["losses"])))
