"""What this machine is and what it can do: plain facts, one quick figure, and advice in words.

Everything here also works where only the base of the distribution is installed; torch is looked at when it is there.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pocketune.cgroups import read_limits
from pocketune.machine import (
    CpuReport,
    CudaDevice,
    RamReport,
    import_torch,
    read_allocator,
    read_cpu,
    read_cuda,
    read_disk_free,
    read_ram,
)
from pocketune.units import readable_size

PACKAGES = {
    "": ("numpy", "pillow", "pydantic", "rich", "safetensors", "typer"),
    "train": ("torch", "diffusers", "transformers", "peft", "accelerate", "jinja2", "matplotlib", "psutil", "sentencepiece"),
}
"""Distributions that each extra of pocketune brings; "" is the base."""

_DENOISERS = {"SD3-medium": 2.1e9, "SD3.5-medium": 2.2e9, "SD3.5-large": 8.1e9}  # parameters, from the files' sizes
_WORKING_ROOM_BYTES = 1.5e9  # libraries, latents and LoRA state beside the weights


@dataclass(frozen=True, kw_only=True)
class MachineReport:
    """All that `examine` found.

    Attributes:
        python: version and implementation.
        system: operating system, release and architecture.
        versions: installed version of each package that pocketune uses; None where it is missing.
        problems: packages that are installed but do not work, and why.
        cpu: the processor.
        ram: main memory.
        disk_folder: the folder whose file system was looked at.
        disk_free_bytes: free space there; None where it cannot be read.
        cuda: GPUs that torch can use.
        allocator: "jemalloc", "tcmalloc", "mimalloc", "glibc", "musl", or "system" where it is not known.
        allocator_settings: environment variables that steer it.
        advice: what to do on this machine, one sentence or two each.
    """

    python: str
    system: str
    versions: dict[str, str | None]
    problems: tuple[str, ...]
    cpu: CpuReport
    ram: RamReport
    disk_folder: str
    disk_free_bytes: int | None
    cuda: tuple[CudaDevice, ...]
    allocator: str
    allocator_settings: dict[str, str]
    advice: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Give the report as JSON-able values."""
        return asdict(self)


def examine(folder: Path | None = None) -> MachineReport:
    """Look at this machine. Takes some 0.3 s beyond the import of torch; starts CUDA where there is a GPU.

    Args:
        folder: where runs will be written; its disk is looked at. Default: the current folder.
    """
    folder = Path.cwd() if folder is None else folder
    versions = {name: _version(name) for names in PACKAGES.values() for name in names}
    torch, problems = import_torch() if versions["torch"] else (None, ())
    cuda, cuda_problems = read_cuda(torch)
    limits = read_limits()
    allocator, settings = read_allocator()
    facts: dict[str, Any] = {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions,
        "problems": problems + cuda_problems,
        "cpu": read_cpu(torch, limits),
        "ram": read_ram(limits),
        "disk_folder": str(folder),
        "disk_free_bytes": read_disk_free(folder),
        "cuda": cuda,
        "allocator": allocator,
        "allocator_settings": settings,
    }
    return MachineReport(**facts, advice=advise(MachineReport(**facts)))


def advise(report: MachineReport) -> tuple[str, ...]:
    """Say in words what the facts of a report mean for training; its own `advice` is not read."""
    lines = list(report.problems)
    for extra, names in PACKAGES.items():
        missing = [name for name in names if report.versions.get(name) is None]
        if missing:
            target = f"pocketune[{extra}]" if extra else "pocketune"
            lines.append(f"Not installed: {', '.join(missing)}. To have them, run: pip install '{target}'")
    dtype, why = _best_dtype(report)
    lines.append(f'Use dtype = "{dtype}": {why}.')
    lines += _model_sizes(report, dtype)
    if report.ram.limit_bytes is not None:
        limit = readable_size(report.ram.limit_bytes)
        lines.append(f"A container limits this process to {limit}; beyond it the kernel ends the process.")
    if report.allocator == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in report.allocator_settings:
        lines.append(
            "glibc's allocator keeps much of the memory that training frees. A lower peak: preload jemalloc "
            "(LD_PRELOAD=libjemalloc.so.2) or set MALLOC_MMAP_THRESHOLD_=131072; training with any setting that saves memory "
            "does the latter by itself."
        )
    if report.cpu.usable_cores < report.cpu.logical_cores and not report.cuda:
        cores = max(1, int(report.cpu.usable_cores))
        lines.append(
            f"Only {report.cpu.usable_cores:g} of {report.cpu.logical_cores} cores may be used: set OMP_NUM_THREADS={cores}."
        )
    if report.disk_free_bytes is not None and report.disk_free_bytes < 5e9:
        free = readable_size(report.disk_free_bytes)
        lines.append(f"Only {free} are free in {report.disk_folder}; a feature cache may need several GB.")
    return tuple(lines)


def _best_dtype(report: MachineReport) -> tuple[str, str]:
    if report.cuda:
        if all(device.bfloat16 for device in report.cuda):
            return "bfloat16", "the GPU computes in it, and the frozen weights take half the memory"
        return "float16", "the GPU has no bfloat16; where numbers overflow, training stops and says so, and float32 is the way"
    full, half = report.cpu.float32_gflops, report.cpu.bfloat16_gflops
    if full is None or half is None:
        return "float32", "it is always safe; install torch to have bfloat16 measured"
    if half >= 0.9 * full:
        return "bfloat16", f"matrix products take {full / half:.2g} times as long as in float32, weights half the memory"
    return "float32", f"bfloat16 matrix products are {full / half:.3g} times as slow on this processor"


def _model_sizes(report: MachineReport, dtype: str) -> list[str]:
    usable, place = report.ram.usable_bytes, "Memory"
    if report.cuda:
        usable, place = max(device.free_bytes for device in report.cuda), "GPU memory"
    if usable is None:
        return []
    item = 4 if dtype == "float32" else 2
    sizes = {name: parameters * item for name, parameters in _DENOISERS.items()}
    fit = [f"{name} ({readable_size(size)})" for name, size in sizes.items() if size + _WORKING_ROOM_BYTES <= usable]
    large = [f"{name} ({readable_size(size)})" for name, size in sizes.items() if size + _WORKING_ROOM_BYTES > usable]
    lines = [f"{place} that can be used now: {readable_size(usable)}."]
    if fit:
        lines.append(f"All weights of these denoisers fit in {dtype}: {', '.join(fit)}.")
    if large:
        lines.append(f"All weights of these denoisers do not fit in {dtype}: {', '.join(large)}; skipped blocks hold none.")
    return lines


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
