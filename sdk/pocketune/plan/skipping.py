"""How an architecture goes without some of its blocks: which it can skip, what is cached of them, and how that enters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from pocketune.errors import PlanError
from pocketune.models.base import DenoiserAdapter, SkipConnected, Streams
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan, Span, middle_run, number_to_skip, parse_plan, usual_split
from pocketune.plan.selection import SELECTION_FILE, Selection, selection_of
from pocketune.recipe import Recipe


class Skipping(Protocol):
    """The skipping of one denoiser."""

    def auto(self, fraction: float = 0.5) -> BlockPlan:
        """What is skipped where only a share of the blocks is named; 0 skips none."""

    def hollow(self, fraction: float) -> BlockPlan:
        """The run around the middle whose share of the blocks is nearest to `fraction`; 0 skips none."""

    def check(self, plan: BlockPlan, *, use_residuals: bool = True) -> None:
        """Refuse a plan that makes no sense for the architecture.

        Raises:
            PlanError: with the reason.
        """

    def collect(self, span: Span, entering: Streams, leaving: Streams) -> Streams:
        """What is to be cached of a skipped span, from the streams on both of its sides."""

    def enter(self, span: Span, streams: Streams, cached: Streams) -> Streams:
        """The streams behind a skipped span, from those before it and what was cached."""


@dataclass(frozen=True)
class ResidualSkipping:
    """Of transformers: any blocks; a span hands on what enters it plus what it added for the frozen model.

    Paper: DiT-BlockSkip (arXiv 2603.20755), equation 3: f'_{i+l} = f'_i + Delta f_{i,i+l}.
    Differs: a prefix is cached as it left the blocks, so it is exact bit for bit.
    """

    block_count: int
    selection: Selection | None = None

    def auto(self, fraction: float = 0.5) -> BlockPlan:
        """The first and last blocks that masking found for this model; else in the proportions found for FLUX."""
        if self.selection is None:
            chosen_by = f"the proportions found for FLUX; no {SELECTION_FILE} of these weights lies in the model's folder"
            return replace(usual_split(self.block_count, fraction), chosen_by=chosen_by)
        split = self.selection.split(number_to_skip(self.block_count, fraction))
        return replace(split.plan(self.block_count), chosen_by=f"masking text in this model ({SELECTION_FILE})")

    def hollow(self, fraction: float) -> BlockPlan:
        """The middle of the list.

        Differs from Hollowed Net, which is for U-Nets: without skip connections a middle replaced by its activation would cut
        the blocks before it off from the loss; a residual does not.
        """
        return middle_run(self.block_count, fraction)

    def check(self, plan: BlockPlan, *, use_residuals: bool = True) -> None:
        """Any plan will do."""

    def collect(self, span: Span, entering: Streams, leaving: Streams) -> Streams:
        """The difference of each stream that goes on; of a prefix, the streams themselves."""
        if span.is_prefix:
            return leaving
        # The last block ends the text stream, so a span that holds it has fewer residuals than streams enter it.
        return tuple(after - before for after, before in zip(leaving, entering, strict=False))

    def enter(self, span: Span, streams: Streams, cached: Streams) -> Streams:
        """Input plus residual."""
        if span.is_prefix:
            return cached
        return tuple(stream + residual for stream, residual in zip(streams, cached, strict=False))


@dataclass(frozen=True)
class HollowSkipping:
    """Of U-Nets: one run around the middle, which hands on the image that left it in the frozen model.

    Paper: Hollowed Net (arXiv 2411.01179). Layers before the run learn through the skip connections alone.
    """

    block_count: int
    adapter: SkipConnected

    def auto(self, fraction: float = 0.5) -> BlockPlan:
        """The same as `hollow`."""
        return self.hollow(fraction)

    def hollow(self, fraction: float) -> BlockPlan:
        """Of the runs whose layers hand skip connections only to each other, the one nearest in length.

        Differs: the paper's layers were chosen by hand.
        """
        if fraction == 0:
            return BlockPlan(self.block_count)
        middle = self.adapter.middle()
        runs = [(middle, middle + 1)]
        for start in range(middle - 1, 0, -1):
            balanced = (stop for stop in range(middle + 1, self.block_count) if self._streams(stop) == self._streams(start))
            runs += [(start, stop) for stop in balanced][:1]
        start, stop = min(runs, key=lambda run: abs(run[1] - run[0] - fraction * self.block_count))
        return BlockPlan(self.block_count, tuple(range(start, stop)))

    def check(self, plan: BlockPlan, *, use_residuals: bool = True) -> None:
        """Refuse plans that would leave a layer without what it takes."""
        if not plan.skipped:
            return
        middle = self.adapter.middle()
        hint = f"Skip a run around the middle block {middle}, such as {self.auto().describe()}."
        span = plan.skipped_spans[0]
        if len(plan.skipped_spans) > 1 or not 0 < span.start <= middle < span.stop < plan.block_count:
            msg = (
                f"cannot skip {plan.describe()} of a U-Net: the first and last blocks hand skip connections to each other and "
                f"must train. {hint}"
            )
            raise PlanError(msg)
        if self._streams(span.stop) > self._streams(span.start):
            msg = (
                f"cannot skip {plan.describe()} of this U-Net: block {span.stop} takes what a skipped block hands over. {hint}"
            )
            raise PlanError(msg)
        if not use_residuals:
            msg = (
                "a U-Net cannot train without features of its middle: nothing would enter the decoder. Leave use_residuals on."
            )
            raise PlanError(msg)

    def collect(self, span: Span, entering: Streams, leaving: Streams) -> Streams:  # noqa: ARG002 - no difference is formed
        """The image alone; the skip connections behind the run are those of layers that train."""
        return leaving[:1]

    def enter(self, span: Span, streams: Streams, cached: Streams) -> Streams:
        """The cached image, and the skip connections that the run would have left."""
        return cached[0], *streams[1 : self._streams(span.stop)]

    def _streams(self, index: int) -> int:
        return self.adapter.stream_count(index)


def skipping_of(adapter: DenoiserAdapter, selection: Selection | None = None) -> Skipping:
    """How a denoiser skips; `selection` is what was measured of its blocks."""
    if isinstance(adapter, SkipConnected):
        return HollowSkipping(adapter.block_count, adapter)
    return ResidualSkipping(adapter.block_count, selection)


def plan_for(
    adapter: DenoiserAdapter, skip: str, *, use_residuals: bool = True, selection: Selection | None = None
) -> BlockPlan:
    """Read a recipe's `skip` for a denoiser; `selection` is what was measured of its blocks, for "auto".

    Raises:
        PlanError: the text cannot be read, or the plan makes no sense for the architecture.
    """
    skipping = skipping_of(adapter, selection)
    plan = parse_plan(skip, adapter.block_count, auto=skipping.auto, hollow=skipping.hollow)
    skipping.check(plan, use_residuals=use_residuals)
    return plan


def plan_of(adapter: DenoiserAdapter, recipe: Recipe, *, folder: ModelFolder) -> BlockPlan:
    """Which blocks a recipe skips in a model; only "auto" reads what was measured of it.

    Args:
        adapter: of the model.
        recipe: what is asked.
        folder: of the model.

    Raises:
        PlanError: as of `plan_for`.
        FileFormatError: what was measured is damaged.
    """
    selection = selection_of(folder) if recipe.skip.startswith("auto") else None
    return plan_for(adapter, recipe.skip, use_residuals=recipe.use_residuals, selection=selection)
