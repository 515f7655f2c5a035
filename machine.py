"""The machine that a net runs on: which device and what it is called, kernels repeatable or fast, precisions by their names."""

import os
import platform

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
