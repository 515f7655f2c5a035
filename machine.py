"""The machine that a net runs on: which device and what it is called; kernels repeatable or fast; memory free and kept."""

import ctypes
import math
import os
import platform
import re
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CGROUP_FILES = [("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")]  # versions 2 and 1
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, from malloc.h of glibc


def choose_device(name):
    """The torch.device of --device; auto is the GPU if there is one. ValueError if the device is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"--device {name}: this machine has none that PyTorch can use: choose --device cpu")
    return torch.device(name)


def describe(device):
    """What the device is called, for a person who reads a result."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def make_repeatable(deterministic):
    """With --deterministic only kernels that give the same bits every time; without it the fastest that cuDNN finds."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)


def keep_freed_memory(device):
    """Lets glibc keep what a step on the CPU frees, for the next step to use; a person's own settings of malloc win.

    By default large tensors are mapped anew, page by page, and given back to the kernel, in every step. Results are the same.
    """
    own = any(name.startswith(("MALLOC_TRIM", "MALLOC_MMAP", "MALLOC_TOP_PAD")) for name in os.environ)
    own = own or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    libc = ctypes.CDLL(None)
    if device.type == "cpu" and not own and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def num_cpus():
    """The CPUs that this process may use; a cluster gives it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(root=Path("/")):
    """Bytes that this process can still get: of the machine, and of what a cluster or a container leaves it; else infinity.

    root is where the kernel's files are, of Linux; other systems have none.
    """
    try:
        rooms = [1024 * int(re.search(r"MemAvailable:\s+(\d+)", (root / "proc/meminfo").read_text())[1])]
        groups = [line.split(":", 2)[2] for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except (OSError, TypeError):
        return math.inf
    for top in (root / "sys/fs/cgroup", root / "sys/fs/cgroup/memory"):
        folders = {folder for group in groups for folder in (Path(group), *Path(group).parents)}
        rooms += [free_in_group(top / folder.relative_to("/"), *files) for folder in folders for files in CGROUP_FILES]
    return min(rooms)


def free_in_group(folder, limit, usage):
    """What a control group's limit leaves; what the kernel only keeps of files read counts as free."""
    try:
        limit, usage = (int((folder / name).read_text()) for name in (limit, usage))
        cached = re.findall(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError, IndexError):  # no such group, or one without a limit
        return math.inf
    return limit - usage + int(cached[-1])  # version 1 has the total of the groups below it behind its own
