"""What devices have: memory, and guesses of speed for estimates of time, each with its source.

A figure without a measurement of ours or of others is an estimate, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from pocketune.errors import PlanError

_PEAK = "estimate: half of the peak, 16 float32 operations a cycle (two 128-bit multiply-add units) of each large core"
_SYSTEM = "estimate; `pocketune doctor` on the device says what is available"
_JETSON = "https://www.scribd.com/document/673174036/Orin-nano-datasheet"
_PI = "https://education.raspberrypiaustralia.online/raspberry-pi-5-8gb-model"
_PIXEL = "https://www.androidauthority.com/google-pixel-8a-vs-pixel-6a-3439876/"


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """A device.

    Attributes:
        name: as `--device` names it.
        title: as people call it.
        memory_bytes: of the device.
        system_bytes: of it that system and other programs take.
        gflops: float32 matrix products on the processor, in 1e9 operations a second.
        disk_bytes_per_s: reading.
        sources: where each of these figures is from, by name of the field: an address, or the word "estimate" and why.
    """

    name: str
    title: str
    memory_bytes: int
    system_bytes: int
    gflops: float
    disk_bytes_per_s: float
    sources: dict[str, str]

    @property
    def usable_bytes(self) -> int:
        """What a job can have."""
        return self.memory_bytes - self.system_bytes

    @property
    def estimates(self) -> tuple[str, ...]:
        """The figures that nobody measured, by name of the field."""
        return tuple(name for name, source in self.sources.items() if source.startswith("estimate"))


def _profile(
    name: str,
    title: str,
    gib: int,
    system_gib: float,
    gflops: float,
    disk_mb: float,
    *,
    memory: str,
    disk: str,
    speed: str = _PEAK,
) -> DeviceProfile:
    return DeviceProfile(
        name=name,
        title=title,
        memory_bytes=gib * 2**30,
        system_bytes=round(system_gib * 2**30),
        gflops=gflops,
        disk_bytes_per_s=disk_mb * 1e6,
        sources={"memory_bytes": memory, "system_bytes": _SYSTEM, "gflops": speed, "disk_bytes_per_s": disk},
    )


PROFILES: dict[str, DeviceProfile] = {
    profile.name: profile
    for profile in (
        _profile(
            "jetson-orin-nano",
            "Jetson Orin Nano 8 GB, on its six Cortex-A78AE",
            *(8, 1.5, 72.0, 1000.0),
            memory=_JETSON,
            disk="estimate: an NVMe drive on PCIe",
        ),
        _profile(
            "raspberry-pi-5", "Raspberry Pi 5 8 GB", *(8, 1.0, 77.0, 400.0), memory=_PI, disk=f"{_PI} (PCIe 2.0, one lane)"
        ),
        _profile(
            "raspberry-pi-5-4gb",
            "Raspberry Pi 5 4 GB, from its card",
            *(4, 1.0, 77.0, 80.0),
            memory=_PI,
            disk="estimate: an SDR104 card",
        ),
        _profile("pixel-6a", "Pixel 6a, in an app", *(6, 3.0, 60.0, 800.0), memory=_PIXEL, disk="estimate: UFS 3.1"),
        _profile("pixel-8a", "Pixel 8a, in an app", *(8, 4.0, 70.0, 800.0), memory=_PIXEL, disk="estimate: UFS 3.1"),
        _profile(
            "pc-2-cores",
            "A PC with two cores and 8 GB",
            *(8, 2.0, 100.0, 500.0),
            memory="estimate: a common size",
            disk="estimate: a SATA drive",
            speed="estimate: AVX2 at 3 GHz, about half of the peak of two cores",
        ),
    )
}


def profile_named(name: str) -> DeviceProfile:
    """A profile.

    Raises:
        PlanError: there is none of this name.
    """
    if name not in PROFILES:
        msg = f"no device {name}; there are {', '.join(PROFILES)}. For another one, give a --memory-budget alone."
        raise PlanError(msg)
    return PROFILES[name]
