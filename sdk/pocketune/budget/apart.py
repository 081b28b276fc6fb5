"""Asks another process for a memory plan. Nothing heavy is imported here: a process can plan before it has any libraries."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from pocketune import errors
from pocketune.cgroups import read_limits
from pocketune.errors import PlanError
from pocketune.recipe import Recipe
from pocketune.units import readable_size

_PLANNER = "pocketune.budget.planner"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned.

    Attributes:
        model: built-in name, published name, diffusers folder or hub id.
        budget_bytes: main memory; None: no budget.
        device: torch device; None: CUDA where there is one. A GPU's budget is what is free of its memory.
        floor_bytes: of interpreter and libraries; None: what this process takes.
        photos: paths of the photos; empty: a typical handful.
        where: named in a refusal.
    """

    model: str
    budget_bytes: int | None = None
    device: str | None = None
    floor_bytes: int | None = None
    photos: tuple[str, ...] = ()
    where: str = ""


def ask_apart(recipe: Recipe, question: Question) -> dict[str, Any]:
    """A memory plan as plain data, made in a process of its own, whose memory is gone when it is there.

    Raises:
        PlanError, ModelError, RecipeError, PhotoError: what planning refuses.
    """
    asked = {"recipe": recipe.model_dump(mode="json", exclude_unset=True), "question": asdict(question)}
    # -P: -m would put the folder that the user is in on the path, and run a torch.py that lies there.
    command = [sys.executable, "-P", "-m", _PLANNER]
    # In a group of its own, so that Ctrl-C in a terminal ends it from here alone, without a word of its own.
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False, process_group=0)
    lines = done.stdout.splitlines()
    if done.returncode == -signal.SIGKILL:
        msg = "planning was killed, most likely for want of memory: it takes some 600 MB for a moment. Raise the limit."
        raise PlanError(msg)
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        msg = f"planning ended with status {done.returncode} and no plan: {last[:200]}. Run `pocketune plan` to see more."
        raise PlanError(msg)
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise getattr(errors, answer["kind"])(answer["error"])
    return answer


def within_limits(budget_bytes: int | None) -> tuple[int | None, str | None]:
    """A budget, or what a control group leaves where that is less; and what to say about it."""
    limit = read_limits().memory_bytes
    if limit is None or budget_bytes is None or budget_bytes <= limit:
        return budget_bytes, None
    return limit, f"a control group limits this process to {readable_size(limit)}, which is less than the budget"
