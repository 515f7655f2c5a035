#!/usr/bin/env python3
"""Trains DenseNet and DenseNet-BC by the protocol of the paper; a run is a folder with its CSVs, figures and checkpoint.

    ./train.py                                                  DenseNet-BC, L=100, k=12, CIFAR-10 with augmentation, 300 epochs
    ./train.py --no-bottleneck --depth 40 --no-augment          the plain DenseNet, L=40, k=12, without augmentation
    ./train.py --dataset digits --depth 22 --epochs 20          a small net on a data set that needs no download
    ./train.py --init net.pth --lr 0.01 --epochs 10             ten epochs more for a net that is trained already

work/<dataset>.base, or --save DIR, then holds: args.json (arguments, versions, device), train.csv (a row for each step),
test.csv (a row for each epoch), latest.pth (the checkpoint) and loss.png, error.png, loss-error.png.
"""

import argparse
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from setproctitle import setproctitle
from tqdm import tqdm

import data
import distributed
import run_folder
from densenet import DenseNet
from evaluate import choose_device, load_checkpoint, loss_and_error_sums, predict

HERE = Path(__file__).resolve().parent
USAGE = "%(prog)s [options], which --help lists"
FLUSH_STEPS = 20  # the device is synchronised once in so many steps, to write their losses to train.csv
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What the paper does differently from the CIFAR default, data set by data set; digits are not mirror images of each other.
PROTOCOLS = {"svhn": dict(epochs=40, augment=False, val=6000), "digits": dict(augment=False)}


def main():
    parser = build_parser()
    args = parse_args(parser)
    try:
        world = distributed.read_world(os.environ)
        run_folder.refuse_to_replace(args.save, args.resume, args.force)
        device = distributed.join(world, choose_device(args.device))
        check_arguments(args, device)
        with distributed.first_rank_first(world):
            dataset = data.load(args.dataset, args.data, device, args.val, args.limit)
        distributed.check_batches(world, args.batch_size, len(dataset.train))
        net = make_net(args, len(dataset.classes), device)
        opened = open_run(args, device, dataset, world) if world.rank == 0 else (None, None)
        _lock, checkpoint = opened  # the lock is held to the end
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, "train.py: stopped before the run began\n")
    try:
        fit(net, dataset, args, device, world, distributed.share_object(checkpoint, world))
    except Stopped as stopped:
        if world.rank == 0:
            print(f"{stopped}; this continues the run: {resume_command(world)}")
        sys.exit(stopped.status)
    except FloatingPointError as error:
        sys.exit(f"train.py: {error}")
    except OSError as error:
        sys.exit(f"train.py: {error}; the last complete checkpoint is kept, --resume continues from it")
    finally:
        distributed.leave(world)


# ---------------------------------------------------------------------------------------------------- the command line


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=USAGE,
    )
    add_data_flags(parser.add_argument_group("data"))
    model_group = parser.add_argument_group("model")
    add_model_flags(model_group)
    model_group.add_argument(
        "--init", metavar="FILE", help="begin with these weights: a latest.pth, or what evaluate.py exported"
    )
    add_optimisation_flags(parser.add_argument_group("optimisation"))
    add_machine_flags(parser.add_argument_group("machine"))
    add_run_flags(parser.add_argument_group("run"))
    return parser


def add_data_flags(group):
    group.add_argument("--dataset", choices=sorted(data.LOADERS), default="cifar10")
    group.add_argument("--data", metavar="DIR", default="data", help="where the data set is, or is downloaded to (%(default)s)")
    group.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="random crop and flip (yes; no for svhn and digits)",
    )
    group.add_argument("--val", metavar="N", type=at_least(0), default=0, help="hold out N training images (0; 6000 for svhn)")
    group.add_argument("--limit", metavar="N", type=at_least(1), help="train on the first N images only")


def add_model_flags(group, depth=100):
    group.add_argument("--depth", type=int, default=depth, help="L, the layers with weights (%(default)s)")
    group.add_argument("--growth-rate", type=int, default=12, help="k, the feature maps a layer adds (%(default)s)")
    group.add_argument("--reduction", type=float, help="share of the channels a transition keeps (0.5; plain net 1.0)")
    group.add_argument("--no-bottleneck", dest="bottleneck", action="store_false", help="the plain DenseNet instead of -BC")
    group.add_argument("--drop-rate", type=float, help="dropout (0 with augmentation, else 0.2)")
    group.add_argument("--init-channels", type=int, help="output of the first convolution (2k; plain net 16)")
    group.add_argument(
        "--efficient", action=argparse.BooleanOptionalAction, default=False, help="dense blocks in linear memory (no)"
    )


def add_optimisation_flags(group):
    group.add_argument("--epochs", "--nEpochs", type=at_least(1), default=300, help="(%(default)s; 40 for svhn)")
    group.add_argument("--batch-size", "--batchSz", type=at_least(1), default=64, help="(%(default)s)")
    group.add_argument("--opt", choices=["sgd", "adam", "rmsprop"], default="sgd", help="(%(default)s)")
    group.add_argument(
        "--lr",
        type=at_least(0, float),
        help="initial rate; sgd divides it by 10 after 1/2 and 3/4 of the epochs (sgd 0.1; else PyTorch's default, constant)",
    )
    group.add_argument("--momentum", type=at_least(0, float), default=0.9, help="of sgd (%(default)s)")
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-4, help="on all parameters (%(default)s)")
    group.add_argument("--no-nesterov", dest="nesterov", action="store_false", help="plain momentum for sgd")
    group.add_argument("--seed", type=at_least(0), default=1, help="(%(default)s)")
    group.add_argument("--deterministic", action="store_true", help="only deterministic kernels: slower on a GPU, repeatable")


def add_machine_flags(group):
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(%(default)s)")
    group.add_argument("--no-cuda", dest="device", action="store_const", const="cpu", help="the same as --device cpu")
    group.add_argument(
        "--precision", choices=sorted(DTYPES), default="fp32", help="autocast of the training steps (%(default)s)"
    )
    modes = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
    group.add_argument("--compile", choices=modes, nargs="?", const="default", help="torch.compile the training steps")
    group.add_argument("--sync-bn", action="store_true", help="under torchrun: batch statistics over all processes")


def add_run_flags(group):
    group.add_argument("--save", metavar="DIR", type=Path, help="the run's folder (work/<dataset>.base)")
    group.add_argument("--resume", action="store_true", help="continue the run in the folder, or begin it if there is none")
    group.add_argument("--force", action="store_true", help="replace the run that the folder holds")
    group.add_argument("--no-plot", dest="plot", action="store_false", help="draw no figures")


def at_least(low, kind=int):
    """An argparse type: a number of that kind, not below low."""

    def parse(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {low} or more")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def parse_args(parser, argv=None):
    """The arguments, with the defaults that depend on the data set or on another argument filled in."""
    parser.set_defaults(**PROTOCOLS.get(parser.parse_args(argv).dataset, {}))
    args = parser.parse_args(argv)
    if args.drop_rate is None:
        args.drop_rate = 0.0 if args.augment else 0.2
    if args.lr is None and args.opt == "sgd":
        args.lr = 0.1
    if args.save is None:
        args.save = Path("work", f"{args.dataset}.base")
    return args


def model_arguments(args):
    """The keyword arguments of DenseNet, but for num_classes, that the model flags stand for."""
    names = ["depth", "growth_rate", "reduction", "bottleneck", "drop_rate", "init_channels", "efficient"]
    return {name: getattr(args, name) for name in names}


# -------------------------------------------------------------------------------------------------------- the beginning


def check_arguments(args, device):
    """ValueError for arguments that do not fit each other or the machine; before anything is downloaded or written."""
    with torch.device("meta"):
        DenseNet(**model_arguments(args))
    if args.sync_bn and args.efficient:
        raise ValueError("--sync-bn does not go with --efficient, whose statistics are of one process: choose one of them")
    if args.precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU: on a CPU choose bf16 or fp32")


def make_net(args, num_classes, device):
    """The net as the run begins with it. ValueError if the weights of --init are not there, or of a net that is another."""
    torch.manual_seed(args.seed)
    net = DenseNet(**model_arguments(args), num_classes=num_classes)
    if args.init:
        try:
            net.load_state_dict(load_checkpoint(Path(args.init))["net"])
        except RuntimeError as error:
            raise ValueError(
                f"--init {args.init} is not of this net: give the model flags and the data set it was trained with"
            ) from error
    return net.to(device, memory_format=torch.channels_last)


def open_run(args, device, dataset, world):
    """Locks the run's folder and begins the run, or continues it with --resume. Returns the lock and a checkpoint or None."""
    lock = run_folder.lock(args.save)
    facts = {**plain_arguments(args), "torch": torch.__version__, "hardware": describe(device), "commit": git_commit()}
    facts |= {"processes": world.size, "train_images": len(dataset.train), "classes": dataset.classes}
    checkpoint = run_folder.resume(args.save, facts, partial(same_schedule, args)) if args.resume else None
    if checkpoint is None:
        run_folder.begin(args.save, facts, has_val=args.val > 0)
    if args.resume:
        print(f"{args.save}: continuing after epoch {checkpoint['epoch']}" if checkpoint else f"{args.save}: from the start")
    return lock, checkpoint


def plain_arguments(args):
    """The arguments as JSON and a checkpoint can hold them."""
    return {**vars(args), "save": str(args.save)}


def same_schedule(args, old_epochs, new_epochs, epochs_done):
    """Whether the epochs that are done had the learning rate that they have with new_epochs, of which they are a part."""
    rates = [[scheduled_rate(args, epoch, epochs) for epoch in range(epochs_done)] for epochs in (old_epochs, new_epochs)]
    return rates[0] == rates[1] and epochs_done <= new_epochs


def describe(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def git_commit():
    """The commit this code is at, with "-dirty" behind it if it was changed since; None without git."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------------------------------------- what goes on beside it


class Stopped(Exception):
    """The run ends on a signal; status is what a shell expects of a program that the signal ended."""

    def __init__(self, signum):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.status = 128 + signum


def resume_command(world):
    if world.size > 1:
        return "the same torchrun command with --resume"
    return shlex.join([word for word in sys.orig_argv if word not in ("--resume", "--force")] + ["--resume"])


class StopSignals:
    """Notes the first SIGINT or SIGTERM, for the training loop to see; a second one ends the program at once."""

    def __init__(self):
        self.received = 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.handle)

    def handle(self, signum, frame):
        self.received = signum
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)


class Figures:
    """Redraws a run's figures with plot.py in a process of its own, so that no epoch waits for them."""

    def __init__(self, save, enabled):
        self.command = [sys.executable, str(HERE / "plot.py"), str(save)]
        self.enabled = enabled
        self.process = None
        self.warned = False

    def redraw(self):
        """Starts drawing, unless the last drawing still goes on."""
        if self.enabled and (self.process is None or self.process.poll() is not None):
            self.check()
            self.process = subprocess.Popen(  # start_new_session: Ctrl-C is not meant for it
                self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
            )

    def finish(self):
        """Draws what the CSVs now hold and waits for it."""
        self.check()
        self.redraw()
        self.check()

    def check(self):
        """Waits for the drawing and says, the first time it fails, why there is no figure."""
        if self.process is not None:
            _, errors = self.process.communicate()
            if self.process.returncode and not self.warned:
                reason = errors.strip().splitlines() or [f"plot.py ended with status {self.process.returncode}"]
                tqdm.write(f"the figures could not be drawn, training goes on: {reason[-1]}")
                self.warned = True
            self.process = None


# ------------------------------------------------------------------------------------------------------------- training


def learning_rate(epoch, epochs, initial):
    """The paper's schedule: divided by 10 when 50 % and again when 75 % of the epochs are done; epoch counts from 0."""
    return initial * 0.1 ** ((2 * epoch >= epochs) + (4 * epoch >= 3 * epochs))


def make_optimizer(net, args):
    """The paper's SGD, or Adam or RMSprop as PyTorch sets them; weight decay on all parameters."""
    options = {"weight_decay": args.weight_decay} | ({} if args.lr is None else {"lr": args.lr})
    if args.opt == "rmsprop":
        return torch.optim.RMSprop(net.parameters(), **options)
    fused = next(net.parameters()).device.type in ("cpu", "cuda")
    if args.opt == "adam":
        return torch.optim.Adam(net.parameters(), fused=fused, **options)
    nesterov = args.nesterov and args.momentum > 0
    return torch.optim.SGD(net.parameters(), momentum=args.momentum, nesterov=nesterov, fused=fused, **options)


def scheduled_rate(args, epoch, epochs):
    """The rate of SGD by the schedule; None for the other optimisers, which keep theirs."""
    return learning_rate(epoch, epochs, args.lr) if args.opt == "sgd" else None


def set_rate(optimizer, rate):
    """Sets the learning rate unless it is None, and returns the one that now holds."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if rate is None else rate
    return optimizer.param_groups[0]["lr"]


def fit(net, dataset, args, device, world, checkpoint):
    """The run: trains, tests, saves and draws, epoch by epoch, from the beginning or from behind the checkpoint.

    FloatingPointError if the loss is no longer finite, Stopped on a signal, OSError if something cannot be written.
    """
    setproctitle(str(args.save))
    make_repeatable(args.deterministic)
    optimizer = make_optimizer(net, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    autocast = torch.autocast(device.type, DTYPES[args.precision], enabled=args.precision != "fp32")
    first_epoch = restore(checkpoint, net, optimizer, scaler)
    model = prepare(net, args, device, world)
    stop = StopSignals()
    figures = Figures(args.save, args.plot and world.rank == 0)
    with progress_bar(first_epoch, args.epochs, len(dataset.train), world) as bar:
        for epoch in range(first_epoch, args.epochs):
            started = time.perf_counter()
            rate = set_rate(optimizer, scheduled_rate(args, epoch, args.epochs))
            bar.set_description_str(f"epoch {epoch + 1}, lr {rate:g}")
            batches = epoch_batches(dataset, epoch, args, device, world)
            steps = training_steps(model, optimizer, scaler, autocast, batches, world)
            train_figures = record(steps, epoch, len(dataset.train), args, world, stop, bar)
            trained = time.perf_counter()
            test_figures = test(net, dataset, world)
            check_finite(test_figures[0], f"on the test images after epoch {epoch + 1}")
            if world.rank == 0:
                run_folder.append_rows(args.save / "test.csv", [(epoch + 1, *test_figures)])
                run_folder.save_checkpoint(args.save, make_checkpoint(net, optimizer, scaler, epoch + 1, args, dataset))
                figures.redraw()
                seconds = trained - started, time.perf_counter() - started
                print_epoch(epoch + 1, args.epochs, train_figures, test_figures, rate, len(dataset.train), *seconds)
    figures.finish()


def make_repeatable(deterministic):
    """With --deterministic only kernels that give the same bits every time; without it the fastest that cuDNN finds."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)


def restore(checkpoint, net, optimizer, scaler):
    """Puts a checkpoint's state where it belongs and returns the number of epochs that are done; 0 without a checkpoint."""
    if checkpoint is None:
        return 0
    net.load_state_dict(checkpoint["net"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["epoch"]


def prepare(net, args, device, world):
    """The net as it is trained; the bare net stays what is saved and tested, and shares its parameters."""
    if args.sync_bn and world.size > 1:
        distributed.synchronise_batch_norm(net)
    model = distributed.wrap(net, world, device)
    return torch.compile(model, mode=args.compile) if args.compile else model


def make_checkpoint(net, optimizer, scaler, epochs_done, args, dataset):
    """Everything that a resumed run or an evaluation needs. Random states are not among it: see epoch_batches."""
    return {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": epochs_done,
        "model": {**model_arguments(args), "num_classes": len(dataset.classes)},
        "args": plain_arguments(args),
        "mean": dataset.mean.flatten().tolist(),
        "std": dataset.std.flatten().tolist(),
        "classes": dataset.classes,
    }


def epoch_batches(dataset, epoch, args, device, world):
    """The batches of an epoch, and the seed of its dropout.

    All that is random depends on the seed, the number of the epoch and, for dropout, the rank: the two numbers in a checkpoint,
    seed and epoch, are the whole random state of a run.
    """
    data_seed, *dropout_seeds = np.random.SeedSequence([args.seed, epoch]).generate_state(1 + world.size, np.uint64).tolist()
    torch.manual_seed(dropout_seeds[world.rank])
    generator = torch.Generator(device).manual_seed(data_seed)
    return data.training_batches(
        dataset.train, args.batch_size, dataset.mean, dataset.std, args.augment, generator, world.rank, world.size
    )


def training_steps(model, optimizer, scaler, autocast, batches, world):
    """One step of the optimiser for each batch; yields this rank's part of (loss, error in %), which stays on the device."""
    model.train()
    for images, labels, share in batches:
        with autocast:
            logits = model(images)  #                              (N, num_classes)
            loss = share * F.cross_entropy(logits, labels)  #      (), summed over the ranks the mean of the batch
        optimizer.zero_grad()
        scaler.scale(world.size * loss).backward()  #              the ranks' gradients are averaged, not summed
        scaler.step(optimizer)
        scaler.update()
        error = share * 100 * (logits.argmax(dim=1) != labels).float().mean()
        yield torch.stack([loss.detach(), error])


def record(steps, epoch, num_images, args, world, stop, bar):
    """Takes the steps of an epoch and writes their rows to train.csv in groups. Returns the epoch's mean loss and error."""
    sizes = [min(args.batch_size, num_images - first) for first in range(0, num_images, args.batch_size)]
    rows, group = [], []
    for size, figures in zip(sizes, steps, strict=True):
        group.append(figures)
        bar.update(size)
        last = len(rows) + len(group) == len(sizes)
        if last or len(group) == FLUSH_STEPS or (stop.received and world.size == 1):
            signum, figures = collect(group, stop.received, world)
            if world.rank == 0:
                epochs = [epoch + (len(rows) + i) / len(sizes) for i in range(1, len(group) + 1)]
                run_folder.append_rows(args.save / "train.csv", zip(epochs, *zip(*figures, strict=True), strict=True))
            for step, (loss, _) in enumerate(figures, start=len(rows) + 1):
                check_finite(loss, f"at step {step} of epoch {epoch + 1}")
            rows += figures
            group = []
            bar.set_postfix_str(f"loss {rows[-1][0]:.3f}, error {rows[-1][1]:.1f} %")
            if signum:
                raise Stopped(signum)
    return np.average(rows, axis=0, weights=sizes)


def collect(group, received, world):
    """The figures of a group of steps over all ranks, and whether any rank was told to stop; here the device is waited for."""
    table = torch.stack([*group, torch.full_like(group[0], received)])
    *figures, (signals, _) = distributed.sum_over_ranks(table, world).tolist()
    return signals and (received or signal.SIGTERM), figures


def check_finite(loss, where):
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} {where}: begin again with a lower --lr, in another --save or with --force"
        )


def test(net, dataset, world):
    """Loss and error in % of the test set, and then of the held-out images if there are any, exact over all images."""
    distributed.share_buffers(net, world)
    figures = []
    for images, labels in filter(None, [dataset.test, dataset.val]):
        mine, my_labels = (part.tensor_split(world.size)[world.rank] for part in (images, labels))
        sums = loss_and_error_sums(predict(net, mine, dataset.mean, dataset.std), my_labels.cpu())
        loss, error = (distributed.sum_over_ranks(sums, world) / len(labels)).tolist()
        figures += [loss, 100 * error]
    return figures


def progress_bar(first_epoch, epochs, num_images, world):
    """A bar over all epochs, with images/s and the time left; silent where the output is no terminal."""
    return tqdm(
        initial=first_epoch * num_images,
        total=epochs * num_images,
        unit=" images",
        unit_scale=True,
        smoothing=0.05,
        dynamic_ncols=True,
        disable=None if world.rank == 0 else True,
    )


def print_epoch(epoch, epochs, train_figures, test_figures, rate, num_images, training_seconds, epoch_seconds):
    tqdm.write(
        f"epoch {epoch}/{epochs}  train loss {train_figures[0]:.4f} error {train_figures[1]:.2f} %  "
        f"test loss {test_figures[0]:.4f} error {test_figures[1]:.2f} %  lr {rate:g}  "
        f"{num_images / training_seconds:.0f} images/s  {timedelta(seconds=round((epochs - epoch) * epoch_seconds))} left"
    )
    sys.stdout.flush()  # the line is of use now, also in a log file


if __name__ == "__main__":
    main()
