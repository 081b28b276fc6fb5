"""What fields of a manifest and of settings may hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pocketune_edge.agreement import MAX_ELEMENTS, path_fault
from pocketune_edge.strict import Rule


@dataclass(frozen=True)
class PathRule(Rule):
    """A path inside the bundle on every system."""

    def complaint(self, value: Any) -> str | None:
        """Why a path is refused, or None."""
        return path_fault(value)


Count = Annotated[int, Rule(low=0, high=MAX_ELEMENTS)]
Size = Annotated[int, Rule(low=1, high=MAX_ELEMENTS)]
Digest = Annotated[str, Rule(pattern="[0-9a-f]{64}")]
Name = Annotated[str, Rule(low=1, high=300)]
BundlePath = Annotated[str, PathRule()]
Positive = Annotated[float, Rule(above=0)]
NotNegative = Annotated[float, Rule(low=0)]
Decay = Annotated[float, Rule(low=0, below=1)]
Share = Annotated[float, Rule(above=0, below=1)]
SOME = Rule(low=1)
"""Not empty."""
