"""The best memory plan that fits a budget, its neighbours, and what would fit where none does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

from pocketune.budget.ladder import changes, rungs
from pocketune.budget.ledger import Ledger
from pocketune.errors import PlanError, PocketuneError
from pocketune.models.load import ModelFolder
from pocketune.recipe import Recipe
from pocketune.rules import skips_blocks
from pocketune.units import readable_size

MARGIN = 0.05
"""Of what a job needs beyond the libraries: a plan may be wrong by so much, and must fit all the same."""
MARGIN_BYTES = 16_000_000
"""And by so much whatever it needs: what a process keeps of one phase in the next."""
_LOW_RANK = 4

Measure = Callable[[Recipe], Ledger]
"""The ledger of a recipe."""


@dataclass(frozen=True, kw_only=True)
class Trade:
    """One setting that a plan changed, with both values, and by how much the predicted peak is lower for it."""

    setting: str
    asked: Any
    planned: Any
    saves_bytes: int


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A memory plan beside the chosen one.

    Attributes:
        settings: what differs from what was asked.
        needs_bytes: the budget from which on it is chosen.
    """

    settings: dict[str, Any]
    needs_bytes: int
    device_needs_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What was decided for a job.

    Attributes:
        recipe: with the settings that fit.
        ledger: what it will need.
        budget_bytes: main memory; None: no budget, and nothing is changed.
        device_budget_bytes: memory of the GPU; None: there is none, or no bound.
        needs_bytes: the budget that the plan needs, with a margin for errors of prediction.
        trades: what was changed.
        saved_bytes: by how much that lowers the predicted peak; 0 where nothing was changed.
        cheaper: the next plan that needs less; None: this is the cheapest.
        faster: the next faster one; None: this is the recipe as asked.
    """

    recipe: Recipe
    ledger: Ledger
    needs_bytes: int
    budget_bytes: int | None = None
    device_budget_bytes: int | None = None
    trades: tuple[Trade, ...] = ()
    saved_bytes: int = 0
    cheaper: Neighbour | None = None
    faster: Neighbour | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values; of the recipe, the settings that were changed."""
        return {
            "budget_bytes": self.budget_bytes,
            "device_budget_bytes": self.device_budget_bytes,
            "needs_bytes": self.needs_bytes,
            "settings": {trade.setting: trade.planned for trade in self.trades},
            "trades": [asdict(trade) for trade in self.trades],
            "saved_bytes": self.saved_bytes,
            "cheaper": asdict(self.cheaper) if self.cheaper else None,
            "faster": asdict(self.faster) if self.faster else None,
            "ledger": self.ledger.as_dict(),
        }

    @classmethod
    def from_dict(cls, recipe: Recipe, values: dict[str, Any]) -> Self:
        """Take back what `as_dict` gave for what was asked."""
        names = ("budget_bytes", "device_budget_bytes", "needs_bytes", "saved_bytes")
        return cls(
            recipe=recipe.changed(**values["settings"]),
            ledger=Ledger.from_dict(values["ledger"]),
            trades=tuple(Trade(**trade) for trade in values["trades"]),
            cheaper=Neighbour(**values["cheaper"]) if values["cheaper"] else None,
            faster=Neighbour(**values["faster"]) if values["faster"] else None,
            **{name: values[name] for name in names},
        )


def choose(
    recipe: Recipe,
    measure: Measure,
    folder: ModelFolder,
    *,
    budget_bytes: int | None,
    device_budget_bytes: int | None = None,
    where: str = "",
) -> MemoryPlan:
    """The first of the ladder's settings that fits; without a budget, the recipe as it is.

    Args:
        recipe: what is asked.
        measure: gives ledgers.
        folder: the model, for proposals.
        budget_bytes: main memory that the job may take.
        device_budget_bytes: memory of a GPU that it may take.
        where: named in the refusal, as " on 'pixel-6a'".

    Raises:
        PlanError: nothing fits; the message names the largest item, and a change that would help.
    """
    asked = measure(recipe)
    if budget_bytes is None:
        return MemoryPlan(recipe=recipe, ledger=asked, needs_bytes=needs(asked), device_budget_bytes=device_budget_bytes)
    tried: list[tuple[Recipe, Ledger]] = []
    for candidate in rungs(recipe):
        ledger = measure(candidate) if tried else asked
        if fits(ledger, budget_bytes, device_budget_bytes):
            return MemoryPlan(
                recipe=candidate,
                ledger=ledger,
                needs_bytes=needs(ledger),
                budget_bytes=budget_bytes,
                device_budget_bytes=device_budget_bytes,
                trades=_trades([*tried, (candidate, ledger)]),
                saved_bytes=max(0, asked.peak_bytes() - ledger.peak_bytes()),
                cheaper=_cheaper(recipe, candidate, ledger, measure),
                faster=_faster(recipe, tried, ledger),
            )
        tried.append((candidate, ledger))
    cheapest, ledger = min(tried, key=lambda pair: needs(pair[1]))
    raise PlanError(_refusal(cheapest, ledger, measure, folder, budget_bytes, device_budget_bytes, where=where))


def _trades(tried: list[tuple[Recipe, Ledger]]) -> tuple[Trade, ...]:
    """What each change saved where it came in, on the way down the ladder from what was asked to what was chosen."""
    (asked, _), (chosen, _) = tried[0], tried[-1]
    way = [tried[0]]
    for pair in tried[1:-1]:
        nearer = len(changes(pair[0], chosen)) <= len(changes(way[-1][0], chosen))
        if nearer and len(changes(way[-1][0], pair[0])) == 1 and pair[0].vae_tile == asked.vae_tile:
            way.append(pair)
    way.append(tried[-1])
    saved: dict[str, int] = dict.fromkeys(changes(asked, chosen), 0)
    for (before, first), (after, second) in pairwise(way):
        named = [name for name in changes(before, after) if name in saved]
        if named:
            saved[named[-1]] += first.peak_bytes() - second.peak_bytes()
    return tuple(
        Trade(setting=name, asked=a, planned=b, saves_bytes=saved[name]) for name, (a, b) in changes(asked, chosen).items()
    )


def needs(ledger: Ledger) -> int:
    """The budget that a ledger's peak calls for."""
    return max(_with_margin(phase.bytes(), sum(item.bytes for item in phase.items[:1])) for phase in ledger.phases)


def device_needs(ledger: Ledger) -> int:
    """The same of a GPU's memory, all of which is the job's own."""
    return max(_with_margin(phase.bytes("device"), 0) for phase in ledger.phases)


def fits(ledger: Ledger, budget_bytes: int, device_budget_bytes: int | None) -> bool:
    """Whether both memories suffice."""
    return needs(ledger) <= budget_bytes and (device_budget_bytes is None or device_needs(ledger) <= device_budget_bytes)


def _with_margin(peak_bytes: int, floor_bytes: int) -> int:
    return peak_bytes + round(MARGIN * (peak_bytes - floor_bytes)) + (MARGIN_BYTES if peak_bytes else 0)


def _cheaper(recipe: Recipe, chosen: Recipe, ledger: Ledger, measure: Measure) -> Neighbour | None:
    following = False
    for candidate in rungs(recipe):
        if following:
            found = measure(candidate)
            if needs(found) < needs(ledger):
                return _neighbour(recipe, candidate, found)
        following = following or candidate == chosen
    return None


def _faster(recipe: Recipe, tried: list[tuple[Recipe, Ledger]], ledger: Ledger) -> Neighbour | None:
    """Of the faster ones, all of which need more than there is, the nearest."""
    above = [pair for pair in tried if needs(pair[1]) > needs(ledger) or device_needs(pair[1]) > device_needs(ledger)]
    return _neighbour(recipe, *above[-1]) if above else None


def _neighbour(recipe: Recipe, candidate: Recipe, ledger: Ledger) -> Neighbour:
    settings = {name: after for name, (_, after) in changes(recipe, candidate).items()}
    return Neighbour(settings=settings, needs_bytes=needs(ledger), device_needs_bytes=device_needs(ledger))


def _refusal(
    cheapest: Recipe,
    ledger: Ledger,
    measure: Measure,
    folder: ModelFolder,
    budget: int,
    device_budget: int | None,
    *,
    where: str,
) -> str:
    short_of_host = needs(ledger) > budget
    place, need, had = (
        ("host", needs(ledger), budget) if short_of_host else ("device", device_needs(ledger), device_budget or 0)
    )
    phase = ledger.peak_phase("host" if place == "host" else "device")
    largest = phase.largest
    msg = (
        f"recipe needs {readable_size(need)}{where} at the least, budget {readable_size(had)}; largest item: {largest.name} "
        f"{readable_size(largest.bytes)} in the phase {phase.name}."
    )
    floor = ledger.phases[0].items[0].bytes
    if short_of_host and floor >= budget:
        return f"{msg} Interpreter and libraries alone take {readable_size(floor)}. Give at least {readable_size(need)}."
    for option, changed in _proposals(cheapest, folder):
        try:
            found = measure(cheapest.changed(**changed))
        except PocketuneError:  # a change that the model or the method does not take
            continue
        if fits(found, budget, device_budget):
            return f"{msg} Try {option} ({readable_size(needs(found))})."
    return f"{msg} No smaller resolution, skipped blocks or rank would fit either. Give at least {readable_size(need)}."


def _proposals(recipe: Recipe, folder: ModelFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes that alter what is learned, for a person to make: the mildest first."""
    unit, native = folder.resolution_unit, recipe.resolution or folder.native_resolution
    sides = [side for share in (0.75, 0.5, 0.25) if unit <= (side := int(native * share) // unit * unit) < native]
    if recipe.rank > _LOW_RANK and recipe.method == "lora":
        yield f"--rank {_LOW_RANK}", {"rank": _LOW_RANK}
    if recipe.patches == "none":
        for side in sides:
            yield f"--resolution {side}", {"resolution": side}
    if not skips_blocks(recipe.skip):
        yield "--skip auto", {"skip": "auto"}
        if recipe.patches == "none" and sides:
            yield f"--skip auto --resolution {sides[-1]}", {"skip": "auto", "resolution": sides[-1]}
