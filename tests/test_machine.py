import ctypes
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import distributed
import machine
import train
from distributed import World
from endings import Refused
from machine import DTYPES, choose_device, default_precision, set_determinism, set_precision

# Pages that the kernel must give for a tensor of 64 MB, when a slightly larger one was freed just before.
FAULTS = """
import resource, torch
from machine import keep_freed_memory
keep_freed_memory(torch.device("{device}"))
torch.ones((1 << 24) + 1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the allocator is not glibc's")
def test_freed_memory_is_kept_on_a_cpu_unless_a_person_says_otherwise(forked):
    """malloc does not read settings in a process that is forked: where a person has set some, its defaults hold there."""

    def page_faults(device, **settings):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | settings
        return int(forked(["-c", FAULTS.format(device=device)], env=environment).wait().stdout)

    assert page_faults("cpu") < 10
    assert page_faults("cuda") > 30  # huge pages have 2 MB
    assert page_faults("cpu", MALLOC_TRIM_THRESHOLD_="131072") > 30
    assert page_faults("cpu", MALLOC_TOP_PAD_="0") > 30
    assert page_faults("cpu", MALLOC_MMAP_THRESHOLD_="131072") > 30
    assert page_faults("cpu", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=131072") > 30


# How many bytes shorter the heap is when 64 MB at its end have been freed.
HEAP = """
import ctypes, torch
from machine import keep_freed_memory
keep_freed_memory(torch.device("cpu"))
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
block = libc.malloc(1 << 26)
end = libc.sbrk(0)
libc.free(ctypes.c_void_p(block))
print(end - libc.sbrk(0))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the allocator is not glibc's")
def test_freed_memory_at_the_end_of_the_heap_is_kept_too():
    """In a process that is not forked: what a server has left in the heap may lie behind."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", HEAP], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(call_main, tmp_path, device):
    if getattr(torch, device).is_available():
        pytest.skip(f"{device} is there")
    for name in (device, f"{device}:1"):
        status, _, errors = call_main(train, "--dataset", "digits", "--device", name, "--save", tmp_path / "run")
        assert (status, f"--device '{name}' is not a device that PyTorch can use here" in errors) == (2, True)


@pytest.fixture
def four_gpus(monkeypatch):
    """A machine with four GPUs, as far as PyTorch is asked; the list of those that were chosen."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size))
    return chosen


@pytest.mark.parametrize("name", ["cuda:4", "cuda:44", "cuda:256", "cuda:99999999999"])
def test_a_number_that_is_not_there(four_gpus, name):
    """PyTorch itself takes cuda:256 for cuda:0."""
    with pytest.raises(Refused, match="choose auto, cuda, cuda:0, cuda:1, cuda:2, cuda:3, "):
        choose_device(name)
    assert not four_gpus


def test_a_number_that_is_there_is_what_cuda_means_from_then_on(four_gpus):
    assert choose_device("cuda:3") == torch.device("cuda", 3)
    assert four_gpus == [torch.device("cuda", 3)]
    assert choose_device("cuda") == choose_device("auto") == torch.device("cuda")
    assert len(four_gpus) == 1


@pytest.mark.skipif(torch.version.cuda is None or torch.cuda.is_available(), reason="needs PyTorch with CUDA, and no GPU")
def test_a_gpu_without_a_driver_that_fits_is_refused_in_one_sentence(monkeypatch):
    """PyTorch counts GPUs without their driver; that it cannot compute on them is an error of its own."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    told = r"^PyTorch finds cuda but cannot compute on it \([^\n]+\): choose --device cpu, or check the driver"
    with pytest.raises(Refused, match=told) as refused:
        choose_device("auto")
    assert refused.value.status == 2
    with pytest.raises(Refused, match=told.replace("cuda", "cuda:0")):
        choose_device("cuda:0")
    assert choose_device("auto", processes=2) == torch.device("cuda")  # each has a GPU of its own, which it tries
    with pytest.raises(Refused, match=told.replace("cuda", "cuda:0")):
        distributed.own_device(World(rank=0, size=2), torch.device("cuda"))


def test_one_cpu_has_the_number_0(call_main, tmp_path):
    with pytest.raises(Refused, match="'cpu:1' is not a device that PyTorch can use here"):
        choose_device("cpu:1")
    flags = ["--dataset", "digits", "--depth", 10, "--growth-rate", 4, "--limit", 96, "--epochs", 1, "--no-plot"]
    status, _, errors = call_main(train, *flags, "--device", "cpu:0", "--save", tmp_path / "run")
    assert status == 0, errors
    assert '"device": "cpu:0"' in (tmp_path / "run" / "args.json").read_text()


def test_under_torchrun_a_number_is_refused():
    with pytest.raises(Refused, match="all processes would share --device cuda:1: choose --device cuda, and each gets its own"):
        distributed.own_device(World(rank=0, size=2), torch.device("cuda", 1))


@pytest.mark.parametrize(
    ("device", "has_tf32", "precision"), [("cpu", True, "fp32"), ("cuda", True, "tf32"), ("cuda", False, "fp32")]
)
def test_the_precision_of_a_device(monkeypatch, device, has_tf32, precision):
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: has_tf32)
    assert default_precision(torch.device(device)) == precision


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("precision", [*DTYPES])
def test_a_precision_holds_for_all_kernels_and_every_way_to_ask_for_it(put_back, precision):
    """In PyTorch's newer names and in its older ones, whatever was set before; Triton kernels are to ask for the first."""
    backends, tf32 = torch.backends, precision != "fp32"
    for before in DTYPES:
        set_precision(before)
        set_precision(precision)
        assert [(owner.fp32_precision == "tf32") for owner in (backends.cudnn.conv, backends.cuda.matmul)] == [tf32, tf32]
        assert (backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32) == (tf32, tf32)
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")


def test_under_torchrun_each_process_of_a_machine_has_a_gpu_of_its_own(four_gpus):
    """By its number on this machine, not among all: here it is the third of the second machine."""
    assert distributed.own_device(World(rank=6, local_rank=2, size=8), torch.device("cuda")) == torch.device("cuda", 2)
    assert four_gpus == [torch.device("cuda", 2)]
    with pytest.raises(Refused, match="no GPU is left for process 4: --nproc-per-node 4 at most"):
        distributed.own_device(World(rank=4, local_rank=4, size=8), torch.device("cuda"))


@pytest.mark.parametrize("deterministic", [True, False])
def test_kernels_are_deterministic_or_the_fastest(monkeypatch, deterministic):
    """On a GPU cuBLAS is deterministic with a workspace of its own only."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        set_determinism(deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # what has no such kernel is an error
        assert torch.backends.cudnn.benchmark is not deterministic
        assert os.environ == ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if deterministic else {})
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_workspace_of_cublas_that_a_person_has_chosen_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})
    try:
        set_determinism(True)
        assert os.environ == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def test_a_cluster_gives_fewer_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert machine.num_cpus() == 2


def test_each_precision_computes_in_its_own_type():
    names = {name: str(dtype) for name, dtype in DTYPES.items()}
    assert names == {"fp32": "torch.float32", "tf32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}


def write_files(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal: 900 kB\nMemFree: 200 kB\nMemAvailable: 500 kB\n"}
V1_STAT = "active_file 1\ninactive_file 1\ntotal_active_file 100\ntotal_inactive_file 50\n"
JOBS = {  # where the group of a job is, and the files of it and of those above it
    "a job": (
        "0::/slurm/job_1/step_0\n",
        {
            "slurm/job_1/step_0/memory.max": "max\n",
            "slurm/job_1/step_0/memory.current": "900\n",
            "slurm/job_1/memory.max": "1000\n",
            "slurm/job_1/memory.current": "900\n",
            "slurm/memory.max": "2000\n",
            "slurm/memory.current": "1000\n",
        },
    ),
    "a container": ("0::/\n", {"memory.max": "1000\n", "memory.current": "900\n"}),
    "a job, version 1": (
        "5:cpuset:/\n4:memory:/slurm/job_1\n1:name=systemd:/\n0::/\n",
        {
            "memory/slurm/job_1/memory.limit_in_bytes": "1000\n",
            "memory/slurm/job_1/memory.usage_in_bytes": "900\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "9000\n",
        },
    ),
    "a container, version 1": (
        "4:memory:/docker/of:the host\n",
        {"memory/memory.limit_in_bytes": "1000\n", "memory/memory.usage_in_bytes": "900\n"},
    ),
}


@pytest.mark.parametrize("job", JOBS)
def test_the_memory_of_a_job_or_a_container_is_what_its_limit_leaves(tmp_path, job):
    """Files that are cached there, 150 bytes, can go."""
    group, files = JOBS[job]
    write_files(tmp_path, MEMINFO | {"proc/self/cgroup": group})
    assert machine.free_memory(tmp_path) == 500 * 1024
    stat = V1_STAT if "version 1" in job else "anon 7\nactive_file 100\ninactive_file 50\n"
    write_files(tmp_path / "sys/fs/cgroup", files | {str(Path(name).parent / "memory.stat"): stat for name in files})
    assert machine.free_memory(tmp_path) == 1000 - 900 + 150


def test_the_memory_of_a_machine_is_what_is_free_or_holds_a_cache(tmp_path):
    assert machine.free_memory(tmp_path) == math.inf  # not Linux
    write_files(tmp_path, MEMINFO)
    assert machine.free_memory(tmp_path) == 500 * 1024
    assert 0 < machine.free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") or sys.platform != "linux"
