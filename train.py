#!/usr/bin/env python3
"""Trains DenseNet and DenseNet-BC by the protocol of the paper; a run is a folder with its CSVs, figures and checkpoint.

    ./train.py                                                  DenseNet-BC, L=100, k=12, CIFAR-10 with augmentation, 300 epochs
    ./train.py --no-bottleneck --depth 40 --no-augment          the plain DenseNet, L=40, k=12, without augmentation
    ./train.py --dataset digits --depth 22 --epochs 20          a small net on a data set that needs no download

work/<dataset>.base, or --save DIR, then holds: args.json (arguments, versions, device), train.csv (a row for each step),
test.csv (a row for each epoch), latest.pth (the checkpoint) and loss.png, error.png, loss-error.png.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from setproctitle import setproctitle
from tqdm import tqdm

import data
from densenet import DenseNet
from evaluate import choose_device, loss_and_error, predict

HERE = Path(__file__).resolve().parent
USAGE = "%(prog)s [options], which --help lists"
FLUSH_STEPS = 20  # the device is synchronised once in so many steps, to write their losses to train.csv
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RUN_FILES = ["args.json", "train.csv", "test.csv", "latest.pth", "loss.png", "error.png", "loss-error.png"]

# What the paper does differently from the CIFAR default, data set by data set; digits are not mirror images of each other.
PROTOCOLS = {"svhn": dict(epochs=40, augment=False, val=6000), "digits": dict(augment=False)}


def main():
    parser = build_parser()
    args = parse_args(parser)
    try:
        check_run_folder(args.save, args.force)
        device = choose_device(args.device)
        check_precision(args.precision, device)
        with torch.device("meta"):  # refuses a bad depth before anything is downloaded
            DenseNet(**model_arguments(args))
        dataset = data.load(args.dataset, args.data, device, args.val, args.limit)
        start_run_folder(args, device)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    torch.manual_seed(args.seed)
    net = DenseNet(**model_arguments(args), num_classes=len(dataset.classes))
    net = net.to(device, memory_format=torch.channels_last)
    try:
        fit(net, dataset, args, device)
    except FloatingPointError as error:
        sys.exit(f"train.py: {error}")


# ---------------------------------------------------------------------------------------------------- the command line


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=USAGE,
    )
    add_data_flags(parser.add_argument_group("data"))
    add_model_flags(parser.add_argument_group("model"))
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


def add_run_flags(group):
    group.add_argument("--save", metavar="DIR", type=Path, help="the run's folder (work/<dataset>.base)")
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
    names = ["depth", "growth_rate", "reduction", "bottleneck", "drop_rate", "init_channels"]
    return {name: getattr(args, name) for name in names}


# ------------------------------------------------------------------------------------------------------ the run's folder


def check_precision(precision, device):
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU: on a CPU choose bf16 or fp32")


def check_run_folder(save, force):
    if not force and any((save / name).exists() for name in RUN_FILES):
        raise ValueError(f"{save} already holds a run: choose another folder with --save, or replace it with --force")


def start_run_folder(args, device):
    """Makes the folder, removes the files of a run that --force replaces, and writes args.json and the CSVs' header lines."""
    try:
        args.save.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            (args.save / name).unlink(missing_ok=True)
        write_headers(args, device)
    except OSError as error:
        raise ValueError(f"--save {args.save} cannot be written ({error.strerror}): choose another folder") from error


def write_headers(args, device):
    facts = {
        **vars(args),
        "save": str(args.save),
        "torch": torch.__version__,
        "device": describe(device),
        "commit": git_commit(),
    }
    (args.save / "args.json").write_text(json.dumps(facts, indent=2) + "\n")
    (args.save / "train.csv").write_text("epoch,loss,error\n")
    (args.save / "test.csv").write_text("epoch,loss,error" + (",val_loss,val_error" if args.val else "") + "\n")


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


def append_rows(path, rows):
    """Adds rows, the epoch first, to a CSV."""
    with path.open("a") as file:
        file.writelines(
            f"{epoch:.6f}".rstrip("0").rstrip(".") + "".join(f",{v:.6g}" for v in values) + "\n" for epoch, *values in rows
        )


def save_checkpoint(path, net, optimizer, scaler, epochs_done, args, dataset):
    """Everything that a resumed run or an evaluation needs. The old file is replaced in one step, by a complete one."""
    checkpoint = {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": epochs_done,
        "model": {**model_arguments(args), "num_classes": len(dataset.classes)},
        "args": {**vars(args), "save": str(args.save)},
        "mean": dataset.mean.flatten().tolist(),
        "std": dataset.std.flatten().tolist(),
        "classes": dataset.classes,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


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
        if self.process is not None:
            self.process.wait()
        self.redraw()
        self.check()

    def check(self):
        """Waits for the drawing and says, the first time it fails, why there is no figure."""
        if self.process is not None:
            _, errors = self.process.communicate()
            if self.process.returncode and not self.warned:
                tqdm.write(f"the figures could not be drawn, training goes on: {errors.strip().splitlines()[-1]}")
                self.warned = True
            self.process = None


# ------------------------------------------------------------------------------------------------------------- training


def learning_rate(epoch, epochs, initial):
    """The paper's schedule: divided by 10 when 50 % and again when 75 % of the epochs are done; epoch counts from 0."""
    return initial * 0.1 ** ((2 * epoch >= epochs) + (4 * epoch >= 3 * epochs))


def make_optimizer(net, args):
    """The paper's SGD, or Adam or RMSprop as PyTorch sets them; weight decay on all parameters."""
    lr = {} if args.lr is None else {"lr": args.lr}
    if args.opt == "adam":
        return torch.optim.Adam(net.parameters(), weight_decay=args.weight_decay, **lr)
    if args.opt == "rmsprop":
        return torch.optim.RMSprop(net.parameters(), weight_decay=args.weight_decay, **lr)
    nesterov = args.nesterov and args.momentum > 0
    return torch.optim.SGD(net.parameters(), momentum=args.momentum, weight_decay=args.weight_decay, nesterov=nesterov, **lr)


def set_learning_rate(optimizer, epoch, args):
    if args.opt == "sgd":
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, args.epochs, args.lr)


def fit(net, dataset, args, device):
    """The run: trains, tests, saves and draws, epoch by epoch. FloatingPointError if the loss is no longer finite."""
    setproctitle(str(args.save))
    make_repeatable(args.deterministic)
    optimizer = make_optimizer(net, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    autocast = torch.autocast(device.type, DTYPES[args.precision], enabled=args.precision != "fp32")
    model = torch.compile(net, mode=args.compile) if args.compile else net
    figures = Figures(args.save, args.plot)
    with progress_bar(args.epochs * len(dataset.train)) as bar:
        for epoch in range(args.epochs):
            started = time.perf_counter()
            set_learning_rate(optimizer, epoch, args)
            bar.set_description_str(f"epoch {epoch + 1}, lr {optimizer.param_groups[0]['lr']:g}")
            batches = epoch_batches(dataset, epoch, args, device)
            steps = training_steps(model, optimizer, scaler, autocast, batches)
            train_figures = record(steps, len(dataset.train), args.batch_size, epoch, args.save / "train.csv", bar)
            rate = len(dataset.train) / (time.perf_counter() - started)
            test_figures = test(net, dataset)
            append_rows(args.save / "test.csv", [(epoch + 1, *test_figures)])
            save_checkpoint(args.save / "latest.pth", net, optimizer, scaler, epoch + 1, args, dataset)
            figures.redraw()
            left = (time.perf_counter() - started) * (args.epochs - epoch - 1)
            print_epoch(epoch + 1, args.epochs, train_figures, test_figures, optimizer, rate, left)
    figures.finish()


def make_repeatable(deterministic):
    """With --deterministic only kernels that give the same bits every time; without it the fastest that cuDNN finds."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)


def epoch_batches(dataset, epoch, args, device):
    """The batches of an epoch. What it draws, dropout included, depends on the seed and the number of the epoch alone."""
    dropout_seed, data_seed = np.random.SeedSequence([args.seed, epoch]).generate_state(2, np.uint64).tolist()
    torch.manual_seed(dropout_seed)
    generator = torch.Generator(device).manual_seed(data_seed)
    return data.training_batches(dataset.train, args.batch_size, dataset.mean, dataset.std, args.augment, generator)


def training_steps(model, optimizer, scaler, autocast, batches):
    """One step of the optimiser for each batch; yields (loss, error in %), a tensor that stays on the device."""
    model.train()
    for images, labels in batches:
        with autocast:
            logits = model(images)  #                      (N, num_classes)
            loss = F.cross_entropy(logits, labels)  #      ()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        error = 100 * (logits.argmax(dim=1) != labels).float().mean()
        yield torch.stack([loss.detach(), error])


def record(steps, num_images, batch_size, epoch, path, bar):
    """Takes all steps of an epoch and writes their rows to train.csv in groups. Returns the epoch's mean loss and error."""
    sizes = [min(batch_size, num_images - first) for first in range(0, num_images, batch_size)]
    rows, group = [], []
    for size, result in zip(sizes, steps, strict=True):
        group.append(result)
        bar.update(size)
        if len(group) == FLUSH_STEPS or len(rows) + len(group) == len(sizes):
            figures = torch.stack(group).tolist()  # waits for the device
            append_rows(path, [(epoch + (len(rows) + i) / len(sizes), *f) for i, f in enumerate(figures, start=1)])
            rows, group = rows + figures, []
            check_finite(rows, epoch)
            bar.set_postfix_str(f"loss {rows[-1][0]:.3f}, error {rows[-1][1]:.1f} %")
    return np.average(rows, axis=0, weights=sizes)


def check_finite(rows, epoch):
    for step, (loss, _) in enumerate(rows, start=1):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {step} of epoch {epoch + 1}: try a lower --lr; "
                "latest.pth, if an epoch was completed, holds the last good state"
            )


def test(net, dataset):
    """Loss and error of the test set, and then of the held-out images if there are any, over all images."""
    splits = [dataset.test] + ([dataset.val] if dataset.val else [])
    return [f for split in splits for f in loss_and_error(predict(net, split.images, dataset.mean, dataset.std), split.labels)]


def progress_bar(num_images):
    """A bar over all epochs, with images/s and the time left; silent where the output is no terminal."""
    return tqdm(total=num_images, unit=" images", unit_scale=True, smoothing=0.05, dynamic_ncols=True, disable=None)


def print_epoch(epoch, epochs, train_figures, test_figures, optimizer, rate, seconds_left):
    left = timedelta(seconds=round(seconds_left))
    tqdm.write(
        f"epoch {epoch}/{epochs}  train loss {train_figures[0]:.4f} error {train_figures[1]:.2f} %  "
        f"test loss {test_figures[0]:.4f} error {test_figures[1]:.2f} %  "
        f"lr {optimizer.param_groups[0]['lr']:g}  {rate:.0f} images/s  {left} left"
    )


if __name__ == "__main__":
    main()
