"""A dense block in memory that grows linearly with its depth, equal to the plain modules in outputs, buffers and gradients.

In a dense block every layer normalises the SAME feature maps x with the SAME batch statistics; only gamma and beta are its own.
So a layer's activation is a = relu(scale * x + shift), with rstd = 1 / sqrt(var + eps), scale = gamma rstd and
shift = beta - scale mean: one pass over the maps. It is not kept but computed again in the backward pass.

    memory     One buffer x (pixels by channels, channels last) holds all maps: a layer reads its first c channels and writes
               its own behind them, so nothing is ever concatenated, and in the end the buffer is the block's output. Kept for
               the backward pass are x, mean and rstd of each map, and the bottlenecks' outputs z: linear in depth. (The plain
               net keeps each layer's concatenation and its activation: quadratic in depth.)
    forward    Layer by layer: z = conv1(a), then BN-ReLU-Conv3x3 as usual.
    backward   From the last layer to the first, with one buffer G for the gradient of x, which starts as that of the output.
               With da the gradient of a where a > 0, else 0:   dbeta = sum da,   dgamma = sum da (x - mean) rstd.
               The gradient of a batch norm with respect to its input,
                   scale (da - dbeta / P - (x - mean) rstd dgamma / P),   P the number of pixels in the batch,
               is linear in da. Its first term is added to G at once. The other two are summed over the layers that read a map,
               and taken off once, when the map's own turn comes:
                   g = G - offset - (x - mean) rstd slope,   offset = sum of scale dbeta / P,   slope = sum of scale dgamma / P.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SLICE_PIXELS = 4096  # pixels at a time on a CPU; between 2,048 and 16,384 it makes little difference

aten = torch.ops.aten


@torch.compiler.disable  # a graph break: what torch.compile would trace is written out here
def dense_block(x, layers):
    """The maps (N, C, H, W) and, behind them, those that the layers add; all layers are Bottlenecks or all are SingleLayers.

    Differentiable once, with respect to x and all parameters. Updates every running statistic as the plain layers would. To
    be called for layers that are `computable` alone.
    """
    parameters = [p for layer in layers for p in layer_parameters(layer)]
    return DenseBlockFunction.apply(x, layers, *parameters)


def computable(x, layers):
    """Whether dense_block computes the layers: none of their modules is in evaluation mode, changed, hooked or parametrized.

    Asked before each pass, since a hook may come at any time: some 20 us a layer. A captured step does not ask.
    """
    if torch.nn.modules.module._has_any_global_hook() or not x.numel():
        return False
    channels = x.shape[1]
    for layer in layers:
        modules = untouched(layer, type(layers[0])) and untouched(layer.dropout, nn.Dropout) and all(map(plain, *halves(layer)))
        if not modules or (layer.bn1.num_features, layer.bn1.eps) != (channels, layers[0].bn1.eps):
            return False
        channels += new_channels(layer)
    return True


def halves(layer):
    """The batch norms, the convolutions behind them, and the sides of their kernels."""
    if hasattr(layer, "bn2"):
        return (layer.bn1, layer.bn2), (layer.conv1, layer.conv2), (1, 3)
    return (layer.bn1,), (layer.conv1,), (3,)


def untouched(module, kind):
    """Whether the module is of this very class, in training mode, without hooks and with the forward of its class."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is kind and module.training and not any(hooks) and "forward" not in module.__dict__


def plain(bn, conv, side):
    """Whether a batch norm has all that is its own, and the convolution is zero-padded to keep the size, and nothing else."""
    if not (untouched(bn, nn.BatchNorm2d) and untouched(conv, nn.Conv2d) and bn.affine and bn.track_running_stats):
        return False
    shape = conv.weight.shape[1:] == (bn.num_features, side, side) and conv.padding == (side // 2, side // 2)
    return shape and (conv.stride, conv.dilation, conv.bias, conv.padding_mode) == ((1, 1), (1, 1), None, "zeros")


def layer_parameters(layer):
    """gamma1, beta1, W1 and for a bottleneck also gamma2, beta2, W2."""
    return [p for bn, conv, _ in zip(*halves(layer), strict=True) for p in (bn.weight, bn.bias, conv.weight)]


def new_channels(layer):
    """The number of maps that the layer adds."""
    return (layer.conv2 if hasattr(layer, "conv2") else layer.conv1).out_channels


def out_channels(layers):
    """The number of maps behind the last layer."""
    return layers[-1].bn1.num_features + new_channels(layers[-1])


class DenseBlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers, *parameters):
        kernels = fitting_kernels(x, layers)
        with no_autocast(x.device), torch.cuda.device_of(x):  # where Triton launches its kernels
            buffer, mean, rstd, kept = forward_layers(x, layers, kernels)
        ctx.layers, ctx.kernels = layers, kernels
        maps = nchw(buffer[..., : out_channels(layers)])
        out = maps.contiguous(memory_format=torch.channels_last)  # a copy, where rows are aligned; PyTorch wants no gaps
        ctx.save_for_backward(buffer, mean, rstd, *parameters, *(tensor for tensors in kept for tensor in tensors))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        buffer, mean, rstd, *rest = ctx.saved_tensors  # parameters are saved so that one changed in the meantime is an error
        rest = rest[len(ctx.needs_input_grad) - 2 :]
        each = len(rest) // len(ctx.layers)
        kept = [rest[i : i + each] for i in range(0, len(rest), each)]
        with no_autocast(grad.device), torch.cuda.device_of(grad):
            maps = buffer[..., : grad.shape[1]]
            grad_x, parameter_grads = backward_layers(grad, maps, mean, rstd, ctx.layers, kept, ctx.kernels)
        return grad_x, None, *parameter_grads


def no_autocast(device):
    """All is computed in the type of the block's input; the meta device, on which its work is counted, knows no autocast."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------------------- forward


def forward_layers(x, layers, kernels):
    """The buffer with all maps (N, H, W, C or more), mean and 1 / std of each, and for each layer what else its backward needs.

    kernels is the module that computes the layers, None for this one.
    """
    if x[:, 0].numel() == 1:
        raise ValueError("expected more than 1 value per channel when training")  # as batch norm says it
    count_batches(layers)
    buffer = empty_maps(x, out_channels(layers), aligned=kernels is not None)
    maps = buffer[..., : out_channels(layers)]
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, rstd, var = torch.zeros(3, buffer.shape[-1], dtype=dtype, device=x.device)
    write_maps(maps, mean, rstd, var, 0, nhwc(x), layers[0].bn1.eps)
    kept = (kernels.forward if kernels else forward)(maps, mean, rstd, var, layers)
    update_running_statistics([layer.bn1 for layer in layers], mean, var)
    return buffer, mean, rstd, kept


def fitting_kernels(x, layers):
    """kernels.py where it computes these layers: bottlenecks without dropout on a GPU. None elsewhere."""
    if not (hasattr(layers[0], "bn2") and triton_runs(x.device)):
        return None
    kernels = load_kernels()
    return kernels if kernels.fit(x, layers) else None


@functools.cache
def load_kernels():
    """kernels.py from beside this file: torch.hub has taken the folder off the path, and others have modules of that name."""
    path = Path(__file__).with_name("kernels.py")
    loaded = sys.modules.get("kernels")
    if loaded and getattr(loaded, "__file__", None) == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location("kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.setdefault("kernels", module)
    return module


@functools.cache
def triton_runs(device):
    """Whether Triton is there and compiles for the device, or interprets its kernels, on a CPU, for tests."""
    if device.type != "cuda":
        return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    capable = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    compiler = any(map(shutil.which, (os.environ.get("CC") or "gcc", "clang")))  # of C: each kernel gets a small launcher
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return capable and compiler and headers and importlib.util.find_spec("triton") is not None


def empty_maps(x, channels, aligned):
    """Memory for maps (N, H, W, channels) of the batch x (N, C, H, W); the channels are rounded up to 8 if aligned."""
    n, _, h, w = x.shape
    return x.new_empty(n, h, w, -(-channels // 8) * 8 if aligned else channels)


def forward(maps, mean, rstd, var, layers):
    """Writes all new maps behind the block's input, and their statistics; returns what each layer's backward pass needs."""
    kept = []
    for layer in layers:
        c = layer.bn1.num_features
        out, tensors = forward_layer(maps[..., :c], mean[:c], rstd[:c], layer)
        write_maps(maps, mean, rstd, var, c, out, layer.bn1.eps)
        kept.append(tensors)
    return kept


def count_batches(layers):
    """As every batch norm does before it uses its momentum."""
    norms = [bn for layer in layers for bn in halves(layer)[0]]
    torch._foreach_add_([bn.num_batches_tracked for bn in norms], 1)


def momentum(bn):
    """The weight of this batch's statistics in the running ones."""
    return 1 / bn.num_batches_tracked.item() if bn.momentum is None else bn.momentum


def update_running_statistics(norms, mean, var):
    """As the batch norms do, each once and with its own momentum; each reads the first channels; var is the unbiased one."""
    weights = [momentum(bn) for bn in norms]
    for name, values in [("running_mean", mean), ("running_var", var)]:
        running = [getattr(bn, name) for bn in norms]
        torch._foreach_lerp_(running, [values[: len(r)].to(r.dtype) for r in running], weights)


def write_maps(maps, mean, rstd, var, first, new, eps):
    """Puts new maps (N, H, W, k) behind the first ones, and their statistics where they belong."""
    behind = slice(first, first + new.shape[-1])
    maps[..., behind] = new
    # Batch norm's own kernel takes them fastest; with a momentum of 1, its running statistics are the batch's.
    _, _, rstd[behind] = aten.native_batch_norm(nchw(new), None, None, mean[behind], var[behind], True, 1.0, eps)


def forward_layer(maps, mean, rstd, layer):
    """The layer's new maps (N, H, W, k), and (z, mean of z, 1 / std of z, dropout masks of z and of the new maps)."""
    z, mask1 = dropout(first_convolution(maps, mean, rstd, layer), layer.dropout.p)
    if not hasattr(layer, "bn2"):
        return z, (None, None, None, mask1, None)
    bn = layer.bn2
    b, mean2, rstd2 = batch_norm_relu(z, bn)
    new, mask2 = dropout(nhwc(F.conv2d(nchw(b), layer.conv2.weight.to(b.dtype), padding=1)), layer.dropout.p)
    return new, (z, mean2, rstd2, mask1, mask2)


def batch_norm_relu(z, bn):
    """relu of the batch norm of z (N, H, W, c); mean and 1 / std of z; the running statistics are updated."""
    parameters = bn.weight, bn.bias, bn.running_mean, bn.running_var, True, momentum(bn), bn.eps
    b, mean, rstd = aten._native_batch_norm_legit(nchw(z), *parameters)
    return nhwc(b.relu_()), mean, rstd


def first_convolution(maps, mean, rstd, layer):
    """conv1(relu(bn1(maps))), slice by slice."""
    bn, weight = layer.bn1, layer.conv1.weight.to(maps.dtype)
    out = maps.new_empty(*maps.shape[:3], weight.shape[0])
    for part, (scratch,) in slices(maps, scratch=1):
        a = activate(maps[part], mean, rstd, bn, scratch)
        if weight.shape[2] == 1:  # a matrix product
            torch.mm(rows(a), weight.flatten(1).t(), out=rows(out[part]))
        else:
            out[part] = nhwc(F.conv2d(nchw(a), weight, padding=1))
    return out


def activate(x, mean, rstd, bn, out=None):
    """Batch norm and relu of maps (n, H, W, c)."""
    scale = bn.weight * rstd
    shift = bn.bias - scale * mean  # both in float32, whatever the type of the maps
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x) if out is None else out).relu_()


def dropout(x, rate):
    """(x with dropout, the mask of what stays); drawn as F.dropout draws it, so that the same seed gives the same mask."""
    if not rate:
        return x, None
    mask = torch.empty_like(nchw(x)).bernoulli_(1 - rate)
    return x * nhwc(mask) / (1 - rate), nhwc(mask).bool()


def slices(maps, scratch):
    """Yields the batch (N, H, W, C) in parts of whole images, and for each part so many tensors to compute in.

    On a CPU the parts are small and the tensors always the same, so that all stays in the cache. Elsewhere the one part is the
    whole batch and the tensors are None, for torch to allocate.
    """
    n, h, w, _ = maps.shape
    on_cpu = maps.device.type == "cpu"
    step = min(n, max(1, SLICE_PIXELS // (h * w))) if on_cpu else n
    buffers = [maps.new_empty(step, *maps.shape[1:]) if on_cpu else None for _ in range(scratch)]
    for first in range(0, n, step):
        yield slice(first, first + step), [b if b is None else b[: n - first] for b in buffers]


def rows(x):
    """(N, H, W, C) as a matrix with a row for each pixel."""
    return x.view(-1, x.shape[-1])


def nchw(x):
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------------------------ backward


def backward_layers(grad, maps, mean, rstd, layers, kept, kernels):
    """Gradient of the block's input (N, C, H, W), and those of all layers' parameters in the order of layer_parameters."""
    grads = empty_maps(grad, grad.shape[1], aligned=kernels is not None)[..., : grad.shape[1]]  # G of the derivation
    grads.copy_(nhwc(grad))
    moments = torch.zeros(2, len(mean), dtype=mean.dtype, device=mean.device)  # offset and slope of the derivation
    parameter_grads = (kernels.backward if kernels else backward)(grads, maps, mean, rstd, moments, layers, kept)
    old = slice(layers[0].bn1.num_features)
    return nchw(through_statistics(grads[..., old], maps[..., old], mean[old], rstd[old], moments[:, old])), parameter_grads


def backward(grads, maps, mean, rstd, moments, layers, kept):
    """Takes G and the moments to those of the block's input; returns the gradients of all layers' parameters."""
    parameter_grads = []
    for layer, tensors in zip(reversed(layers), reversed(kept), strict=True):
        c = layer.bn1.num_features
        new = slice(c, c + new_channels(layer))
        grad_new = through_statistics(grads[..., new], maps[..., new], mean[new], rstd[new], moments[:, new])
        grad_z, second = backward_second(grad_new, layer, *tensors)
        first = backward_first(grad_z, grads[..., :c], maps[..., :c], mean[:c], rstd[:c], moments[:, :c], layer)
        parameter_grads = [*first, *second, *parameter_grads]
    return parameter_grads


def through_statistics(grad, x, mean, rstd, moments):
    """Takes off a gradient G (n, H, W, c) what mean and variance of the maps x pass on: the end of the derivation."""
    offset, slope = moments
    return (grad - offset).addcmul_(x - mean, slope * rstd, value=-1).to(grad.dtype)


def backward_second(grad, layer, z, mean2, rstd2, mask1, mask2):
    """From the gradient of the new maps to that of z; and the gradients of gamma2, beta2, W2, of which SingleLayer has none."""
    if z is None:
        return undo_dropout(grad, mask1, layer.dropout.p), []
    grad = undo_dropout(grad, mask2, layer.dropout.p)
    bn, weight = layer.bn2, layer.conv2.weight.to(z.dtype)
    b = activate(z, mean2, rstd2, bn)
    grad_b, grad_w = convolution_backward(grad, b, weight, out=None)
    grad_z, *grads_of_bn = batch_norm_relu_backward(grad_b, b, z, mean2, rstd2, bn)
    return undo_dropout(grad_z, mask1, layer.dropout.p), [*grads_of_bn, grad_w]


def batch_norm_relu_backward(grad, b, z, mean, rstd, bn):
    """From the gradient of b = relu(batch norm of z) to that of z; and the gradients of gamma and beta."""
    grad = aten.threshold_backward(grad, b, 0)
    grad_z, grad_gamma, grad_beta = aten.native_batch_norm_backward(
        nchw(grad), nchw(z), bn.weight, None, None, mean, rstd, True, bn.eps, [True, True, True]
    )
    return nhwc(grad_z), grad_gamma, grad_beta


def backward_first(grad_z, grads, maps, mean, rstd, moments, layer):
    """Adds the layer's part to G and to the moments; returns the gradients of gamma1, beta1, W1."""
    bn, weight = layer.bn1, layer.conv1.weight.to(maps.dtype)
    grads_of_bn, grads_of_weight = [], []
    for part, (scratch, scratch_da) in slices(maps, scratch=2):
        a = activate(maps[part], mean, rstd, bn, scratch)
        da, grad_w = convolution_backward(grad_z[part], a, weight, scratch_da)
        grads_of_bn.append(accumulate(da, a, maps[part], mean, rstd, bn.weight, grads[part]))
        grads_of_weight.append(grad_w.to(layer.conv1.weight.dtype))
    grad_beta, grad_gamma = grad_bn = functools.reduce(torch.add, grads_of_bn)
    moments.addcmul_(bn.weight * rstd, grad_bn, value=1 / maps[..., 0].numel())
    return grad_gamma, grad_beta, functools.reduce(torch.add, grads_of_weight)


def accumulate(da, a, x, mean, rstd, gamma, grads):
    """Masks da by the relu, adds scale * da to grads in place; returns the gradients of beta and gamma (2, c).

    The contents of a and da are lost.
    """
    aten.threshold_backward.grad_input(da, a, 0, grad_input=da)
    da_x = torch.mul(da, x, out=a)
    grads.addcmul_(da, gamma * rstd)
    grad_beta, sum_da_x = (values.sum(dim=(0, 1, 2), dtype=mean.dtype) for values in (da, da_x))
    return torch.stack([grad_beta, (sum_da_x - mean * grad_beta) * rstd])


def convolution_backward(grad, x, weight, out):
    """Gradients of the input (N, H, W, C), which may be written into out, and of the weight; of a 1x1 or padded 3x3 kernel."""
    if weight.shape[2] == 1:  # two matrix products
        grad_x = torch.mm(rows(grad), weight.flatten(1), out=None if out is None else rows(out)).view(x.shape)
        return grad_x, (rows(grad).t() @ rows(x)).view(weight.shape)
    grad_x, grad_w, _ = aten.convolution_backward(
        nchw(grad), nchw(x), weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return nhwc(grad_x), grad_w


def undo_dropout(grad, mask, rate):
    return grad if mask is None else grad * mask / (1 - rate)
