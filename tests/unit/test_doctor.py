"""The doctor's facts agree with other sources, containers are respected, and advice follows from the facts."""

import json
import os
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pocketune import allocator, doctor, machine
from pocketune.cgroups import CgroupLimits, read_limits
from pocketune.doctor import PACKAGES, MachineReport, advise, examine
from pocketune.machine import CpuReport, CudaDevice, RamReport, read_allocator, read_cuda, read_ram

GB = 10**9
PROJECT = Path(__file__).parents[2]


def report(**changes: object) -> MachineReport:
    """A laptop on which nothing is missing."""
    plain = MachineReport(
        python="3.11.0 (CPython)",
        system="Linux",
        versions={name: "1" for names in PACKAGES.values() for name in names},
        problems=(),
        cpu=CpuReport(
            model="cpu",
            architecture="x86_64",
            logical_cores=8,
            usable_cores=8,
            features=(),
            float32_gflops=100.0,
            bfloat16_gflops=1.0,
        ),
        ram=RamReport(
            total_bytes=16 * GB,
            available_bytes=12 * GB,
            swap_bytes=0,
            limit_bytes=None,
            usable_bytes=12 * GB,
            source="/proc/self/status",
        ),
        disk_folder="/runs",
        disk_free_bytes=100 * GB,
        cuda=(),
        allocator="jemalloc",
        allocator_settings={},
    )
    return replace(plain, **changes)


def test_examines_this_machine(tmp_path):
    pytest.importorskip("torch")
    began = time.monotonic()
    found = examine(tmp_path / "not yet there")
    assert time.monotonic() - began < 10
    assert json.loads(json.dumps(found.as_dict()))["cpu"]["logical_cores"] == os.cpu_count()
    assert 0 < found.cpu.usable_cores <= found.cpu.logical_cores
    assert found.cpu.float32_gflops > 0.01
    assert found.cpu.bfloat16_gflops > 0.0001
    assert found.disk_free_bytes > 0
    assert found.versions["pillow"].count(".") >= 1
    assert any("dtype" in line for line in found.advice)
    psutil = pytest.importorskip("psutil")
    assert found.ram.total_bytes == psutil.virtual_memory().total
    assert found.ram.usable_bytes <= found.ram.total_bytes


def test_quick_figure_is_quick():
    torch = pytest.importorskip("torch")
    began = time.process_time()
    for dtype in ("float32", "bfloat16"):
        machine._matmul_gflops(torch, dtype)
    assert time.process_time() - began < 1.0 * max(torch.get_num_threads(), 1)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_works_where_torch_is_not_installed():
    out = run_python(
        "import importlib.metadata as m, sys, json\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name in ('torch', 'psutil'): raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "sys.modules['psutil'] = None\n"
        "from pocketune.doctor import examine\n"
        "found = examine()\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps(found.as_dict()))"
    )
    found = json.loads(out)
    assert found["versions"]["torch"] is None
    assert found["cpu"]["float32_gflops"] is None
    assert any("pip install 'pocketune[train]'" in line and "torch" in line for line in found["advice"])


def test_broken_torch_is_named():
    out = run_python(
        "import sys\nsys.modules['torch'] = None\nfrom pocketune.doctor import examine\nprint('\\n'.join(examine().advice))"
    )
    assert pytest.importorskip("torch")
    assert "torch is installed but cannot be imported" in out


def test_package_lists_are_those_of_the_distribution():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    listed = {"": project["dependencies"], "train": project["optional-dependencies"]["train"]}
    for extra, names in PACKAGES.items():
        assert set(names) == {requirement.split(">")[0].split("<")[0] for requirement in listed[extra]}


# Control groups: a made-up root with the same files as the kernel's.


def make_root(folder: Path, *, group: str, mounts: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": group, "proc/self/mountinfo": mounts, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MEMORY = "34 23 0:30 {root} /sys/fs/cgroup/memory rw shared:8 - cgroup cgroup rw,memory\n"
V1_CPU = "35 23 0:31 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"


def test_version_2_takes_the_tightest_limit_on_the_way_up(tmp_path):
    base = "sys/fs/cgroup"
    files = {
        f"{base}/app.slice/job/memory.max": "max\n",
        f"{base}/app.slice/job/cpu.max": "max 100000\n",
        f"{base}/app.slice/memory.max": "4000000000\n",
        f"{base}/app.slice/memory.current": "3000000000\n",
        f"{base}/app.slice/memory.stat": "anon 1000000000\ninactive_file 1500000000\n",
        f"{base}/app.slice/cpu.max": "150000 100000\n",
    }
    root = make_root(tmp_path, group="0::/app.slice/job\n", mounts=V2, files=files)
    assert read_limits(root) == CgroupLimits(memory_bytes=4 * GB, memory_used_bytes=1_500_000_000, cpus=1.5)


def test_version_1(tmp_path):
    base = "sys/fs/cgroup/memory/docker/abc"
    files = {
        f"{base}/memory.limit_in_bytes": "2000000000\n",
        f"{base}/memory.usage_in_bytes": "500000000\n",
        f"{base}/memory.stat": "inactive_file 1\ntotal_inactive_file 100000000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    }
    group = "9:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n0::/\n"
    root = make_root(tmp_path, group=group, mounts=V1_MEMORY.format(root="/") + V1_CPU, files=files)
    assert read_limits(root) == CgroupLimits(memory_bytes=2 * GB, memory_used_bytes=400_000_000, cpus=0.5)


@pytest.mark.parametrize("mount_root", ["/docker/abc", "/somewhere/else"])
def test_inside_a_container_the_mount_is_the_group(tmp_path, mount_root):
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000000\n"}
    root = make_root(tmp_path, group="9:memory:/docker/abc\n", mounts=V1_MEMORY.format(root=mount_root), files=files)
    assert read_limits(root) == CgroupLimits(memory_bytes=GB)


@pytest.mark.parametrize("limit", ["9223372036854771712", "max", "", "nonsense"])
def test_no_limit(tmp_path, limit):
    files = {"sys/fs/cgroup/memory.max": limit, "sys/fs/cgroup/memory.limit_in_bytes": limit}
    assert read_limits(make_root(tmp_path, group="0::/\n", mounts=V2, files=files)) == CgroupLimits()


def test_no_control_groups(tmp_path):
    assert read_limits(tmp_path) == CgroupLimits()


def test_container_limit_bounds_usable_memory():
    free = read_ram(CgroupLimits())
    tight = read_ram(CgroupLimits(memory_bytes=100_000_000, memory_used_bytes=60_000_000))
    assert free.usable_bytes == free.available_bytes
    assert free.limit_bytes is None
    assert (tight.limit_bytes, tight.usable_bytes) == (100_000_000, 40_000_000)
    assert read_ram(CgroupLimits(memory_bytes=10**15)).limit_bytes is None


def test_allocator_by_its_mapping(monkeypatch):
    monkeypatch.setenv("MALLOC_CONF", "narenas:1")
    monkeypatch.setattr(allocator, "read_procfs", lambda path: "7f00 r-xp /usr/lib/x86_64-linux-gnu/libjemalloc.so.2\n")
    name, settings = read_allocator()
    assert name == "jemalloc"
    assert settings["MALLOC_CONF"] == "narenas:1"


def test_a_gpu_that_cannot_be_used_is_named_and_the_others_are_listed():
    def free_and_total(index: int) -> tuple[int, int]:
        if index == 0:
            raise RuntimeError("CUDA error: out of memory")
        return 7 * GB, 8 * GB

    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda index: SimpleNamespace(name=f"gpu{index}", major=7, minor=5),
        mem_get_info=free_and_total,
    )
    devices, problems = read_cuda(SimpleNamespace(cuda=cuda))
    assert devices == (CudaDevice(name="gpu1", capability="7.5", total_bytes=8 * GB, free_bytes=7 * GB, bfloat16=False),)
    assert len(problems) == 1
    assert "GPU 0" in problems[0]
    assert read_cuda(None) == ((), ())


# Advice.


def advice(**changes: object) -> str:
    return "\n".join(advise(report(**changes)))


def test_dtype_advice_follows_the_measured_speed():
    slow, fast = report().cpu, replace(report().cpu, bfloat16_gflops=180.0)
    assert 'dtype = "float32"' in advice(cpu=slow)
    assert "100 times" in advice(cpu=slow)
    assert 'dtype = "bfloat16"' in advice(cpu=fast)
    assert 'dtype = "float32"' in advice(cpu=replace(slow, float32_gflops=None, bfloat16_gflops=None))


def test_dtype_advice_on_a_gpu_follows_the_gpu():
    new = CudaDevice(name="new", capability="8.7", total_bytes=8 * GB, free_bytes=7 * GB, bfloat16=True)
    old = replace(new, bfloat16=False)
    assert 'dtype = "bfloat16"' in advice(cuda=(new,))
    assert 'dtype = "float16"' in advice(cuda=(new, old))
    assert "float32 is the way" in advice(cuda=(new, old))
    assert "GPU memory that can be used now: 7,000 MB" in advice(cuda=(new,))


def test_models_are_weighed_against_usable_memory():
    text = advice()
    assert "fit in float32: SD3-medium (8,400 MB), SD3.5-medium (8,800 MB)." in text
    assert "do not fit in float32: SD3.5-large (32.4 GB)" in text
    assert "SD3" not in advice(ram=replace(report().ram, usable_bytes=None))


def test_other_advice_appears_only_when_it_applies():
    assert len(advise(report())) == 4
    assert "jemalloc" in advice(allocator="glibc")
    assert "jemalloc" not in advice(allocator="glibc", allocator_settings={"MALLOC_MMAP_THRESHOLD_": "131072"})
    assert "OMP_NUM_THREADS=2" in advice(cpu=replace(report().cpu, usable_cores=2.5))
    assert "A container limits this process to 3,000 MB" in advice(ram=replace(report().ram, limit_bytes=3 * GB))
    assert "Only 1,000 MB are free in /runs" in advice(disk_free_bytes=GB)
    assert "Not installed: torch" in advice(versions=report().versions | {"torch": None})
    assert advise(report(problems=("GPU 0 cannot be used.",)))[0] == "GPU 0 cannot be used."


def test_importing_the_doctor_imports_no_torch():
    assert run_python("import sys, pocketune.doctor; print('torch' in sys.modules)").strip() == "False"
    assert doctor.PACKAGES
