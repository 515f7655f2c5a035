#!/usr/bin/env python3
"""Finds a broken kernel: the gradients of a net on this machine, switch by switch, against float64 on the CPU.

    attic/check-kernels.py                        a DenseNet-BC with one layer in each block, on the GPU if there is one
    attic/check-kernels.py --device cpu --no-bottleneck --depth 40 --no-compile

When a net that is known to converge does not, the framework may be at fault. In February 2017 it was (pytorch/pytorch#708), and
switching cuDNN off would have shown it. Exit status 1 if a row is wrong. The flags of the model are those of train.py.
"""

import copy
import importlib.util
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attic.comparison import random_batch, randomize, relative_errors, training_pass, worst
from endings import Refused, handle_errors, make_parser
from flags import USAGE, add_device_flag, add_model_flags, make_net
from machine import choose_device, device_name

# How far rounding may move a tensor, relative to its largest value. With the sides of the ReLUs fixed (see measure), nets of 7
# to 100 layers, BC and plain, reach 7e-5 in fp32 and 9e-2 in bf16 on a CPU; tf32 rounds eight times more finely than bf16.
# A kernel that reads the wrong memory is off by 1 or more. The bf16 row cannot see a fault of a few percent; the fp32 rows can.
BOUNDS = {"fp32": 1e-3, "tf32": 5e-2, "bf16": 2e-1}

BARELY_OPEN = 1e-12  # the reference's input to a ReLU that must be open


class Row(NamedTuple):
    switch: str
    precision: str
    available: bool
    cudnn: bool = True
    tf32: bool = False
    onednn: bool = True
    channels_last: bool = False
    compiled: bool = False


def main():
    parser = build_parser()
    args = parser.parse_args()
    args.drop_rate = 0.0  # dropout masks would differ between devices
    with handle_errors(parser, f"L={args.depth}, k={args.growth_rate}", "a smaller net (--depth, --growth-rate)"):
        if args.efficient:
            raise Refused("--efficient computes its ReLUs where this check cannot see them: leave it out")
        device = choose_device(args.device)
        torch.manual_seed(0)
        net = randomize(make_net(args), seed=0)
        print(f"{device_name(device)}, torch {torch.__version__}, {sum(p.numel() for p in net.parameters()):,} parameters\n")
        images, labels = random_batch(8, num_classes=10, seed=1)
        print(f"{'switch':16}{'precision':>9}{'bound':>8}{'error':>10}{'of logits':>11}{'ReLUs moved':>13}  verdict")
        right = [check(row, net, images, labels, device) for row in rows(device, args.compile)]
        print(f"\n{'every kernel tried is right' if all(right) else 'a kernel is WRONG: look at what its row switches'}")
        sys.exit(not all(right))


def build_parser():
    parser = make_parser(__doc__, USAGE)
    add_device_flag(parser)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile, the slow row")
    add_model_flags(parser, depth=10)
    return parser


# --------------------------------------------------------------------------------------------------------------- the rows


def rows(device, with_compile):
    """The table's rows. Apart from what a row switches, and TF32, kernels run as in train.py."""
    gpu, cpu = device.type == "cuda", device.type == "cpu"
    cudnn, tf32 = gpu and torch.backends.cudnn.is_available(), gpu and torch.cuda.is_tf32_supported()
    onednn = cpu and torch.backends.mkldnn.is_available()
    bf16 = torch.cuda.is_bf16_supported() if gpu else torch.amp.is_autocast_available(device.type)
    table = [
        Row("cuDNN on", "fp32", cudnn),
        Row("cuDNN off", "fp32", cudnn, cudnn=False),
        Row("TF32 on", "tf32", tf32, tf32=True),
        Row("TF32 off", "fp32", tf32),
        Row("oneDNN on", "fp32", onednn),
        Row("oneDNN off", "fp32", onednn, onednn=False),
        Row("channels_last", "fp32", True, channels_last=True),
        Row("bf16 autocast", "bf16", bf16),
        Row("torch.compile", "fp32", can_compile(device), compiled=True),
    ]
    return table if with_compile else table[:-1]


def can_compile(device):
    """Whether torch.compile has its compiler: a C++ compiler for a CPU, Triton for a GPU."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is not None


@contextmanager
def switched(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def kernels(row):
    """Inside, PyTorch uses the kernels of the row; cuDNN benchmarks its own, as it does for train.py."""
    with (
        switched(torch.backends.cudnn, "enabled", row.cudnn),
        switched(torch.backends.cudnn, "benchmark", True),
        switched(torch.backends.cudnn, "allow_tf32", row.tf32),
        switched(torch.backends.cuda.matmul, "allow_tf32", row.tf32),
        switched(torch.backends.mkldnn, "enabled", row.onednn),
    ):
        yield


# -------------------------------------------------------------------------------------------------------- the measurement


def check(row, net, images, labels, device):
    """Prints the row; returns whether it is right or not available."""
    if not row.available:
        print(f"{row.switch:16}not available here")
        return True
    errors, moved = measure(row, net, images, labels, device)
    name, error = worst(errors, "grad/")
    right = max(errors.values()) <= BOUNDS[row.precision]
    numbers = f"{BOUNDS[row.precision]:8g}{error:10.1e}{errors['logits']:11.1e}{moved:13}"
    print(f"{row.switch:16}{row.precision:>9}{numbers}  {'right' if right else 'WRONG'}, worst {name.removeprefix('grad/')}")
    return right


def measure(row, net, images, labels, device):
    """The relative error of each tensor of a training pass, and the number of ReLUs that rounding moved to the other side.

    Where the input of a ReLU is within rounding of zero, it passes in one precision and not in another. Such a flip of a
    single unit, one or two in a million in fp32, changes some gradients by percents, and no bound tells that from a bug. So the
    float64 reference takes, unit by unit, the side that the device took; the remaining error is smooth and small. A kernel that
    takes wrong sides is still caught: the logits, which are compared as well, would then be wrong.
    """
    ours, sides = device_pass(row, copy.deepcopy(net), images, labels, device)
    reference, moved = reference_pass(copy.deepcopy(net), images, labels, sides)
    return relative_errors(ours, reference), moved


def device_pass(row, net, images, labels, device):
    """A training pass by the kernels of the row, and on which side of zero the input of every ReLU was, layer by layer."""
    net.to(device, memory_format=torch.channels_last if row.channels_last else torch.preserve_format)
    sides = []
    for module in batch_norms(net):  # a ReLU follows each
        module.register_forward_hook(lambda module, inputs, output: sides.append(output > 0))
    if row.compiled:
        net.compile()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=row.precision == "bf16")
    with kernels(row):
        return training_pass(net, images.to(device), labels.to(device), autocast), sides


def reference_pass(net, images, labels, sides):
    """The pass in float64 on the CPU with the ReLUs on the given sides, and how many it would have put on the other."""
    moved = []
    remaining = iter(sides)

    def take_side(module, inputs, output):
        opened = next(remaining).cpu()
        moved.append((opened != (output > 0)).sum().item())
        value = torch.where(opened, output.clamp(min=BARELY_OPEN), output.clamp(max=0))
        return output + (value - output).detach()  # straight-through: the gradient passes to the output

    for module in batch_norms(net):
        module.register_forward_hook(take_side)
    return training_pass(net.double(), images.double(), labels), sum(moved)


def batch_norms(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


if __name__ == "__main__":
    main()
