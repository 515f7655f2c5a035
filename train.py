#!/usr/bin/env python3
"""Trains DenseNet and DenseNet-BC by the protocol of the paper; a run is a folder with its CSVs, figures and checkpoint.

    ./train.py                                                  DenseNet-BC, L=100, k=12, CIFAR-10 with augmentation, 300 epochs
    ./train.py --no-bottleneck --depth 40 --no-augment          the plain DenseNet, L=40, k=12, without augmentation
    ./train.py --dataset digits --depth 22 --drop-rate 0        a small net on a data set that needs no download
    ./train.py --init net.pth --lr 0.01 --epochs 10             fine-tune a trained net, also for other classes
    ./train.py --save work/run --resume                         continue a run, with the arguments in its args.json

work/<dataset>.base, or --save DIR, then holds: args.json (arguments, versions, device), train.csv (a row for each step),
test.csv (a row for each epoch), latest.pth (the checkpoint) and loss.png, error.png, loss-error.png.
"""

import contextlib
import os
import random
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from setproctitle import setproctitle
from tqdm import tqdm

import data
import distributed
import endings
import flags
import run_folder
from checkpoint import build_net, checkpoint_in, digest, image_size_of, load_checkpoint, make_card, make_checkpoint, restore
from endings import Refused, Stopped, say
from files import writable
from folder import describe_classes, leaks, refuse_among_pictures
from machine import choose_device, device_name, keep_freed_memory, set_determinism
from metrics import loss_and_error_sums, predict
from progress import progress
from step import TrainingStep, make_optimizer, schedule

GROUP_STEPS = 20  # steps between two writes to train.csv; each write waits for the GPU
MAX_LOSS = 1e4  # of a step; beyond it, training has diverged


def main():
    parser = build_parser()
    args = flags.parse_args(parser)
    with endings.handle_errors(parser, "the net and its images", endings.LARGER) as ending:
        world = distributed.read_world(os.environ)
        args, old_args = resumed_arguments(parser, args, world)
        with distributed.process_group(world, choose_device(args.device, world.size), ending) as device:
            distributed.check_equal(sys.argv[1:], world, "the command lines")
            fresh = run_folder.is_fresh(args.save, args.resume)
            start = starting_point(parser, args, old_args, fresh) if world.rank == 0 else None
            args, old_args, init = distributed.broadcast_object(start, world)  # another machine may lack the files
            flags.fill_in(args, device, world.size, old_args)
            run_folder.compare_arguments(old_args, flags.plain_arguments(args))
            flags.refuse_contradictions(args, device, world.size)
            ending.needs, ending.remedy = flags.memory_advice(args, device, fresh)
            keep_freed_memory(device)
            set_determinism(args.deterministic)
            dataset = load_data(args, device, world)
            net = initial_net(args, dataset.classes, init, quiet=world.rank > 0)
            net = net.to(device, memory_format=torch.channels_last)
            run(net, dataset, args, world, ending, fresh)


def build_parser():
    parser = endings.make_parser(__doc__, flags.USAGE, allow_abbrev=False)
    flags.add_data_flags(parser.add_argument_group("data"))
    model_group = parser.add_argument_group("model")
    flags.add_model_flags(model_group)
    text = "start from this net, which sets the shapes: a run, or a file of evaluate.py --export"
    model_group.add_argument("--init", metavar="DIR|FILE", type=endings.nonempty(str), help=text)
    flags.add_optimisation_flags(parser.add_argument_group("optimisation"))
    flags.add_machine_flags(parser.add_argument_group("machine"))
    flags.add_run_flags(parser.add_argument_group("run"))
    return parser


def resumed_arguments(parser, args, world):
    """(args, the run's args.json or {}); with --resume, arguments that are not given are taken from it.

    Flags that the run's version did not have are added with their defaults, so that another value counts as a change.
    """
    if args.force and world.max_restarts:
        ways = "remove the old run and choose --resume, or leave out --max-restarts"
        raise Refused(f"--force would start the run over after each restart by torchrun: {ways}")
    run_folder.refuse_to_replace(args.save, args.resume, args.force)
    old_args = run_folder.read_arguments(args.save) if args.resume else {}
    args = flags.parse_args(parser, defaults=old_args, source=args.save / "args.json", remedy=run_folder.REMEDY)
    if old_args:
        complete = flags.plain_arguments(flags.parse_args(parser, [], old_args))
        old_args = {name: complete[name] for name in complete.keys() - flags.FILLED_IN} | old_args
    return args, old_args


def starting_point(parser, args, old_args, fresh):
    """(args, old_args, the net of --init or None); a run that continues, not fresh, needs no --init.

    Refused, before any data are read, if a fresh run's folder is not writable, or its figures would be read as data.
    """
    if fresh and not writable(args.save):
        raise Refused(f"--save {args.save} is not a writable folder: choose another")
    if fresh and args.dataset == "folder":
        refuse_among_pictures(args.save, args.data)
    if args.resume and not old_args:
        say(f"{args.save} holds no run yet: starting one")
    args, init = read_init(parser, args, old_args) if args.init and fresh else (args, None)
    if init:  # the file may be replaced by another net
        args.init_digest = digest(init["net"])
    elif old_args.get("init_digest") and args.init != old_args["init"]:  # the net may have been moved
        known = load_checkpoint(checkpoint_in(Path(args.init)), "leave out --init, which the run no longer needs")
        args.init_digest = digest(build_net(known).state_dict())
    elif "init_digest" in old_args:
        args.init_digest = old_args["init_digest"]
    return args, old_args, init


def read_init(parser, args, old_args):
    """(args, the net of --init). The net sets model flags not given, except --drop-rate; for a folder, --image-size as well."""
    path = checkpoint_in(Path(args.init))
    if args.force and path.resolve() in [(args.save / name).resolve() for name in run_folder.FILES]:
        raise Refused(f"--force would delete --init {args.init}, a file of the run in {args.save}: choose another --save")
    needed = "put it back, --init needs it until the run has a checkpoint"
    init = load_checkpoint(path, needed if old_args else "name a run, or a file of evaluate.py --export")
    net = build_net(init)
    known = {name: value for name, value in init["model"].items() if name != "drop_rate"}
    if args.dataset == "folder":
        known["image_size"] = max(8, image_size_of(init) // 4 * 4)  # as the flag requires; other data may have any size
    args = flags.parse_args(parser, defaults=known | old_args, source=f"--init {args.init}", remedy="name another")
    refuse_another_net(args, net.architecture)
    return args, {"net": net.state_dict(), "classes": init["classes"]}  # in float32, whatever the file's dtype


def refuse_another_net(args, trained):
    """Refused if the model flags make a net of other shapes than that of --init; the classifier may differ."""
    with torch.device("meta"):
        ours = flags.make_net(args).architecture
    words = flags.words_of({name: trained[name] for name in ours if trained[name] != ours[name]}, build_parser())
    if words:
        ways = f"leave these flags out, or give {' '.join(words)}"
        raise Refused(f"--init {args.init} holds a different net from that of the model flags: {ways}")


def load_data(args, device, world):
    """The data set on the device; on each machine one process downloads it first. Sets args.digests."""
    with distributed.first_rank_first(world):
        dataset = data.load(args.dataset, args.data, args.val, args.limit, args.image_size, quiet=world.rank > 0)
    args.digests = dataset.digests()
    distributed.check_equal((args.digests, dataset.classes), world, f"the images or classes in --data {args.data}")
    distributed.check_batches(world, args.batch_size, len(dataset.train))
    return dataset.to(device)


def initial_net(args, classes, init, quiet=False):
    """The net that the run begins with: initialised from --seed, or that of --init, with a new classifier if classes differ.

    A run that continues has no init here, and loads its own net later: code that freezes layers must look at args.init.
    """
    torch.manual_seed(args.seed)
    net = flags.make_net(args, len(classes))
    if init and init["classes"] == classes:
        net.load_state_dict(init["net"])
    elif init:
        classifier = {f"fc.{name}": value for name, value in net.fc.state_dict().items()}
        net.load_state_dict({**init["net"], **classifier})
        if not quiet:
            say(f"--init {args.init}: a new classifier, because that net has other classes; the rest is loaded")
    return net


def run(net, dataset, args, world, ending, fresh):
    """Begins the run in its folder, or continues it, and trains to the end."""
    with run_folder.locked(args.save) if world.rank == 0 else contextlib.nullcontext() as unmoved:
        checkpoint = open_run(net, dataset, args, world, fresh) if world.rank == 0 else None
        checkpoint = distributed.broadcast_object(checkpoint, world)
        ending.resume, ending.silent = endings.resume_command(world.size), world.rank > 0
        if world.rank == 0:
            say(*opening_lines(net, dataset, args, checkpoint))
        fit(net, dataset, args, world, checkpoint, unmoved)
        if world.rank == 0:
            say(*closing_lines(args))


def open_run(net, dataset, args, world, fresh):
    """Begins the run, or continues it with --resume. Returns the checkpoint to continue from, or None."""
    run_folder.refuse_to_replace(args.save, args.resume, args.force)  # again: another process may have had the folder
    if fresh != run_folder.is_fresh(args.save, args.resume):
        raise Refused(f"another process has changed {args.save} in the meantime: start again")
    facts = {**flags.plain_arguments(args), "torch": torch.__version__, "hardware": device_name(dataset.mean.device)}
    facts |= {"commit": run_folder.git_commit(), "processes": world.size}
    facts |= {"train_images": len(dataset.train), "classes": dataset.classes, "data": os.path.abspath(args.data)}
    checkpoint = None
    if args.resume:
        old_args = run_folder.read_arguments(args.save)
        optimizer = make_optimizer(net, args)  # the step makes its own
        checkpoint = run_folder.resume(args.save, old_args, facts, net, optimizer, schedule(args))
    if checkpoint is None:
        run_folder.begin(args.save, facts)
    return checkpoint


def opening_lines(net, dataset, args, checkpoint):
    """Lines on the net, its data, device and folder; on the classes and leaks of pictures; on where a resumed run continues."""
    name = ("DenseNet-BC" if args.bottleneck else "DenseNet") + f", L={args.depth}, k={args.growth_rate}"
    name += f", dropout {args.drop_rate:g}" if args.drop_rate else ""
    yield f"{name if args.depth else type(net).__name__}, {sum(p.numel() for p in net.parameters()):,} parameters"
    parts = {"training": dataset.train, "held-out": dataset.val, "test": dataset.test}
    images = ", ".join(f"{len(split):,} {part}" for part, split in parts.items() if split)
    ways = [args.precision, *(name for name in ("capture", "compile", "efficient") if getattr(args, name))]
    yield f"{args.dataset} ({images} images), {device_name(dataset.mean.device)}, {', '.join(ways)}, {args.save}"
    if args.dataset == "folder":
        yield from describe_classes(dataset.classes, dataset.train.labels, dataset.test.labels)
        if checkpoint is None:
            yield from leaks(dataset.train.images, {name: parts[name].images for name in ("held-out", "test")})
    if args.resume:
        epochs_done = checkpoint["epoch"] if checkpoint else 0
        where = f"continuing after epoch {epochs_done}" if epochs_done else "from the start"
        yield f"{args.save} is complete" if epochs_done == args.epochs else f"{args.save}: {where}"


def closing_lines(args):
    """The final errors, and what the run's folder holds."""
    last = run_folder.last_row(args.save / "test.csv")
    parts = {"val": "val_error", "test": "error"}
    errors = [f"{part} error {float(last[column]):.2f} %" for part, column in parts.items() if column in last]
    yield f"{', '.join(errors)} after epoch {args.epochs}"
    yield f"{args.save} has {', '.join(name for name in run_folder.FILES if (args.save / name).is_file())}"


def fit(net, dataset, args, world, checkpoint, unmoved):
    """The training loop: trains, tests, saves and plots each epoch, starting after the checkpoint."""
    stop = endings.StopSignals()
    setproctitle(str(args.save).encode(errors="replace").decode())  # it takes UTF-8 only
    step = TrainingStep(net, args, dataset.mean.device, world)
    first_epoch = restore(checkpoint, net, step.optimizer, step.scaler)
    rates = schedule(args)
    card = make_card(flags.model_arguments(args), flags.plain_arguments(args), dataset)
    if args.init and not checkpoint and world.rank == 0:  # from here on, the file of --init may be deleted
        with unmoved():
            run_folder.write_checkpoint(args.save, make_checkpoint(net, step.optimizer, step.scaler, 0, card))
    plots = run_folder.Plots(args.save, args.plot and world.rank == 0)
    extent = {"initial": first_epoch * len(dataset.train), "total": args.epochs * len(dataset.train)}
    shown = world.rank == 0 and first_epoch < args.epochs
    with stop, progress(shown=shown, **extent, unit=" images", unit_scale=True) as bar:
        for epoch in range(first_epoch, args.epochs):
            started = time.perf_counter()
            rate = step.begin_epoch(rates[epoch])
            bar.set_description_str(f"epoch {epoch + 1}, lr {rate:g}", refresh=False)
            log = EpochLog(args, epoch, len(dataset.train), world, unmoved)
            for images, labels, share in epoch_batches(dataset, epoch, args, world):
                log.add(step(images, labels, share), stop, bar)
            seconds = time.perf_counter() - started
            with endings.memory_for(*flags.advice_for_test(args)):
                tested = test(net, dataset, world)
            finite = sys.float_info.max  # batch norm's statistics lag behind the weights: a large test loss is no divergence
            check_loss(sum(tested[::2]), f"in the test after epoch {epoch + 1}", largest=finite)
            if world.rank == 0:
                newest = make_checkpoint(net, step.optimizer, step.scaler, epoch + 1, card)
                with unmoved():
                    run_folder.end_epoch(args.save, [*tested, *log.mean(), rate, seconds], newest)
                plots.redraw()
                left = (args.epochs - epoch - 1) * (time.perf_counter() - started)
                print_epoch(f"{epoch + 1}/{args.epochs}", log.mean(), tested, rate, len(dataset.train) / seconds, left)
    plots.finish()


def epoch_batches(dataset, epoch, args, world):
    """One epoch's batches, determined by --seed and the epoch; a step's random numbers (dropout) also differ by rank."""
    data_seed, *rank_seeds = np.random.SeedSequence([args.seed, epoch]).generate_state(1 + world.size, np.uint64).tolist()
    seed = rank_seeds[world.rank]
    torch.manual_seed(seed)  # dropout's
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    generator = torch.Generator(dataset.mean.device).manual_seed(data_seed)
    return data.training_batches(dataset, args.batch_size, args.augment, generator, world.rank, world.size)


class EpochLog:
    """Collects the loss and error of each step and writes them to train.csv in groups."""

    def __init__(self, args, epoch, num_images, world, unmoved):
        self.unmoved = unmoved
        self.path = args.save / "train.csv"
        self.epoch = epoch
        self.world = world
        self.sizes = [min(args.batch_size, num_images - first) for first in range(0, num_images, args.batch_size)]
        self.group = []  # steps not yet written, on the device
        self.rows = []  # (loss, error) of the steps written

    def add(self, result, stop, bar):
        """Adds a step's (loss, error); writes full groups. After a signal, raises Stopped (several GPUs: after the group)."""
        self.group.append(result)
        done = len(self.rows) + len(self.group)
        bar.update(self.sizes[done - 1])
        at_once = stop.received if self.world.size == 1 else result.is_cpu  # ranks on CPUs: torchrun waits 30 seconds only
        if len(self.group) == GROUP_STEPS or done == len(self.sizes) or at_once:
            signum = self.write(stop.received)
            bar.set_postfix_str(f"loss {self.rows[-1][0]:.3f}, error {self.rows[-1][1]:.1f} %", refresh=False)
            if signum:
                raise Stopped(signum)

    def write(self, received):
        """Writes the group to train.csv, waiting for the device. Returns this rank's signal, SIGTERM for another's, or 0."""
        table = torch.stack([*self.group, torch.full_like(self.group[0], received)])
        *rows, (signals, _) = distributed.sum_over_ranks(table, self.world).tolist()
        steps = [*enumerate(rows, start=len(self.rows) + 1)]
        if self.world.rank == 0:
            with self.unmoved():
                run_folder.append_rows(self.path, [(self.epoch + step / len(self.sizes), *row) for step, row in steps])
        for step, (loss, _) in steps:
            check_loss(loss, f"at step {step} of epoch {self.epoch + 1}")
        self.rows += rows
        self.group = []
        return signals and (received or signal.SIGTERM)

    def mean(self):
        """Mean (loss, error) over the epoch's images."""
        return np.average(self.rows, axis=0, weights=self.sizes)


def check_loss(loss, where, largest=MAX_LOSS):
    """Refused where training has diverged; the rows and the last checkpoint stay."""
    if not loss <= largest:
        remedy = "start again with a lower --lr, in another --save or with --force"
        raise Refused(f"training diverged, the loss is {loss:g} {where}: {remedy}", status=1)


def test(net, dataset, world):
    """[loss, error in %] of the test set, followed by those of the held-out images if there are any."""
    distributed.broadcast_buffers(net, world)
    results = []
    parts = {"test": dataset.test} | ({"val": dataset.val} if dataset.val else {})
    for title, split in parts.items():
        images, labels = (part.tensor_split(world.size)[world.rank] for part in (split.images, split.labels))
        logits = predict(net, images, dataset.mean, dataset.std, title if world.rank == 0 else None)
        sums = loss_and_error_sums(logits, labels.cpu())
        loss, error = (distributed.sum_over_ranks(sums, world) / len(split)).tolist()
        results += [loss, 100 * error]
    return results


def print_epoch(epoch, train_result, test_result, rate, images_per_second, seconds_left):
    results = {"train": train_result, "val": test_result[2:], "test": test_result[:2]}
    numbers = "".join(f"{part} loss {r[0]:.4f} error {r[1]:.2f} %  " for part, r in results.items() if len(r))
    left = timedelta(seconds=round(seconds_left))
    say(f"epoch {epoch}  {numbers}lr {rate:g}  {images_per_second:.0f} images/s  {left} left", write=tqdm.write)


if __name__ == "__main__":
    main()
