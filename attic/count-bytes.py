#!/usr/bin/env python3
"""Counts the bytes of a training step of our net and of torchvision's, on any machine; prints a Markdown table.

    attic/count-bytes.py                                      kept for the backward pass, and alive at once
    attic/count-bytes.py --on-cpu                             the same on a CPU, where --efficient works slice by slice
    attic/count-bytes.py --traffic --bandwidth 900 --rate 30  moved on a GPU, and the time that takes at 900 GB/s, 30 TFLOP/s

Kept bytes are those of all tensors that a forward pass leaves alive; the peak is the largest sum of all tensors alive at once
during a step. Moved bytes: each operation reads its inputs once and writes its results once. The floor takes for each launch
the longer of both times. The step is that of train.py, in fp32; --efficient is counted as PyTorch's own operations compute it,
not the kernels of kernels.py.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import flags
from attic.counting import META, NETS, kept_bytes, peak_bytes, step_on, traffic_of
from endings import Refused, at_least, handle_errors, make_parser


def main():
    parser = build_parser()
    args = flags.parse_args(parser)
    with handle_errors(parser, flags.memory_needs(args), "a smaller net (--depth, --growth-rate)"):
        if args.traffic and args.on_cpu:
            raise Refused("--traffic is what a GPU moves: leave out --on-cpu")
        with META:
            flags.make_net(args)  # Refused, if it is none
        print(f"L={args.depth}, k={args.growth_rate}, batch {args.batch_size}, {args.image_size} x {args.image_size}, fp32\n")
        print(*(moved_rows(args) if args.traffic else alive_rows(args)), sep="\n")


def build_parser():
    parser = make_parser(__doc__, flags.USAGE)
    parser.add_argument("--only", nargs="+", choices=NETS, metavar="NET", default=NETS, help=f"of {', '.join(NETS)} (all)")
    parser.add_argument("--image-size", metavar="N", type=flags.image_size, default=data.IMAGE_SIZE, help="(%(default)s)")
    parser.add_argument("--on-cpu", action="store_true", help="take the steps, on the CPU")
    parser.add_argument("--traffic", action="store_true", help="count what a step moves on a GPU instead")
    for flag, unit, default in [("--bandwidth", "GB/S", 1000), ("--rate", "TFLOP/S", 20)]:
        kind = at_least(1e-6, float)
        parser.add_argument(flag, metavar=unit, type=kind, default=default, help="for the floor of --traffic (%(default)s)")
    flags.add_model_flags(parser.add_argument_group("model"))
    flags.add_optimisation_flags(parser.add_argument_group("optimisation"))
    parser.set_defaults(dataset="folder", augment=True, save=None, sync_bn=False)  # a folder's images have any size
    return parser


def alive_rows(args):
    """The lines of the table of kept and peak bytes."""
    yield "| | kept for the backward pass, MB/image | peak, MB/image |\n| --- | --- | --- |"
    for name in args.only:
        step, forward = step_on(torch.device("cpu") if args.on_cpu else META, name, args)
        kept, peak = (size / args.batch_size / 1e6 for size in (kept_bytes(forward), peak_bytes(step)))
        yield f"| {name} | {kept:.1f} | {peak:.1f} |"


def moved_rows(args):
    """The lines of the table of what a step moves and computes."""
    yield f"| | GB/step | kernel launches | GFLOP | floor, ms at {args.bandwidth:g} GB/s or {args.rate:g} TFLOP/s |"
    yield "| --- | --- | --- | --- | --- |"
    for name in args.only:
        launches = traffic_of(step_on(META, name, args)[0])
        floor = sum(max(size / args.bandwidth / 1e9, flops / args.rate / 1e12) for size, flops in launches)
        moved, computed = (sum(column) / 1e9 for column in zip(*launches, strict=True))
        yield f"| {name} | {moved:.1f} | {len(launches)} | {computed:.1f} | {1e3 * floor:.1f} |"


if __name__ == "__main__":
    main()
