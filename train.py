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
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from setproctitle import setproctitle
from tqdm import tqdm

import data
import distributed
import endings
import flags
import run_folder
from checkpoint import load_checkpoint, make_card, make_checkpoint, restore
from densenet import DenseNet
from machine import DTYPES, choose_device, describe, keep_freed_memory, make_repeatable
from metrics import loss_and_error_sums, predict
from signals import Stopped, StopSignals

FLUSH_STEPS = 20  # the device is synchronised once in so many steps, to write their losses to train.csv


def main():
    parser = build_parser()
    args = flags.parse_args(parser)
    asked, remedy = flags.memory_advice(args)
    with endings.before_training(parser, asked, f"{remedy}, or fewer images (--limit)", trains=True):
        world = distributed.read_world(os.environ)
        run_folder.refuse_to_replace(args.save, args.resume, args.force)
        device = distributed.join(world, choose_device(args.device))
        keep_freed_memory(device)
        check_arguments(args, device)
        args.image_size = distributed.share_object(run_folder.image_size(args) if world.rank == 0 else None, world)
        with distributed.first_rank_first(world):
            quiet = world.rank > 0
            dataset = data.load(args.dataset, args.data, device, args.val, args.limit, args.image_size, quiet)
        distributed.check_batches(world, args.batch_size, len(dataset.train))
        net = make_net(args, len(dataset.classes), device)
        opened = open_run(net, args, device, dataset, world) if world.rank == 0 else (None, None)
        _lock, checkpoint = opened  # the lock is held to the end
    with endings.training(parser.prog, world, asked, remedy):
        fit(net, dataset, args, device, world, distributed.share_object(checkpoint, world))


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=flags.USAGE,
    )
    flags.add_data_flags(parser.add_argument_group("data"))
    model_group = parser.add_argument_group("model")
    flags.add_model_flags(model_group)
    model_group.add_argument(
        "--init",
        metavar="FILE",
        type=flags.named(str),
        help="begin with these weights: a latest.pth, or what evaluate.py exported",
    )
    flags.add_optimisation_flags(parser.add_argument_group("optimisation"))
    flags.add_machine_flags(parser.add_argument_group("machine"))
    flags.add_run_flags(parser.add_argument_group("run"))
    return parser


# -------------------------------------------------------------------------------------------------------- the beginning


def check_arguments(args, device):
    """ValueError for arguments that do not fit each other or the machine; before anything is downloaded or written."""
    with torch.device("meta"):
        DenseNet(**flags.model_arguments(args))
    if args.sync_bn and args.efficient:
        raise ValueError("--sync-bn does not go with --efficient, whose statistics are of one process: choose one of them")
    if args.precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU: on a CPU choose bf16 or fp32")


def make_net(args, num_classes, device):
    """The net as the run begins with it. ValueError if the weights of --init are not there, or of a net that is another.

    A run that is continued has weights of its own, and needs the file of --init no more.
    """
    torch.manual_seed(args.seed)
    net = DenseNet(**flags.model_arguments(args), num_classes=num_classes)
    if args.init and not (args.resume and run_folder.has_checkpoint(args.save)):
        try:
            net.load_state_dict(load_checkpoint(Path(args.init))["net"])
        except RuntimeError as error:
            raise ValueError(
                f"--init {args.init} is not of this net: give the model flags and the data set it was trained with"
            ) from error
    return net.to(device, memory_format=torch.channels_last)


def open_run(net, args, device, dataset, world):
    """Locks the run's folder and begins the run, or continues it with --resume. Returns the lock and a checkpoint or None."""
    lock = run_folder.lock(args.save)
    facts = {**flags.plain_arguments(args), "torch": torch.__version__, "hardware": describe(device)}
    facts |= {"commit": run_folder.git_commit(), "processes": world.size}
    facts |= {"train_images": len(dataset.train), "classes": dataset.classes}
    checkpoint = run_folder.resume(args.save, facts, net, partial(same_schedule, args)) if args.resume else None
    if checkpoint is None:
        run_folder.begin(args.save, facts, has_val=args.val > 0)
    if args.dataset == "folder":
        print(*data.describe_classes(dataset), sep="\n")
    if args.resume:
        print(f"{args.save}: continuing after epoch {checkpoint['epoch']}" if checkpoint else f"{args.save}: from the start")
    return lock, checkpoint


def same_schedule(args, old_epochs, new_epochs, epochs_done):
    """Whether the epochs that are done had the learning rate that they have with new_epochs, of which they are a part."""
    rates = [[scheduled_rate(args, epoch, epochs) for epoch in range(epochs_done)] for epochs in (old_epochs, new_epochs)]
    return rates[0] == rates[1] and epochs_done <= new_epochs


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
    stop = StopSignals()
    setproctitle(str(args.save))
    make_repeatable(args.deterministic)
    optimizer = make_optimizer(net, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    autocast = torch.autocast(device.type, DTYPES[args.precision], enabled=args.precision != "fp32")
    first_epoch = restore(checkpoint, net, optimizer, scaler)
    model = prepare(net, args, device, world)
    card = make_card(flags.model_arguments(args), flags.plain_arguments(args), dataset)
    figures = run_folder.Figures(args.save, args.plot and world.rank == 0)
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
                state = make_checkpoint(net, optimizer, scaler, epoch + 1, card)
                run_folder.end_epoch(args.save, test_figures, state)
                figures.redraw()
                seconds = trained - started, time.perf_counter() - started
                print_epoch(epoch + 1, args.epochs, train_figures, test_figures, rate, len(dataset.train), *seconds)
    figures.finish()


def prepare(net, args, device, world):
    """The net as it is trained; the bare net stays what is saved and tested, and shares its parameters."""
    if args.sync_bn and world.size > 1:
        distributed.synchronise_batch_norm(net)
    model = distributed.wrap(net, world, device)
    return WholeBatchesCompiled(model, args.compile, args.batch_size // world.size) if args.compile else model


class WholeBatchesCompiled(nn.Module):
    """The model, compiled; a smaller batch, the last of an epoch, goes through the bare one: one graph, compiled once."""

    def __init__(self, model, mode, batch_size):
        super().__init__()
        self.compiled = torch.compile(model, mode=mode)
        self.model = model
        self.batch_size = batch_size

    def forward(self, images):
        return (self.compiled if len(images) == self.batch_size else self.model)(images)


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
        yield training_step(model, optimizer, scaler, autocast, images, labels, share, world)


def training_step(model, optimizer, scaler, autocast, images, labels, share, world):
    """Gradients go before the forward pass and all else when this returns: nothing of a step outlives it in a CUDA graph."""
    optimizer.zero_grad()
    with autocast:
        logits = model(images)  #                              (N, num_classes)
        loss = share * F.cross_entropy(logits, labels)  #      (), summed over the ranks the mean of the batch
    scaler.scale(world.size * loss).backward()  #              the ranks' gradients are averaged, not summed
    scaler.step(optimizer)
    scaler.update()
    error = share * 100 * (logits.argmax(dim=1) != labels).float().mean()
    return torch.stack([loss.detach(), error])


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
