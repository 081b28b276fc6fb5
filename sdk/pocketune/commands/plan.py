"""`pocketune plan`: what a job will need, phase by phase, and what fits a budget; no weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pocketune.budget.apart import Question
from pocketune.commands.failures import clear_errors, needing_extra
from pocketune.commands.options import DEFAULT_MODEL, BudgetOption, JsonOption, SkipOption, recipe_of
from pocketune.display import print_facts, print_lines, printable
from pocketune.lean import without_scipy
from pocketune.profile import PROFILES, DeviceProfile, profile_named
from pocketune.units import duration, parse_size, readable_size

if TYPE_CHECKING:
    from pocketune.budget.search import MemoryPlan, Neighbour
    from pocketune.budget.speed import Speed

_ANY_PROMPT = "a photo of sks toy"


def plan(
    model: Annotated[str, typer.Option(help="Built-in or published name, local diffusers folder, or hub id.")] = DEFAULT_MODEL,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of settings; options given here win over it.")] = None,
    memory_budget: BudgetOption = None,
    device: Annotated[str | None, typer.Option(help=f"Plan for a device: {', '.join(PROFILES)}; default: this one.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the training images in pixels.")] = None,
    skip: SkipOption = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    method: Annotated[str | None, typer.Option(help="What is tuned: lora, scales or token.")] = None,
    weights: Annotated[str | None, typer.Option(help="Frozen weights in memory or read from disk: resident, streamed.")] = None,
    weight_bits: Annotated[int | None, typer.Option(help="Pack the denoiser's weights to 8 or 4 bits.")] = None,
    activations: Annotated[str | None, typer.Option(help="What backward needs of a block: kept, recomputed, on_disk.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a job will need before anything is loaded, and which settings fit a memory budget."""
    asked = {
        "instance_prompt": None if recipe else _ANY_PROMPT,  # no prompt needs more than another
        "resolution": resolution,
        "skip": skip,
        "rank": rank,
        "steps": steps,
        "method": method,
        "weights": weights,
        "weight_bits": weight_bits,
        "activations": activations,
    }
    with clear_errors():
        profile = None if device is None else profile_named(device)
        settings = recipe_of(recipe, asked)
        budget = profile.usable_bytes if profile else None
        if memory_budget is not None:
            budget = min(parse_size(memory_budget), budget or parse_size(memory_budget))
        with needing_extra("train"), without_scipy():
            from pocketune.budget.planning import plan_memory
            from pocketune.budget.speed import speed_of
        where = f" on '{profile.name}'" if profile else ""
        # Profiles are of devices' processors; without one, plan for this machine.
        question = Question(model=model, budget_bytes=budget, device="cpu" if profile else None, where=where)
        found = plan_memory(settings, question)
        speed = speed_of(profile)
        seconds = speed.by_phase(found.ledger)
    if as_json:
        typer.echo(json.dumps(found.as_dict() | {"model": model, "device": device, "seconds": seconds}))
        return
    _show(found, model, profile, speed, seconds)


def _show(found: MemoryPlan, model: str, profile: DeviceProfile | None, speed: Speed, seconds: dict[str, float]) -> None:
    console = Console()
    ledger = found.ledger
    facts: dict[str, Any] = {"model": model}
    disk = readable_size(speed.disk_bytes_per_s)
    if profile:
        facts["device"] = (
            f"{profile.title}: {readable_size(profile.usable_bytes)} of {readable_size(profile.memory_bytes)} can be used"
        )
    if found.budget_bytes is not None:
        facts["budget"] = readable_size(found.budget_bytes)
    facts |= {
        "predicted peak": f"{readable_size(ledger.peak_bytes())} in the phase {ledger.peak_phase().name}",
        "needs": f"{readable_size(found.needs_bytes)}, with a margin for errors of prediction",
        "time": f"at least {duration(sum(seconds.values()))}, by arithmetic on the processor and a disk of {disk}/s alone",
        "disk": ", ".join(f"{name} {readable_size(size)}" for name, size in ledger.disk) or "none",
    }
    if found.budget_bytes is not None:
        facts["changed"] = (
            "; ".join(f"{t.setting} {t.asked} -> {t.planned} (saves {readable_size(t.saves_bytes)})" for t in found.trades)
            or "nothing: the recipe fits as it is"
        )
        facts["next cheaper"] = _beside(found.cheaper, "there is none")
        facts["next faster"] = _beside(found.faster, "there is none: this is the recipe as asked")
    print_facts(console, facts)
    table = Table(box=None, padding=(0, 2))
    for heading, side in (("phase", "left"), ("item", "left"), ("MB", "right"), ("from", "left")):
        table.add_column(heading, justify=side, header_style="bold")  # type: ignore[arg-type]
    for phase in ledger.phases:
        table.add_row(Text(phase.name, style="bold"), "", Text(f"{phase.bytes() / 1e6:,.0f}", style="bold"), "")
        for item in phase.items:
            table.add_row("", printable(item.name), f"{item.bytes / 1e6:,.1f}", printable(item.formula))
    console.print()
    console.print(table)
    notes = list(ledger.notes)
    if found.budget_bytes is None and not found.recipe.saves_memory:
        notes.append(
            "without a --memory-budget, and with these settings, glibc keeps some freed memory: up to a few 100 MB more"
        )
    if profile is not None and profile.estimates:
        notes.append(f"of {profile.name}, these figures are estimates: {', '.join(profile.estimates)}")
    if notes:
        console.print()
        print_lines(console, notes)


def _beside(neighbour: Neighbour | None, otherwise: str) -> str:
    if neighbour is None:
        return otherwise
    settings = ", ".join(f"{name} {value}" for name, value in neighbour.settings.items()) or "the recipe as it is"
    return f"{settings}: needs {readable_size(neighbour.needs_bytes)}"
