"""The machine that a net runs on: device, precision, determinism, memory."""

import contextlib
import ctypes
import math
import os
import platform
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from endings import Refused

# {--precision: the type that autocast computes in}; with float32 there is no autocast.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, from malloc.h of glibc

# Of a Linux control group, by version 2 and by version 1: the files of its memory limit and of what is used, and the prefix of
# the sums in its memory.stat.
MEMORY_FILES = [("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")]


def choose_device(name, processes=1):
    """The torch.device of --device; auto is the GPU if there is one. Refused if this machine has no such device, or it fails.

    With several processes, each uses the GPU that distributed.own_device gives it.
    """
    gpus = torch.cuda.device_count()
    names = ["cuda", *(f"cuda:{number}" for number in range(gpus))] if gpus else []
    names += ["mps", "mps:0"] * torch.backends.mps.is_available() + ["cpu", "cpu:0"]
    if name == "auto":
        name = names[0]
    if name not in names:  # torch.device would take cuda:256 for cuda:0
        raise Refused(f"--device {name!r} is not a device that PyTorch can use here: choose auto, {', '.join(names)}")
    device = torch.device(name)
    if processes == 1:
        use_device(device)
    return device


def use_device(device):
    """Computes a first number on the device. Refused if PyTorch cannot: the GPU or its driver is too old, say, or taken."""
    try:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # so that "cuda" without a number means this one
        F.conv2d(*torch.ones(2, 1, 1, 3, 3, device=device)).item()  # with cuDNN, of which LD_LIBRARY_PATH may name another
    except RuntimeError as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        ways = "choose --device cpu, or check the driver, LD_LIBRARY_PATH and the version of PyTorch"
        raise Refused(f"PyTorch finds {device} but cannot compute on it ({reason}): {ways}") from error


def device_name(device):
    """The GPU's name, or the CPU and its threads: what a result was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def default_precision(device):
    """tf32 on a GPU that has it, else fp32."""
    return "tf32" if device.type == "cuda" and torch.cuda.is_tf32_supported() else "fp32"


def set_precision(precision):
    """Lets float32 matrix products on a GPU round their inputs to TF32, unless precision is fp32; a CPU never does that."""
    # PyTorch's older switches also set the newer ones (fp32_precision). torch.compile reads the older ones, and fails if only
    # the newer ones were set.
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"


def set_determinism(deterministic):
    """Deterministic kernels only, or the fastest that cuDNN finds."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    torch.use_deterministic_algorithms(deterministic)


def keep_freed_memory(device):
    """On a CPU, makes glibc keep freed memory for the next step, unless environment variables already tune its malloc.

    By default large tensors are mapped again, page by page, in every step.
    """
    own = any(name.startswith(("MALLOC_TRIM", "MALLOC_MMAP", "MALLOC_TOP_PAD")) for name in os.environ)
    own = own or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    libc = ctypes.CDLL(None)
    if device.type == "cpu" and not own and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def num_cpus():
    """The number of CPUs that this process may use; on a cluster, often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def free_memory(root=Path("/")):
    """The memory that is free, in bytes, within the limits of a container or a cluster's job; infinity if not on Linux."""
    free = [memory_left(group) for group in control_groups(root)]
    with contextlib.suppress(OSError):
        found = re.findall(r"MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text())
        free += [1024 * int(kilobytes) for kilobytes in found]
    return min(free, default=math.inf)


def control_groups(root):
    """The folders of the control groups whose memory limits may hold for this process: its own, and all above."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers in ("", "memory"):  # in version 2, and in version 1
                group = root / "sys/fs/cgroup" / controllers / name.strip("/")
                yield from (group, *group.parents)


def memory_left(group):
    """What the memory limit of a control group leaves, in bytes; infinity if it has none. Cached files count as free."""
    for limit, usage, total in MEMORY_FILES:
        with contextlib.suppress(OSError, ValueError, KeyError):  # the other version has other files, the topmost group none
            allowed, used, stat = ((group / name).read_text() for name in (limit, usage, "memory.stat"))
            sizes = dict(line.split() for line in stat.splitlines())
            cached = int(sizes[f"{total}active_file"]) + int(sizes[f"{total}inactive_file"])
            return math.inf if allowed.strip() == "max" else max(0, int(allowed) - int(used) + cached)
    return math.inf
