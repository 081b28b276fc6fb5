"""A plan for a model and a recipe; in a process of its own where the memory of planning must not count."""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pocketune import errors
from pocketune.allocator import trim
from pocketune.budget.search import MemoryPlan, choose
from pocketune.budget.sizes import readable
from pocketune.budget.whole import Ledgers, Setting, model_to_plan
from pocketune.cgroups import read_limits
from pocketune.errors import PlanError
from pocketune.memory import read_memory
from pocketune.models.load import ModelFolder
from pocketune.recipe import Recipe

_JOB = "pocketune.job"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned.

    Attributes:
        model: built-in name, published name, diffusers folder or hub id.
        budget_bytes: main memory; None: no budget.
        device_budget_bytes: memory of a GPU; None: none, or no bound.
        device: torch device.
        floor_bytes: of interpreter and libraries; None: what this process takes.
        photo_bytes: of the photos in memory; None: a typical handful.
        where: named in a refusal.
    """

    model: str
    budget_bytes: int | None = None
    device_budget_bytes: int | None = None
    device: str = "cpu"
    floor_bytes: int | None = None
    photo_bytes: int | None = None
    where: str = ""


def plan_memory(recipe: Recipe, question: Question) -> MemoryPlan:
    """The best plan that fits; no weights are read.

    Raises:
        PlanError: no plan fits.
        ModelError, RecipeError: the model or recipe is no good.
    """
    folder = model_to_plan(question.model)
    floor = measured_floor(folder) if question.floor_bytes is None else question.floor_bytes
    setting = Setting(folder=folder, device=torch.device(question.device), floor_bytes=floor, photo_bytes=question.photo_bytes)
    return choose(
        recipe,
        Ledgers(setting),
        folder,
        budget_bytes=question.budget_bytes,
        device_budget_bytes=question.device_budget_bytes,
        where=question.where,
    )


def plan_apart(recipe: Recipe, question: Question) -> MemoryPlan:
    """The same in a process of its own, so that what planning imports and leaves behind takes nothing from the budget.

    Raises:
        PlanError, ModelError, RecipeError: as of `plan_memory`.
    """
    asked = {"recipe": recipe.model_dump(mode="json", exclude_unset=True), "question": asdict(question)}
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        msg = f"planning ended with status {done.returncode} and no plan. Run `pocketune plan` to see why."
        raise PlanError(msg)
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise getattr(errors, answer["kind"])(answer["error"])
    return MemoryPlan.from_dict(recipe, answer)


def measured_floor(folder: ModelFolder) -> int:
    """What interpreter and libraries take in this process, with all that a job of a model imports."""
    importlib.import_module(_JOB)
    for library, kind in (found for found in folder.index.values() if isinstance(found, list)):
        if library in ("diffusers", "transformers") and kind:
            getattr(importlib.import_module(library), kind)  # imported when it is asked for
    gc.collect()
    trim()
    return read_memory().rss_bytes


def within_limits(budget_bytes: int | None) -> tuple[int | None, str | None]:
    """A budget, or what a control group leaves where that is less; and what to say about it."""
    limit = read_limits().memory_bytes
    if limit is None or budget_bytes is None or budget_bytes <= limit:
        return budget_bytes, None
    return limit, f"a control group limits this process to {readable(limit)}, which is less than the budget"


def _answer() -> None:
    asked = json.load(sys.stdin)
    try:
        recipe = Recipe.create(**asked["recipe"])
        answer = plan_memory(recipe, Question(**asked["question"])).as_dict()
    except errors.PocketuneError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _answer()
