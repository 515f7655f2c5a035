#!/usr/bin/env python3
"""Compiles kernels.py for GPUs that this machine may lack, and shows the result for each kernel; needs Triton, but no GPU.

    attic/compile-kernels.py                             all launches of DenseNet-BC, L=100, k=12, 16, 24, 40, batches of 64
    attic/compile-kernels.py --growth-rate 12 --capability 90 --types bf16

For each launch: registers per thread, shared memory per program, bytes per thread that spill from registers to memory, matrix
instructions, and loads from global memory by width in bits. Exit status 1 if a launch is wrong: it needs more shared memory
than the GPU has, it spills (which is allowed below capability 9.0 with k > 12), or it multiplies matrices without matrix
instructions.
"""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.pop("TRITON_INTERPRET", None)  # what is interpreted is not compiled
try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import kernels
except ImportError:
    triton = None

from dense_block import empty_maps, out_channels, weights_of
from densenet import ArgumentError, DenseNet
from endings import Refused, at_least, handle_errors, make_parser

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
MULTIPLIED = {"tf32": "tf32", "fp32": "tf32x3"}  # what kernels.products says on a GPU; nothing that matters of the others
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KB that a program may have, by capability
PRODUCTS = ("first_convolution", "second_convolution", "first_backward", "second_backward")  # they multiply matrices
COLUMNS = (
    "k | type | capability | kernel | tile | warps | stages | registers | shared, KB | spilled | products | loads | verdict"
)


def main():
    parser = build_parser()
    args = parser.parse_args()
    with handle_errors(parser, f"{args.processes or 'all'} processes", "fewer --processes"):
        if triton is None:
            raise Refused("Triton is missing, or lacks its Nvidia backend: pip install triton")
        cases = compile_all(args)
        wrong = sum(faults(growth_rate, *case) != "" for growth_rate, _, *case in cases)
        print(f"\n{f'{wrong} of {len(cases)} launches are WRONG' if wrong else 'every launch is right'}")
        sys.exit(wrong > 0)


def build_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--growth-rate", type=at_least(1, high=56), nargs="+", metavar="K", default=[12, 16, 24, 40], help="(12 16 24 40)")
    add("--depth", type=at_least(0, high=10**4), default=100, help="(%(default)s)")
    add("--batch-size", type=at_least(1), default=64, help="(%(default)s)")
    known = f"of {', '.join(map(str, SHARED))}, ten times the GPU's (80 90)"
    add("--capability", type=int, choices=SHARED, nargs="+", metavar="N", default=[80, 90], help=known)
    add("--types", nargs="+", choices=TYPES, metavar="TYPE", default=["bf16", "tf32", "fp32"], help=f"of {', '.join(TYPES)}")
    add("--processes", type=at_least(1), metavar="N", help="that compile at the same time (one for each CPU)")
    return parser


def compile_all(args):
    """Prints the table; returns its cases, (k, type, capability, launch, machine code)."""
    sides = itertools.product(args.growth_rate, args.types, args.capability)
    jobs = [(*side, launch) for side in sides for launch in launches(*side, args.depth, args.batch_size)]
    print(f"Triton {triton.__version__}, L={args.depth}, batches of {args.batch_size}\n")
    print(f"| {COLUMNS} |\n|{' --- |' * (COLUMNS.count('|') + 1)}")
    cases = []
    forked = multiprocessing.get_context("fork")  # with torch imported; not the default from Python 3.14 on
    with concurrent.futures.ProcessPoolExecutor(args.processes, mp_context=forked) as pool:
        for job, code in zip(jobs, pool.map(machine_code, *[*zip(*jobs, strict=True)][2:]), strict=True):
            cases.append((*job, code))
            print("|", " | ".join(cells(*cases[-1])), "|", flush=True)
    return cases


def cells(growth_rate, type_name, capability, launch, code):
    """A line of the table."""
    tile = " ".join(f"{name}={value}" for name, value in launch.constants if name not in ("PRODUCTS", "UNIT"))
    loads = ", ".join(f"{n} x {bits}" for bits, n in sorted(code.loads.items(), reverse=True))
    wrong = faults(growth_rate, capability, launch, code)
    described = growth_rate, type_name, capability, launch.name, tile, launch.warps, launch.stages
    became = code.registers, f"{code.shared / 1024:.0f}", code.spilled, code.products or "none", loads
    return [*map(str, described), *map(str, became), f"WRONG: {wrong}" if wrong else "right"]


def faults(growth_rate, capability, launch, code):
    """What is wrong with a launch, in words."""
    found = {
        "too much shared memory": code.shared > SHARED[capability] * 1024,
        "spills": code.spilled > 0 and (capability >= 90 or growth_rate <= 12),
        "no matrix instructions": launch.name in PRODUCTS and not code.products,
    }
    return ", ".join(name for name, present in found.items() if present)


# ----------------------------------------------------------------------------------------------------------- the launches


class Launch(NamedTuple):
    """A kernel launch as the compiler sees it."""

    name: str
    types: tuple  # (argument, type) of all
    constants: tuple  # (argument, value)
    aligned: tuple  # the indices of multiples of 16: pointers and numbers
    warps: int
    stages: int


def launches(growth_rate, type_name, capability, depth, batch_size):
    """The different launches of a training pass of the net's blocks; none if kernels.py does not compute them."""
    try:
        with torch.device("meta"):
            net = DenseNet(growth_rate=growth_rate, depth=depth).to(memory_format=torch.channels_last)
    except ArgumentError as error:
        raise Refused(str(error)) from error
    found = {}  # as a set in order
    recorders = {name: Recorder(getattr(kernels, name), found) for name in kernel_names()}
    gpu = {"products": lambda maps: MULTIPLIED.get(type_name, "tf32"), "hopper": lambda maps: 90 <= capability < 100}
    with mock.patch.multiple(kernels, **recorders, **gpu):
        for i, (block, transition) in enumerate([(net.dense1, net.trans1), (net.dense2, net.trans2), (net.dense3, None)]):
            train(block, transition, batch_size, 32 >> i, TYPES[type_name])
    return [*found]


def kernel_names():
    """The kernels that kernels.py launches."""
    launched = set(re.findall(r"\b(\w+)\[", Path(kernels.__file__).read_text()))
    return sorted(name for name in launched if isinstance(getattr(kernels, name, None), triton.JITFunction))


def train(block, transition, batch_size, size, dtype):
    """Both passes of kernels.py over a block and what follows it, on the meta device, which has shapes and no numbers."""
    layers = list(block)
    x = torch.empty(batch_size, layers[0].bn1.num_features, size, size, dtype=dtype, device="meta")
    if not kernels.computes(x, layers):
        return
    channels = out_channels(layers)
    maps, grads = (empty_maps(x, channels, kernels.ALIGNMENT)[..., :channels] for _ in range(2))
    mean, rstd, var = torch.empty(3, maps.stride(2), device="meta")
    corrections = torch.empty(2, maps.stride(2), device="meta")
    weights = weights_of(layers, x, kernels)
    kernels.write_maps(maps, mean, rstd, var, x.permute(0, 2, 3, 1), layers[0].bn1.eps)
    kept = kernels.forward(maps, mean, rstd, var, layers, weights)
    if transition:
        out = kernels.transition_forward(maps, mean, rstd, transition)
        kernels.transition_backward(out, grads, maps, mean, rstd, corrections, transition)
    kernels.backward(grads, maps, mean, rstd, corrections, layers, weights, kept)
    kernels.through_statistics(grads, maps, mean, rstd, corrections, slice(0, x.shape[1]))
    kernels.infer(maps, layers, weights)


class Recorder:
    """In the place of a kernel: notes how it is launched; memory is taken to begin at a multiple of 16, as on a GPU."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return self.note

    def note(self, *arguments, num_warps=4, num_stages=3):
        given = [*zip(self.kernel.params, arguments, strict=True)]
        types = tuple((parameter.name, type_of(parameter, value)) for parameter, value in given)
        constants = tuple((parameter.name, value) for parameter, value in given if parameter.is_constexpr)
        aligned = tuple(i for i, (parameter, value) in enumerate(given) if is_aligned(parameter, value))
        self.found[Launch(self.kernel.__name__, types, constants, aligned, num_warps, num_stages)] = None


def type_of(parameter, value):
    if parameter.is_constexpr:
        return "constexpr"
    return POINTERS[value.dtype] if torch.is_tensor(value) else {int: "i32", float: "fp32"}[type(value)]


def is_aligned(parameter, value):
    """Whether Triton compiles for a multiple of 16 bytes, or of 16."""
    if torch.is_tensor(value):
        return value.storage_offset() * value.element_size() % 16 == 0
    return type(value) is int and value % 16 == 0 and not (parameter.is_constexpr or parameter.do_not_specialize)


# --------------------------------------------------------------------------------------------------------- the machine code


class Code(NamedTuple):
    """The compiled code of a launch."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread
    shared: int  # bytes of a program
    products: str  # the instructions that multiply matrices
    loads: dict  # {bits: number of loads}


def machine_code(capability, launch):
    """The Code of a launch."""
    assembly, cubin, shared = compiled(launch, capability)
    usage = resource_usage(cubin)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # there is nothing else on it
    products = sorted({*re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", assembly)})
    return Code(registers, stack, shared, " ".join(products), loads_of(assembly))


def loads_of(assembly):
    """{bits: number of loads from global memory}."""
    found = re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\b|\bcp\.async\.c[ag]\..*, 0x(\w+),", assembly)
    return dict(collections.Counter(8 * int(size, 16) if size else int(n or 1) * int(bits) for n, bits, size in found))


def compiled(launch, capability):
    """(assembly, which is PTX; machine code; bytes of shared memory)."""
    index = {name: i for i, (name, _) in enumerate(launch.types)}
    source = ASTSource(
        fn=getattr(kernels, launch.name),
        signature=dict(launch.types),
        constexprs={(index[name],): value for name, value in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return done.asm["ptx"], done.asm["cubin"], done.metadata.shared


def resource_usage(cubin):
    """What cuobjdump, which comes with Triton, prints of it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
