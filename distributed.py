"""Data-parallel training under torchrun; with a single process, everything here is a no-op.

torchrun sets the rank in the environment. Every rank holds the whole data set and takes its share of each batch, gradients
are averaged by DistributedDataParallel, and rank 0 alone writes the run's folder. NCCL connects GPUs, gloo CPUs.
"""

import atexit
import contextlib
import gc
import os
import sys
import warnings
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from endings import Refused, no_thread_left
from machine import use_device

TIMEOUT = timedelta(minutes=30)  # for the rendezvous, and while one rank downloads the data


class World(NamedTuple):
    rank: int = 0
    local_rank: int = 0  # among the processes of this machine: the number of its GPU
    size: int = 1
    attempt: int = 0  # how often torchrun has restarted all of them
    max_restarts: int = 0


def read_world(environment):
    """The world that torchrun describes in the environment; World() without torchrun."""
    if not environment.get("WORLD_SIZE"):  # empty counts as unset
        return World()
    values = {name: environment.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    values |= {name: environment.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")}
    world = World(*map(int, values.values())) if all(value.isdecimal() for value in values.values()) else None
    if not world or world.rank >= world.size:
        told = ", ".join(f"{name}={value}" for name, value in values.items())
        raise Refused(f"the environment describes no process of torchrun ({told}): use torchrun, or unset WORLD_SIZE")
    return world


@contextlib.contextmanager
def process_group(world, device, ending):
    """Connects the ranks inside a `with`; yields this rank's device. Refused if they cannot connect, or a rank has no GPU.

    ending: what endings.handle_errors yields; it holds the exit status when the program ends.
    """
    if world.size == 1:
        yield device
        return
    device = own_device(world, device)
    connect(world, device)
    atexit.register(free, dist.group.WORLD)
    try:
        yield device
    except BaseException:
        if device.type == "cuda":  # NCCL ends on all ranks together, and the others may be waiting for this one
            atexit.register(leave, ending)
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def own_device(world, device):
    """The rank's own GPU, or the CPU. Refused if it has no GPU of its own, or --device names one for all ranks."""
    if device.index is not None:
        raise Refused(f"all processes would share --device {device}: choose --device {device.type}, and each gets its own")
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if world.local_rank >= gpus:
            raise Refused(f"no GPU is left for process {world.local_rank}: --nproc-per-node {gpus} at most")
        device = torch.device("cuda", world.local_rank)
        use_device(device)
    return device


def connect(world, device):
    """Connects this rank to the others. Refused if that fails."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(f"attempt {world.attempt}", store)  # after a restart the old keys hold stale addresses
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:  # a port that is taken, an address that does not answer
        if no_thread_left(error):
            raise
        reason = str(error).splitlines()[0]
        raise Refused(f"rank {world.rank} cannot reach the others ({reason}): check --master-addr and --master-port") from error


def free(group):
    """At exit, frees what else refers to the group, such as DistributedDataParallel, which is in a reference cycle.

    atexit drops its argument next, the last reference to the group, whose destructor ends gloo's threads. A thread that is left
    may ask for the GIL during Python's shutdown, to free its last task's tensor: the process aborts, and the others hang.
    """
    gc.collect()


def leave(ending):
    """At exit, ends the process without waiting for the group; torchrun sees the failure and ends the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ending.status)


def check_batches(world, batch_size, num_images):
    """Refused unless every rank gets images of every batch, and equally many of a full one."""
    if batch_size % world.size:
        raise Refused(f"--batch-size {batch_size}, the whole batch, must be a multiple of the {world.size} processes")
    last = num_images % batch_size or batch_size
    if last < world.size:
        raise Refused(f"the last batch has {last} images for {world.size} processes: choose another --batch-size")


@contextlib.contextmanager
def first_rank_first(world):
    """On each machine the first process runs what is inside, such as a download; then the others do."""
    if world.local_rank > 0:
        barrier()
    try:
        yield
    finally:
        if world.size > 1 and world.local_rank == 0:
            barrier()


def barrier():
    """Waits for all ranks. NCCL is told which GPU to wait on, or it warns that it takes the current one."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def wrap(net, world, device):
    """The net as it is trained: gradients averaged over the ranks. Its buffers stay each rank's own, see broadcast_buffers."""
    if world.size == 1:
        return net
    device_ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # the new name of broadcast_buffers is not in 2.11
        return DistributedDataParallel(net, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def broadcast_buffers(net, world):
    """Gives all ranks the running statistics of rank 0, which are the ones that are saved."""
    if world.size > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)


def broadcast_object(value, world):
    """Rank 0's value, on all ranks."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def check_equal(value, world, what):
    """Refused, on all ranks, unless all have the same value."""
    if world.size == 1:
        return
    values = [None] * world.size
    dist.all_gather_object(values, value)
    others = [rank for rank in range(world.size) if values[rank] != values[0]]
    if others:
        raise Refused(f"{what} are not the same for all processes, rank {others[0]} differs from rank 0: make them the same")


def sum_over_ranks(tensor, world):
    """The sum of the ranks' tensors; with NCCL, which sums on GPUs only, it is on the GPU."""
    if world.size == 1:
        return tensor
    return AllReduce.apply(tensor.cuda() if dist.get_backend() == "nccl" else tensor)


class AllReduce(torch.autograd.Function):
    """The sum over the ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return AllReduce.apply(gradient)


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of the whole batch, over all ranks, on CPUs; torch.nn.SyncBatchNorm needs GPUs."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        x32 = x.to(self.weight.dtype)  # float32 where autocast gives bf16
        count = AllReduce.apply(x32.new_full((), x.numel() // x.shape[1]))
        mean = AllReduce.apply(x32.sum(dim=(0, 2, 3))) / count  #                               (C,)
        centred = x32 - mean.view(1, -1, 1, 1)  #                                               (N, C, H, W)
        var = AllReduce.apply(centred.square().sum(dim=(0, 2, 3))) / count  #                   (C,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


def synchronise_batch_norm(net, device):
    """Makes every BatchNorm2d of the net a synchronised one; parameters, buffers and their names stay."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm
