"""One pass of a net forward and backward as a dictionary of tensors, and how far apart two such passes are.

Shared by the scripts of this folder; imported, not run.
"""

import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F


def training_pass(net, images, labels, autocast=None):
    """The pass of one step of training: logits, loss and, as grad/<state-dict name>, the gradient of every parameter."""
    net.train()
    net.zero_grad()
    with autocast or contextlib.nullcontext():
        logits = net(images)
        loss = F.cross_entropy(logits, labels)
    loss.backward()
    gradients = {f"grad/{name}": parameter.grad for name, parameter in net.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients}


def running_statistics(net):
    return {f"buffer/{name}": buffer.clone() for name, buffer in net.named_buffers() if "running" in name}


def relative_error(ours, theirs):
    """max |ours - theirs| / max |theirs|, of whole tensors or arrays; infinite where a number is not finite.

    Element by element, a gradient that happens to be near zero would make the error look large where nothing is wrong.
    """
    ours, theirs = (torch.as_tensor(values).detach().cpu().double() for values in (ours, theirs))
    if ours.shape != theirs.shape:
        raise ValueError(f"the shapes {tuple(ours.shape)} and {tuple(theirs.shape)} differ")
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    return error if error < float("inf") else float("inf")  # NaN is not below it, either


def relative_errors(ours, theirs):
    """The relative error of each tensor of the dictionary `theirs`; both hold the same names."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"only one of the two sides has {sorted(ours.keys() ^ theirs.keys())}")
    return {name: relative_error(ours[name], theirs[name]) for name in theirs}


def worst(errors, prefix):
    """The name with the largest error among those that begin with prefix, and that error."""
    return max(((name, error) for name, error in errors.items() if name.startswith(prefix)), key=lambda pair: pair[1])


def randomize(net, seed):
    """Randomises what is initialised to 0 or 1: with BN weights 0.5 to 1.5 and biases -1 to 1 every gradient is exercised."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
        if isinstance(module, nn.BatchNorm2d | nn.Linear):
            nn.init.uniform_(module.bias, -1, 1, generator=generator)
    return net


def random_batch(num_images, num_classes, seed, size=32):
    """Images (N, 3, size, size) of normal random numbers in float32, and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, 3, size, size, generator=generator)
    return images, torch.randint(num_classes, (num_images,), generator=generator)
