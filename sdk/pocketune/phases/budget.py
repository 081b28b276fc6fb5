"""The memory plan of a job that has a memory budget: made before anything starts, kept in RUN, and watched over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pocketune.atomic import write_text
from pocketune.budget.apart import Question, within_limits
from pocketune.budget.planning import plan_memory_apart
from pocketune.budget.search import MemoryPlan
from pocketune.errors import BudgetError, PlanError, RecipeError, RunError
from pocketune.guard import Guard
from pocketune.recipe import Recipe
from pocketune.units import readable_size
from pocketune.watch import Watch

PLAN_FILE = "plan.json"


def memory_plan_of(
    recipe: Recipe,
    budget_bytes: int,
    *,
    model: str,
    floor_bytes: int,
    run: Path,
    resume: bool,
    photos: Sequence[str],
    device: torch.device,
    made: dict[str, Any] | None,
    watch: Watch,
) -> MemoryPlan:
    """The memory plan of a new job, or the one that an interrupted job was begun with; progress says its peak.

    Args:
        recipe: what is asked.
        budget_bytes: main memory.
        model: as of `personalize`.
        floor_bytes: of interpreter and libraries, without the photos.
        run: the RUN folder.
        resume: whether a job goes on.
        photos: their paths.
        device: where the arithmetic is done.
        made: a memory plan as plain data that was made for all of this already.
        watch: of the job.

    Raises:
        PlanError: nothing fits, or not the plan that the job was begun with.
        RunError: `RUN/plan.json` is not readable.
    """
    with watch.phase("plan"):
        bound, note = within_limits(budget_bytes)
        kept = run / PLAN_FILE
        if resume and kept.is_file():
            memory_plan = replace(_kept_memory_plan(kept, recipe), budget_bytes=bound)
            if bound is not None and memory_plan.needs_bytes > bound:
                msg = (
                    f"the run in {run} needs {readable_size(memory_plan.needs_bytes)} as it was planned, budget "
                    f"{readable_size(bound)}. Give as much to go on, or start anew with the smaller budget in another --out."
                )
                raise PlanError(msg)
        elif made is not None:
            memory_plan = MemoryPlan.from_dict(recipe, made)
        else:
            question = Question(
                model=model,
                budget_bytes=bound,
                device=str(device),
                floor_bytes=floor_bytes,
                photos=tuple(photos),
            )
            memory_plan = plan_memory_apart(recipe, question)
        changed = ", ".join(f"{trade.setting} {trade.planned}" for trade in memory_plan.trades) or "the recipe as it is"
        peak, most = memory_plan.ledger.peak_bytes(), memory_plan.budget_bytes or 0
        said = f"predicted peak {readable_size(peak)} of {readable_size(most)}: {changed}"
        watch.say("plan", said + (f" ({note})" if note else ""))
    return memory_plan


def keep_memory_plan(memory_plan: MemoryPlan, run: Path) -> None:
    """Write it into RUN, so that a resumed job has the same settings."""
    write_text(run / PLAN_FILE, json.dumps(memory_plan.as_dict()) + "\n")


def guard_of(memory_plan: MemoryPlan, device: torch.device) -> Guard:
    """What stops a job before it has more than the budget."""
    used = (lambda: torch.cuda.memory_reserved(device)) if device.type == "cuda" else None
    return Guard(memory_plan.budget_bytes or 0, device_budget_bytes=memory_plan.device_budget_bytes, device_bytes=used)


def exceeded(guard: Guard, memory_plan: MemoryPlan, phase: str, *, kept: bool) -> BudgetError:
    """What to tell about a job that was stopped; kept: whether RUN is there to go on with."""
    if guard.device_bytes is not None:
        what, reached, more = "memory of the GPU", guard.device_bytes, "more of it free"
        bound = f"the {readable_size(memory_plan.device_budget_bytes or 0)} that were free"
        peak = memory_plan.ledger.peak_bytes("device")
    else:
        what, reached, more = "memory", guard.tripped.rss_bytes if guard.tripped else 0, "a larger --memory-budget"
        bound = f"the budget of {readable_size(memory_plan.budget_bytes or 0)}"
        peak = memory_plan.ledger.peak_bytes()
    again = "What was done is kept: add --resume and" if kept else "Nothing was done that could be kept: start again with"
    msg = (
        f"{what} reached {readable_size(reached)} in the phase {phase}, which is close to {bound} "
        f"(predicted: {readable_size(peak)}). {again} {more}, or start anew with a lower resolution."
    )
    return BudgetError(msg)


def predicted(memory_plan: MemoryPlan) -> dict[str, Any]:
    """What the record of a run says about its memory plan; saving is a part of the phase of training."""
    phases = {phase.name: phase.bytes() for phase in memory_plan.ledger.phases}
    phases["training"] = max(phases["training"], phases.pop("saving"))
    return {
        "budget_bytes": memory_plan.budget_bytes,
        "needs_bytes": memory_plan.needs_bytes,
        "settings": {trade.setting: trade.planned for trade in memory_plan.trades},
        "phases": phases,
    }


def _kept_memory_plan(path: Path, recipe: Recipe) -> MemoryPlan:
    try:
        return MemoryPlan.from_dict(recipe, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecipeError) as error:
        why = f"{type(error).__name__}: {error}"
        msg = f"cannot read the memory plan {path} ({why}). Start again in a new RUN, without --resume."
        raise RunError(msg) from error
