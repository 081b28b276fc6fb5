"""The seam between a training and what it tunes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from pocketune.models.base import DenoiserAdapter
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan
from pocketune.recipe import Recipe
from pocketune.step import Batch


def unchanged(batch: Batch) -> Batch:
    """The inputs of methods that tune the denoiser alone."""
    return batch


def whole(name: str, gradient: Tensor) -> Tensor:  # noqa: ARG001
    """The gradients of methods that use all of them."""
    return gradient


def nothing(step: int) -> None:
    """What most methods do after a step."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a training changes.

    Attributes:
        parameters: by name.
        owner: the module whose parts hold and use them.
        inputs: called with the batch whenever a loss is computed; gives what the denoiser sees.
        state: further tensors that a resumed run needs, by name, written in place.
        project: called with a parameter's name and its zeroth-order gradient; gives the part that is used.
        after_step: called with the number of each zeroth-order step when it is done.
    """

    parameters: dict[str, nn.Parameter]
    owner: nn.Module
    inputs: Callable[[Batch], Batch] = unchanged
    state: dict[str, Tensor] = field(default_factory=dict)
    project: Callable[[str, Tensor], Tensor] = whole
    after_step: Callable[[int], None] = nothing


class TuningMethod(Protocol):
    """What is tuned, and how the result is stored and used."""

    result: Path
    """The file in a RUN folder."""

    def attach(self, adapter: DenoiserAdapter, *, plan: BlockPlan, recipe: Recipe, folder: ModelFolder) -> Tuned:
        """Freeze the denoiser and add what trains, which changes nothing yet."""

    def save(self, adapter: DenoiserAdapter, tuned: Tuned, path: Path, *, recipe: Recipe) -> None:
        """Write the result, whole or not at all."""

    def change(self, tuned: Tuned) -> dict[str, float]:
        """By name, how far each trained tensor is from doing nothing, 0 for not at all."""

    def prepare(self, pipeline: Any, path: Path, folder: ModelFolder) -> None:
        """Make a stock pipeline compute as the model does without what was learned, for the images before.

        Args:
            pipeline: changed in place.
            path: of the result that was just written.
            folder: of the model.
        """

    def check(self, pipeline: Any, path: Path, folder: ModelFolder) -> None:
        """Give a pipeline that was prepared the result, and see that all of it arrives.

        Raises:
            NoEffectError: some of it did not.
        """

    def apply(self, pipeline: Any, path: Path, folder: ModelFolder) -> None:
        """Give a stock pipeline the result.

        Raises:
            FileFormatError: the file is damaged, or belongs to another model.
        """
