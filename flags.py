"""The flags that several programs share, and their defaults, each stated once; which of them need less memory."""

import argparse
import json
import math
import sys
from inspect import signature
from pathlib import Path

import torch

from data import IMAGE_SIZE, SOURCES
from dense_block import triton_runs
from densenet import ArgumentError, DenseNet
from endings import LARGER, Refused, at_least, nonempty
from files import THEN
from machine import DTYPES, default_precision

USAGE = "%(prog)s [options], which --help lists"
FILLED_IN = {"precision", "capture", "efficient"}  # by fill_in, for the device
NOT_TAKEN_OVER = {"help", "save", "resume", "force", "capture", "efficient"}  # from args.json; for the last two see fill_in
SGD = {"momentum": 0.9, "nesterov": True}  # defaults of the flags that sgd alone has
MAX_SIZE = 10**4  # largest --depth, --growth-rate and --init-channels

# Defaults that differ from CIFAR's: svhn as in the paper; digits must not be mirrored.
PROTOCOLS = {"svhn": dict(epochs=40, augment=False, val=6000), "digits": dict(augment=False)}


def add_data_flags(group):
    add, switch = group.add_argument, argparse.BooleanOptionalAction
    add("--dataset", choices=sorted(SOURCES), default="cifar10", help="(%(default)s)")
    add("--data", metavar="DIR", type=nonempty(str), default="data", help="its folder; downloaded if missing (%(default)s)")
    add("--augment", action=switch, default=True, help="random crop and flip (yes; no for svhn and digits)")
    add("--val", metavar="N", type=at_least(0), default=0, help="hold out N training images (0; 6000 for svhn)")
    add("--limit", metavar="N", type=at_least(1), help="train on the first N images only")
    sizes = f"N x N, N a multiple of 4, at least 8 ({IMAGE_SIZE}, or what the net of --init has)"
    add("--image-size", metavar="N", type=image_size, default=IMAGE_SIZE, help=f"a folder's pictures become {sizes}")


def add_model_flags(group, depth=100):
    add, switch = group.add_argument, argparse.BooleanOptionalAction
    size = at_least(-math.inf, high=MAX_SIZE)  # DenseNet refuses what is too small
    add("--depth", type=size, default=depth, help="L, the layers with weights (%(default)s)")
    add("--growth-rate", type=size, default=12, help="k, the feature maps that a layer adds (%(default)s)")
    add("--reduction", type=float, help="fraction of the channels a transition keeps (0.5; plain net 1.0)")
    add("--bottleneck", action=switch, default=True, help="the layers of DenseNet-BC (yes), or those of the plain DenseNet")
    add("--drop-rate", type=float, help="dropout (0 with augmentation, else 0.2)")
    add("--init-channels", type=size, help="output channels of the first convolution (2k; plain net 16)")
    add("--efficient", action=switch, help="dense blocks in linear memory (yes on a GPU with k <= 12, no dropout, no fp32)")


def add_optimisation_flags(group):
    add, number, switch = group.add_argument, at_least(0, float), argparse.BooleanOptionalAction
    add("--epochs", "--nEpochs", type=at_least(1, high=10**5), default=300, help="(%(default)s; 40 for svhn)")
    add("--batch-size", "--batchSz", type=at_least(1), default=64, help="(%(default)s)")
    add("--opt", choices=["sgd", "adam", "rmsprop"], default="sgd", help="(%(default)s)")
    add("--lr", type=number, help="sgd: 0.1, divided by 10 at 1/2 and 3/4 of the epochs; else PyTorch's default, constant")
    add("--momentum", type=at_least(0, float, high=1), default=SGD["momentum"], help="of sgd (%(default)s)")
    add("--weight-decay", type=number, default=1e-4, help="on all parameters (%(default)s)")
    add("--nesterov", action=switch, default=SGD["nesterov"], help="Nesterov momentum, for sgd (yes)")
    add("--seed", type=at_least(0, high=2**64 - 1), default=1, help="(%(default)s)")
    add("--deterministic", action=switch, default=False, help="only deterministic kernels: slower on a GPU, repeatable")


def add_machine_flags(group):
    add, switch, modes = group.add_argument, argparse.BooleanOptionalAction, ["auto", "default", "reduce-overhead", "none"]
    add_device_flag(group)
    add("--no-cuda", dest="device", action="store_const", const="cpu", help="the same as --device cpu")
    add("--precision", choices=[*DTYPES], help="of matrix products; bf16, fp16: autocast (tf32 if the GPU has it, else fp32)")
    add("--compile", choices=modes, nargs="?", const="auto", help="torch.compile; auto: reduce-overhead on a GPU, else default")
    add("--capture", action=switch, help="replay both passes as one CUDA graph (yes on a GPU with one process, no --compile)")
    add("--sync-bn", action=switch, default=False, help="under torchrun: batch statistics over all processes")


def add_device_flag(group):
    group.add_argument("--device", type=nonempty(str), default="auto", help="auto, cpu, cuda, cuda:N or mps (%(default)s)")


def add_run_flags(group):
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--save", metavar="DIR", type=nonempty(Path), help="the run's folder (work/<dataset>.base)")
    either("--resume", action="store_true", help="continue the run in the folder, with its args.json, or start one there")
    either("--force", action="store_true", help="replace the run that the folder holds")
    add("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw figures after each epoch")


def image_size(text):
    """An argparse type: a multiple of 4, at least 8."""
    size = at_least(8)(text)
    if size % 4:
        below = size - size % 4
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 4: the nearest are {below} and {below + 4}")
    return size


def parse_args(parser, argv=None, defaults=None, source=None, remedy=None):
    """The arguments, with the defaults that depend on the data set or on another argument filled in.

    Those not given are taken from `defaults`, the arguments in the file `source`, except NOT_TAKEN_OVER. Refused, with the
    remedy, if a flag does not take its value there.
    """
    given = parser.parse_args(argv)
    words = words_taken_over(parser, defaults or {}, source, remedy)
    words += sys.argv[1:] if argv is None else argv
    protocol = PROTOCOLS.get(parser.parse_args(words).dataset, {})
    args = parser.parse_args(words_of(protocol, parser) + words)  # of two words for one argument, the last counts
    if args.opt != "sgd" and any(getattr(given, name) != value for name, value in SGD.items()):
        parser.error(f"--momentum and --no-nesterov are for sgd only: leave them out with --opt {args.opt}")
    if vars(args).get("compile") == "none":
        args.compile = None
    if args.drop_rate is None:
        args.drop_rate = 0.0 if args.augment else 0.2
    if args.lr is None and args.opt == "sgd":
        args.lr = 0.1
    if args.save is None:
        args.save = Path("work", f"{args.dataset}.base")
    return args


def words_taken_over(parser, defaults, source, remedy):
    """The parser's arguments that `defaults` holds, as a command line. Refused if the parser does not accept it."""
    names = {action.dest for action in parser._actions} - NOT_TAKEN_OVER
    words = words_of({name: defaults[name] for name in sorted(names & defaults.keys()) if defaults[name] is not None}, parser)
    parser.exit_on_error = False
    try:
        _, unknown = parser.parse_known_args(words)
        if unknown:
            raise argparse.ArgumentError(None, f"no flag is {unknown[0]}")
    except argparse.ArgumentError as error:
        raise Refused(f"{source} is damaged, or from another version of this program ({error}): {remedy}") from error
    parser.exit_on_error = True
    return words


def words_of(arguments, parser):
    """{argument: value} as the words of a command line."""
    actions = {action.dest: action for action in reversed(parser._actions)}  # of several flags for one argument, the first
    return [word for name, value in arguments.items() for word in words_for(actions[name], value)]


def words_for(action, value):
    """The words that give an argument this value: a switch, a constant, a list or a single value."""
    flag = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        switch = flag if value else f"--no-{flag.removeprefix('--')}"
        return [switch] if isinstance(value, bool) else [f"{flag}={value}"]  # the parser refuses what is not a bool
    if action.nargs == 0 and value in (action.const, action.default):  # store_true, say
        return [flag] * (value == action.const)
    if action.nargs and isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]


def model_arguments(args):
    """The keyword arguments of DenseNet, except num_classes: each has the value of the flag of its name."""
    return {name: getattr(args, name) for name in signature(DenseNet).parameters if name != "num_classes"}


def make_net(args, num_classes=10):
    """The DenseNet of the model flags. Refused if they do not make one."""
    try:
        return DenseNet(**model_arguments(args), num_classes=num_classes)
    except ArgumentError as error:
        raise Refused(str(error)) from error


def fill_in(args, device, processes=1, old_args=None):
    """Sets --precision, --capture and --efficient where they are not given: TF32 if the device has it, and the fastest steps.

    A continued run keeps its --capture and --efficient if it was begun on the same kind of device (CPU or GPU).
    """
    args.precision = args.precision or default_precision(device)
    had = old_args or {}
    if str(had.get("hardware")).split(THEN)[-1].startswith("cpu") != (device.type == "cpu"):
        had = {}
    alone = device.type == "cuda" and torch.version.hip is None and processes == 1 and not args.compile
    if args.capture is None:
        args.capture = alone and had.get("capture", True)
    if args.efficient is None:
        args.efficient = had.get("efficient")
    if args.efficient is None:
        kernels = args.bottleneck and not args.drop_rate and args.growth_rate <= 12 and args.precision != "fp32"
        args.efficient = bool(alone and args.capture and kernels and not args.sync_bn and triton_runs(device))


def refuse_contradictions(args, device, processes=1):
    """Refused if the arguments, filled in, contradict each other or the machine; before anything is downloaded or written."""
    if args.image_size != IMAGE_SIZE and args.dataset != "folder":
        raise Refused(f"--image-size is for --dataset folder: the images of {args.dataset} have a fixed size, leave it out")
    if args.depth is not None:  # the control experiment has a net of its own
        with torch.device("meta"):
            make_net(args)
    if args.sync_bn and args.efficient:
        raise Refused("--sync-bn cannot be combined with --efficient, whose statistics are of one process: choose one of them")
    if args.precision == "fp16" and device.type == "cpu":
        raise Refused("--precision fp16 needs a GPU: on a CPU choose bf16 or fp32")
    if args.capture and (device.type != "cuda" or processes > 1 or args.compile):
        raise Refused("--capture needs a CUDA GPU, a single process and no --compile: leave it out")


def memory_needs(args):
    """What a training step needs memory for."""
    if args.depth is None:  # the control experiment has another net
        return f"batches of {args.batch_size}"
    return f"batches of {args.batch_size} and a net of L={args.depth}, k={args.growth_rate}"


def memory_advice(args, device, fresh):
    """(what a run needs memory for, what needs less); a run that is continued, not fresh, keeps its batches and its net."""
    densenet = args.depth is not None
    remedies = {
        "--efficient": densenet and not args.efficient,
        "--precision bf16": fresh and device.type == "cuda" and args.precision in ("fp32", "tf32"),
        "--no-capture": args.capture,
        "a smaller --batch-size": fresh and args.batch_size > 1,
        "a smaller net (--depth, --growth-rate)": fresh and densenet,
        "fewer images (--limit)": fresh,
        LARGER: not fresh,
    }
    return memory_needs(args), " or ".join(remedy for remedy, helps in remedies.items() if helps)


def advice_for_test(args):
    """As memory_advice, for the test after an epoch, whose batches do not depend on --batch-size."""
    capture = ", --no-capture" * args.capture  # a captured step keeps its memory
    return "the test after an epoch", f"a smaller net (--depth, --growth-rate){capture} or {LARGER}"


def plain_arguments(args):
    """The arguments as JSON and a checkpoint can hold them."""
    return json.loads(json.dumps(vars(args), default=str))
