"""How long a job takes at the least: its arithmetic at the speed of large matrix products, or the disk where that is slower."""

from __future__ import annotations

from dataclasses import dataclass

from pocketune.budget.ledger import Ledger, PhaseLedger
from pocketune.cgroups import read_limits
from pocketune.machine import import_torch, read_cpu
from pocketune.profile import DeviceProfile

UNKNOWN_DISK = 500e6
"""Bytes a second, where no device is named: that of a SATA drive."""


@dataclass(frozen=True)
class Speed:
    """Of a device: 1e9 operations a second, and bytes a second from disk."""

    gflops: float
    disk_bytes_per_s: float = UNKNOWN_DISK

    def seconds(self, phase: PhaseLedger) -> float:
        """Weights are read while earlier ones multiply; activations are written and read in between. All else takes no time."""
        arithmetic = phase.flops / (self.gflops * 1e9)
        return max(arithmetic, phase.read_bytes / self.disk_bytes_per_s) + 2 * phase.written_bytes / self.disk_bytes_per_s

    def by_phase(self, ledger: Ledger) -> dict[str, float]:
        """Of all phases, by name."""
        return {phase.name: self.seconds(phase) for phase in ledger.phases}


def speed_of(profile: DeviceProfile | None) -> Speed:
    """That of a profile, or of this machine by a quick matrix product."""
    if profile is not None:
        return Speed(profile.gflops, profile.disk_bytes_per_s)
    torch, _ = import_torch()
    return Speed(read_cpu(torch, read_limits()).float32_gflops or 1.0)
