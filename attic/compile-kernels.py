#!/usr/bin/env python3
"""Compiles kernels.py for GPUs that need not be there, and shows what became of each kernel; needs Triton, and no GPU.

    attic/compile-kernels.py                             all launches of DenseNet-BC, L=100, k=12, 24 and 40, batches of 64
    attic/compile-kernels.py --growth-rate 12 --capability 90 --types bf16

For each kernel: registers a thread, shared memory of a program, bytes spilled from registers to memory, which matrix
instructions it has, and how many bits its loads from global memory have. Exit status 1 if a kernel spills on capability 9.0, or
on 8.0 with k=12, or if one multiplies matrices without matrix instructions.
"""

import argparse
import collections
import concurrent.futures
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
from densenet import DenseNet

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
PRODUCTS = ("first_convolution", "second_convolution", "first_backward", "second_backward")


def main():
    args = build_parser().parse_args()
    cases = [*itertools.product(args.growth_rate, args.types, args.capability)]
    jobs = [(*case, launch) for case in cases for launch in launches(case[0], case[1], args.depth, args.batch_size)]
    print(f"Triton {triton.__version__}, L={args.depth}, batches of {args.batch_size}\n")
    print("| k | type | capability | kernel | tile | warps | registers | shared, KB | spilled | products | loads, bits |")
    print("|" + " --- |" * 11)
    with concurrent.futures.ProcessPoolExecutor(args.processes) as pool:
        right = [*pool.map(report, jobs)]
    print(f"\n{'no kernel spills' if all(right) else 'a kernel SPILLS or does without matrix instructions'}")
    sys.exit(not all(right))


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth-rate", type=int, nargs="+", default=[12, 24, 40], help="(12 24 40)")
    parser.add_argument("--depth", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90], help="compute capability times ten (80 90)")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=["bf16", "tf32", "fp32"], help="(bf16 tf32 fp32)")
    parser.add_argument("--processes", type=int, help="that compile at the same time (one for each CPU)")
    return parser


# ----------------------------------------------------------------------------------------------------------- the launches


class Launch(NamedTuple):
    """What the compiler is told: (argument, type) of all, (index, value) of constants, the indices of multiples of 16."""

    name: str
    types: tuple
    constants: tuple
    aligned: tuple
    warps: int
    stages: int


def launches(growth_rate, type_name, depth, batch_size):
    """The different launches of a training pass of the net's blocks."""
    with torch.device("meta"):
        net = DenseNet(growth_rate=growth_rate, depth=depth).to(memory_format=torch.channels_last)
    found = {}  # as a set in order
    recorders = {name: Recorder(getattr(kernels, name), found) for name in kernel_names()}
    with mock.patch.multiple(kernels, **recorders, products=lambda device: {"tf32": "tf32", "fp32": "tf32x3"}.get(type_name, "tf32")):
        for i, block in enumerate((net.dense1, net.dense2, net.dense3)):
            train(block, batch_size, 32 >> i, TYPES[type_name])
    return [*found]


def kernel_names():
    """The kernels that kernels.py launches."""
    launched = set(re.findall(r"\b(\w+)\[", Path(kernels.__file__).read_text()))
    return sorted(name for name in launched if isinstance(getattr(kernels, name, None), triton.JITFunction))


def train(block, batch_size, size, dtype):
    """Both passes of kernels.py over a block, on the meta device, which has shapes and no numbers."""
    layers = list(block)
    channels = kernels.channels(layers)
    maps, grads = torch.empty(2, batch_size, size, size, -(-channels // 16) * 16, dtype=dtype, device="meta")[..., :channels]
    mean, rstd, var, *moments = torch.empty(5, maps.stride(2), device="meta")
    kept = kernels.forward(maps, mean, rstd, var, layers)
    kernels.backward(grads, maps, mean, rstd, torch.stack(moments), layers, kept)


class Recorder:
    """In the place of a kernel: notes how it is launched."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return self.note

    def note(self, *arguments, num_warps=4, num_stages=3):
        types, constants, aligned = [], [], []
        for i, (parameter, value) in enumerate(zip(self.kernel.params, arguments, strict=True)):
            if parameter.is_constexpr:
                types.append((parameter.name, "constexpr"))
                constants.append((i, value))
            elif isinstance(value, torch.Tensor):
                types.append((parameter.name, POINTERS[value.dtype]))
                aligned.append(i)
            else:
                types.append((parameter.name, "fp32" if isinstance(value, float) else "i32"))
                aligned += [i] * (type(value) is int and value % 16 == 0 and not parameter.do_not_specialize)
        self.found[Launch(self.kernel.__name__, tuple(types), tuple(constants), tuple(aligned), num_warps, num_stages)] = None


# --------------------------------------------------------------------------------------------------------- the machine code


def report(job):
    """Prints a line of the table; returns whether the kernel is as it should be."""
    growth_rate, type_name, capability, launch = job
    cubin, shared = compiled(launch, capability)
    usage, code = tool("cuobjdump", cubin, "--dump-resource-usage"), tool("nvdisasm", cubin, "-c")
    registers = re.search(r"REG:(\d+)", usage)[1]
    counts = collections.Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code, re.MULTILINE))
    spilled = sum(n for name, n in counts.items() if name.startswith(("LDL", "STL")))
    products = sorted({name.split(".")[0] for name in counts if re.match("[HQ]G?MMA", name)})
    widths = collections.Counter()
    for name, n in counts.items():
        if re.match(r"LDG(STS)?\b", name) and "DEPBAR" not in name:
            widths[width(name)] += n
    constants = dict(launch.constants)
    tile = " ".join(
        f"{launch.types[i][0]}={value}" for i, value in constants.items() if launch.types[i][0] not in ("PRODUCTS", "UNIT")
    )
    loads = ", ".join(f"{n} x {bits}" for bits, n in sorted(widths.items(), reverse=True))
    cells = [growth_rate, type_name, capability, launch.name, tile, launch.warps, registers, f"{shared / 1024:.0f}", spilled]
    print("|", " | ".join(map(str, [*cells, " ".join(products) or "none", loads])), "|", flush=True)
    return (spilled == 0 or (capability < 90 and growth_rate > 12)) and (
        launch.name not in PRODUCTS or bool(products) or type_name == "fp32"
    )


def width(instruction):
    found = re.search(r"\.(U8|S8|U16|S16|64|128)(?=\.|$)", instruction.replace("LTC128B", "").replace("LTC64B", ""))
    return int(re.sub(r"\D", "", found[1])) if found else 32


def compiled(launch, capability):
    """(machine code, bytes of shared memory)."""
    source = ASTSource(
        fn=getattr(kernels, launch.name),
        signature=dict(launch.types),
        constexprs={(i,): value for i, value in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps, "num_stages": launch.stages})
    return done.asm["cubin"], done.metadata.shared


def tool(name, cubin, *flags):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *flags, file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
