"""The machine that a net runs on: its devices by name; kernels repeatable or fast; memory that is free, kept, or ran out."""

import ctypes
import errno
import math
import os
import platform
import re
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CGROUP_FILES = [("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")]  # versions 2 and 1
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, from malloc.h of glibc
DEVICE_NAME = re.compile(r"auto|(cpu|cuda|mps)(:(0|[1-9]\d{0,99}))?", re.ASCII)

# What is said where there is no exception for it: by PyTorch's allocators, oneDNN, cuBLAS, the C++ library, the system.
OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator|not enough memory|out of memory|cannot allocate memory|can't allocate memory|bad_alloc|"
    r"_ALLOC_FAILED|could not (create|execute) a (memory|primitive)",
    re.IGNORECASE,
)
SIZE = re.compile(r"allocate ([\d.]+) (bytes|[KMGTP]i?B)", re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------- the device


def choose_device(name):
    """The torch.device of --device; auto is the GPU if there is one. ValueError if the device is not there."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind, count in counts.items() if count)
    kind, _, index = name.partition(":")
    if not counts[kind]:
        raise ValueError(f"--device {name}: this machine has none that PyTorch can use: choose --device cpu")
    if int(index or 0) >= counts[kind]:  # not asked of torch.device, which takes cuda:256 for cuda:0
        raise ValueError(f"--device {name}: the machine has {counts[kind]} of them, counted from 0: choose a lower number")
    device = torch.device(name)
    if kind == "cuda" and index:
        torch.cuda.set_device(device)  # for what is said to "cuda" without a number, such as to wait for it
    return device


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


# ---------------------------------------------------------------------------------------------------------- its memory


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


def out_of_memory(error):
    """The exception that says that memory ran out, of a GPU or of the machine: error or what it came from; None without."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno == errno.ENOMEM
        told = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
        if full or told or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return error
        error = error.__cause__ or error.__context__
    return None


def size_asked_for(error):
    """The words for how much was asked for, or none, as far as the exception tells."""
    found = SIZE.search(str(error))
    if found is None:
        return ""
    number, unit = found.groups()
    return f", {f'{int(number) / 1e6:.1f} MB' if unit == 'bytes' else f'{number} {unit}'} more were asked for"
