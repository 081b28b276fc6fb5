"""Subspace gradients: directions in which a tuned vector hardly moved are taken out of its noisy gradient.

Paper: ZOODiP (arXiv 2503.14868), section 4.2: the last tau values of the token are normalised by feature; of their principal
components, those beyond a share 1 - nu of the variance span P, and g' = g (I - P^T P); P is made anew every tau steps.
Differs: components without any variance are part of P as well as in the paper, but only tau - 1 directions exist in tau values,
so the many that the token never visited stay in the gradient, as in the paper's own code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Subspace:
    """Remembers vectors and projects their gradients; `state` is what a resumed run needs, by name."""

    def __init__(self, vectors: Mapping[str, Tensor], *, steps: int, noise: float) -> None:
        """Begin with nothing taken out.

        Args:
            vectors: what trains, each (width,).
            steps: tau; 0 turns projection off.
            noise: nu, the share of the variance that counts as noise.
        """
        self._vectors = vectors
        self._steps, self._noise = steps, noise
        self.state: dict[str, Tensor] = {}
        for name, vector in vectors.items() if steps else ():
            for kind in ("values", "removed"):
                self.state[f"{kind}.{name}"] = torch.zeros(steps, vector.numel(), device=vector.device)

    def project(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient of a vector without the directions that are taken out."""
        if not self._steps:
            return gradient
        removed = self.state[f"removed.{name}"]
        return gradient - (gradient @ removed.T) @ removed

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Remember the vectors after step number `step`; every tau of them, find anew what is taken out."""
        for name, vector in self._vectors.items() if self._steps else ():
            values = self.state[f"values.{name}"]
            values[step % self._steps] = vector
            if (step + 1) % self._steps == 0:
                self.state[f"removed.{name}"].copy_(noise_directions(values, self._noise))


def noise_directions(values: Tensor, noise: float) -> Tensor:
    """The principal directions that hold the last share of the variance, as rows that are orthonormal or zero.

    Args:
        values: (steps, width).
        noise: that share, at most.
    """
    deviation = values.std(0)
    normalised = (values - values.mean(0)) / torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    _, singular, directions = torch.linalg.svd(normalised, full_matrices=False)
    variance = singular.double() ** 2
    if float(variance.sum()) == 0:
        return torch.zeros_like(values)
    shares = variance.cumsum(0) / variance.sum()
    kept = int((shares <= 1 - noise).sum()) + 1
    removed = torch.zeros_like(values)
    removed[kept : len(directions)] = directions[kept:]
    return removed
