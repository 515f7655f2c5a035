#!/usr/bin/env python3
"""Images per second and memory of train.py's own training step, plain, --efficient, captured and compiled, as a Markdown table.

    ./bench.py                                         DenseNet-BC, L=100, k=12, batches of 64
    ./bench.py --no-bottleneck --depth 40 --opt adam   takes the flags of train.py that affect a step

Each variant runs in its own process. They take turns, round by round, on augmented batches of random images. A number is the
median, with quartiles in brackets. Memory is the most that PyTorch had allocated on the GPU, or the largest resident memory.
"""

import argparse
import contextlib
import functools
import multiprocessing
import resource
import shlex
import signal
import sys
import time
import traceback

import numpy as np
import torch
from tqdm import tqdm

import data
import endings
import flags
from distributed import World
from files import as_json, refuse_foreign, refuse_unwritable, replace_file
from machine import choose_device, device_name, keep_freed_memory, set_determinism, use_device
from step import TrainingStep

VARIANTS = ("plain", "efficient", "plain-captured", "efficient-captured", "plain-compiled", "efficient-compiled")
REMEDY = "a smaller --batch-size, a smaller net (--depth, --growth-rate) or fewer variants (--only)"  # if memory runs out


def main():
    parser = build_parser(__doc__, VARIANTS)
    args = flags.parse_args(parser)
    with endings.handle_errors(parser, flags.memory_needs(args), REMEDY):
        device = check_measurement(args)
        names = args.only or (VARIANTS if device.type == "cuda" else VARIANTS[:2])  # on a CPU neither captured nor compiled
        results = measure({n: functools.partial(make_step, variant_arguments(n, args), device) for n in names}, args, device)
        lines = [*table(results, args, device)]
        endings.say(*lines)
        write_report(args.json, {"table": lines, "variants": results})


def build_parser(text, variants):
    """The flags of a measurement, and those of train.py that affect a step."""
    parser = endings.make_parser(text, flags.USAGE)
    flags.add_model_flags(parser.add_argument_group("model"))
    flags.add_optimisation_flags(parser.add_argument_group("optimisation"))
    flags.add_machine_flags(parser.add_argument_group("machine; --compile is the mode of the compiled variants"))
    group = parser.add_argument_group("measurement")
    group.add_argument("--only", nargs="+", choices=variants, metavar="VARIANT", help=f"of {', '.join(variants)} (all)")
    group.add_argument("--rounds", type=endings.at_least(1), default=5, help="(%(default)s)")
    group.add_argument("--steps", type=endings.at_least(1), help="of a round (10; on a CPU 2)")
    group.add_argument("--image-size", metavar="N", type=flags.image_size, default=data.IMAGE_SIZE, help="(%(default)s)")
    group.add_argument("--json", metavar="FILE", type=endings.new_file, help="write the numbers of all rounds there, too")
    parser.set_defaults(dataset="folder", augment=True, save=None, compile="auto")  # a folder's images have any size
    return parser


def check_measurement(args):
    """Validates args; returns the device."""
    device = choose_device(args.device)
    args.steps = args.steps or (2 if device.type == "cpu" else 10)
    if args.efficient or args.capture:
        raise endings.Refused("--efficient and --capture are what variants differ in: choose them with --only")
    if args.sync_bn:
        raise endings.Refused("--sync-bn has no effect on one process, and a bench has no more: leave it out")
    if device.type != "cuda" and any("captured" in name for name in args.only or []):
        raise endings.Refused("captured variants need a CUDA GPU: leave them out of --only, or choose --device cuda")
    flags.fill_in(args, device)
    flags.refuse_contradictions(args, device)
    if args.json:
        refuse_foreign(args.json, rb'"(variants|images_per_second)"')
        refuse_unwritable(args.json)
    return device


def write_report(path, report):
    """Writes the file of --json, in a folder that may be new; None stands for no file."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, as_json(report))


def variant_arguments(name, args):
    compiled = (args.compile or "auto") if name.endswith("-compiled") else None
    ways = {"efficient": name.startswith("efficient"), "capture": name.endswith("-captured"), "compile": compiled}
    return argparse.Namespace(**vars(args) | ways)


def make_step(args, device, make=flags.make_net):
    """A function without arguments that takes one training step of train.py; `make` makes the net from args."""
    keep_freed_memory(device)
    set_determinism(args.deterministic)
    torch.manual_seed(args.seed)
    net = make(args).to(device, memory_format=torch.channels_last)
    step = TrainingStep(net, args, device, World())
    step.begin_epoch(args.lr)
    batches = random_batches(args, device)
    return lambda: step(*next(batches))


def random_batches(args, device):
    """Endless batches of random images and labels, drawn as train.py draws them."""
    shape = (16 * args.batch_size, 3, args.image_size, args.image_size)
    split = data.Split(torch.randint(256, shape, dtype=torch.uint8, device=device), torch.randint(10, shape[:1], device=device))
    dataset = data.Dataset(split, split, split, *torch.full((2, 3, 1, 1), 127.5, device=device), classes=[*"0123456789"])
    generator = torch.Generator(device).manual_seed(args.seed)
    while True:
        yield from data.training_batches(dataset, args.batch_size, args.augment, generator)


def measure(factories, args, device):
    """{name: its numbers}; each factory runs in its own process and returns a step, a function without arguments."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(worker(name, factory, device)) for name, factory in factories.items()]
        compiling = [each for each in workers if device.type == "cuda" and each[0].name.endswith("-compiled")]
        others = [[each] for each in workers if each not in compiling]
        for group in [compiling, *others]:  # compiling takes long: these do it at the same time, the others one by one
            take_steps(group, 5)  # warm-up, in which graphs are captured, and kernels compiled and tuned
        rounds = [[take_steps([each], args.steps)[0] for each in workers] for _ in tqdm(range(args.rounds), disable=None)]
    by_variant = zip(factories, zip(*rounds, strict=True), strict=True)
    return {name: {"ms_per_step": [ms for ms, _ in answers], "memory_gb": answers[-1][1]} for name, answers in by_variant}


@contextlib.contextmanager
def worker(name, factory, device):
    """Yields a process that takes as many steps as it is asked for, and the connection to ask it."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's heap
    connection, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, factory, device), name=name, daemon=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # is inherited: Ctrl-C is the parent's
    process.start()
    signal.signal(signal.SIGINT, before)
    theirs.close()
    try:
        yield process, connection
        connection.close()  # it ends by itself, and cleans up after torch.compile
        process.join(timeout=30)
    finally:
        process.terminate()  # it may be compiling, and not read the connection
        process.join()


def take_steps(workers, steps):
    """The answers of the workers, which take these steps at the same time."""
    for _, connection in workers:
        with contextlib.suppress(OSError):  # one that has ended does not answer either
            connection.send(steps)
    return [receive(process, connection) for process, connection in workers]


def receive(process, connection):
    """(ms/step, GB). Refused if the process was killed; an error in it is raised here."""
    try:
        answer = connection.recv()
    except (EOFError, OSError) as error:
        process.join()
        if process.exitcode >= 0:
            raise RuntimeError(f"{process.name}'s process has ended") from error
        raise endings.Refused(f"{process.name}'s process was killed: if memory ran out, choose {REMEDY}", status=1) from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def serve(connection, factory, device):
    """The process of a worker: makes its step when it is first asked, and answers until the connection is closed."""
    step = None
    with contextlib.suppress(EOFError, OSError):
        while steps := connection.recv():
            try:
                if step is None:
                    use_device(device)
                    step = factory()
                connection.send(measured(step, steps, device))
            except Exception as error:
                error.add_note(traceback.format_exc())  # which the parent shows if it is a bug
                connection.send(error)


def measured(step, steps, device):
    """(ms/step, the largest memory so far in GB)."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    getattr(torch, device.type).synchronize()
    ms = 1e3 * (time.perf_counter() - started) / steps
    if device.type == "cuda":
        return ms, torch.cuda.max_memory_allocated(device) / 1e9
    return ms, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def conditions(args, device):
    """The conditions of a measurement that do not depend on the net."""
    run = f"{args.precision}, batch {args.batch_size}, {args.rounds} x {args.steps} steps"
    return f"{run}, {device_name(device)}, torch {torch.__version__}"


def table(results, args, device):
    """Yields a heading and the lines of a Markdown table; the ratio is to the first row."""
    yield f"`{shlex.join(sys.argv)}`: L={args.depth}, k={args.growth_rate}, {conditions(args, device)}"
    yield from ("", "| | ms/step | images/s | ratio | memory, GB |", f"|{' --- |' * 5}")
    base = np.median(next(iter(results.values()))["ms_per_step"])
    for name, result in results.items():
        fast, ms, slow = np.quantile(result["ms_per_step"], [0.25, 0.5, 0.75])
        rate, low, high = (f"{1e3 * args.batch_size / t:,.1f}" for t in (ms, slow, fast))
        yield f"| {name} | {ms:,.1f} | {rate} ({low} to {high}) | {base / ms:.2f} | {result['memory_gb']:.2f} |"


if __name__ == "__main__":
    main()
