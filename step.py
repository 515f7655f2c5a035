"""One training step: optimiser, learning-rate schedule, precision, compilation. It knows no folders and no CSVs.

step = TrainingStep(net, args, device, world)
for rate in schedule(args, args.epochs):
    step.begin_epoch(rate)
    for images, labels, share in batches:
        loss, error = step(images, labels, share)
"""

import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F

import distributed
from machine import DTYPES, set_precision


class TrainingStep:
    """Callable that trains the net on one batch; args are those of train.py."""

    def __init__(self, net, args, device, world):
        set_precision(args.precision)
        self.world = world
        self.model = prepare(net, args, device, world)
        self.optimizer = make_optimizer(net, args)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        dtype = DTYPES[args.precision]
        self.autocast = contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)

    def __call__(self, images, labels, share):
        """This rank's contribution to (loss, error in %), on the device; images (N, 3, H, W), labels (N,), share of the batch.

        Nothing may outlive a step in a CUDA graph, so gradients are freed before the forward pass.
        """
        self.optimizer.zero_grad()
        with self.autocast:
            logits = self.model(images)  #                         (N, num_classes)
            loss = share * F.cross_entropy(logits, labels)  #     (), sums to the batch mean over the ranks
        self.scaler.scale(self.world.size * loss).backward()  #   DDP averages gradients: this makes it a sum
        self.scaler.step(self.optimizer)
        self.scaler.update()
        error = share * 100 * (logits.argmax(dim=1) != labels).float().mean()
        return torch.stack([loss.detach(), error])  #              (2,)

    def begin_epoch(self, rate):
        """Switches to training mode and sets the learning rate (None keeps it); returns the current one."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] if rate is None else rate
        return self.optimizer.param_groups[0]["lr"]


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


def learning_rate(epoch, epochs, initial):
    """The paper's schedule: divided by 10 after 50 % and after 75 % of the epochs; epoch counts from 0."""
    return initial * 0.1 ** ((2 * epoch >= epochs) + (4 * epoch >= 3 * epochs))


def schedule(args, epochs):
    """The learning rate of each epoch; None for Adam and RMSprop, which keep theirs."""
    return [learning_rate(epoch, epochs, args.lr) if args.opt == "sgd" else None for epoch in range(epochs)]


def prepare(net, args, device, world):
    """The net as it is trained; the bare net, whose parameters it shares, is what is saved and tested."""
    if args.sync_bn and world.size > 1:
        distributed.synchronise_batch_norm(net, device)
    model = distributed.wrap(net, world, device)
    if not args.compile:
        return model
    automatic = "reduce-overhead" if device.type == "cuda" else "default"
    return WholeBatchesCompiled(model, automatic if args.compile == "auto" else args.compile, args.batch_size // world.size)


class WholeBatchesCompiled(nn.Module):
    """The compiled model. The smaller last batch runs uncompiled, so that only one shape is compiled."""

    def __init__(self, model, mode, batch_size):
        super().__init__()
        self.compiled = torch.compile(model, mode=mode)
        self.model = model
        self.batch_size = batch_size

    def forward(self, images):
        return (self.compiled if len(images) == self.batch_size else self.model)(images)
