"""Counts what a training step needs instead of measuring it: bytes kept and alive at once, bytes moved, kernel launches.

Shared by the scripts of this folder; imported, not run. On the meta device, whose tensors have a shape and no
data, a net of any size is counted in seconds, the whole batch at once: on a CPU --efficient works slice by slice, and has to
take real steps to be counted. Counted are PyTorch's own operations: --efficient as dense_block.py computes it, not the kernels
of kernels.py. The meta device has no autocast: what is counted is a step in fp32.
"""

import argparse
import math
import weakref

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from attic.torchvision_weights import torchvision_net
from distributed import World
from flags import make_net
from step import TrainingStep

aten = torch.ops.aten
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach, aten._unsafe_view}
OVERWRITING = {aten.copy_, aten.fill_, aten.zero_}  # they write their first argument, and do not read it

META = torch.device("meta")
NETS = ("torchvision", "torchvision-checkpointed", "plain", "efficient")


def net_of(name, args):
    """The net of NETS that has the layers of args; torchvision's follow a 3x3 convolution, and newly initialised."""
    net = make_net(argparse.Namespace(**vars(args) | {"efficient": name == "efficient"}))
    return torchvision_net(net, memory_efficient=name.endswith("checkpointed")) if name.startswith("torchvision") else net


def net_and_batch(device, name, args):
    """The net of NETS, channels last, and a batch of images and labels that are 0."""
    with device:
        images = torch.zeros(args.batch_size, 3, args.image_size, args.image_size)
        labels = torch.zeros(args.batch_size, dtype=torch.int64)
        return net_of(name, args).to(memory_format=torch.channels_last), images, labels


def step_on(device, name, args):
    """(step, forward): functions without arguments, of train.py's step and of its loss alone."""
    args = argparse.Namespace(**vars(args) | {"precision": "fp32", "compile": None, "capture": False})
    net, images, labels = net_and_batch(device, name, args)
    step = TrainingStep(net, args, device, World())
    step.begin_epoch(args.lr)
    for group in step.optimizer.param_groups if device == META else []:
        group["foreach"] = True  # one launch for all parameters, as on a GPU
    step(images, labels, 1.0)  # gives the optimiser its state
    return lambda: step(images, labels, 1.0), lambda: F.cross_entropy(step.model(images), labels)


# ------------------------------------------------------------------------------------------------------------ bytes alive


def kept_bytes(forward):
    """Bytes of all tensors that a forward pass makes and that are still alive after it: what the backward pass needs."""
    with LiveBytes() as live:
        loss = forward()
        kept = live.now
    del loss  # alive until here, and with it the graph
    return kept


def peak_bytes(step):
    """The largest sum of the bytes of all tensors that were made during a step and alive at once."""
    with LiveBytes() as live:
        step()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in before | self.alive:
                self.add(storage)
        return result

    def add(self, storage):
        identity, size = storage._cdata, storage.nbytes()  # on the meta device all have the address 0
        self.alive.add(identity)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, identity, size)

    def remove(self, identity, size):
        self.alive.discard(identity)
        self.now -= size


def tensors_in(structure):
    return filter(torch.is_tensor, torch.utils._pytree.tree_leaves(structure))


# ------------------------------------------------------------------------------------------------------------ bytes moved


def traffic_of(step):
    """The launches of a step on the meta device, as Traffic counts them."""
    with Traffic() as traffic:
        step()
    return traffic.launches


class Traffic(TorchDispatchMode):
    """The (bytes, floating-point operations) of every kernel launch.

    An operation counts as one launch, which reads every tensor that it is given once and writes every result once, a batch norm
    too; views and allocations are none. Only products and convolutions count as arithmetic.
    """

    def __init__(self):
        super().__init__()
        self.launches = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        size = bytes_moved(function, args, kwargs, result)
        if size:
            flops = flop_registry.get(function.overloadpacket, lambda *args, **kwargs: 0)
            self.launches.append((size, flops(*args, **kwargs, out_val=result)))
        return result


def bytes_moved(function, args, kwargs, result):
    """Bytes read and written by one operation; 0 for a view or an allocation."""
    if function.is_view or function.overloadpacket in ALLOCATIONS:
        return 0
    schema, total = function._schema, 0
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    for argument in schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        read = not (argument.is_out or (written and function.overloadpacket in OVERWRITING))
        total += (read + written) * size_of(given.get(argument.name))
    results = result if isinstance(result, tuple) else (result,)
    new = [value for value, returned in zip(results, schema.returns, strict=False) if returned.alias_info is None]
    return total + size_of(new)


def size_of(structure):
    """Bytes of all tensors in a structure; expanded dimensions count once."""
    shapes = [(t, zip(t.shape, t.stride(), strict=True)) for t in tensors_in(structure)]
    return sum(t.element_size() * math.prod(n for n, stride in sides if stride) for t, sides in shapes)
