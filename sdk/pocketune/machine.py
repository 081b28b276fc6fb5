"""Facts of the machine: processor, main memory, GPUs, allocator, disk. Each reader copes with a system that does not say."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pocketune.allocator import name_allocator
from pocketune.cgroups import CgroupLimits
from pocketune.memory import memory_source
from pocketune.procfs import read_procfs

_FEATURES = frozenset(
    {"avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"}
    | {"amx_tile", "amx_int8", "amx_bf16", "amx_fp16"}
    | {"asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svebf16"}
)
_MATMUL_BUDGET_S = 0.1


@dataclass(frozen=True, kw_only=True)
class CpuReport:
    """The processor.

    Attributes:
        model: its name, or the board's where the system names only that.
        architecture: "x86_64", "aarch64", "arm64".
        logical_cores: of the machine.
        usable_cores: what affinity and a container's quota leave to this process; may be a fraction.
        features: instruction sets that matter for training, as the system spells them.
        float32_gflops: speed of a quick matrix product in 1e9 operations a second; None without torch.
        bfloat16_gflops: same in bfloat16.
    """

    model: str
    architecture: str
    logical_cores: int
    usable_cores: float
    features: tuple[str, ...]
    float32_gflops: float | None
    bfloat16_gflops: float | None


@dataclass(frozen=True, kw_only=True)
class RamReport:
    """Main memory in bytes; None where the system does not say.

    Attributes:
        total_bytes: of the machine.
        available_bytes: what can be had without swapping.
        swap_bytes: size of the swap space.
        limit_bytes: a container's limit.
        usable_bytes: what this process can still take: the smaller of what is available and what the limit leaves.
        source: where the memory of a job is read from.
    """

    total_bytes: int | None
    available_bytes: int | None
    swap_bytes: int | None
    limit_bytes: int | None
    usable_bytes: int | None
    source: str


@dataclass(frozen=True, kw_only=True)
class CudaDevice:
    """A GPU as torch sees it; `capability` is CUDA's, such as "8.7"."""

    name: str
    capability: str
    total_bytes: int
    free_bytes: int
    bfloat16: bool


def import_torch() -> tuple[ModuleType | None, tuple[str, ...]]:
    """Import torch; None and the reason where that fails."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:  # built for another system, or a library is missing
        return None, (f"torch is installed but cannot be imported ({error}). Install it anew.",)
    return torch, ()


def read_cpu(torch: ModuleType | None, limits: CgroupLimits) -> CpuReport:
    """Describe the processor, and time it where there is a torch."""
    described = dict[str, str]()
    for line in read_procfs(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        described.setdefault(name.strip(), value.strip())
    flags = (described.get("flags") or described.get("Features") or "").split()
    board = read_procfs(Path("/proc/device-tree/model")).rstrip("\0\n")
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else cores
    return CpuReport(
        model=described.get("model name") or board or platform.processor() or "unknown",
        architecture=platform.machine(),
        logical_cores=cores,
        usable_cores=min(usable, limits.cpus) if limits.cpus else usable,
        features=tuple(flag for flag in dict.fromkeys(flags) if flag in _FEATURES),
        float32_gflops=_matmul_gflops(torch, "float32"),
        bfloat16_gflops=_matmul_gflops(torch, "bfloat16"),
    )


def _matmul_gflops(torch: ModuleType | None, dtype: str) -> float | None:
    """Time square matrix products of growing size, as far as the budget goes; a slow type stops at a small size.

    Processor time is taken, shared out to the threads: waiting for other work on the machine does not count.
    """
    if torch is None:
        return None
    small = torch.full((64, 64), 0.5, dtype=getattr(torch, dtype))
    small @ small  # the first product of all also starts threads
    deadline = time.process_time() + _MATMUL_BUDGET_S
    best, side = 0.0, 64
    while True:
        matrix = torch.full((side, side), 0.5, dtype=getattr(torch, dtype))
        seconds = float("inf")
        for _ in range(3):
            began = time.process_time()
            matrix @ matrix
            seconds = min(seconds, time.process_time() - began)
        best = max(best, 2 * side**3 * int(torch.get_num_threads()) / max(seconds, 1e-6) / 1e9)
        # Of small products, threads that wait for one another on a busy machine take most of the time.
        if side >= 1024 or (side >= 256 and time.process_time() + 16 * seconds > deadline):
            return best
        side *= 2


def read_ram(limits: CgroupLimits) -> RamReport:
    """Describe main memory, within the limits of a container."""
    fields = dict[str, int]()
    for line in read_procfs(Path("/proc/meminfo")).splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value.split()[0]) * 1024
    total, available, swap = fields.get("MemTotal"), fields.get("MemAvailable"), fields.get("SwapTotal")
    if total is None:
        try:
            import psutil  # type: ignore[import-untyped, unused-ignore]

            memory = psutil.virtual_memory()
            total, available, swap = memory.total, memory.available, psutil.swap_memory().total
        except ImportError:
            pass
    limit = limits.memory_bytes
    if limit is not None and total is not None and limit >= total:
        limit = None
    usable = available
    if limit is not None:
        left = max(limit - (limits.memory_used_bytes or 0), 0)
        usable = left if available is None else min(left, available)
    return RamReport(
        total_bytes=total,
        available_bytes=available,
        swap_bytes=swap,
        limit_bytes=limit,
        usable_bytes=usable,
        source=memory_source(),
    )


def read_cuda(torch: ModuleType | None) -> tuple[tuple[CudaDevice, ...], tuple[str, ...]]:
    """Describe the GPUs that torch can use, and say which cannot be used and why."""
    if torch is None or not torch.cuda.is_available():
        return (), ()
    devices, problems = [], []
    for index in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:  # taken by another process, out of memory, or a driver that does not match
            problems.append(f"GPU {index} cannot be used ({error}). Check it with nvidia-smi.")
            continue
        devices.append(
            CudaDevice(
                name=properties.name,
                capability=f"{properties.major}.{properties.minor}",
                total_bytes=total,
                free_bytes=free,
                bfloat16=properties.major >= 8,  # older ones emulate it
            )
        )
    return tuple(devices), tuple(problems)


def read_allocator() -> tuple[str, dict[str, str]]:
    """Name the allocator of this process, and give the environment variables that steer it."""
    names = ("MALLOC_", "LD_PRELOAD", "PYTHONMALLOC", "GLIBC_TUNABLES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith(names)}
    return name_allocator(), settings


def read_disk_free(folder: Path) -> int | None:
    """Give the free bytes on the disk of a folder, which need not exist yet."""
    existing = next((place for place in (folder, *folder.absolute().parents) if place.exists()), None)
    try:
        return shutil.disk_usage(existing).free if existing else None
    except OSError:
        return None
