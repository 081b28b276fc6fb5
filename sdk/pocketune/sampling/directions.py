"""Where zeroth-order steps measure the loss, and along which directions: plain numbers that every runtime makes again.

Nothing here needs torch, so that a step on a device is the step that PyTorch takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketune.sampling.philox import Stream, normals


class Point(NamedTuple):
    """Where a loss is measured: the parameters, moved by `scale` times the direction of a query."""

    query: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class Probing:
    """How a step looks around: `queries` directions, as far as `epsilon`, both ways or one way and from the centre."""

    queries: int = 1
    epsilon: float = 1e-3
    two_sided: bool = True

    @property
    def points(self) -> tuple[Point, ...]:
        """All that are measured, in order; one-sided, the first is the centre."""
        sides = (self.epsilon, -self.epsilon) if self.two_sided else (self.epsilon,)
        around = tuple(Point(query, side) for query in range(self.queries) for side in sides)
        return around if self.two_sided else (Point(0, 0.0), *around)

    def slopes(self, losses: Sequence[float]) -> tuple[float, tuple[float, ...]]:
        """The loss of the step, and the slope along each direction, from the losses at `points`.

        Paper: MeZO (arXiv 2305.17333), algorithm 1, two-sided; ZOODiP (arXiv 2503.14868), one-sided.
        """
        if self.two_sided:
            pairs = list(zip(losses[::2], losses[1::2], strict=True))
            found = tuple((ahead - behind) / (2 * self.epsilon) for ahead, behind in pairs)
            return sum((ahead + behind) / 2 for ahead, behind in pairs) / len(pairs), found
        centre, *around = losses
        return centre, tuple((ahead - centre) / self.epsilon for ahead in around)


class Directions:
    """The directions of a run, which follow from its seed, the step, the query and a parameter's place among all names."""

    def __init__(self, names: Iterable[str], *, seed: int, queries: int) -> None:
        """Number all trained parameters by their names' order; `queries` a step."""
        self._numbers = {name: number for number, name in enumerate(sorted(names))}
        self._seed, self._queries = seed, queries

    def along(self, name: str, shape: tuple[int, ...], *, step: int, query: int) -> NDArray[np.float64]:
        """A parameter's share of a direction, standard normal numbers in its shape. step: 0 at first."""
        index = step * self._queries + query
        return normals(self._seed, Stream.PERTURBATION, shape, purpose=self._numbers[name], index=index)
