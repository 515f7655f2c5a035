#!/usr/bin/env python3
"""The control experiment: a VGG-style net with batch norm, trained by the same functions as DenseNet in train.py.

    attic/train-vgg.py                            CIFAR-10 with augmentation, downloaded to data/, into work/vgg
    attic/train-vgg.py --dataset digits --epochs 3

If this net converges and DenseNet does not, the model is at fault, or what only the model uses; if neither does, the training
code is. The net is small enough for a CPU: the first command ends at 11.25 % test error after 20 epochs, 57 minutes of training
steps on 2 cores of a server CPU that other work shared (torch 2.14.1, seed 1). Exit status 1 if CIFAR-10 ends above 12 %.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import endings
import flags
import run_folder
import train
from densenet import init_weights
from distributed import World
from machine import choose_device, keep_freed_memory, set_determinism

# Output channels of the convolutions, and the poolings.
PLAN = [32, "pool", 64, 64, 64, "pool", 128, 128, 128, "pool", 256, 256]
BOUND = 12.0  # test error on CIFAR-10 in percent


def main():
    parser = build_parser()
    args = flags.parse_args(parser)
    with endings.handle_errors(parser, "the net and its images", endings.LARGER) as ending:
        args, old_args = train.resumed_arguments(parser, args, World())
        device = choose_device(args.device)
        flags.fill_in(args, device, old_args=old_args)
        flags.refuse_contradictions(args, device)
        run_folder.compare_arguments(old_args, flags.plain_arguments(args))
        fresh = run_folder.is_fresh(args.save, args.resume)
        ending.needs, ending.remedy = flags.memory_advice(args, device, fresh)
        keep_freed_memory(device)
        set_determinism(args.deterministic)
        dataset = train.load_data(args, device, World())
        torch.manual_seed(args.seed)
        net = vgg(PLAN, num_classes=len(dataset.classes)).to(device, memory_format=torch.channels_last)
        train.run(net, dataset, args, World(), ending, fresh)
        sys.exit(print_verdict(args))


def build_parser():
    """The flags of train.py, except the model's, with defaults for a run that ends within an hour on two cores."""
    parser = endings.make_parser(__doc__, flags.USAGE)
    flags.add_data_flags(parser.add_argument_group("data"))
    flags.add_optimisation_flags(parser.add_argument_group("optimisation"))
    flags.add_machine_flags(parser.add_argument_group("machine"))
    flags.add_run_flags(parser.add_argument_group("run"))
    parser.set_defaults(**no_model_flags(), epochs=20, lr=0.05, weight_decay=5e-4, save=Path("work", "vgg"))
    return parser


def no_model_flags():
    """The model flags of train.py, unset: they are written into args.json and the checkpoint, and a VGG has none of them."""
    parser = argparse.ArgumentParser()
    flags.add_model_flags(parser)
    return {**dict.fromkeys(["init", *vars(parser.parse_args([]))]), "drop_rate": 0.0}


def print_verdict(args):
    """Prints the verdict; returns the exit status: 1 if the whole of CIFAR-10 was used, and not learned well enough."""
    error = float(run_folder.last_row(args.save / "test.csv")["error"])
    if args.dataset != "cifar10" or args.limit:
        print(f"test error {error:.2f} %; the verdict is for the whole of cifar10 only")
        return 0
    learned = error < BOUND
    print(f"test error {error:.2f} %, bound {BOUND:g} %: the training code {'works' if learned else 'does NOT work'}")
    return int(not learned)


def vgg(plan, num_classes):
    """Conv3x3-BN-ReLU and max poolings by plan, then global average pooling and a linear classifier."""
    layers, channels = [], 3
    for entry in plan:
        if entry == "pool":
            layers.append(nn.MaxPool2d(kernel_size=2))
        else:
            conv = nn.Conv2d(channels, entry, kernel_size=3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(entry), nn.ReLU()]
            channels = entry
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    return net.apply(init_weights)


if __name__ == "__main__":
    main()
