"""One training step: optimiser, learning-rate schedule, precision, compilation, capture. It reads and writes no files.

step = TrainingStep(net, args, device, world)
for rate in schedule(args):
    step.begin_epoch(rate)
    for images, labels, share in batches:
        loss, error = step(images, labels, share)
"""

import contextlib
import pickle
import random
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import distributed
from endings import Refused, out_of_memory, say
from machine import DTYPES, set_precision

WARM_UP_STEPS = 3  # eager steps before the capture, in which kernels are compiled and chosen


class TrainingStep:
    """Callable that trains the net on one batch; args are those of train.py, after flags.fill_in."""

    def __init__(self, net, args, device, world):
        set_precision(args.precision)
        if args.sync_bn and world.size > 1:
            distributed.synchronise_batch_norm(net, device)
        self.world = world
        self.batch_size = args.batch_size // world.size  # of this rank
        self.model = distributed.wrap(net, world, device)  # shares its parameters with the net, which is saved and tested
        self.compiled = compiled(self.model, args.compile, device)
        self.optimizer = make_optimizer(net, args)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        dtype, self.autocast = DTYPES[args.precision], contextlib.nullcontext()
        if dtype is not torch.float32:  # no cache: a captured step must cast the weights again
            self.autocast = torch.autocast(device.type, dtype, cache_enabled=False)
        self.forward_backward = self.eager_forward_backward
        if args.capture:
            self.forward_backward = CapturedForwardBackward(self.eager_forward_backward, [*net.parameters()], self.batch_size)

    def __call__(self, images, labels, share):
        """This rank's part of (loss, error in %), on the device; images (N, 3, H, W), labels (N,), share of the batch."""
        result = self.forward_backward(images, labels, share)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return result

    def eager_forward_backward(self, images, labels, share):
        """Sets the parameters' gradients; returns (loss, error in %)."""
        self.optimizer.zero_grad()  # before the forward pass: nothing may outlive a step in a CUDA graph
        model = self.compiled if len(images) == self.batch_size else self.model  # compiled for one shape only
        with self.autocast:
            logits = model(images)  #                             (N, num_classes)
            loss = share * F.cross_entropy(logits, labels)  #     (), sums to the batch mean over the ranks
        self.scaler.scale(self.world.size * loss).backward()  #  DDP averages gradients: this makes it a sum
        error = share * 100 * (logits.argmax(dim=1) != labels).float().mean()
        return torch.stack([loss.detach(), error])  #             (2,)

    def begin_epoch(self, rate):
        """Switches to training mode and sets the learning rate of all parameters (None keeps it); returns the current one."""
        if rate is not None and len({group["lr"] for group in self.optimizer.param_groups}) > 1:
            raise ValueError("begin_epoch sets one learning rate, but the parameter groups have different ones")
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] if rate is None else rate
        return self.optimizer.param_groups[0]["lr"]


class CapturedForwardBackward:
    """Forward and backward pass of full batches as a CUDA graph, captured once, then replayed: one launch, not thousands.

    The first steps run eagerly, on the stream used for the capture. A graph reads and writes fixed addresses, those of its
    batch, result and gradients. A smaller batch runs eagerly, with its own gradients; the next replay puts the fixed ones back.
    Values computed in Python, such as a changing loss weight, are frozen at the capture.
    """

    def __init__(self, eager, parameters, batch_size):
        self.eager = eager
        self.parameters = parameters
        self.batch_size = batch_size
        self.stream = torch.cuda.Stream()
        self.warm_ups_left = WARM_UP_STEPS
        self.capturable = True
        self.graph = None

    def __call__(self, images, labels, share):
        """As TrainingStep.eager_forward_backward, of a single process: the share of a full batch is 1."""
        if len(images) < self.batch_size or not self.capturable:
            return self.eager(images, labels, share)
        if self.warm_ups_left:
            return self.warm_up(images, labels, share)
        if self.graph is None:
            self.capture(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.fixed, strict=True):
            parameter.grad = gradient
        return self.result.clone()

    def warm_up(self, images, labels, share):
        """An eager step; the last one checks for what a graph cannot repeat: waits for the device, host random numbers."""
        self.warm_ups_left -= 1
        watched = contextlib.nullcontext([]) if self.warm_ups_left else noted_obstacles()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), watched as obstacles:
            result = self.eager(images, labels, share)
        torch.cuda.current_stream().wait_stream(self.stream)
        if obstacles:
            self.capturable = False
            say(f"steps run eagerly, not captured: each {' and '.join(obstacles)}", write=tqdm.write)
        return result

    def capture(self, images, labels):
        """Records both passes, without running them. A failure ends the run: PyTorch does not recover from it."""
        self.images, self.labels = images.clone(), labels.clone()
        self.graph = torch.cuda.CUDAGraph()
        try:  # thread_local: other threads may use the GPU meanwhile
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self.eager(self.images, self.labels, 1.0)
        except RuntimeError as error:
            error = error.__context__ or error  # the error in the step, not that of ending the capture
            if out_of_memory(error):  # not as a cause, which is lost where bench.py sends the error to its parent
                raise error from None
            reason = str(error).partition("\n")[0]
            raise Refused(f"a step of this net cannot be captured ({reason}): choose --no-capture", status=1) from error
        self.fixed = [parameter.grad for parameter in self.parameters]


@contextlib.contextmanager
def noted_obstacles():
    """Yields a list, filled at exit with what a CUDA graph cannot repeat: waits for the device, host random numbers."""
    obstacles, state = [], random_state()
    with warnings.catch_warnings(record=True, action="always") as noted:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield obstacles
        finally:
            torch.cuda.set_sync_debug_mode(before)
    if any("called a synchronizing" in str(each.message) for each in noted):
        obstacles.append("waits for the device")
    if random_state() != state:
        obstacles.append("draws random numbers on the host")


def random_state():
    """The state of Python's, NumPy's and PyTorch's generators on the host."""
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()))  # noqa: NPY002


def make_optimizer(net, args):
    """The paper's SGD, or Adam or RMSprop with PyTorch's defaults; weight decay on all parameters."""
    options = {"weight_decay": args.weight_decay} | ({} if args.lr is None else {"lr": args.lr})
    if args.opt == "rmsprop":
        return torch.optim.RMSprop(net.parameters(), **options)
    fused = next(net.parameters()).device.type in ("cpu", "cuda")
    if args.opt == "adam":
        return torch.optim.Adam(net.parameters(), fused=fused, **options)
    if args.opt != "sgd":
        raise ValueError(f"make_optimizer does not know --opt {args.opt}")
    nesterov = args.nesterov and args.momentum > 0
    optimizer = torch.optim.SGD(net.parameters(), momentum=args.momentum, nesterov=nesterov, fused=fused, **options)
    if args.precision == "fp16" and args.momentum:  # fused SGD leaves these uninitialised if the first step overflows
        for parameter in net.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def schedule(args):
    """The paper's learning rate of each epoch: divided by 10 at half and at three quarters of them. Adam and RMSprop: None."""
    if args.opt != "sgd":
        return [None] * args.epochs
    return [args.lr * 0.1 ** ((2 * epoch >= args.epochs) + (4 * epoch >= 3 * args.epochs)) for epoch in range(args.epochs)]


def compiled(model, mode, device):
    """The model, compiled in this mode unless it is None."""
    if mode == "auto":
        mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(model, mode=mode) if mode else model
