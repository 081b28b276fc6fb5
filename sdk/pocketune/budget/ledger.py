"""What a job will need, item by item and phase by phase."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

Place = Literal["host", "device"]
"""Main memory, or the memory of a GPU."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that takes memory.

    Attributes:
        name: what it is.
        bytes: how much.
        formula: where the number comes from, for a person.
        place: whose memory.
        fixed: no setting changes it.
    """

    name: str
    bytes: int
    formula: str
    place: Place = "host"
    fixed: bool = False


@dataclass(frozen=True, kw_only=True)
class PhaseLedger:
    """One phase of a job at the moment of its peak.

    Attributes:
        name: as progress and reports call it.
        items: what is in memory then.
        flops: floating-point operations of the whole phase.
        read_bytes: weights that it reads from disk beyond loading them once.
        written_bytes: what it writes to disk and reads back.
        disk_bytes: what of it lies there at once.
    """

    name: str
    items: tuple[Item, ...]
    flops: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    disk_bytes: int = 0

    def bytes(self, place: Place = "host") -> int:
        """Of all items in one memory."""
        return sum(item.bytes for item in self.items if item.place == place)

    def item(self, name: str) -> int:
        """Bytes of the items of a name."""
        return sum(item.bytes for item in self.items if item.name == name)

    @property
    def largest(self) -> Item:
        """The largest item that a setting could change; the largest of all where none could."""
        return max(self.items, key=lambda item: (not item.fixed, item.bytes))


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """All phases of a job, which follow one another, each freeing what it used.

    Attributes:
        phases: in order.
        disk: what lies on disk, by name, in bytes.
        notes: what is not counted.
    """

    phases: tuple[PhaseLedger, ...]
    disk: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()

    def peak_phase(self, place: Place = "host") -> PhaseLedger:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.bytes(place))

    def peak_bytes(self, place: Place = "host") -> int:
        """Of the largest phase; not the sum, since each phase is gone before the next."""
        return self.peak_phase(place).bytes(place)

    @property
    def disk_bytes(self) -> int:
        """Of all files that the job makes, scratch file included."""
        return sum(size for _, size in self.disk)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "phases": [
                asdict(phase) | {"bytes": phase.bytes(), "device_bytes": phase.bytes("device")} for phase in self.phases
            ],
            "peak_bytes": self.peak_bytes(),
            "peak_phase": self.peak_phase().name,
            "device_peak_bytes": self.peak_bytes("device"),
            "disk": dict(self.disk),
            "disk_bytes": self.disk_bytes,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Take back what `as_dict` gave."""
        phases = []
        for phase in values["phases"]:
            known = {name: phase[name] for name in ("name", "flops", "read_bytes", "written_bytes", "disk_bytes")}
            phases.append(PhaseLedger(items=tuple(Item(**item) for item in phase["items"]), **known))
        return cls(phases=tuple(phases), disk=tuple(values["disk"].items()), notes=tuple(values["notes"]))
