"""Progress log and restart point of one training stage of the built-in models; safetensors and JSON only."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LOG_EVERY = 50


class StageRun:
    """Where a training stage leaves its log and its restart point.

    `folder/state.safetensors` holds parameters and optimizer moments, `folder/log.jsonl` one row every 50 steps.
    """

    def __init__(self, folder: Path, *, save_every_s: float = 180.0) -> None:
        """Open (or create) the stage's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._save_every_s = save_every_s
        self._last_save = self._began = time.monotonic()
        self._means: dict[str, list[float]] = {}
        self._first_step: int | None = None

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
    ) -> int:
        """Load the restart point, if there is one, into all three; the number of steps done."""
        path = self._folder / "state.safetensors"
        if not path.exists():
            return 0
        tensors = load_file(path)
        step = int(tensors.pop("step").item())
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        state = optimizer.state_dict()
        state["state"] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(state)
        schedule.last_epoch = step - 1
        schedule.step()
        return step

    def after_step(
        self,
        step: int,
        steps: int,
        figures: dict[str, float],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        """Log the means of `figures` every 50 steps, and save every few minutes and at the end."""
        self._first_step = self._first_step if self._first_step is not None else step - 1
        for name, value in figures.items():
            self._means.setdefault(name, []).append(value)
        if step % LOG_EVERY == 0 or step == steps:
            rate = (step - self._first_step) / (time.monotonic() - self._began)
            row: dict[str, Any] = {"step": step, "steps": steps, "steps_per_s": round(rate, 3)}
            row |= {name: round(sum(values) / len(values), 5) for name, values in self._means.items()}
            row["learning_rate"] = schedule.get_last_lr()[0]
            self._means.clear()
            with (self._folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        if step == steps or time.monotonic() - self._last_save > self._save_every_s:
            self._save(step, model, optimizer)
            self._last_save = time.monotonic()

    def _save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        tensors: dict[str, Tensor] = {"step": torch.tensor(step)}
        tensors |= {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value).contiguous() for name, value in moments.items()}
        partial = self._folder / "state.partial"
        save_file(tensors, partial)
        partial.replace(self._folder / "state.safetensors")
