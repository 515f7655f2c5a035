import ctypes
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train

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


def page_faults(device, **settings):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | settings
    command = [sys.executable, "-c", FAULTS.format(device=device)]
    return int(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the allocator is not glibc's")
def test_freed_memory_is_kept_on_a_cpu_unless_a_person_says_otherwise():
    assert page_faults("cpu") < 10
    assert page_faults("cuda") > 30  # huge pages have 2 MB
    assert page_faults("cpu", MALLOC_TRIM_THRESHOLD_="131072") > 30
    assert page_faults("cpu", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=131072") > 30


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(call_main, tmp_path, device):
    if getattr(torch, device).is_available():
        pytest.skip(f"{device} is there")
    status, _, errors = call_main(train, "--dataset", "digits", "--device", device, "--save", tmp_path / "run")
    assert (status, f"--device {device}: this machine has none" in errors) == (2, True)
