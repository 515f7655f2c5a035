"""A dense block whose memory grows linearly with depth; outputs, buffers and gradients equal those of the plain modules.

In a dense block every layer normalises the SAME feature maps x with the SAME batch statistics; only gamma and beta differ.
So a layer's activation is a = relu(scale * x + shift), with rstd = 1 / sqrt(var + eps), scale = gamma rstd and
shift = beta - scale mean: one pass over the maps. It is not stored but recomputed in the backward pass.

    memory     One buffer x (pixels by channels, channels last) holds all maps. A layer reads the first c channels and writes
               its own after them: nothing is concatenated, and in the end the buffer is the block's output. Stored for the
               backward pass are x, mean and rstd of each map, and the bottlenecks' outputs z: linear in depth. (Plain modules
               store each layer's concatenation and activation: quadratic in depth.)
    forward    Layer by layer: z = conv1(a), then BN-ReLU-Conv3x3 as usual.
    backward   From the last layer to the first. A buffer G for the gradient of x starts as the gradient of the output.
               With da the gradient of a where a > 0, else 0:   dbeta = sum da,   dgamma = sum da (x - mean) rstd.
               The gradient of a batch norm with respect to its input,
                   scale (da - dbeta / P - (x - mean) rstd dgamma / P),   P the number of pixels in the batch,
               is linear in da. Its first term is added to G at once. The other two are summed over the layers that read a map,
               and subtracted once, when the backward pass reaches that map:
                   g = G - offset - (x - mean) rstd slope,   offset = sum of scale dbeta / P,   slope = sum of scale dgamma / P.
    transition Reads x as a layer does. kernels.py fuses it with the block, whose output is then not materialised; without
               kernels.py, it runs as a plain module.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

ALIGNMENT = 1  # a pixel's maps are padded to a multiple of this
SLICE_PIXELS = 4096  # pixels at a time on a CPU; between 2,048 and 16,384 it makes little difference

aten = torch.ops.aten


@torch.compiler.disable  # a graph break: both passes are written by hand
def dense_block(x, layers, transition=None):
    """The maps x (N, C, H, W), followed by those that the layers add; all layers are Bottlenecks or all are SingleLayers.

    With a transition, its output for these maps. In training mode the result is differentiable once, with respect to x and
    all parameters, and running statistics are updated as in the plain layers. The layers must be `computable`, and a transition
    `joinable`.
    """
    kernels = fitting_kernels(x, layers)
    if not layers[0].training:
        return infer(x, layers, transition, kernels)
    block = Block(layers, transition, kernels or sys.modules[__name__])
    return DenseBlockFunction.apply(x, block, *block.parameters())


class Block(NamedTuple):
    """The modules of a block, and the functions that compute them."""

    layers: list
    transition: nn.Module | None
    backend: object  # kernels.py, or this module: both have write_maps, forward, backward and so on, by these names

    @property
    def modules(self):
        return [*self.layers, self.transition] if self.transition else self.layers

    def parameters(self):
        """gamma1, beta1, W1 of each module, and of a bottleneck also gamma2, beta2, W2."""
        return [p for module in self.modules for bn, conv in bn_convs(module) for p in (bn.weight, bn.bias, conv.weight)]

    def state(self):
        """What must not change before the backward pass: each parameter's storage and version counter, and the drop rates."""
        versions = [(p.untyped_storage()._cdata, None if p.is_inference() else p._version) for p in self.parameters()]
        return versions, [float(module.dropout.p) for module in self.modules]


def bn_convs(module):
    """[(batch norm, convolution)] of a layer or a transition."""
    if hasattr(module, "bn2"):
        return [(module.bn1, module.conv1), (module.bn2, module.conv2)]
    return [(module.bn1, module.conv1)]


def new_channels(layer):
    """The number of maps that the layer adds."""
    return bn_convs(layer)[-1][1].out_channels


def out_channels(layers):
    """The number of maps after the last layer."""
    return layers[-1].bn1.num_features + new_channels(layers[-1])


class DenseBlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block, *parameters):
        with no_autocast(x.device), torch.cuda.device_of(x):  # where Triton launches its kernels
            weights = weights_of(block.layers, x, block.backend)
            buffer, mean, rstd, kept = forward_block(x, block, weights)
            maps = buffer[..., : out_channels(block.layers)]
            transition = block.transition
            out = nchw(block.backend.transition_forward(maps, mean, rstd, transition) if transition else maps)
        ctx.block, ctx.weights, ctx.parameters, ctx.state = block, weights, parameters, block.state()
        # The whole buffer: hooks that pack saved tensors may lose the strides of its slice.
        ctx.save_for_backward(*parameters, buffer, mean, rstd, *(tensor for tensors in kept for tensor in tensors))
        return out.contiguous(memory_format=torch.channels_last)  # copies if rows are padded: PyTorch expects no gaps

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable misses some such cases
            raise RuntimeError("an efficient block cannot be differentiated twice (create_graph=True): use efficient=False")
        if torch._C._functorch.is_functorch_wrapped_tensor(grad) or torch._C._functorch.is_legacy_batchedtensor(grad):
            raise RuntimeError("an efficient block takes no batched gradients (is_grads_batched, vmap): use efficient=False")
        # Autograd detects a parameter that was changed in place, but not if saved-tensor hooks packed it.
        saved = ctx.saved_tensors[len(ctx.parameters) :]
        check_unchanged(ctx.block, ctx.parameters, ctx.state)
        # Hooks may return other strides, and kernels.py assumes contiguous tensors; without hooks, nothing is copied.
        buffer, mean, rstd, *rest = (each if each is None else each.contiguous() for each in saved)
        per_layer = len(rest) // len(ctx.block.layers)
        kept = [rest[i : i + per_layer] for i in range(0, len(rest), per_layer)]
        with no_autocast(grad.device), torch.cuda.device_of(grad):
            grad_x, parameter_grads = backward_block(nhwc(grad), buffer, mean, rstd, ctx.block, ctx.weights, kept)
        return grad_x, None, *map(with_strides_of, parameter_grads, ctx.parameters)


def check_unchanged(block, parameters, state):
    """RuntimeError if the block's parameters, their values or its drop rates were changed since its forward pass."""
    unchanged = False
    with contextlib.suppress(AttributeError):  # a module was replaced or removed
        unchanged = [*map(id, block.parameters())] == [*map(id, parameters)] and block.state() == state
    if not unchanged:
        what = "the parameters or drop rates of an efficient block"
        raise RuntimeError(f"{what} were changed before its backward pass: use efficient=False")


def with_strides_of(grad, parameter):
    """The gradient in the parameter's layout: DistributedDataParallel warns of other strides, even of a dimension of 1."""
    return grad if grad.stride() == parameter.stride() else torch.empty_like(parameter).copy_(grad)


def weights_of(layers, x, backend):
    """For each layer the weights of its convolutions, in the type and layout that the backend needs for maps like x."""
    by_layer = [[conv for _, conv in bn_convs(layer)] for layer in layers]
    by_place = [backend.cast(convolutions, x) for convolutions in zip(*by_layer, strict=True)]  # all conv1, all conv2
    return [*zip(*by_place, strict=True)]


def cast(convolutions, maps):
    """The convolutions' weights in the type of the maps."""
    return [conv.weight.to(maps.dtype) for conv in convolutions]


def no_autocast(device):
    """Everything is computed in the dtype of the block's input. The meta device, used for counting memory, has no autocast."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------------------- forward


def forward_block(x, block, weights):
    """(buffer (N, H, W, C or more) of all maps, mean and 1 / std of each map, what else each layer's backward pass needs)."""
    layers, backend = block.layers, block.backend
    torch._foreach_add_([bn.num_batches_tracked for module in block.modules for bn, _ in bn_convs(module)], 1)
    buffer = empty_maps(x, out_channels(layers), backend.ALIGNMENT)
    maps = buffer[..., : out_channels(layers)]
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, rstd, var = torch.zeros(3, buffer.shape[-1], dtype=dtype, device=x.device)
    backend.write_maps(maps, mean, rstd, var, nhwc(x), layers[0].bn1.eps)
    kept = backend.forward(maps, mean, rstd, var, layers, weights)
    update_running_statistics([module.bn1 for module in block.modules], mean, var)
    return buffer, mean, rstd, kept


def empty_maps(x, channels, alignment):
    """An empty tensor for maps (N, H, W, channels) of the batch x (N, C, H, W); channels are rounded up to the alignment."""
    n, _, h, w = x.shape
    return x.new_empty(n, h, w, -(-channels // alignment) * alignment)


def forward(maps, mean, rstd, var, layers, weights):
    """Writes all new maps after the block's input, and their statistics; returns what each layer's backward pass needs."""
    kept = []
    for layer, w in zip(layers, weights, strict=True):
        c = layer.bn1.num_features
        out, tensors = forward_layer(maps[..., :c], mean[:c], rstd[:c], layer, *w)
        write_maps(maps[..., c:], mean[c:], rstd[c:], var[c:], out, layer.bn1.eps)
        kept.append(tensors)
    return kept


def write_maps(maps, mean, rstd, var, new, eps):
    """Writes new maps (N, H, W, k) to the front of the maps, and their statistics to the front of mean, rstd and var."""
    k = new.shape[-1]
    maps[..., :k] = new
    # Batch norm's own kernel computes them fastest; with a momentum of 1, its running statistics are the batch's.
    _, _, rstd[:k] = aten.native_batch_norm(nchw(new), None, None, mean[:k], var[:k], True, 1.0, eps)


def forward_layer(maps, mean, rstd, layer, w1, w2=None):
    """The layer's new maps (N, H, W, k), and (z, mean of z, 1 / std of z, dropout masks of z and of the new maps)."""
    z, mask1 = dropout(first_convolution(maps, mean, rstd, layer.bn1, w1), layer.dropout.p)
    if not hasattr(layer, "bn2"):
        return z, (None, None, None, mask1, None)
    bn = layer.bn2
    parameters = bn.weight, bn.bias, bn.running_mean, bn.running_var, True, bn.momentum, bn.eps
    b, mean2, rstd2 = aten.native_batch_norm(nchw(z), *parameters)
    new, mask2 = dropout(nhwc(F.conv2d(b.relu_(), w2, padding=1)), layer.dropout.p)
    return new, (z, mean2, rstd2, mask1, mask2)


def first_convolution(maps, mean, rstd, bn, weight):
    """conv1(relu(bn1(maps))), slice by slice."""
    out = maps.new_empty(*maps.shape[:3], weight.shape[0])
    for part in slices(maps):
        a = activate(maps[part], mean, rstd, bn)
        if weight.shape[2] == 1:  # a matrix product
            torch.mm(rows(a), weight.flatten(1).t(), out=rows(out[part]))
        else:
            out[part] = nhwc(F.conv2d(nchw(a), weight, padding=1))
    return out


def activate(x, mean, rstd, bn):
    """Batch norm and relu of maps (n, H, W, c)."""
    scale = bn.weight * rstd
    shift = bn.bias - scale * mean  # both in float32, whatever the type of the maps
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x)).relu_()


def dropout(x, rate):
    """(x with dropout, the mask of elements kept, or None); drawn as F.dropout draws it for channels_last maps."""
    if not rate:
        return x, None
    rate = float(rate)  # from a tensor of rates, bernoulli_ would draw another mask
    mask = torch.empty_like(nchw(x)).bernoulli_(1 - rate)
    return x * nhwc(mask) / (1 - rate), nhwc(mask).bool()


def update_running_statistics(norms, mean, var):
    """As each batch norm would: with its own momentum, for the channels that it reads, which come first. var is unbiased."""
    weights = [float(bn.momentum) for bn in norms]
    for name, values in [("running_mean", mean), ("running_var", var)]:
        running = [getattr(bn, name) for bn in norms]
        torch._foreach_lerp_(running, [values[: len(r)].to(r.dtype) for r in running], weights)


def slices(maps):
    """Slices of the batch (N, H, W, C); on a CPU, of a few images each, so that intermediate results stay in the cache."""
    n, h, w, _ = maps.shape
    step = max(1, SLICE_PIXELS // (h * w)) if maps.device.type == "cpu" else n
    return [slice(first, first + step) for first in range(0, n, step)]


def rows(x):
    """(N, H, W, C) as a matrix with a row for each pixel."""
    return x.view(-1, x.shape[-1])


def nchw(x):
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------------------------ backward


def backward_block(grad, buffer, mean, rstd, block, weights, kept):
    """The gradient of the block's input (N, C, H, W), and those of block.parameters()."""
    backend, maps = block.backend, buffer[..., : out_channels(block.layers)]
    corrections = torch.zeros(2, buffer.shape[-1], dtype=mean.dtype, device=maps.device)  # offset, slope
    grads = torch.empty_like(buffer)[..., : maps.shape[-1]]  # G of the derivation
    grads_of_transition = []
    if block.transition:
        grads_of_transition = backend.transition_backward(grad, grads, maps, mean, rstd, corrections, block.transition)
    else:
        grads.copy_(grad)
    parameter_grads = backend.backward(grads, maps, mean, rstd, corrections, block.layers, weights, kept)
    old = slice(0, block.layers[0].bn1.num_features)
    grad_x = nchw(backend.through_statistics(grads, maps, mean, rstd, corrections, old))
    return grad_x, [*parameter_grads, *grads_of_transition]


def backward(grads, maps, mean, rstd, corrections, layers, weights, kept):
    """Updates G and the corrections, last layer to first; returns the gradients of all layers' parameters."""
    parameter_grads = []
    for layer, (w1, *w2), tensors in reversed([*zip(layers, weights, kept, strict=True)]):
        c = layer.bn1.num_features
        grad_new = through_statistics(grads, maps, mean, rstd, corrections, slice(c, c + new_channels(layer)))
        grad_z, second = backward_second(grad_new, layer, tensors, *w2)
        first = backward_first(grad_z, grads[..., :c], maps[..., :c], mean[:c], rstd[:c], corrections[:, :c], layer.bn1, w1)
        parameter_grads = [*first, *second, *parameter_grads]
    return parameter_grads


def through_statistics(grads, maps, mean, rstd, corrections, channels):
    """The gradient g of the derivation (n, H, W, channels), for a slice of the channels."""
    offset, slope = corrections[:, channels]
    centred = maps[..., channels] - mean[channels]
    return (grads[..., channels] - offset).addcmul_(centred, slope * rstd[channels], value=-1).to(grads.dtype)


def backward_second(grad, layer, tensors, weight=None):
    """From the gradient of the new maps to that of z; and the gradients of gamma2, beta2, W2, of which SingleLayer has none."""
    z, mean2, rstd2, mask1, mask2 = tensors
    if z is None:
        return dropout_backward(grad, mask1, layer.dropout.p), []
    bn = layer.bn2
    b = activate(z, mean2, rstd2, bn)
    grad_b, grad_w = convolution_backward(dropout_backward(grad, mask2, layer.dropout.p), b, weight)
    grad_b = nchw(aten.threshold_backward(grad_b, b, 0))  # through the ReLU
    arguments = bn.weight, None, None, mean2, rstd2, True, bn.eps, [True, True, True]
    grad_z, grad_gamma, grad_beta = aten.native_batch_norm_backward(grad_b, nchw(z), *arguments)
    return dropout_backward(nhwc(grad_z), mask1, layer.dropout.p), [grad_gamma, grad_beta, grad_w]


def backward_first(grad_z, grads, maps, mean, rstd, corrections, bn, weight):
    """Adds the layer's part to G and to the corrections; returns the gradients of gamma1, beta1, W1."""
    grads_of_bn, grads_of_weight = [], []
    for part in slices(maps):
        a = activate(maps[part], mean, rstd, bn)
        da, grad_w = convolution_backward(grad_z[part], a, weight)
        grads_of_bn.append(accumulate(da, a, maps[part], mean, rstd, bn.weight, grads[part]))
        grads_of_weight.append(grad_w.to(bn.weight.dtype))
    grad_beta, grad_gamma = grad_bn = sum(grads_of_bn)
    corrections.addcmul_(bn.weight * rstd, grad_bn, value=1 / maps[..., 0].numel())
    return grad_gamma, grad_beta, sum(grads_of_weight)


def accumulate(da, a, x, mean, rstd, gamma, grads):
    """Masks da by the relu, adds scale * da to grads in place; returns the gradients of beta and gamma (2, c).

    Overwrites a and da.
    """
    aten.threshold_backward.grad_input(da, a, 0, grad_input=da)
    grads.addcmul_(da, gamma * rstd)
    grad_beta = sum_of_pixels(da, mean.dtype)
    # In the dtype of the mean: products rounded to 16 bits lose too much when the mean of x or of da is large.
    if a.dtype == mean.dtype:
        sum_da_centred = sum_of_pixels(torch.sub(x, mean, out=a).mul_(da), mean.dtype)
    else:  # in quarters, each of which takes half the memory of a
        quarters = zip(x.chunk(4), da.chunk(4), strict=True)
        sum_da_centred = sum(sum_of_pixels(torch.sub(x, mean).mul_(da), mean.dtype) for x, da in quarters)
    return torch.stack([grad_beta, sum_da_centred * rstd])


def sum_of_pixels(x, dtype):
    """The sum over pixels (C,) of x (N, H, W, C), accumulated in this dtype."""
    return x.sum(dim=(0, 1, 2), dtype=dtype)


def convolution_backward(grad, x, weight):
    """Gradients of the input (N, H, W, C) and of the weight, of a 1x1 or padded 3x3 kernel."""
    if weight.shape[2] == 1:  # two matrix products
        return (rows(grad) @ weight.flatten(1)).view(x.shape), nchw((rows(grad).t() @ rows(x)).view(len(weight), 1, 1, -1))
    grad_x, grad_w, _ = aten.convolution_backward(
        nchw(grad), nchw(x), weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return nhwc(grad_x), grad_w


def dropout_backward(grad, mask, rate):
    return grad if mask is None else grad * mask / (1 - float(rate))


# --------------------------------------------------------------------------------------- where kernels.py computes them


def fitting_kernels(x, layers):
    """kernels.py if it computes these layers: bottlenecks without dropout, on a GPU; else None."""
    if not (hasattr(layers[0], "bn2") and triton_runs(x.device)):
        return None
    kernels = load_kernels()
    return kernels if kernels.computes(x, layers) else None


@functools.cache
def load_kernels():
    """kernels.py beside this file, by its path: torch.hub removes the folder from sys.path; others may share that name."""
    spec = importlib.util.spec_from_file_location("kernels", Path(__file__).with_name("kernels.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def triton_runs(device):
    """Whether Triton is installed and can compile for the device; on a CPU, whether it interprets kernels, as in tests."""
    if device.type != "cuda":
        return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    capable = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    return capable and importlib.util.find_spec("triton") is not None and triton_starts()


def triton_starts():
    """Whether Triton finds what it needs: see triton_obstacle. Warns if not."""
    obstacle = triton_obstacle()
    if obstacle:
        warnings.warn(f"Triton does not start ({obstacle}), so kernels.py is not used", stacklevel=1)
    return not obstacle


def triton_obstacle():
    """What Triton lacks: a C compiler and Python's headers for each kernel's launcher, the driver's library, a cache folder."""
    compiler = os.environ.get("CC") or "gcc"
    if not (shutil.which(compiler) or shutil.which("clang")):
        return f"no C compiler {compiler}"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.exists():
        return f"no {headers}, of a package such as python3-dev"
    try:
        importlib.import_module("triton").runtime.driver.active.get_current_target()  # as each launch does
    except Exception as error:  # Triton raises nearly anything
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def infer(x, layers, transition, kernels):
    """dense_block in evaluation mode, on a GPU."""
    with no_autocast(x.device), torch.cuda.device_of(x):
        maps = empty_maps(x, out_channels(layers), kernels.ALIGNMENT)[..., : out_channels(layers)]
        maps[..., : x.shape[1]] = nhwc(x)
        kernels.infer(maps, layers, weights_of(layers, x, kernels))
        if transition:
            (rstd,) = kernels.running_rstd([transition.bn1])
            maps = kernels.transition_forward(maps, transition.bn1.running_mean, rstd, transition)
    return nchw(maps).contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------- whether a block is as it was made


def computable(x, layers):
    """Whether dense_block computes the layers: none of their modules is changed, hooked, parametrized or in another mode.

    Checked before each pass (some 50 us per layer), since a hook may be added at any time; not in a replayed CUDA graph.
    """
    kind, training, bottleneck = type(layers[0]), layers[0].training, hasattr(layers[0], "bn2")
    kernel_sizes = (1, 3) if bottleneck else (3,)
    if torch.compiler.is_compiling():  # a graph break, for blocks that train and are as made; torch.export takes none
        if not training or torch.compiler._is_exporting_flag:  # is_exporting() is always true here with PyTorch 2.11
            return False
        return all(as_made(layer, kind, kernel_sizes, training) for layer in layers) and computable_now(x, layers)
    if observed(x, training) or x.dim() != 4 or x[:, 0].numel() < 2:  # batch norm cannot take statistics of one pixel
        return False
    if not (all(as_made(layer, kind, kernel_sizes, training) for layer in layers) and connected(x, layers)):
        return False
    if not (training or fitting_kernels(x, layers)):
        return False
    return as_defined(kind, Definition.bottleneck if bottleneck else Definition.single_layer)


# Evaluated in each pass, not while tracing: a compiler's guards miss some changes, such as a replaced forward of one module,
# and would have it compile each net anew.
computable_now = torch.compiler.disable(computable)


@torch.compiler.disable  # evaluated in each pass: the compiler's guards miss some changes
def joinable(x, block, transition):
    """Whether dense_block computes the transition together with its block: kernels.py can, if both are unchanged."""
    layers = list(block)
    training = layers[0].training
    if not (untouched(block, type(block), training) and as_made(transition, type(transition), (1,), training)):
        return False
    kernels, bn = fitting_kernels(x, layers), transition.bn1
    alike = (bn.num_features, bn.eps) == (out_channels(layers), layers[0].bn1.eps)
    if not (alike and kernels is not None and kernels.computes_transition(x, transition)):
        return False
    return as_defined(type(block), Definition.block) and as_defined(type(transition), Definition.transition)


def observed(x, training):
    """Whether a tracer, functorch, forward-mode AD, a mode or a hook needs more of the block than its output and its gradient.

    In evaluation mode kernels.py computes only the output, so autograd or a dispatch mode counts as well.
    """
    function_modes, dispatch_modes = _get_current_function_mode_stack(), _get_current_dispatch_mode_stack()
    return (
        torch.nn.modules.module._has_any_global_hook()
        or type(x) not in (torch.Tensor, nn.Parameter, FakeTensor)  # a subclass may override operations, or run them twice
        or torch.jit.is_tracing()
        or get_proxy_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or any(type(mode) is not DeviceContext for mode in function_modes)  # may replace what a layer calls
        # Selective checkpointing skips operators; allow_mutation_on_saved_tensors copies tensors that are changed in place.
        or any(type(mode).__module__ in ("torch.utils.checkpoint", "torch.autograd.graph") for mode in dispatch_modes)
        or not (training or (type(x) is torch.Tensor and not dispatch_modes and not torch.is_grad_enabled()))
    )


def connected(x, layers):
    """Whether each layer reads all maps before it, with the eps of the first, and counts batches in tensors of its own."""
    channels, eps, counters = x.shape[1], layers[0].bn1.eps, []
    for layer in layers:
        if (layer.bn1.num_features, layer.bn1.eps) != (channels, eps):
            return False
        channels += new_channels(layer)
        counters += [id(bn.num_batches_tracked) for bn, _ in bn_convs(layer)]
    return len({*counters}) == len(counters)  # one call adds 1 to each; a shared one needs 2


def as_made(module, kind, kernel_sizes, training):
    """Whether a layer or transition is untouched and has the parts computed here, its convolutions of these kernel sizes."""
    dropout = getattr(module, "dropout", None)  # an edited module may lack parts, or have more
    if not (untouched(module, kind, training) and untouched(dropout, nn.Dropout, training)):
        return False
    if hasattr(module, "bn2") != (len(kernel_sizes) == 2):  # by which bn_convs tells a bottleneck
        return False
    for i, kernel_size in enumerate(kernel_sizes, start=1):
        bn, conv = getattr(module, f"bn{i}", None), getattr(module, f"conv{i}", None)
        if not (plain_norm(bn, training) and plain_convolution(conv, bn.num_features, kernel_size, training)):
            return False
    return dropout.p != 1  # if everything is dropped, the scale is 1 / 0


def untouched(module, kind, training):
    """Whether the module has exactly this class and its forward, is in this mode and has no hooks."""
    if type(module) is not kind or module.training != training:
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (hooks or "forward" in module.__dict__ or "_conv_forward" in module.__dict__)


def plain_norm(bn, training):
    """Whether bn is a BatchNorm2d with weight, bias, running statistics of its size, a counter and a momentum."""
    if not untouched(bn, nn.BatchNorm2d, training) or bn.momentum is None or not bn.track_running_stats:
        return False
    mean, var, counter = map(bn._buffers.get, ("running_mean", "running_var", "num_batches_tracked"))
    own = type(bn.weight) is type(bn.bias) is nn.Parameter  # unlike in torch.func.functional_call
    if not own or mean is None or var is None or counter is None:
        return False
    size = (bn.num_features,)
    return all(vector.shape == size and vector.is_contiguous() for vector in (bn.weight, bn.bias, mean, var))


def plain_convolution(conv, channels, kernel_size, training):
    """Whether conv is a Conv2d of stride 1 over all channels, without bias, with zero padding that preserves H and W."""
    if not untouched(conv, nn.Conv2d, training) or type(conv.weight) is not nn.Parameter:
        return False
    shape = conv.out_channels, channels, kernel_size, kernel_size
    settings = conv.padding, conv.padding_mode, conv.stride, conv.dilation, conv.groups, conv.bias
    return conv.weight.shape == shape and settings == ((kernel_size // 2,) * 2, "zeros", (1, 1), (1, 1), 1, None)


@torch.compiler.disable
def as_defined(kind, definition):
    """Whether the class's forward is this method of Definition and PyTorch's functions are unpatched. Warns if not."""
    same = code_of(kind.forward) == code_of(definition) and kind.__call__ is nn.Module.__call__ and called() == AS_IMPORTED
    if not same:
        told = f"{kind.__name__}.forward, or what it calls, differs from dense_block.Definition: it is called as it is"
        warnings.warn(told, stacklevel=1)
    return same


def code_of(function):
    """What a function does: its bytecode, the constants and names in it, and which modules F and torch are. None if unknown."""
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    return code and (code.co_code, code.co_consts, code.co_names, names.get("F"), names.get("torch"))


def called():
    """The functions of PyTorch that a layer or transition calls; somebody may replace them."""
    functions = F.relu, F.avg_pool2d, F.conv2d, F.batch_norm, F.dropout, torch.cat, torch.batch_norm, nn.Conv2d._conv_forward
    kinds = nn.BatchNorm2d, nn.Conv2d, nn.Dropout, nn.Sequential
    return *functions, nn.Module.__call__, *(kind.forward for kind in kinds), *(kind.__call__ for kind in kinds)


AS_IMPORTED = called()


class Definition(nn.Sequential):
    """What is computed here: the forward methods of densenet.py, word for word."""

    def bottleneck(self, x):
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        out = self.dropout(self.conv2(F.relu(self.bn2(out))))
        return torch.cat([x, out], dim=1)

    def single_layer(self, x):
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        return torch.cat([x, out], dim=1)

    def transition(self, x):
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        return F.avg_pool2d(out, kernel_size=2)

    def block(self, x):
        if self.runs_efficiently(x):
            return dense_block(x, list(self))
        return super().forward(x)
