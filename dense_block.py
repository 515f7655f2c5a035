"""A dense block in memory that grows linearly with its depth, equal to the plain modules in outputs, buffers and gradients.

In a dense block every layer normalises the SAME feature maps with the SAME batch statistics; only gamma and beta are its own.
So a layer's activation is a = relu(scale * x + shift), with scale = gamma / sqrt(var + eps) and shift = beta - scale * mean:
one pass over the maps. It is not kept but computed again in the backward pass, slice by slice, while a slice is in the cache.

    memory     One buffer x (pixels by channels, channels last) holds all maps: a layer reads its first c channels and writes
               its own behind them, so nothing is ever concatenated, and in the end the buffer is the block's output. Kept for
               the backward pass are x, mean and var of each map, and the bottlenecks' outputs z: linear in depth. (The plain
               net keeps each layer's concatenation and its activation: quadratic in depth.)
    forward    Layer by layer: z = conv1(a), then BN-ReLU-Conv3x3 as usual.
    backward   From the last layer to the first, with one buffer G for the gradient of x, which starts as that of the output.
               With da the gradient of a where a > 0, else 0:   dbeta = sum da,   dgamma = sum da (x - mean) / sqrt(var + eps).
               The gradient of a batch norm with respect to its input,
                   scale (da - mean(da) - (x - mean) / (var + eps) mean(da (x - mean))),
               is linear in da. Its first term is added to G at once. The other two are, but for factors, dbeta and dgamma; they
               are summed over the layers that read a map, and taken off once, when the map's own turn comes:
                   g = G - offset / P - (x - mean) slope / P,   P the number of pixels in the batch,
                   offset = sum over the layers of scale dbeta,   slope = that of scale dgamma / sqrt(var + eps).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SLICE_PIXELS = 4096  # pixels at a time on a CPU: a slice of activations stays in the cache

aten = torch.ops.aten


@torch.compiler.disable  # a graph break: what torch.compile would trace is written out here
def dense_block(x, layers):
    """The maps (N, C, H, W) and, behind them, those that the layers add; all layers are Bottlenecks or all are SingleLayers.

    Differentiable once, with respect to x and all parameters. Updates every running statistic as the plain layers would.
    ValueError if a batch norm is not a plain one: its statistics would not be those of the others.
    """
    if any(type(layer.bn1) is not nn.BatchNorm2d for layer in layers):
        raise ValueError("the efficient dense block needs plain batch norms: make the net with efficient=False")
    parameters = [p for layer in layers for p in layer_parameters(layer)]
    return DenseBlock.apply(x, layers, *parameters)


def layer_parameters(layer):
    """gamma1, beta1, W1 and for a bottleneck also gamma2, beta2, W2."""
    first = [layer.bn1.weight, layer.bn1.bias, layer.conv1.weight]
    return first + [layer.bn2.weight, layer.bn2.bias, layer.conv2.weight] if hasattr(layer, "bn2") else first


def new_channels(layer):
    """The number of maps that the layer adds."""
    return (layer.conv2 if hasattr(layer, "conv2") else layer.conv1).out_channels


class DenseBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers, *parameters):
        with torch.autocast(x.device.type, enabled=False):
            maps, mean, var, kept = forward_layers(x.to(working_dtype(x)), layers)
        ctx.layers = layers
        out = nchw(maps)
        ctx.save_for_backward(out, mean, var, *parameters, *(tensor for tensors in kept for tensor in tensors))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        out, mean, var, *rest = ctx.saved_tensors  # parameters are saved so that one changed in the meantime is an error
        n = len(ctx.layers)
        kept = [rest[i : i + 5] for i in range(len(rest) - 5 * n, len(rest), 5)]
        with torch.autocast(grad.device.type, enabled=False):
            grad_x, parameter_grads = backward_layers(grad, nhwc(out), mean, var, ctx.layers, kept)
        return grad_x, None, *parameter_grads


def working_dtype(x):
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# ------------------------------------------------------------------------------------------------------------- forward


def forward_layers(x, layers):
    """All maps (N, H, W, C), mean and var of each (C,), and for each layer what its backward pass needs besides them."""
    n, c, h, w = x.shape
    new = [new_channels(layer) for layer in layers]
    maps = x.new_empty(n, h, w, c + sum(new))
    mean, var = torch.empty(2, c + sum(new), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    write_maps(maps, mean, var, 0, nhwc(x))
    kept = []
    for layer, k in zip(layers, new, strict=True):
        out, tensors = forward_layer(maps[..., :c], mean[:c], var[:c], layer)
        write_maps(maps, mean, var, c, out)
        kept.append(tensors)
        c += k
    return maps, mean, var, kept


def write_maps(maps, mean, var, first, new):
    """Puts new maps (N, H, W, k) behind the first ones, and their statistics where they belong."""
    behind = slice(first, first + new.shape[-1])
    maps[..., behind] = new
    var[behind], mean[behind] = torch.var_mean(new.to(var.dtype), dim=(0, 1, 2), correction=0)


def forward_layer(maps, mean, var, layer):
    """The layer's new maps (N, H, W, k), and (z, mean of z, 1 / std of z, dropout masks of z and of the new maps)."""
    update_running_statistics(layer.bn1, mean, var, count=maps[..., 0].numel())
    z, mask1 = dropout(first_convolution(maps, mean, var, layer), layer.dropout.p)
    if not hasattr(layer, "bn2"):
        return z, (None, None, None, mask1, None)
    bn = layer.bn2
    b, mean2, rstd2 = aten.native_batch_norm(
        nchw(z), bn.weight, bn.bias, bn.running_mean, bn.running_var, True, momentum(bn), bn.eps
    )
    new, mask2 = dropout(nhwc(F.conv2d(b.relu_(), layer.conv2.weight.to(b.dtype), padding=1)), layer.dropout.p)
    return new, (z, mean2, rstd2, mask1, mask2)


def first_convolution(maps, mean, var, layer):
    """conv1(relu(bn1(maps))), slice by slice."""
    weight = layer.conv1.weight.to(maps.dtype)
    scale, shift = scale_and_shift(layer.bn1, mean, var, maps.dtype)
    out = maps.new_empty(*maps.shape[:3], weight.shape[0])
    (scratch,) = scratch_buffers(maps, 1)
    for part in slices(maps):
        a = activate(maps[part], scale, shift, scratch[: len(maps[part])])
        if weight.shape[2] == 1:  # a matrix product
            torch.mm(rows(a), weight.flatten(1).t(), out=rows(out[part]))
        else:
            out[part] = nhwc(F.conv2d(nchw(a), weight, padding=1))
    return out


def activate(x, scale, shift, out):
    """relu(scale * x + shift), written into out: batch norm and relu of maps (n, H, W, c)."""
    return torch.addcmul(shift, x, scale, out=out).relu_()


def scale_and_shift(bn, mean, var, dtype):
    """Batch norm as scale * x + shift."""
    scale = bn.weight * (var + bn.eps).rsqrt()
    return scale.to(dtype), (bn.bias - scale * mean).to(dtype)


def update_running_statistics(bn, mean, var, count):
    """As a batch norm does in its forward pass: once, with its own momentum, with the unbiased variance."""
    if count == 1:
        raise ValueError("expected more than 1 value per channel when training")  # as batch norm says it
    factor = momentum(bn)
    bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), factor)
    bn.running_var.lerp_((var * (count / (count - 1))).to(bn.running_var.dtype), factor)


def momentum(bn):
    """Counts the batch, and returns the weight of its statistics in the running ones."""
    bn.num_batches_tracked += 1
    return 1 / bn.num_batches_tracked.item() if bn.momentum is None else bn.momentum


def dropout(x, rate):
    """(x with dropout, the mask of what stays); drawn as F.dropout draws it, so that the same seed gives the same mask."""
    if not rate:
        return x, None
    mask = torch.empty_like(nchw(x)).bernoulli_(1 - rate)
    return x * nhwc(mask) / (1 - rate), nhwc(mask).bool()


def slices(maps):
    """The batch (N, H, W, C) in parts of whole images: small ones on a CPU, whose cache is what counts, else all at once."""
    n, h, w, _ = maps.shape
    step = max(1, SLICE_PIXELS // (h * w)) if maps.device.type == "cpu" else n
    return [slice(first, first + step) for first in range(0, n, step)]


def scratch_buffers(maps, number):
    """Room for the activations of one slice of maps, allocated once for all slices."""
    images = max(len(maps[part]) for part in slices(maps))
    return maps.new_empty(number, images, *maps.shape[1:])


def rows(x):
    """(N, H, W, C) as a matrix with a row for each pixel."""
    return x.view(-1, x.shape[-1])


def nchw(x):
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------------------------ backward


def backward_layers(grad, maps, mean, var, layers, kept):
    """Gradient of the block's input (N, C, H, W), and those of all layers' parameters in the order of layer_parameters."""
    grads = nhwc(grad).clone(memory_format=torch.contiguous_format)  # G of the derivation
    offset, slope = torch.zeros(2, grads.shape[-1], dtype=mean.dtype, device=mean.device)
    parameter_grads = []
    c = grads.shape[-1]
    for layer, tensors in zip(reversed(layers), reversed(kept), strict=True):
        last, c = c, c - new_channels(layer)
        grad_new = through_statistics(grads, maps, mean, offset, slope, slice(c, last))
        grad_z, second = backward_second(grad_new, layer, *tensors)
        first = backward_first(grad_z, grads[..., :c], maps[..., :c], mean[:c], var[:c], offset[:c], slope[:c], layer)
        parameter_grads = [*first, *second, *parameter_grads]
    return nchw(through_statistics(grads, maps, mean, offset, slope, slice(0, c))), parameter_grads


def through_statistics(grads, maps, mean, offset, slope, part):
    """Takes off G, for the channels `part`, what their mean and variance pass on: the end of the derivation."""
    slope = slope[part] / maps[..., 0].numel()
    offset = mean[part] * slope - offset[part] / maps[..., 0].numel()
    return torch.addcmul(grads[..., part] + offset.to(grads.dtype), maps[..., part], slope.to(grads.dtype), value=-1)


def backward_second(grad, layer, z, mean2, rstd2, mask1, mask2):
    """From the gradient of the new maps to that of z; and the gradients of gamma2, beta2, W2, of which SingleLayer has none."""
    if z is None:
        return undo_dropout(grad, mask1, layer.dropout.p), []
    grad = undo_dropout(grad, mask2, layer.dropout.p)
    bn, weight = layer.bn2, layer.conv2.weight.to(z.dtype)
    scale = bn.weight * rstd2
    b = activate(z, scale.to(z.dtype), (bn.bias - scale * mean2).to(z.dtype), torch.empty_like(z))
    grad_b, grad_w = convolution_backward(grad, b, weight, out=None)
    grad_b = aten.threshold_backward(grad_b, b, 0)
    grad_z, grad_gamma, grad_beta = aten.native_batch_norm_backward(
        nchw(grad_b), nchw(z), bn.weight, None, None, mean2, rstd2, True, bn.eps, [True, True, True]
    )
    return undo_dropout(nhwc(grad_z), mask1, layer.dropout.p), [grad_gamma, grad_beta, grad_w]


def backward_first(grad_z, grads, maps, mean, var, offset, slope, layer):
    """Adds the layer's part to G, and to the sums that through_statistics needs; returns the gradients of gamma1, beta1, W1."""
    bn, weight = layer.bn1, layer.conv1.weight.to(maps.dtype)
    scale, shift = scale_and_shift(bn, mean, var, maps.dtype)
    sum_da, sum_da_x = torch.zeros(2, len(mean), dtype=mean.dtype, device=mean.device)
    grad_w = torch.zeros_like(layer.conv1.weight)
    scratch, scratch_da = scratch_buffers(maps, 2)
    for part in slices(maps):
        images = slice(len(maps[part]))
        a = activate(maps[part], scale, shift, scratch[images])
        da, dw = convolution_backward(grad_z[part], a, weight, scratch_da[images])
        sums = accumulate(da, a, maps[part], scale, grads[part])
        sum_da += sums[0]
        sum_da_x += sums[1]
        grad_w += dw
    rstd = (var + bn.eps).rsqrt()
    grad_gamma = (sum_da_x - mean * sum_da) * rstd
    offset += bn.weight * rstd * sum_da
    slope += bn.weight * rstd.square() * grad_gamma
    return grad_gamma, sum_da, grad_w


def accumulate(da, a, x, scale, grads):
    """Masks da by the relu, adds scale * da to grads, both in place; returns the sums over all pixels of da and of da * x.

    The contents of a are lost.
    """
    aten.threshold_backward.grad_input(da, a, 0, grad_input=da)
    grads.addcmul_(da, scale)
    return rows(da).sum(dim=0), rows(torch.mul(da, x, out=a)).sum(dim=0)


def convolution_backward(grad, x, weight, out):
    """Gradients of the input, which may be written into out, and of the weight; of a 1x1 or a padded 3x3 convolution.

    Images are (N, H, W, channels).
    """
    if weight.shape[2] == 1:  # two matrix products
        torch.mm(rows(grad), weight.flatten(1), out=rows(out))
        return out, (rows(grad).t() @ rows(x)).view(weight.shape)
    grad_x, grad_w, _ = aten.convolution_backward(
        nchw(grad), nchw(x), weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return nhwc(grad_x), grad_w


def undo_dropout(grad, mask, rate):
    return grad if mask is None else grad * mask / (1 - rate)
