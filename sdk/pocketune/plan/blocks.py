"""Which blocks of a denoiser train and which are skipped."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby

from pocketune.errors import PlanError


@dataclass(frozen=True)
class Span:
    """A run of neighbouring blocks, `start` inclusive to `stop` exclusive, all skipped or all kept."""

    start: int
    stop: int
    skipped: bool

    @property
    def is_prefix(self) -> bool:
        """Whether nothing that trains lies before it, so that its cached output is exact."""
        return self.start == 0


@dataclass(frozen=True)
class BlockPlan:
    """The blocks that training skips, sorted; all others are kept and get an adapter. chosen_by: who chose, for the report."""

    block_count: int
    skipped: tuple[int, ...] = ()
    chosen_by: str = field(default="the recipe", compare=False)

    def __post_init__(self) -> None:
        if any(not 0 <= index < self.block_count for index in self.skipped):
            msg = f"cannot skip block {max(self.skipped)}: the model has blocks 0 to {self.block_count - 1}."
            raise PlanError(msg)
        if len(self.skipped) >= self.block_count:
            msg = f"cannot skip all {self.block_count} blocks: nothing would be left to train. Keep at least one."
            raise PlanError(msg)
        if list(self.skipped) != sorted(set(self.skipped)):
            msg = f"skipped blocks must be sorted and distinct, got {self.skipped}."
            raise PlanError(msg)

    @property
    def kept(self) -> tuple[int, ...]:
        """The blocks that train."""
        skipped = set(self.skipped)
        return tuple(index for index in range(self.block_count) if index not in skipped)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The blocks as alternating skipped and kept runs, in order."""
        skipped = set(self.skipped)
        spans: list[Span] = []
        for index in range(self.block_count):
            if spans and spans[-1].skipped == (index in skipped):
                spans[-1] = Span(spans[-1].start, index + 1, spans[-1].skipped)
            else:
                spans.append(Span(index, index + 1, index in skipped))
        return tuple(spans)

    @property
    def skipped_spans(self) -> tuple[Span, ...]:
        """The skipped runs alone, in order."""
        return tuple(span for span in self.spans if span.skipped)

    def describe(self) -> str:
        """The skipped blocks as a person would type them: "0-3,10-11", or "none"."""
        return ranges_text(self.skipped) or "none"


def ranges_text(numbers: Iterable[int]) -> str:
    """Sorted whole numbers as a person would type them: "0-3,8"; empty if there are none."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def parse_plan(
    text: str,
    block_count: int,
    *,
    auto: Callable[[float], BlockPlan] | None = None,
    hollow: Callable[[float], BlockPlan] | None = None,
) -> BlockPlan:
    """Read "none", "auto", shares of the blocks such as "auto:0.3", or ranges such as "0-3,8-11".

    Shares are "auto:" for some first and last blocks, "hollow:" for those around the middle, "first:" and "last:" for one end.

    Args:
        text: as a person types it; both ends of a range are inclusive.
        block_count: of the model.
        auto: what "auto" skips for a share of the blocks, a half where none is named; default: `usual_split`.
        hollow: what "hollow" skips for a share of the blocks; default: `middle_run`.

    Raises:
        PlanError: the text is none of these, or names blocks that the model does not have.
    """
    if text == "none":
        return BlockPlan(block_count)
    kind, colon, share = text.partition(":")
    if text == "auto" or (kind == "auto" and colon):
        fraction = _fraction(share, text) if colon else 0.5
        return auto(fraction) if auto else usual_split(block_count, fraction)
    if kind == "hollow" and colon:
        fraction = _fraction(share, text)
        return hollow(fraction) if hollow else middle_run(block_count, fraction)
    if kind in ("first", "last") and colon:
        count = number_to_skip(block_count, _fraction(share, text))
        return BlockPlan(block_count, skip_ends(block_count, *((count, 0) if kind == "first" else (0, count))))
    skipped: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            msg = (
                f'cannot read the skip range "{part}" in "{text}": expected none, auto, auto:0.3, hollow:0.3, or ranges such '
                "as 0-3,8-11."
            )
            raise PlanError(msg)
        last = int(match[2] or match[1])
        if last >= block_count:
            msg = (
                f"cannot skip block {last}: the model has blocks 0 to {block_count - 1}. Give ranges within them, such as 0-3."
            )
            raise PlanError(msg)
        skipped.update(range(int(match[1]), last + 1))
    return BlockPlan(block_count, tuple(sorted(skipped)))


def number_to_skip(block_count: int, fraction: float) -> int:
    """How many of the blocks a share is: 0 for 0, else at least one, and at most all but one.

    Rounded half up, as the paper's are: 17, 23 and 29 of 57 for 30, 40 and 50 %.
    """
    return min(max(1, math.floor(block_count * fraction + 0.5)), block_count - 1) if fraction else 0


def usual_split(block_count: int, fraction: float) -> BlockPlan:
    """Skip a share of the blocks, in the proportions that masking chose for FLUX: for models that were not searched.

    Paper: DiT-BlockSkip (arXiv 2603.20755), Table 4: of 57 blocks the last 10, and the first 7, 13 and 19 at 30, 40 and 50 %.
    Differs: the proportions stand in for a search on the model at hand.
    """
    skipped = number_to_skip(block_count, fraction)
    last = min(round(block_count * 10 / 57), skipped)
    return BlockPlan(block_count, skip_ends(block_count, skipped - last, last))


def middle_run(block_count: int, fraction: float) -> BlockPlan:
    """Skip a share of the blocks, as `number_to_skip` rounds it, around the middle of the list."""
    count = number_to_skip(block_count, fraction)
    start = (block_count - count) // 2
    return BlockPlan(block_count, tuple(range(start, start + count)))


def skip_ends(block_count: int, first: int, last: int) -> tuple[int, ...]:
    """The indices of the first `first` and the last `last` blocks."""
    indices: Iterable[int] = [*range(first), *range(block_count - last, block_count)]
    return tuple(sorted(set(indices)))


def _fraction(share: str, text: str) -> float:
    if not re.fullmatch(r"0(\.\d+)?|\.\d+", share):
        msg = f'cannot read the share of blocks "{share}" in "{text}": expected a number from 0 to below 1, such as 0.3.'
        raise PlanError(msg)
    return float(share)
