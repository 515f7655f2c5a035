#!/usr/bin/env python3
"""Images per second and memory of a training step, variant by variant, beside torchvision's DenseNet, in one run.

    ./bench.py                                 DenseNet-BC, L=100, k=12, batches of 64, in fp32
    ./bench.py --depth 40 --rounds 9 --only torchvision plain "plain, bf16"
    ./bench.py --count --bandwidth 900 --rate 30     what a step moves and computes, and the time that takes at these rates
    ./bench.py --scaling images/memory.png     memory and time against the depth
    ./bench.py --data data                     the data pipeline against a torchvision DataLoader, on the real CIFAR-10

Each variant runs as a person runs it, in a process of its own: torchvision's net as PyTorch makes it, ours by the functions and
with the settings of train.py. They take turns, step by step, so that a noisy machine harms all alike; a figure is the median of
the rounds, and behind it stands half the distance between the quartiles. Kept and peak bytes are counted, not measured: those
of all tensors that a forward pass leaves alive for the backward pass, and the largest sum of all tensors alive at once during
a step. The last column is measured: the largest resident memory of the process, or on a GPU what PyTorch had allocated there.
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import resource
import signal
import statistics
import sys
import time
import weakref
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms as transforms
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import data
import dense_block
import endings
from attic.torchvision_weights import torchvision_net
from densenet import DenseNet, layers_per_block
from distributed import World
from flags import (
    LARGEST,
    USAGE,
    add_device_flag,
    add_machine_flags,
    add_optimisation_flags,
    at_least,
    default_values,
    named,
)
from machine import DTYPES, choose_device, describe, keep_freed_memory, make_repeatable
from train import make_optimizer, prepare, training_step

DEPTHS = (40, 100, 160, 250)
SCALED = {"plain": "plain modules", "torchvision, checkpointed": "checkpointed (torchvision)", "efficient": "--efficient"}

aten = torch.ops.aten
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach, aten._unsafe_view}
OVERWRITING = {aten.copy_, aten.fill_, aten.zero_}  # they write their first argument, and do not read it


class Variant(NamedTuple):
    net: str
    by_train: bool = True  # with the settings of train.py; else as PyTorch makes it
    precision: str = "fp32"
    compile: str | None = None  # a mode of torch.compile


VARIANTS = {
    "torchvision": Variant("torchvision", by_train=False),
    "torchvision, with our settings": Variant("torchvision"),
    "torchvision, checkpointed": Variant("checkpointed", by_train=False),
    "plain": Variant("plain"),
    "efficient": Variant("efficient"),
    "plain, compile": Variant("plain", compile="default"),
    "efficient, compile": Variant("efficient", compile="default"),
    "plain, reduce-overhead": Variant("plain", compile="reduce-overhead"),
    "efficient, reduce-overhead": Variant("efficient", compile="reduce-overhead"),
}
FIRST = list(VARIANTS)[:-2]  # what runs unless --only says otherwise; CUDA graphs are for GPUs
VARIANTS |= {f"{name}, bf16": variant._replace(precision="bf16") for name, variant in VARIANTS.items()}


def main():
    parser = build_parser()
    args = parser.parse_args()
    asked = f"batches of {args.batch_size} and L={args.depth}, k={args.growth_rate}"
    with endings.before_training(parser, asked, "a smaller --batch-size, --depth or --growth-rate"):
        device = choose_device(args.device)
        layers_per_block(args.depth, bottleneck=True)
        measure, show = choose_task(args)
        report = measure(args, device)
        print(f"{describe(device)}, torch {torch.__version__}, {args.rounds} rounds, batch {args.batch_size}\n")
        show(report)
        if args.json:
            facts = {"torch": torch.__version__, "hardware": describe(device), **report}
            args.json.write_text(json.dumps(facts, indent=2) + "\n")


def choose_task(args):
    """What measures, from args and the device, and what shows the report."""
    if args.data:
        return measure_pipeline, print_pipeline
    if args.count:
        return count_steps, print_counts
    if args.scaling:
        return measure_scaling, functools.partial(draw_scaling, path=args.scaling)
    return measure_steps, print_steps


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=USAGE)
    parser.add_argument("--depth", type=at_least(1, high=LARGEST), default=100, help="L of the DenseNet-BC (%(default)s)")
    parser.add_argument("--growth-rate", type=at_least(1, high=LARGEST), default=12, help="k (%(default)s)")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="(%(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="(%(default)s)")
    parser.add_argument("--image-size", type=at_least(4), default=32, help="height and width (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="VARIANT", default=FIRST, help=f"of {list(VARIANTS)}")
    add_device_flag(parser)
    parser.add_argument(
        "--data", metavar="DIR", type=named(str), help="measure the data pipeline on the CIFAR-10 in this folder instead"
    )
    parser.add_argument(
        "--count", action="store_true", help="count a step's bytes, operations and kernel launches on a GPU instead"
    )
    for flag, unit, default in [("--bandwidth", "GB/S", 1000), ("--rate", "TFLOP/S", 20)]:
        parser.add_argument(
            flag, metavar=unit, type=at_least(1e-6, float), default=default, help="for the floor of --count (%(default)s)"
        )
    parser.add_argument("--scaling", metavar="PNG", type=named(Path), help="draw memory and time against the depth instead")
    parser.add_argument("--json", metavar="FILE", type=named(Path), help="write the figures to this file, too")
    return parser


# ----------------------------------------------------------------------------------------------------------- the variants


def make_net(kind, depth, growth_rate):
    """The DenseNet-BC for 32 x 32 images: ours, or torchvision's modules behind a 3x3 convolution."""
    net = DenseNet(growth_rate, depth, efficient=kind == "efficient")
    return net if kind in ("plain", "efficient") else torchvision_net(net, memory_efficient=kind == "checkpointed")


def make_step(name, args, device):
    """A function that takes one training step, and one that runs a forward pass only and returns the loss."""
    variant = VARIANTS[name]
    if variant.by_train:
        keep_freed_memory(device)
        make_repeatable(deterministic=False)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    labels = torch.randint(10, (args.batch_size,), device=device)
    net = make_net(variant.net, args.depth, args.growth_rate).to(device)
    autocast = (
        torch.autocast(device.type, DTYPES[variant.precision]) if variant.precision != "fp32" else contextlib.nullcontext()
    )
    return (step_of_train if variant.by_train else step_of_pytorch)(net, variant, images, labels, autocast)


def step_of_pytorch(net, variant, images, labels, autocast):
    """As anyone writes it who sets nothing."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    launch_once(optimizer, images.device)

    def forward():
        with autocast:
            return F.cross_entropy(net(images), labels)

    def step():
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    return step, forward


def step_of_train(net, variant, images, labels, autocast):
    """As train.py takes it."""
    settings = default_values(add_optimisation_flags, add_machine_flags)
    settings.batch_size, settings.compile = len(images), variant.compile
    net.to(memory_format=torch.channels_last)
    model = prepare(net, settings, images.device, World())
    optimizer = make_optimizer(net, settings)
    launch_once(optimizer, images.device)
    scaler = torch.amp.GradScaler(enabled=False)

    def forward():
        with autocast:
            return F.cross_entropy(model(images), labels)

    return functools.partial(training_step, model, optimizer, scaler, autocast, images, labels, 1.0, World()), forward


def launch_once(optimizer, device):
    """On the meta device, where a GPU's launches are counted: one for all parameters, as there."""
    for group in optimizer.param_groups if device.type == "meta" else []:
        group["foreach"] = True


# ----------------------------------------------------------------------------------------------------------- the processes


def measure_steps(args, device):
    """{variant: figures}; each in a process of its own, all alive together, their steps interleaved."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in tqdm(args.only, desc="preparing", disable=None):  # to compile a net takes minutes on a CPU
            workers[name] = stack.enter_context(Worker(name, args, device))
        report = {name: worker.ask("counted") for name, worker in workers.items()}
        seconds = {name: [] for name in workers}
        for _, (name, worker) in itertools.product(range(args.rounds), workers.items()):
            seconds[name].append(worker.ask("step"))
        for name, worker in workers.items():
            report[name]["images_per_second"] = [args.batch_size / s for s in seconds[name]]
            report[name]["process_gb"] = worker.ask("memory")
    sizes = {"depth": args.depth, "growth_rate": args.growth_rate, "batch_size": args.batch_size, "image_size": args.image_size}
    return {**sizes, "variants": report}


class Worker:
    """A process that takes a variant's steps, one whenever it is asked to."""

    def __init__(self, name, args, device):
        context = multiprocessing.get_context("spawn")  # a fork would inherit this process's heap
        self.name = name
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, args, device), daemon=True)
        self.process.start()
        theirs.close()
        with contextlib.suppress(EOFError):  # if it has ended, the first question tells
            self.connection.recv()  # "ready": one is prepared after the other

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.connection.close()
        self.process.join()

    def ask(self, what):
        """The answer to "counted", "step" or "memory". ValueError if the process has ended."""
        try:
            self.connection.send(what)
            return self.connection.recv()
        except (EOFError, OSError) as error:
            hint = "if memory ran out, name fewer variants with --only or a smaller --batch-size"
            raise ValueError(f"the process of {self.name} ended: {hint}") from error


def serve(connection, name, args, device):
    """What a worker's process does: prepares the step, and answers until nobody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the parent
    step, forward = make_step(name, args, device)
    step()  # warms up, compiles, and gives the optimiser its state
    answers = {
        "counted": functools.partial(counted_memory, step, forward, name, args.batch_size),
        "step": functools.partial(timed, step, device),
        "memory": functools.partial(process_memory, device),
    }
    connection.send("ready")
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            connection.send(answers[connection.recv()]())


def counted_memory(step, forward, name, batch_size):
    """In MB an image. What is compiled would run uncompiled while its tensors are counted."""
    if VARIANTS[name].compile:
        return {"kept_mb_per_image": None, "peak_mb_per_image": None}
    kept, peak = (size / batch_size / 1e6 for size in (kept_bytes(forward), peak_bytes(step)))
    return {"kept_mb_per_image": kept, "peak_mb_per_image": peak}


def timed(step, device):
    """Seconds of one step."""
    wait_for(device)
    started = time.perf_counter()
    step()
    wait_for(device)
    return time.perf_counter() - started


def process_memory(device):
    """The largest resident memory of this process so far, in GB; on a GPU what PyTorch had allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def wait_for(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


# --------------------------------------------------------------------------------------------------------- counted memory


def kept_bytes(forward):
    """Bytes of all tensors that a forward pass makes and that are still alive after it: what the backward pass needs."""
    with LiveBytes() as live:
        loss = forward()
        kept = live.now
    del loss  # alive until here, and with it the graph
    return kept


def peak_bytes(step):
    """The largest sum of the bytes of all tensors that were made during a step and alive at once."""
    with LiveBytes() as live:
        step()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, torch.utils._pytree.tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in before | self.alive:
                self.add(storage)
        return result

    def add(self, storage):
        address, size = storage.data_ptr(), storage.nbytes()
        self.alive.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, address, size)

    def remove(self, address, size):
        self.alive.discard(address)
        self.now -= size


def print_steps(report):
    variants = report["variants"]
    peer = statistics.median(variants["torchvision"]["images_per_second"]) if "torchvision" in variants else None
    print(f"{'':34}{'images/s':>16}{'ratio':>8}{'kept, MB/image':>16}{'peak, MB/image':>16}{'process, GB':>13}")
    for name, figures in variants.items():
        rates = figures["images_per_second"]
        ratio = f"{statistics.median(rates) / peer:8.2f}" if peer else f"{'':8}"
        counted = (figures["kept_mb_per_image"], figures["peak_mb_per_image"])
        memory = "".join(f"{'-':>16}" if value is None else f"{value:16.2f}" for value in counted)
        print(f"{name:34}{statistics.median(rates):9.1f} ±{spread(rates):5.1f}{ratio}{memory}{figures['process_gb']:13.2f}")


def spread(values):
    """Half the distance between the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


# ------------------------------------------------------------------------------------------------------ against the depth


def measure_scaling(args, device):
    """{depth: the report of measure_steps}."""
    scaling = {d: measure_steps(argparse.Namespace(**vars(args) | {"depth": d, "only": list(SCALED)}), device) for d in DEPTHS}
    return {"growth_rate": args.growth_rate, "scaling": scaling}


def draw_scaling(report, path):
    """Peak memory and time of a training step against the depth; beside each name the exponent between the last depths."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    memory, time_ = figure.subplots(1, 2)
    for name, label in SCALED.items():
        figures = [report["scaling"][depth]["variants"][name] for depth in DEPTHS]
        draw_power(memory, [f["peak_mb_per_image"] for f in figures], label)
        draw_power(time_, [1e3 / statistics.median(f["images_per_second"]) for f in figures], label)
    memory.set_ylabel("peak memory, MB an image")
    time_.set_ylabel("time of a training step, ms an image")
    for axes in (memory, time_):
        axes.set(xscale="log", yscale="log", xlabel=f"depth L of DenseNet-BC, k = {report['growth_rate']}")
        axes.set_xticks(DEPTHS, DEPTHS)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def draw_power(axes, values, label):
    exponent = math.log(values[-1] / values[1]) / math.log(DEPTHS[-1] / DEPTHS[1])
    axes.plot(DEPTHS, values, marker="o", label=f"{label}: $L^{{{exponent:.2f}}}$")


# ---------------------------------------------------------------------------------------------------------- a GPU's work


def count_steps(args, _):
    """{variant: the work of a training step}, from a step on the meta device, which has shapes and no data."""
    counts = {name: count(name, args) for name in ("torchvision", "plain", "efficient")}
    return {"bandwidth_gb_s": args.bandwidth, "rate_tflop_s": args.rate, "counts": counts}


def count(variant, args):
    step, _ = make_step(variant, args, torch.device("meta"))
    step()  # gives the optimiser its state
    traffic = Traffic()
    with traffic, mock.patch.object(dense_block, "kernel", traffic.fused):
        step()
    floor = sum(max(size / args.bandwidth / 1e9, flops / args.rate / 1e12) for size, flops in traffic.launches)
    gigabytes, gigaflops = (sum(column) / 1e9 for column in zip(*traffic.launches, strict=True))
    return {"gigabytes": gigabytes, "gigaflops": gigaflops, "launches": len(traffic.launches), "floor_ms": 1e3 * floor}


class Traffic(TorchDispatchMode):
    """The (bytes, floating-point operations) of every kernel launch.

    An operation counts as one launch, which reads every tensor that it is given once and writes every result once, a batch norm
    too; views and allocations are none. What a compiler is given to fuse, the functions of dense_block.kernel, counts as one
    operation. Only products and convolutions count as arithmetic.
    """

    def __init__(self):
        super().__init__()
        self.launches = []
        self.inside_fused = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        size = bytes_moved(function, args, kwargs, result)
        if size and not self.inside_fused:
            flops = flop_registry.get(function.overloadpacket, lambda *args, **kwargs: 0)
            self.launches.append((size, flops(*args, **kwargs, out_val=result)))
        return result

    def fused(self, function, _):
        """The function, to be counted as one launch; its arguments called grads are written, too."""

        def counted(*args):
            self.inside_fused = True
            result = function(*args)
            self.inside_fused = False
            written = inspect.signature(function).bind(*args).arguments.get("grads")
            self.launches.append((size_of((args, result, written)), 0))
            return result

        return counted


def bytes_moved(function, args, kwargs, result):
    """Bytes read and written by one operation; 0 for a view or an allocation."""
    if function.is_view or function.overloadpacket in ALLOCATIONS:
        return 0
    schema, total = function._schema, 0
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    for argument in schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        read = not (argument.is_out or (written and function.overloadpacket in OVERWRITING))
        total += (read + written) * size_of(given.get(argument.name))
    new = [value for value, returned in zip(as_tuple(result), schema.returns, strict=False) if returned.alias_info is None]
    return total + size_of(new)


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def size_of(tensors):
    """Bytes of all tensors in a structure; what is expanded counts once."""
    leaves = filter(torch.is_tensor, torch.utils._pytree.tree_leaves(tensors))
    return sum(t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride) for t in leaves)


def print_counts(report):
    plain = report["counts"]["plain"]
    print(f"{'':14}{'GB':>8}{'ratio':>8}{'launches':>10}{'ratio':>8}{'GFLOP':>10}{'floor, ms':>12}")
    for name, work in report["counts"].items():
        ratios = [work[key] / plain[key] for key in ("gigabytes", "launches")]
        print(
            f"{name:14}{work['gigabytes']:8.2f}{ratios[0]:8.2f}{work['launches']:10d}{ratios[1]:8.2f}"
            f"{work['gigaflops']:10.1f}{work['floor_ms']:12.2f}"
        )
    bounds = f"{report['bandwidth_gb_s']:g} GB/s or {report['rate_tflop_s']:g} TFLOP/s"
    print(f"\nfloor: each launch at {bounds}, whichever takes longer; counted, not measured")


# ------------------------------------------------------------------------------------------------------------ the pipeline


def measure_pipeline(args, device, num_batches=40):
    """Images/s of batches that are normalised, cropped and flipped: by data.py, and by a DataLoader with 1 and 2 workers."""
    dataset = data.load("cifar10", args.data, device)
    generator = torch.Generator(device).manual_seed(0)
    ours = functools.partial(data.training_batches, dataset.train, args.batch_size, dataset.mean, dataset.std, True, generator)
    sources = {  # each gives the batches of an epoch when it is called
        "data.py": ours,
        "DataLoader, 1 worker": data_loader(args, dataset, num_workers=1).__iter__,
        "DataLoader, 2 workers": data_loader(args, dataset, num_workers=2).__iter__,
    }
    report = {}
    for name, epoch in sources.items():  # one after the other: idle workers would still fill their queues
        batches = itertools.chain.from_iterable(epoch() for _ in itertools.count())
        next(batches)
        report[name] = [args.batch_size * num_batches / seconds_of(batches, num_batches, device) for _ in range(args.rounds)]
    return {"pipeline": report}


def seconds_of(batches, number, device):
    started = time.perf_counter()
    for _ in itertools.islice(batches, number):
        pass
    wait_for(device)
    return time.perf_counter() - started


def data_loader(args, dataset, num_workers):
    """The usual pipeline: torchvision's data set, its transforms image by image, and worker processes."""
    mean, std = ((values.flatten().cpu() / 255).tolist() for values in (dataset.mean, dataset.std))
    steps = [transforms.ToTensor(), transforms.Normalize(mean, std), transforms.RandomCrop(32, padding=4)]
    transform = transforms.Compose([*steps, transforms.RandomHorizontalFlip()])
    images = torchvision.datasets.CIFAR10(args.data, train=True, transform=transform)
    return torch.utils.data.DataLoader(images, args.batch_size, shuffle=True, num_workers=num_workers)


def print_pipeline(report):
    peer = statistics.median(report["pipeline"]["DataLoader, 1 worker"])
    print(f"{'':26}{'images/s':>18}{'ratio':>8}")
    for name, rates in report["pipeline"].items():
        print(f"{name:26}{statistics.median(rates):10.0f} ±{spread(rates):6.0f}{statistics.median(rates) / peer:8.1f}")


if __name__ == "__main__":
    main()
