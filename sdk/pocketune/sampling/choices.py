"""Which steps of a mixed training backpropagate at low resolution, and which take a zeroth-order step at high resolution.

A choice is plain data that follows from the seed, the step and the step's draws, as draws do: it is known before training,
replayed by a resumed run and by the pass that fills the feature cache, and it is the same on every runtime. Nothing here needs
torch.

Paper: selective optimization (arXiv 2507.10029): backpropagation at low resolution learns the subject fast but distorts
structure and over-fits at high timesteps; zeroth-order steps at high resolution keep structure but get nowhere from scratch.
A timestep-aware probability picks low-resolution backpropagation less often at high timesteps, and zeroth-order steps more
often as training goes on.
Differs: the form of that probability and its constants, the two resolutions and all settings of the optimizers could not be
read (only the abstract could); those here are Pocketune's own, and each is a field of the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketune.sampling.draws import Draw
from pocketune.sampling.philox import Stream, uniforms, words


class Asked(Protocol):
    """The fields of a recipe that choices follow from."""

    @property
    def seed(self) -> int:
        """Of all random numbers."""

    @property
    def mix_start(self) -> float:
        """The noise at which the probability of zeroth order is half of the largest, at the first step."""

    @property
    def mix_end(self) -> float:
        """The same after the last step."""

    @property
    def mix_width(self) -> float:
        """How gradually the probability rises with the noise."""

    @property
    def mix_largest(self) -> float:
        """The largest probability of a zeroth-order step."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one step does.

    Attributes:
        noise: t / T, the mean over the step's draws.
        probability: that the step was to be of zeroth order.
        zeroth_order: whether it is; otherwise it backpropagates at low resolution.
    """

    noise: float
    probability: float
    zeroth_order: bool

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def zeroth_order_probability(recipe: Asked, *, noise: float, progress: float) -> float:
    """The probability that a step is of zeroth order, rising in the noise and in the progress.

        p = largest * sigmoid((noise - c) / width),   c = start + (end - start) * progress

    Args:
        recipe: holds largest, width, start and end, as `mix_largest` and so on.
        noise: t / T, from 0 to 1.
        progress: finished steps over all steps, from 0 to 1.
    """
    middle = recipe.mix_start + (recipe.mix_end - recipe.mix_start) * progress
    logit = (noise - middle) / recipe.mix_width
    return recipe.mix_largest * 0.5 * (1.0 + math.tanh(0.5 * logit))  # the sigmoid, without overflow


def zeroth_order_share(recipe: Asked) -> float:
    """The share of zeroth-order steps to expect over a whole training, of timesteps that are drawn evenly."""
    grid = (np.arange(20) + 0.5) / 20
    return float(np.mean([zeroth_order_probability(recipe, noise=n, progress=p) for n in grid for p in grid]))


def low_side(asked: int | None, *, side: int, unit: int) -> int:
    """Side of the images that mixed training backpropagates on; where none is asked for, half of the others'.

    Args:
        asked: `low_resolution`.
        side: of the training images.
        unit: sides are multiples of it.
    """
    return asked or max(unit, side // 2 // unit * unit)


def choose(recipe: Asked, batches: Sequence[Sequence[Draw]], noise: NDArray[np.float64]) -> tuple[Choice, ...]:
    """What each step does.

    Args:
        recipe: seed and constants.
        batches: the draws of each step.
        noise: t / T by timestep index, (timesteps,).
    """
    choices = []
    for step, draws in enumerate(batches):
        level = float(np.mean([noise[draw.timestep_index] for draw in draws]))
        probability = zeroth_order_probability(recipe, noise=level, progress=step / len(batches))
        number = float(uniforms(words(recipe.seed, Stream.CHOICE, 1, index=step))[0])
        choices.append(Choice(noise=level, probability=probability, zeroth_order=number < probability))
    return tuple(choices)


def lower(batches: Sequence[Sequence[Draw]], choices: Sequence[Choice]) -> list[tuple[Draw, ...]]:
    """The draws of each step, at low resolution where the step backpropagates."""
    return [
        tuple(replace(draw, low=not choice.zeroth_order) for draw in draws)
        for draws, choice in zip(batches, choices, strict=True)
    ]
