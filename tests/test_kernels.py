"""The Triton kernels equal the plain modules: interpreted on a CPU, compiled where there is a GPU.

Triton 3.8 interprets products in bf16 wrongly, as products of integers: bf16 is for the GPU.
"""

import contextlib
import copy
import os
import sys
import types
from unittest import mock

import numpy
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from forked import Server
from test_dense_block import distance, efficient_twin, packed

import dense_block
from attic.comparison import random_batch, randomize, relative_error, training_pass
from densenet import Bottleneck, DenseBlock, DenseNet, SingleLayer, Transition, block_and_transition
from machine import DTYPES, set_precision

triton = pytest.importorskip("triton", reason="Triton is not there")
pytestmark = pytest.mark.xdist_group("kernels")  # one server interprets them


def version(module):
    return tuple(map(int, module.__version__.split(".")[:2]))


@pytest.fixture(scope="module")
def interpreter():
    """Starts processes in which Triton is imported to interpret its kernels."""
    if version(triton) < (3, 8) and version(numpy) >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.8 needs NumPy before 2.4")
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        server = Server(["test_kernels", "hubconf"])
    yield server.start
    server.stop()


@pytest.fixture
def interpreted(interpreter):
    """Calls a function of this file, by its name, in such a process; its assertions have to hold there."""

    def call(check, *arguments):
        code = f"import test_kernels; test_kernels.{check}{arguments!r}"
        done = interpreter(["-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}).wait()
        assert done.returncode == 0, done.stderr

    return call


def in_the_interpreter(check):
    """Makes a test of a function: that is called as the fixture `interpreted` calls one."""

    def test(interpreted):
        interpreted(f"{check.__name__}.check")

    test.check, test.__doc__ = check, check.__doc__
    return test


class BlockAndTransition(nn.Sequential):
    """What a DenseNet makes of the two."""

    def forward(self, x):
        return block_and_transition(*self, x)


def block_and_batch(growth_rate, channels, shape, layers=2, device="cpu", reduction=None):
    """A block of bottlenecks, images, and what its output is multiplied by for a gradient; with a transition that reduces."""
    torch.manual_seed(0)
    block = DenseBlock(Bottleneck, layers, channels, growth_rate, 0.0, efficient=False)
    images = torch.randn(shape[0], channels, *shape[1:])
    out_channels, (height, width) = channels + layers * growth_rate, shape[1:]
    if reduction:
        block = BlockAndTransition(block, Transition(out_channels, int(reduction * out_channels)))
        out_channels, height, width = int(reduction * out_channels), height // 2, width // 2
    target = torch.randn(shape[0], out_channels, height, width)
    return randomize(block, seed=0).to(device, memory_format=torch.channels_last), images.to(device), target.to(device)


def block_pass(block, images, target):
    """New maps or what the transition makes of all, gradients and running statistics of a pass of training, by name."""
    x = images.clone().requires_grad_()
    out = block(x)
    behind = 0 if isinstance(block, BlockAndTransition) else images.shape[1]
    (out * target).sum().backward()
    gradients = {f"grad/{name}": parameter.grad for name, parameter in block.named_parameters()}
    buffers = {name: buffer for name, buffer in block.named_buffers() if buffer.is_floating_point()}
    return {"new maps": out[:, behind:].detach(), "grad/images": x.grad, **gradients, **buffers}


def exact_pass(block, images, target):
    """In float64, without what is 0: with steady ReLUs, the gradient of a beta before a convolution and a batch norm."""
    exact = block_pass(copy.deepcopy(block).double(), images.double(), target.double())
    return {name: values for name, values in exact.items() if values.abs().max() > 1e-9}


def kernels_of(block, images):
    """The module whose kernels compute the block for these images, None if none do."""
    return dense_block.fitting_kernels(images, list(block[0] if isinstance(block, BlockAndTransition) else block))


def steady(block):
    """Each ReLU far from its edge, half of them open: what rounding moves across the edge would hide all else."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data = torch.where(torch.arange(len(module.bias), device=module.bias.device) % 2 == 0, 8.0, -8.0)
    return block


# ------------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("growth_rate", "channels", "shape", "reduction"),
    [(8, 10, (3, 7, 5), None), (12, 24, (2, 6, 6), 0.5), (24, 10, (1, 4, 6), 0.5), (5, 7, (2, 3, 9), 0.9)],
)
def test_maps_statistics_and_gradients_are_those_of_the_plain_modules(interpreted, growth_rate, channels, shape, reduction):
    interpreted("check_float32", growth_rate, channels, shape, reduction)


def check_float32(growth_rate, channels, shape, reduction):
    layers = 1 if growth_rate == 24 else 2
    block, images, target = block_and_batch(growth_rate, channels, shape, layers, reduction=reduction)
    with counted(kernels_of(block, images)) as calls:
        exact, ours = exact_pass(block, images, target), block_pass(efficient_twin(block), images, target)
    assert calls == {"forward": 1, "transition_forward": reduction is not None, "infer": 0}
    assert exact.keys() == ours.keys()
    for name, values in exact.items():
        assert relative_error(ours[name], values) < 3e-6, (name, relative_error(ours[name], values))


@in_the_interpreter
def test_a_transition_in_which_programs_take_several_turns():
    """Three turns of four pixels each, which it takes over 4,096 pixels to get; the last program has six pixels of 30."""
    kernels = dense_block.load_kernels()
    cdiv = kernels.cdiv
    kernels.cdiv = lambda n, each: 3 if each == 2048 else cdiv(n, each)
    torch.manual_seed(0)
    transition = steady(randomize(Transition(8, 4), seed=0))
    x, target = torch.randn(1, 8, 12, 10).requires_grad_(), torch.randn(1, 4, 6, 5)
    (transition(x) * target).sum().backward()
    maps = dense_block.nhwc(x.detach()).contiguous()
    var, mean = torch.var_mean(maps, dim=(0, 1, 2), correction=0)
    statistics, corrections = (mean, (var + transition.bn1.eps).rsqrt()), torch.zeros(2, 8)
    grads = torch.full_like(maps, float("nan"))
    ours = kernels.transition_backward(dense_block.nhwc(target), grads, maps, *statistics, corrections, transition)
    grad_x = kernels.through_statistics(grads, maps, *statistics, corrections, slice(0, 8))
    expected = transition.bn1.weight.grad, transition.bn1.bias.grad, transition.conv1.weight.grad
    for result, values in zip((*ours, dense_block.nchw(grad_x)), (*expected, x.grad), strict=True):
        assert relative_error(result, values) < 3e-6


@in_the_interpreter
def test_what_many_programs_leave_is_joined():
    """Of nine programs with eight pixels each, the last with six: in the interpreter four are read at a time."""
    kernels = dense_block.load_kernels()
    torch.manual_seed(0)
    pixels = 100 + torch.randn(70, 5)
    tiles = pixels.split(8)
    part = torch.stack([torch.stack([tile.mean(dim=0), (tile - tile.mean(dim=0)).square().sum(dim=0)]) for tile in tiles])
    statistics = torch.zeros(3, 8)
    kernels.join(part, tuple(statistics), 70, 8, 2, 0.1)
    var, mean = torch.var_mean(pixels.double(), dim=0)
    expected = torch.stack([mean, (var * 69 / 70 + 0.1).rsqrt(), var])
    torch.testing.assert_close(statistics[:, 2:7].double(), expected, rtol=1e-5, atol=0)
    assert (statistics[:, [0, 1, 7]] == 0).all()
    part, bn, none = torch.randn(9, 7), nn.BatchNorm2d(1), torch.zeros(1)
    sums = kernels.added_up(part, 0, bn, none, none, 70, 1, CORRECT=False)
    torch.testing.assert_close(sums, part.sum(dim=0), rtol=1e-5, atol=1e-6)


def test_weights_are_rounded_to_tf32_and_not_cut_off(monkeypatch):
    import kernels

    monkeypatch.setattr(kernels, "products", lambda maps: "tf32")
    conv = nn.Conv2d(20, 30, 3)
    (rounded,) = kernels.cast([conv], torch.empty(1))
    bits = conv.weight.detach().view(torch.int32)
    expected = (bits + 0x1000 & -0x2000).view(torch.float32)
    assert torch.equal(rounded, torch.where(bits & 0x1FFF == 0x1000, rounded, expected))  # but for ties
    assert (rounded.contiguous().view(torch.int32) & 0x1FFF == 0).all()


def test_products_of_float32_are_rounded_where_the_convolutions_of_pytorch_may_round_them(put_back):
    """On a GPU. A transition, whose product is cuBLAS's, is joined if that does the same."""
    import kernels

    maps = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(2, 8, 4, 4))
    for convolutions, matrices, kind, fits in [(0, 0, "tf32x3", 1), (0, 1, "tf32x3", 0), (1, 0, "tf32", 1), (1, 1, "tf32", 1)]:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = bool(convolutions), bool(matrices)
        assert kernels.products(maps) == kind
        assert kernels.computes_transition(maps, Transition(8, 4)) == bool(fits)


def test_a_transition_is_joined_for_maps_of_two_rows_and_columns_and_weights_of_float32():
    """For smaller maps PyTorch's pooling says that they are too small."""
    import kernels

    transition = Transition(8, 4)
    joined = [kernels.computes_transition(torch.empty(2, 8, *size), transition) for size in [(2, 2), (1, 4), (4, 1)]]
    transition.conv1.half()
    assert (joined, kernels.computes_transition(torch.empty(2, 8, 2, 2), transition)) == ([True, False, False], False)


@in_the_interpreter
def test_a_mean_large_against_the_deviation():
    """No tensor is more than three times as far from float64 as that of the plain modules in float32, and 2e-6."""
    block, images, target = block_and_batch(8, 10, (3, 5, 3))
    steady(block)
    images += 1000
    exact = exact_pass(block, images, target)
    plain, ours = (block_pass(each, images, target) for each in (copy.deepcopy(block), efficient_twin(block)))
    for name, values in exact.items():
        errors = [relative_error(each[name], values) for each in (plain, ours)]
        assert errors[1] < 3 * errors[0] + 2e-6, (name, errors)


def test_half_precision(interpreted):
    interpreted("check_rounding", "float16", 8, 10, (3, 5, 3), 0.5)
    interpreted("check_rounding", "float16", 8, 10, (3, 5, 3), None)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", [None, 0.5])
@pytest.mark.parametrize(
    ("precision", "growth_rate", "channels", "shape"),
    [
        ("bf16", 12, 24, (65, 32, 32)),
        ("bf16", 24, 10, (17, 32, 32)),
        ("bf16", 40, 80, (2, 8, 8)),
        ("fp16", 12, 24, (3, 7, 5)),
        ("fp32", 12, 24, (17, 32, 32)),
        ("tf32", 12, 24, (65, 32, 32)),
    ],
)
def test_every_precision_of_a_gpu(precision, growth_rate, channels, shape, reduction, put_back):
    set_precision(precision)
    dtype = str(DTYPES[precision]).removeprefix("torch.")
    check_rounding(dtype, growth_rate, channels, shape, reduction, "cuda")


def check_rounding(dtype, growth_rate, channels, shape, reduction, device="cpu"):
    """In all, at most 1.3 times as far from float64 as the plain modules, and 1e-5; the images' mean is not 0.

    And so a block in evaluation mode.
    """
    block, images, target = block_and_batch(growth_rate, channels, shape, device=device, reduction=reduction)
    images = (images + 10).to(getattr(torch, dtype))
    exact = exact_pass(steady(block), images, target)
    plain, ours = (rounded_pass(each, images, target) for each in (copy.deepcopy(block), efficient_twin(block)))
    assert kernels_of(block, images)
    distances = [distance([each[name] for name in exact], exact.values()) for each in (plain, ours)]
    assert distances[1] < 1.3 * distances[0] + 1e-5, distances
    if reduction is None:
        exact = inferred(copy.deepcopy(block).double(), images.double())
        with counted(kernels_of(block, images)) as calls:
            distances = [distance([inferred(each, images)], [exact]) for each in (copy.deepcopy(block), efficient_twin(block))]
        assert calls["infer"] == 1
        assert distances[1] < 1.3 * distances[0] + 1e-5, distances


def rounded_pass(block, images, target):
    with rounding(images):
        return block_pass(block, images, target)


def rounding(images):
    """With the convolutions in the type of the images."""
    half = images.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(images.device.type, images.dtype) if half else contextlib.nullcontext()


@torch.no_grad()
def inferred(block, images):
    """The new maps in evaluation mode."""
    with rounding(images):
        return block.eval()(images)[:, images.shape[1] :]


def test_an_offset_is_taken_off_without_bias(interpreted):
    interpreted("check_bias", "float16", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_offset_is_taken_off_without_bias_on_a_gpu(dtype):
    check_bias(dtype, "cuda")


def check_bias(dtype, device):
    """From values of few digits, all nearly of one size, a quarter of their last digit: rounding alone gives them back.

    In float16 also from those of the smallest numbers, which have fewer digits.
    """
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    for digit, first in [(torch.finfo(kind).eps, 1), (2.0**-24, 2.0**-16)][: 1 + (kind == torch.float16)]:
        values = (first + digit * torch.randint(100, (4, 32, 32, 8))).to(kind).to(device)
        corrections = torch.zeros(2, 8, device=device)
        corrections[0] = digit / 4
        statistics = torch.zeros(8, device=device), torch.ones(8, device=device)
        through = dense_block.load_kernels().through_statistics
        out = through(values, torch.zeros_like(values), *statistics, corrections, slice(0, 8))
        off = (values.double() - out.double()) / digit
        assert (off.mean(dim=(0, 1, 2)) - 0.25).abs().max() < 0.03
        assert off.abs().max() <= 1
        assert off.sum(dim=3).std() < off.std() * 8**0.5  # the maps of a pixel are not all rounded the same way


@in_the_interpreter
def test_a_whole_net():
    torch.manual_seed(0)
    plain = randomize(DenseNet(depth=10, growth_rate=8), seed=0)
    net = DenseNet(depth=10, growth_rate=8, efficient=True).to(memory_format=torch.channels_last)
    net.load_state_dict(plain.state_dict())
    images, labels = random_batch(2, num_classes=10, seed=1, size=8)
    exact = training_pass(plain.double(), images.double(), labels) | dict(plain.named_buffers())
    with counted(dense_block.load_kernels()) as calls:
        ours = training_pass(net, images, labels) | dict(net.named_buffers())
    assert calls == {"forward": 3, "transition_forward": 2, "infer": 0}
    for name, values in exact.items():
        assert torch.equal(ours[name], values) or relative_error(ours[name], values) < 1e-5, name


@contextlib.contextmanager
def counted(kernels):
    """Yields a dictionary that has, in the end, how often functions of kernels.py were called."""
    calls = {}
    with contextlib.ExitStack() as stack:
        names = ("forward", "transition_forward", "infer")
        mocks = {n: stack.enter_context(mock.patch.object(kernels, n, wraps=getattr(kernels, n))) for n in names}
        yield calls
        calls |= {name: each.call_count for name, each in mocks.items()}


@in_the_interpreter
def test_a_net_in_evaluation_mode():
    """By the running statistics, with dropout in the net; through the plain modules where somebody looks on."""
    torch.manual_seed(0)
    plain = randomize(DenseNet(depth=10, growth_rate=8, drop_rate=0.2), seed=0).eval()
    net = DenseNet(depth=10, growth_rate=8, drop_rate=0.2, efficient=True).eval()
    net.load_state_dict(plain.state_dict())
    images, _ = random_batch(2, num_classes=10, seed=1, size=10)
    exact = copy.deepcopy(plain).double()(images.double())
    kernels = dense_block.load_kernels()
    with counted(kernels) as calls, torch.no_grad():
        assert relative_error(net(images), exact) < 1e-6
    assert [calls["transition_forward"], calls["infer"]] == [2, 3]
    maps = torch.randn(2, 16, 4, 4)
    part, exact = (BlockAndTransition(each.dense1, each.trans1) for each in (net, copy.deepcopy(plain).double()))
    for name, (look, *expected) in LOOKS_ON.items():
        with counted(kernels) as calls, torch.no_grad(), look(net):
            assert relative_error(part(maps), exact(maps.double())) < 1e-6, name
        assert [calls["transition_forward"], calls["infer"]] == expected, name
    with torch.no_grad():
        traced = torch.jit.trace(part, maps, check_trace=False)
        assert relative_error(traced(2 * maps), exact(2 * maps.double())) < 1e-6
    with counted(kernels) as calls, torch.no_grad():
        net.dense2[0].bn2.train()(torch.randn(2, 32, 5, 5))
        assert relative_error(net(images), copy.deepcopy(net).double()(images.double())) < 1e-6
    assert calls["infer"] == 2


@contextlib.contextmanager
def hooked(module):
    handle = module.register_forward_hook(lambda *_: None)
    yield
    handle.remove()


def wrapped(layer):
    return mock.patch.dict(layer._modules, conv2=nn.Sequential(layer.conv2))


class LooksOn(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


LOOKS_ON = {  # how; the transitions and the blocks that go through the kernels
    "nobody": (lambda net: contextlib.nullcontext(), 1, 1),
    "autograd": (lambda net: torch.enable_grad(), 0, 0),
    "a hook on a block": (lambda net: hooked(net.dense1), 0, 1),
    "a hook on a layer": (lambda net: hooked(net.dense1[0]), 0, 0),
    "a layer's convolution in a wrapper": (lambda net: wrapped(net.dense1[0]), 0, 0),
    "a hook on a transition": (lambda net: hooked(net.trans1), 0, 1),
    "a hook in a transition": (lambda net: hooked(net.trans1.conv1), 0, 1),
    "forward-mode differentiation": (lambda net: torch.autograd.forward_ad.dual_level(), 0, 0),
    "a mode of dispatch": (lambda net: LooksOn(), 0, 0),
    "a mode of functions": (lambda net: torch.overrides.BaseTorchFunctionMode(), 0, 0),
    "a default device": (lambda net: torch.device("cpu"), 1, 1),
}


# ------------------------------------------------------------------------------------------------------------------ memory


@in_the_interpreter
def test_the_same_bits_whatever_the_memory_held_before():
    block, images, target = block_and_batch(12, 10, (2, 5, 3), reduction=0.5)
    first = block_pass(efficient_twin(block), images, target)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    assert images.new_empty(2, 3).isnan().all()
    second = block_pass(efficient_twin(block), images, target)
    for name, values in first.items():
        assert values.isfinite().all(), name
        assert torch.equal(second[name], values), name


@in_the_interpreter
def test_no_program_reads_or_writes_what_another_one_writes():
    """The interpreter runs the programs of a launch one after another, and hides what a GPU, which runs them at once, does not.

    The maps do not fill the last of the several programs of a launch, have rows with gaps, and need several chunks of channels.
    """
    block, images, target = block_and_batch(12, 73, (9, 6, 5), layers=1, reduction=0.5)
    images, net = images.half(), efficient_twin(block)
    with watched() as training:
        rounded_pass(net, images, target)
    with watched() as evaluation, torch.no_grad(), rounding(images):
        net.eval()(images)
    forward = ["copy_maps", "first_convolution", "activation", "second_convolution", "join_statistics", "pooled_activation"]
    backward = ["new_gradient", "second_backward", "first_backward", "join_sums", "pooled_backward"]
    assert {name for name, _ in training} == {*forward, *backward}
    assert {name for name, _ in evaluation} == {"first_convolution", "second_convolution", "pooled_activation"}
    for name, accesses in training + evaluation:
        assert races(accesses) == [], name


@contextlib.contextmanager
def watched():
    """Yields a list of the launches in it: the kernel's name, and its programs' accesses to memory in their order.

    An access is (program, whether it writes, addresses). One outside of the storages of the launch's tensors is an error.
    """
    from triton.runtime import interpreter

    builder, launches, storages = interpreter.interpreter_builder, [], []
    load, store, launch = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__

    def note(writes, pointers, mask):
        addresses = numpy.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        if addresses.size:
            (name, accesses), program = launches[-1], builder.grid_idx
            low, high = addresses.min(), addresses.max() + pointers.get_element_ty().primitive_bitwidth // 8
            inside = any(first <= low and high <= end for first, end in storages)
            assert inside, f"{name}, program {program}, leaves its tensors"
            accesses.append((program, writes, addresses))

    def noted_load(pointers, mask, *more):
        note(False, pointers, mask)
        return load(pointers, mask, *more)

    def noted_store(pointers, value, mask, *more):
        note(True, pointers, mask)
        return store(pointers, value, mask, *more)

    def noted_launch(self, *arguments, **more):
        tensors = [each.untyped_storage() for each in arguments if torch.is_tensor(each)]
        storages[:] = [(each.data_ptr(), each.data_ptr() + each.nbytes()) for each in tensors]
        launches.append((self.fn.__name__, []))
        return launch(self, *arguments, **more)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(builder, "create_masked_load", noted_load))
        stack.enter_context(mock.patch.object(builder, "create_masked_store", noted_store))
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", noted_launch))
        for atomic in ("create_atomic_rmw", "create_atomic_cas"):  # whose order differs from run to run
            stack.enter_context(mock.patch.object(builder, atomic, side_effect=AssertionError("an atomic operation")))
        yield launches


def races(accesses):
    """The races of a launch, in words: on a GPU a program's own threads, too, run at once."""
    found, writers = [], {}
    for program, writes, addresses in accesses:
        known = writers.keys() & addresses.tolist()
        if known or (writes and len(numpy.unique(addresses)) < len(addresses)):
            found.append(f"{program} reads or writes what is written already")
        writers |= dict.fromkeys(addresses.tolist() if writes else (), program)
    for program, writes, addresses in accesses:
        if not writes and any(writers.get(address, program) != program for address in addresses.tolist()):
            found.append(f"{program} reads what another writes")
    return found


# ------------------------------------------------------------------------------------------------------ what they are for


@in_the_interpreter
def test_what_the_kernels_do_not_compute_goes_without_them():
    block, images, _ = block_and_batch(4, 6, (2, 4, 4))
    assert kernels_of(block, images)
    assert kernels_of(block, images.half())
    assert kernels_of(copy.deepcopy(block).half(), images.half()) is None  # weights, statistics and sums are float32
    for norm in ("1.bn1", "1.bn2"):
        mixed = copy.deepcopy(block)
        mixed.get_submodule(norm).half()
        assert kernels_of(mixed, images.half()) is None
    for name, other in unfit_blocks().items():
        dtype = next(other.parameters()).dtype
        images = torch.randn(2, 6, 4, 4, dtype=dtype)
        assert kernels_of(other, images) is None, name
        results = []
        for each in (copy.deepcopy(other), efficient_twin(other)):
            torch.manual_seed(5)  # of dropout
            results.append(block_pass(each, images, 1.0))
        for tensor, values in results[0].items():
            assert relative_error(results[1][tensor], values) < 1e-5, (name, tensor)


def unfit_blocks():
    """Blocks of 6 channels that the kernels do not compute."""
    blocks = {
        "dropout": DenseBlock(Bottleneck, 2, 6, 4, 0.3, efficient=False),
        "a plain net": DenseBlock(SingleLayer, 2, 6, 4, 0.0, efficient=False),
        "a growth rate too large": DenseBlock(Bottleneck, 2, 6, 57, 0.0, efficient=False),
        "a wider bottleneck": wider(DenseBlock(Bottleneck, 2, 6, 4, 0.0, efficient=False)),
        "float64": DenseBlock(Bottleneck, 2, 6, 4, 0.0, efficient=False).double(),
    }
    return {name: randomize(block, seed=0).to(memory_format=torch.channels_last) for name, block in blocks.items()}


def wider(block):
    """The block with 20 maps in its second layer's bottleneck, not 16."""
    layer = block[1]
    layer.conv1, layer.bn2 = nn.Conv2d(10, 20, 1, bias=False), nn.BatchNorm2d(20)
    layer.conv2 = nn.Conv2d(20, 4, 3, padding=1, bias=False)
    return block


@in_the_interpreter
def test_a_changed_transition_is_a_module_of_its_own():
    """As the plain modules compute it, without transition_forward; the block before it goes through the kernels."""
    for name, (change, is_joined) in TRANSITIONS.items():
        block, images, target = block_and_batch(4, 6, (2, 4, 4), layers=1, reduction=0.5)
        change(block[1])
        results = []
        with counted(kernels_of(block, images)) as calls:
            for each in (copy.deepcopy(block), efficient_twin(block)):
                torch.manual_seed(5)  # of dropout
                results.append(block_pass(each, images, target))
        assert calls == {"forward": 1, "transition_forward": is_joined, "infer": 0}, name
        for tensor, values in results[0].items():
            if values is not None and values.abs().max() > 1e-4:
                assert relative_error(results[1][tensor], values) < 1e-4, (name, tensor)


@in_the_interpreter
def test_a_transition_in_another_mode_than_the_layers_is_a_module_of_its_own():
    """The layers alone are switched: to training, and back to evaluation in a block and a transition that train."""
    for training in (False, True):
        block, images, target = block_and_batch(4, 6, (2, 6, 5), layers=1, reduction=0.5)
        block.train(training)[0][0].train(not training)
        results = []
        with counted(kernels_of(block, images)) as calls, contextlib.ExitStack() as stack:
            for each in (copy.deepcopy(block), efficient_twin(block)):
                if training:
                    stack.enter_context(torch.no_grad())
                    results.append({"out": each(images), **dict(each.named_buffers())})
                else:
                    results.append(block_pass(each, images, target))
        assert calls == {"forward": int(not training), "transition_forward": 0, "infer": int(training)}
        for tensor, values in results[0].items():
            if values is not None and values.abs().max() > 1e-4:
                assert relative_error(results[1][tensor].double(), values.double()) < 1e-4, (training, tensor)


@pytest.mark.parametrize("kind", ["Transition", "DenseBlock"])
def test_where_a_class_was_edited_the_transition_is_a_module_of_its_own(interpreted, kind):
    interpreted("check_edited", kind)


def check_edited(name):
    """By somebody who does not know the kernels: the class's forward method, and no attribute of the module."""
    block, images, _ = block_and_batch(4, 6, (2, 6, 5), layers=1, reduction=0.5)
    kind = {"Transition": Transition, "DenseBlock": DenseBlock}[name]
    as_made = kind.forward
    with mock.patch.object(kind, "forward", lambda self, x: 2 * as_made(self, x)):
        plain = block(images)
        with pytest.warns(UserWarning, match=f"^{name}.forward, or what it calls, differs from dense_block.Definition"):
            assert relative_error(efficient_twin(block)(images), plain) < 1e-4


class Doubled(Transition):
    def forward(self, x):
        return 2 * super().forward(x)


def biased(transition):
    transition.conv1.bias = nn.Parameter(torch.ones(transition.conv1.out_channels))


def with_a_second_pair(transition):
    """Unused by its forward, but it makes a bottleneck of a layer."""
    transition.bn2, transition.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 5, 1, bias=False)


TRANSITIONS = {  # what is done to it, and whether it is joined
    "nothing": (lambda transition: None, True),
    "frozen weights": (lambda transition: transition.conv1.requires_grad_(False), True),
    "another eps": (lambda transition: setattr(transition.bn1, "eps", 0.1), False),
    "dropout": (lambda transition: setattr(transition.dropout, "p", 0.3), False),
    "a mean over all batches": (lambda transition: setattr(transition.bn1, "momentum", None), False),
    "a bias": (biased, False),
    "a frozen batch norm": (lambda transition: transition.bn1.eval(), False),
    "another class": (lambda transition: setattr(transition, "__class__", Doubled), False),
    "a second pair": (with_a_second_pair, False),
    "another forward": (lambda transition: setattr(transition, "forward", lambda x: F.avg_pool2d(x, 2)[:, :5]), False),
    "a hook": (lambda transition: transition.conv1.register_forward_hook(lambda *args: 2 * args[-1]), False),
}


@pytest.mark.parametrize(("growth_rate", "timed", "exact"), [(8, 1, 1), (12, 1, 1), (13, 0, 1), (14, 0, 1), (15, 0, 0)])
def test_widths_beyond_those_that_were_timed_get_tiles_that_do_not_spill(monkeypatch, growth_rate, timed, exact):
    """Products of float32 without rounding spill from k = 15 on."""
    import kernels

    layers = list(DenseBlock(Bottleneck, 2, 16, growth_rate, 0.0, efficient=True))
    maps = torch.empty(64, 32, 32, 64, device="meta")
    size = kernels.Sizes.of(maps, layers)
    for kernel, (many, *_, untimed) in kernels.TILES["tf32"].items():
        monkeypatch.setattr(kernels, "products", lambda maps: "tf32")
        assert size.tile(kernel, maps) == (many if timed else untimed)
        assert kernels.computes(maps.permute(0, 3, 1, 2)[:, :16], layers)
        monkeypatch.setattr(kernels, "products", lambda maps: "tf32x3")
        assert kernels.computes(maps.permute(0, 3, 1, 2)[:, :16], layers) == bool(exact)


def test_offsets_of_32_bits_are_enough():
    import kernels

    for channels, growth_rate, widest in [(8, 4, 16), (9, 2, 16), (1, 8, 32)]:  # the maps, in rows of 8 or 16; z
        layers = list(DenseBlock(Bottleneck, 2, channels, growth_rate, 0.0, efficient=False))
        images = 2**21 // widest
        assert kernels.computes(torch.empty(images - 1, channels, 32, 32, device="meta"), layers)
        assert not kernels.computes(torch.empty(images, channels, 32, 32, device="meta"), layers)


@in_the_interpreter
def test_the_hubs_nets_find_the_kernels():
    """torch.hub takes the folder off the path when it has loaded the net; a module of another may have the kernels' name."""
    sys.path[:] = [folder for folder in sys.path if folder not in ("", str(ROOT))]
    for name in ("densenet", "dense_block", "kernels"):
        sys.modules.pop(name, None)
    sys.modules["kernels"] = types.ModuleType("kernels")
    net = torch.hub.load(str(ROOT), "densenet_bc_40_12", source="local", efficient=True).train()
    del net.dense1[1:]
    net.dense1(torch.randn(2, 24, 4, 4)).sum().backward()
    found = sys.modules["dense_block"].load_kernels()
    assert (found.__file__, hasattr(found, "first_convolution")) == (str(ROOT / "kernels.py"), True)


@in_the_interpreter
def test_a_forward_that_is_replaced_after_a_step_of_a_compiled_net_is_called():
    """That of the block or of its transition; the compiler's guards do not notice it where the two are fused."""
    for part in (0, 1):
        torch._dynamo.reset()
        block, images, _ = block_and_batch(4, 6, (2, 4, 4), layers=1, reduction=0.5)
        results = []
        for each in (block, twin := efficient_twin(block)):
            compiled = torch.compile(each, backend="eager") if each is twin else each
            compiled(images)
            module = each[part]
            module.forward = lambda x, forward=module.forward: forward(x).sin()
            results.append(compiled(images))
        assert relative_error(*reversed(results)) < 1e-4, part


@in_the_interpreter
def test_saved_tensors_may_be_packed_and_unpacked():
    """What keeps values and not strides, as a copy to another device does."""
    block, images, target = block_and_batch(8, 10, (2, 4, 4), reduction=0.5)
    expected = block_pass(efficient_twin(block), images, target)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with packed(memory_format):
            ours = block_pass(efficient_twin(block), images, target)
        assert all(torch.equal(ours[name], values) for name, values in expected.items())


@in_the_interpreter
def test_what_lies_beyond_the_pixels_is_never_infinite():
    """A batch norm makes over 65,504 of the zeros beyond the last pixel, if its channel is always -300."""
    block, images, target = block_and_batch(8, 10, (3, 6, 6), layers=1)
    images[:, 0] = -300
    half = images.half()
    with torch.autocast("cpu", torch.float16):
        results = block_pass(efficient_twin(block), half, target)
    assert all(values.isfinite().all() for values in results.values())


@in_the_interpreter
def test_nan_is_passed_on():
    for name in ("conv1.weight", "bn1.weight", "bn2.bias", "conv2.weight"):
        block, images, _ = block_and_batch(8, 10, (1, 4, 4))
        values = block.get_parameter(f"0.{name}").data
        values[(0,) * values.dim()] = float("nan")
        plain, ours = (each(images).isnan() for each in (copy.deepcopy(block), efficient_twin(block)))
        assert torch.equal(plain, ours), name
        assert plain.any()
    block, images, target = block_and_batch(8, 10, (1, 4, 4), reduction=0.5)
    images[0, 0, 0, 0] = float("nan")
    plain, ours = (block_pass(each, images, target) for each in (copy.deepcopy(block), efficient_twin(block)))
    for name, values in plain.items():
        assert torch.equal(ours[name].isnan(), values.isnan()), name


@in_the_interpreter
def test_batch_norms_with_settings_of_their_own():
    """Of each batch norm another momentum, and another epsilon where the maps are not shared; in training and in evaluation."""
    block, images, target = block_and_batch(8, 10, (3, 5, 3))
    for i, layer in enumerate(block):
        layer.bn1.momentum, layer.bn2.momentum, layer.bn2.eps = 0.3 + 0.2 * i, 0.05 + 0.3 * i, 0.1 + 0.5 * i
        layer.bn1.eps = 0.03
    with counted(kernels_of(block, images)) as calls:
        exact, ours = exact_pass(block, images, target), block_pass(efficient_twin(block), images, target)
        expected, answer = (
            inferred(each, images.to(t))
            for each, t in ((copy.deepcopy(block).double(), torch.float64), (efficient_twin(block), torch.float32))
        )
    assert (calls["forward"], calls["infer"]) == (1, 1)
    assert relative_error(answer, expected) < 3e-6
    for name, values in exact.items():
        assert relative_error(ours[name], values) < 3e-6, name
