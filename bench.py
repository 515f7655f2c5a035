#!/usr/bin/env python3
"""Images per second and memory of a training step, variant by variant, beside torchvision's DenseNet, in one run.

    ./bench.py                                 DenseNet-BC, L=100, k=12, batches of 64
    ./bench.py --depth 40 --rounds 9 --only plain efficient
    ./bench.py --data data                     the data pipeline against a torchvision DataLoader, on the real CIFAR-10

The variants take turns, round by round, so that a noisy machine harms all alike; a figure is the median of the rounds, and
behind it stands half the distance between the quartiles. Memory is counted, not measured: the bytes of all tensors autograd
keeps for the backward pass, weights aside, and the largest sum of the bytes of all tensors alive at once during a step.
"""

import argparse
import itertools
import json
import statistics
import time
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms as transforms
from torch.utils._python_dispatch import TorchDispatchMode

import data
from attic.torchvision_weights import torchvision_net
from densenet import DenseNet, layers_per_block
from evaluate import choose_device
from train import DTYPES, USAGE, at_least, describe, make_optimizer, parse_args
from train import build_parser as build_train_parser

VARIANTS = {  # name: (net, precision, compiled)
    "torchvision": ("torchvision", "fp32", False),
    "plain": ("plain", "fp32", False),
    "efficient": ("efficient", "fp32", False),
    "plain, compile": ("plain", "fp32", True),
    "efficient, compile": ("efficient", "fp32", True),
    "torchvision, bf16": ("torchvision", "bf16", False),
    "plain, bf16": ("plain", "bf16", False),
    "efficient, bf16": ("efficient", "bf16", False),
    "plain, compile, bf16": ("plain", "bf16", True),
    "efficient, compile, bf16": ("efficient", "bf16", True),
}


def main():
    parser = build_parser()
    args = parser.parse_args()
    try:
        device = choose_device(args.device)
        layers_per_block(args.depth, bottleneck=True)
        if args.data:
            report, print_report = measure_pipeline(args, device), print_pipeline
        else:
            report, print_report = measure_steps(args, device), print_steps
    except ValueError as error:
        parser.error(str(error))
    print(f"{describe(device)}, torch {torch.__version__}, {args.rounds} rounds, batch {args.batch_size}\n")
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "hardware": describe(device), **report}, indent=2) + "\n")


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=USAGE)
    parser.add_argument("--depth", type=int, default=100, help="L of the DenseNet-BC (%(default)s)")
    parser.add_argument("--growth-rate", type=at_least(1), default=12, help="k (%(default)s)")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="(%(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="(%(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, metavar="VARIANT", default=list(VARIANTS), help=f"of {list(VARIANTS)}"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(%(default)s)")
    parser.add_argument("--data", metavar="DIR", help="measure the data pipeline on the CIFAR-10 in this folder instead")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to this file, too")
    return parser


# ----------------------------------------------------------------------------------------------------------- the variants


def make_net(kind, depth, growth_rate):
    """The DenseNet-BC for 32 x 32 images: ours, or torchvision's modules behind a 3x3 convolution."""
    net = DenseNet(growth_rate, depth, efficient=kind == "efficient")
    return torchvision_net(net) if kind == "torchvision" else net


def make_step(variant, args, device):
    """A function that takes one training step, and one that runs a forward pass only and returns the loss."""
    kind, precision, compiled = VARIANTS[variant]
    torch.manual_seed(0)
    net = make_net(kind, args.depth, args.growth_rate).to(device, memory_format=torch.channels_last)
    images = torch.randn(args.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (args.batch_size,), device=device)
    optimizer = make_optimizer(net, parse_args(build_train_parser(), []))
    model = torch.compile(net) if compiled else net

    def forward():
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            return F.cross_entropy(model(images), labels)

    def step():
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    return step, forward


# ------------------------------------------------------------------------------------------------------------- the figures


def measure_steps(args, device):
    """{variant: figures}; the variants' steps are interleaved."""
    report, steps = {}, {}
    for variant in args.only:
        step, forward = make_step(variant, args, device)
        step()  # warms up, compiles, and gives the optimiser its state
        kept, peak = kept_bytes(forward) / args.batch_size, peak_bytes(step) / args.batch_size
        report[variant] = {"kept_mb_per_image": kept / 1e6, "peak_mb_per_image": peak / 1e6}
        steps[variant] = step
    seconds = interleave(steps, args.rounds, device)
    for variant in args.only:
        report[variant]["images_per_second"] = [args.batch_size / s for s in seconds[variant]]
    return {"depth": args.depth, "growth_rate": args.growth_rate, "batch_size": args.batch_size, "variants": report}


def interleave(steps, rounds, device):
    """{name: seconds of each round}."""
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            wait_for(device)
            started = time.perf_counter()
            step()
            wait_for(device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def wait_for(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def kept_bytes(forward):
    """Bytes of all storages that autograd keeps after a forward pass, but for parameters."""
    kept = {}

    def pack(tensor):
        source = tensor if tensor._base is None else tensor._base  # a transposed weight is a weight
        if not (source.is_leaf and source.requires_grad):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss  # alive until here, so that no memory was used twice
    return sum(kept.values())


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
    print(f"{'':26}{'images/s':>16}{'ratio':>8}{'kept, MB/image':>16}{'peak, MB/image':>16}")
    for name, figures in variants.items():
        rates = figures["images_per_second"]
        ratio = f"{statistics.median(rates) / peer:8.2f}" if peer else f"{'':8}"
        memory = f"{figures['kept_mb_per_image']:16.2f}{figures['peak_mb_per_image']:16.2f}"
        print(f"{name:26}{statistics.median(rates):9.1f} ±{spread(rates):5.1f}{ratio}{memory}")


def spread(values):
    """Half the distance between the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


# ------------------------------------------------------------------------------------------------------------ the pipeline


def measure_pipeline(args, device, num_batches=40):
    """Images/s of batches that are normalised, cropped and flipped: by data.py, and by a DataLoader with 1 and 2 workers."""
    dataset = data.load("cifar10", args.data, device)
    generator = torch.Generator(device).manual_seed(0)
    sources = {
        "data.py": data.training_batches(dataset.train, args.batch_size, dataset.mean, dataset.std, True, generator),
        "DataLoader, 1 worker": data_loader(args, dataset, num_workers=1),
        "DataLoader, 2 workers": data_loader(args, dataset, num_workers=2),
    }
    report = {}
    for name, source in sources.items():  # one after the other: idle workers would still fill their queues
        batches = itertools.islice(source, 1 + args.rounds * num_batches)
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
