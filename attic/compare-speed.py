#!/usr/bin/env python3
"""Times train.py's own training step beside torchvision's DenseNet; prints a Markdown table as bench.py does.

    attic/compare-speed.py                        DenseNet-BC, L=100, k=12, batches of 64
    attic/compare-speed.py --depths 40 100 160 250 --only plain efficient --json report.json     one table for each depth
    attic/compare-speed.py --data data            batches of the real CIFAR-10, by data.py and by torchvision's DataLoader

torchvision is their net trained with PyTorch's defaults; torchvision-our-settings is the same net trained by train.py's step;
torchvision-checkpointed recomputes concatenations and activations in the backward pass. The report of --json also holds the
counted peak bytes of each net, if it is trained in fp32 or tf32.
"""

import argparse
import functools
import itertools
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms as transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench
import data
import endings
import flags
from attic.counting import META, net_of, peak_bytes, step_on
from machine import DTYPES, device_name, set_precision

# Whether it is train.py's step, and the name of the net in attic/counting.py.
VARIANTS = {
    "torchvision": (False, "torchvision"),
    "torchvision-checkpointed": (False, "torchvision-checkpointed"),
    "torchvision-our-settings": (True, "torchvision"),
    "plain": (True, "plain"),
    "efficient": (True, "efficient"),
    "torchvision-our-settings-compiled": (True, "torchvision"),
    "plain-compiled": (True, "plain"),
    "efficient-compiled": (True, "efficient"),
    "plain-captured": (True, "plain"),
    "efficient-captured": (True, "efficient"),
}
ON_GPUS = ("-compiled", "-captured")  # variants that are measured on a CPU only when asked for, or never


def main():
    parser = build_parser()
    args = flags.parse_args(parser)
    with endings.handle_errors(parser, flags.memory_needs(args), bench.REMEDY):
        args.steps = args.steps or (40 if args.data else None)
        device = bench.check_measurement(args)
        report = measure_pipeline(args, device) if args.data else measure_depths(args, device)
        bench.write_report(args.json, report)


def build_parser():
    parser = bench.build_parser(__doc__, VARIANTS)
    add, depth = parser.add_argument, endings.at_least(0, high=flags.MAX_SIZE)
    add("--depths", nargs="+", metavar="L", type=depth, help="instead of --depth")
    add("--data", metavar="DIR", type=endings.nonempty(str), help="time batches of the CIFAR-10 in this folder instead")
    return parser


# ------------------------------------------------------------------------------------------------------------- the steps


def measure_depths(args, device):
    """Prints a table for each depth; returns the report."""
    of_depth = {depth: argparse.Namespace(**vars(args) | {"depth": depth}) for depth in args.depths or [args.depth]}
    for settings in of_depth.values():  # before anything is measured, which takes long
        bench.check_measurement(settings)
    report = {"growth_rate": args.growth_rate, "batch_size": args.batch_size}
    report |= {"conditions": bench.conditions(args, device), "depths": {}}
    for depth, settings in of_depth.items():
        names = args.only or [name for name in VARIANTS if device.type == "cuda" or not name.endswith(ON_GPUS)]
        factories = {name: functools.partial(make_step, name, settings, device) for name in names}
        results = bench.measure(factories, settings, device)
        print(*bench.table(results, settings, device), "", sep="\n", flush=True)
        report["depths"][depth] = {"variants": with_peaks(results, settings, device)}
    return report


def make_step(name, args, device):
    by_train, net = VARIANTS[name]
    if not by_train:
        return step_of_pytorch(net_of(net, args).to(device), args, device)
    return bench.make_step(bench.variant_arguments(name, args), device, functools.partial(net_of, net))


def step_of_pytorch(net, args, device):
    """A training step with PyTorch's defaults, apart from the precision."""
    set_precision(args.precision)
    dtype = DTYPES[args.precision]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    batches = bench.random_batches(args, device)

    def step():
        images, labels, _ = next(batches)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(net(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def with_peaks(results, args, device):
    """The results, with the counted peak bytes per image where they can be counted: in float32, step by step."""
    where = device if device.type == "cpu" else META
    counted = [name for name in results if DTYPES[args.precision] is torch.float32 and not name.endswith(ON_GPUS)]
    peaks = {name: peak_bytes(step_on(where, VARIANTS[name][1], args)[0]) / args.batch_size / 1e6 for name in counted}
    return {name: result | {"peak_mb_per_image": peaks.get(name)} for name, result in results.items()}


# ---------------------------------------------------------------------------------------------------------- the pipeline


def measure_pipeline(args, device):
    """Prints a table of images/s; returns the report."""
    rates = pipeline_rates(args, data.load("cifar10", args.data).to(device))
    base = statistics.median(rates["DataLoader, 1 worker"])
    batches = f"{args.rounds} x {args.steps} batches of {args.batch_size}"
    print(f"{batches}, {device_name(device)}, torch {torch.__version__}\n")
    print("| | images/s | ratio |\n| --- | --- | --- |")
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"| {name} | {rate:,.0f} ({min(values):,.0f} to {max(values):,.0f}) | {rate / base:.1f} |")
    return {"images_per_second": rates}


def pipeline_rates(args, dataset):
    """{source: images/s of each round} of batches that are normalised, cropped and flipped."""
    generator = torch.Generator(dataset.mean.device).manual_seed(args.seed)
    sources = {  # each gives the batches of an epoch when it is called
        "data.py": functools.partial(data.training_batches, dataset, args.batch_size, True, generator),
        "DataLoader, 1 worker": data_loader(args, dataset, num_workers=1).__iter__,
        "DataLoader, 2 workers": data_loader(args, dataset, num_workers=2).__iter__,
    }
    rates = {}
    for name, epoch in sources.items():  # one after the other: idle workers would still fill their queues
        batches = itertools.chain.from_iterable(epoch() for _ in itertools.count())
        next(batches)
        draw = functools.partial(next, batches)
        times = [bench.measured(draw, args.steps, dataset.mean.device)[0] for _ in range(args.rounds)]
        rates[name] = [1e3 * args.batch_size / ms for ms in times]
    return rates


def data_loader(args, dataset, num_workers):
    """The usual pipeline: torchvision's data set, its transforms image by image, and worker processes."""
    mean, std = ((values.flatten().cpu() / 255).tolist() for values in (dataset.mean, dataset.std))
    steps = [transforms.ToTensor(), transforms.Normalize(mean, std), transforms.RandomCrop(32, padding=4)]
    transform = transforms.Compose([*steps, transforms.RandomHorizontalFlip()])
    images = torchvision.datasets.CIFAR10(args.data, train=True, transform=transform)
    return torch.utils.data.DataLoader(images, args.batch_size, shuffle=True, num_workers=num_workers)


if __name__ == "__main__":
    main()
