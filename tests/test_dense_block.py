"""The efficient dense block equals the plain modules, which define it: outputs, buffers and every gradient, in float64."""

import contextlib
import copy
import functools
import inspect
import textwrap
import types
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import dense_block
import densenet
from attic.comparison import random_batch, randomize, relative_error, training_pass
from densenet import Bottleneck, DenseBlock, DenseNet, SingleLayer, Transition

BC = dict(depth=16, growth_rate=5)
PLAIN = dict(depth=13, growth_rate=5, bottleneck=False)


def efficient_twin(module):
    """A copy of a net, or of a part of one, whose blocks are efficient."""
    twin = copy.deepcopy(module)
    for block in twin.modules():
        if isinstance(block, DenseBlock):
            block.efficient = True
    return twin


def random_net(arguments):
    torch.manual_seed(0)
    return randomize(DenseNet(**arguments), seed=0).double().to(memory_format=torch.channels_last)


def assert_equal_training(net, images, labels, bound=1e-12):
    """One training pass of the net and of its efficient twin, from the same random state, gives the same in every tensor."""
    results = []
    for each in (net, efficient_twin(net)):
        torch.manual_seed(5)
        results.append({**training_pass(each, images, labels), **dict(each.named_buffers())})
    plain, efficient = results
    assert plain.keys() == efficient.keys()
    for name, value in plain.items():
        if value.dtype == torch.int64:  # num_batches_tracked
            assert torch.equal(efficient[name], value)
        elif value.abs().max() > 0:
            assert relative_error(efficient[name], value) < bound, name
        else:
            assert efficient[name].abs().max() < 1e-15, name


def batch(num_images, size):
    images, labels = random_batch(num_images, num_classes=10, seed=1, size=size)
    return images.double(), labels


def block_pass(block, images, target):
    """A block's output and all gradients of its product with the target."""
    x = images.clone().requires_grad_()
    out = block(x)
    (out * target).sum().backward()
    return [out, x.grad, *(parameter.grad for parameter in block.parameters())]


def distance(ours, theirs):
    """The root of the squared relative errors of all tensors, each in the Euclidean norm, added up."""
    pairs = zip(ours, theirs, strict=True)
    return sum((a.double() - b).square().sum() / b.square().sum() for a, b in pairs).sqrt()


@pytest.mark.parametrize(
    "arguments", [BC, PLAIN, dict(depth=40, growth_rate=12), {**PLAIN, "growth_rate": 1}, {**BC, "reduction": 1.0}]
)
@pytest.mark.parametrize(("num_images", "size"), [(5, 32), (1, 8), (3, (20, 28)), (2, (13, 9)), (70, 4)])
def test_outputs_buffers_and_gradients_equal_the_plain_modules(arguments, num_images, size):
    assert_equal_training(random_net(arguments), *shaped_batch(num_images, size))


def shaped_batch(num_images, size):
    height, width = size if isinstance(size, tuple) else (size, size)
    images, labels = batch(num_images, max(height, width))
    return images[:, :, :height, :width], labels


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layer", [Bottleneck, SingleLayer])
def test_gradients_have_the_strides_of_the_parameters(layer, memory_format):
    """DistributedDataParallel compares those of a 1x1 kernel's dimensions, too; several slices are added up."""
    block = DenseBlock(layer, 2, 10, 5, 0.0, efficient=True).to(memory_format=memory_format)
    block(torch.randn(3, 10, 64, 64)).sum().backward()
    assert [p.grad.stride() for p in block.parameters()] == [p.stride() for p in block.parameters()]


@pytest.mark.parametrize("arguments", [BC, PLAIN])
def test_larger_images(arguments):
    """As --image-size makes them."""
    assert_equal_training(random_net(arguments), *batch(2, 96))


@pytest.mark.parametrize("arguments", [BC, PLAIN])
@pytest.mark.parametrize("gamma", [0.0, 1e-12, -1e-9, -1.3])
def test_any_gamma(arguments, gamma):
    net = random_net(arguments)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[::2] = gamma
    assert_equal_training(net, *batch(3, 16))


@pytest.mark.parametrize("arguments", [BC, PLAIN])
def test_the_same_seed_gives_the_same_dropout(arguments):
    assert_equal_training(random_net({**arguments, "drop_rate": 0.3}), *batch(4, 16))


def test_a_drop_rate_may_be_a_tensor():
    net = random_net({**BC, "drop_rate": torch.tensor(0.3)})
    assert_equal_training(net, *batch(3, 16))
    net = efficient_twin(net)
    loss = net(batch(2, 8)[0]).sum()
    net.dense3[1].dropout.p.fill_(0.5)
    with pytest.raises(RuntimeError, match="drop rates of an efficient block were changed before its backward pass"):
        loss.backward()


def test_batch_norms_with_settings_of_their_own():
    """Of each layer another momentum, and another epsilon where the maps are not shared."""
    net = random_net(BC)
    for i, (name, module) in enumerate((n, m) for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)):
        module.momentum = [0.1, torch.tensor(0.03), 1.0][i % 3]
        module.eps = 1e-3 if name.startswith("dense1") and name.endswith("bn1") else 10.0 ** -(4 + i % 5)
        if name.startswith(("dense2", "dense3")) and name.endswith("bn1"):
            module.eps = 1e-5
    assert_equal_training(net, *batch(3, 16))
    assert net.dense1[0].bn1.num_batches_tracked == 1


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    bottleneck=st.booleans(),
    channels=st.integers(1, 9),
    growth_rate=st.integers(1, 6),
    num_layers=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(2, 9)),
)
def test_blocks_of_any_shape(bottleneck, channels, growth_rate, num_layers, shape):
    torch.manual_seed(0)
    layer = Bottleneck if bottleneck else SingleLayer
    plain = randomize(DenseBlock(layer, num_layers, channels, growth_rate, 0.0, efficient=False), seed=1).double()
    num_images, height, width = shape
    images = torch.randn(num_images, channels, height, width, dtype=torch.float64)
    target = torch.randn(num_images, channels + num_layers * growth_rate, height, width, dtype=torch.float64)
    results = [[*block_pass(block, images, target), *block.buffers()] for block in (plain, efficient_twin(plain))]
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arguments", [BC, PLAIN])
def test_twenty_optimiser_steps_stay_equal(arguments):
    nets = [random_net(arguments)]
    nets.append(efficient_twin(nets[0]))
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4, nesterov=True)
        for step in range(20):
            images, labels = random_batch(8, num_classes=10, seed=step, size=8)
            optimizer.zero_grad()
            F.cross_entropy(net(images.double()), labels).backward()
            optimizer.step()
    for name, value in nets[0].state_dict().items():
        assert relative_error(nets[1].state_dict()[name], value) < 1e-10, name


# ------------------------------------------------------------------------------------------------------ ways to use it


@pytest.mark.parametrize("layer", [Bottleneck, SingleLayer])
@pytest.mark.parametrize("mean", [0, 10, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_no_worse_than_the_plain_modules(layer, dtype, mean):
    """Outputs and gradients in 16 bits are at most 1.3 times as far from float64 as those of the plain modules.

    Of one block: a whole net is so far off that a worse rounding does not show. The input's mean makes the shift of its batch
    norm large: rounded to 16 bits, that alone would double the distance, as would rounded products of the maps as they are.
    """
    torch.manual_seed(0)
    plain = randomize(DenseBlock(layer, 3, 10, 5, 0.0, efficient=False), seed=0).to(memory_format=torch.channels_last)
    images, target = (torch.randn(8, channels, 16, 16) for channels in (10, 25))
    images = (images + mean).to(dtype)
    exact = block_pass(copy.deepcopy(plain).double(), images.double(), target)
    distances = []
    for block in (plain, efficient_twin(plain)):
        with torch.autocast("cpu", dtype):
            rounded = block_pass(block, images, target)
        assert all(parameter.grad.dtype == torch.float32 for parameter in block.parameters())
        distances.append(distance(rounded, exact))
    assert distances[1] < 1.3 * distances[0]


@pytest.mark.parametrize("layer", [Bottleneck, SingleLayer])
@pytest.mark.parametrize(("dtype", "mean", "grad_mean"), [(torch.float32, 1000, 0), (torch.bfloat16, 0, 1)])
def test_the_gradient_of_gamma_is_as_exact_as_that_of_the_plain_modules(layer, dtype, mean, grad_mean):
    """Where the mean of the maps, or that of their gradient, is large: at most three times as far from float64.

    Each ReLU is far from its edge: what rounding moves across the edge would hide all else.
    """
    torch.manual_seed(0)
    plain = randomize(DenseBlock(layer, 2, 10, 5, 0.0, efficient=False), seed=0).to(memory_format=torch.channels_last)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data = torch.where(torch.arange(len(module.bias)) % 2 == 0, 8.0, -8.0)
    images, target = torch.randn(8, 10, 32, 32).to(dtype) + mean, torch.randn(8, 20, 32, 32) + grad_mean
    exact = block_pass(copy.deepcopy(plain).double(), images.double(), target)
    distances = []
    for block in (plain, efficient_twin(plain)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            rounded = block_pass(block, images, target)
        named = zip(["", "", *(name for name, _ in block.named_parameters())], rounded, exact, strict=True)
        distances.append(distance(*zip(*(pair for name, *pair in named if name.endswith("bn1.weight")), strict=True)))
    assert distances[1] < 3 * distances[0]


@pytest.mark.parametrize("arguments", [BC, PLAIN])
def test_weights_that_are_cast_are_those_of_the_step(arguments):
    """Not of an earlier step, before the optimiser changed them."""
    x = torch.randn(2, 8, 6, 6).bfloat16()
    blocks = [efficient_twin(random_net({**arguments, "init_channels": 8})).float().dense1 for _ in range(2)]
    blocks[0](x)
    for block in blocks:
        with torch.no_grad():
            block[0].conv1.weight.neg_()
            block[1].conv1.weight.neg_()
    assert torch.equal(*(block(x) for block in blocks))


@pytest.mark.parametrize("layer", [Bottleneck, SingleLayer])
def test_under_autocast_all_is_computed_in_the_type_of_the_input(layer):
    """Whether the forward pass, the backward pass or neither is under it."""
    torch.manual_seed(0)
    block = randomize(DenseBlock(layer, 2, 4, 3, 0.0, efficient=True), seed=0)
    images, results = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last), []
    for forward, backward in [(False, False), (True, False), (False, True)]:
        x = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            out = block(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])])
    for others in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], others, strict=True))


def test_frozen_parameters_and_an_input_without_gradient():
    net = random_net(BC)
    twin = efficient_twin(net)
    images, labels = batch(3, 16)
    for each in (net, twin):
        each.conv1.requires_grad_(False)
        each.dense1[0].requires_grad_(False)
        F.cross_entropy(each(images), labels).backward()
    for ours, theirs in zip(twin.parameters(), net.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            assert relative_error(ours.grad, theirs.grad) < 1e-12


SECOND_DERIVATIVES = {
    "backward": lambda loss, images: loss(images).backward(create_graph=True),
    "grad": lambda loss, images: torch.autograd.grad(loss(images.requires_grad_()), images, create_graph=True),
    "a Hessian by a vector": lambda loss, images: torch.autograd.functional.hvp(loss, images, images),
    "a derivative in a direction": lambda loss, images: torch.autograd.functional.jvp(loss, images, images),
}


@pytest.mark.parametrize("name", SECOND_DERIVATIVES)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_gradient_that_is_to_be_differentiated_is_an_error_at_once(name):
    """Where only some gradients are asked for, autograd would not reach a node that raises later."""
    images, labels = batch(3, 16)
    net = random_net(BC)
    SECOND_DERIVATIVES[name](lambda images: F.cross_entropy(net(images), labels), images.clone())
    twin = efficient_twin(net)
    with pytest.raises(RuntimeError, match=r"^an efficient block cannot be differentiated twice \(create_graph=True\): use e"):
        SECOND_DERIVATIVES[name](lambda images: F.cross_entropy(twin(images), labels), images.clone())


def gradients_in_a_batch(loss, weight, directions):
    return torch.autograd.grad(loss, weight, directions, is_grads_batched=True)


def gradients_by_vmap(loss, weight, directions):
    return torch.func.vmap(lambda direction: torch.autograd.grad(loss, weight, direction)[0])(directions)


@pytest.mark.parametrize("gradients", [gradients_in_a_batch, gradients_by_vmap])
def test_a_batch_of_gradients_is_an_error(gradients):
    images, net = batch(2, 8)[0], random_net(BC)
    for each in (net, efficient_twin(net)):
        logits = each(images)
        told = pytest.raises(RuntimeError, match=r"^an efficient block takes no batched gradients \(is_grads_batched, vmap\)")
        with contextlib.nullcontext() if each is net else told:
            gradients(logits, each.conv1.weight, torch.ones(2, *logits.shape).double())


def test_where_a_checkpoint_keeps_the_results_of_some_operators_the_plain_modules_run():
    net, (images, labels), gradients = random_net(PLAIN), batch(3, 8), []
    kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.native_batch_norm.default])
    for each in (net, efficient_twin(net)):
        F.cross_entropy(checkpoint(each, images, use_reentrant=False, context_fn=kept), labels).backward()
        gradients.append(each.conv1.weight.grad)
    assert relative_error(*gradients) < 1e-12


def test_where_saved_tensors_may_be_changed_the_plain_modules_run():
    """PyTorch copies what is changed, which is then no error."""
    net, (images, labels), gradients = random_net(BC), batch(3, 8), []
    for each in (net, efficient_twin(net)):
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            loss = F.cross_entropy(each(images), labels)
            with torch.no_grad():
                each.dense2[0].conv1.weight.mul_(2)
            loss.backward()
        gradients.append(each.conv1.weight.grad)
    assert relative_error(*gradients) < 1e-12


def packed(memory_format):
    """Where saved tensors keep their values and not their strides: they get those of this format, if it is one of theirs."""

    def pack(tensor):
        return tensor.detach().clone(memory_format=memory_format if tensor.dim() == 4 else torch.contiguous_format)

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


@pytest.mark.parametrize("arguments", [BC, {**BC, "drop_rate": 0.3}, PLAIN])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_saved_tensors_may_be_packed_and_unpacked(arguments, memory_format):
    with packed(memory_format):
        assert_equal_training(random_net(arguments), *batch(3, 16))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing(use_reentrant):
    """Which runs a backward pass inside of another, and the forward pass there with gradients on."""
    net = random_net(BC)
    images, labels = batch(3, 16)
    grads = []
    for each in (net, efficient_twin(net)):
        logits = checkpoint(each, images.clone().requires_grad_(), use_reentrant=use_reentrant)
        F.cross_entropy(logits, labels).backward()
        grads.append([parameter.grad for parameter in each.parameters()])
    assert all(relative_error(ours, theirs) < 1e-12 for theirs, ours in zip(*grads, strict=True))


def test_evaluation_and_training_without_gradient():
    net = random_net(BC)
    twin = efficient_twin(net)
    images, _ = batch(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), net(images), rtol=1e-12, atol=1e-12)
    assert torch.equal(twin.load_state_dict(net.state_dict()) and twin.eval()(images), net.eval()(images))


@pytest.mark.xdist_group("compiler")  # imported by one process
def test_inside_torch_compile():
    net = random_net(dict(depth=10, growth_rate=4))
    images, labels = batch(3, 16)
    expected = training_pass(copy.deepcopy(net), images, labels)
    twin = efficient_twin(net)
    torch._dynamo.reset()
    F.cross_entropy(torch.compile(twin, backend="aot_eager")(images), labels).backward()
    for name, parameter in twin.named_parameters():
        assert relative_error(parameter.grad, expected[f"grad/{name}"]) < 1e-12


@pytest.mark.xdist_group("compiler")  # imported by one process
def test_many_nets_are_compiled_in_one_process():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(3):
            net = torch.compile(efficient_twin(random_net(dict(depth=10, growth_rate=2))), backend="eager")
            net(batch(2, 8)[0]).sum().backward()


@pytest.mark.xdist_group("compiler")  # imported by one process
def test_a_functional_call_is_one_graph():
    net, (images, _) = random_net(dict(depth=10, growth_rate=2)), batch(2, 8)
    gradients = []
    for each in (net, twin := efficient_twin(net)):
        call = functools.partial(torch.func.functional_call, each)
        if each is twin:
            torch._dynamo.reset()
            call = torch.compile(call, backend="eager", fullgraph=True)
        call({name: 2 * parameter for name, parameter in each.named_parameters()}, images).sin().sum().backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.xdist_group("compiler")  # imported by one process
def test_a_forward_that_is_replaced_after_a_step_of_a_compiled_block_is_called():
    images, labels = batch(2, 8)
    net = random_net(dict(depth=10, growth_rate=2))
    torch._dynamo.reset()
    for each in (net, twin := efficient_twin(net)):
        convolution = each.dense2[0].conv2
        if each is twin:
            each.dense2 = torch.compile(each.dense2, backend="eager")
        each(images)
        convolution.forward = lambda x, forward=convolution.forward: forward(x).sin()
        F.cross_entropy(each(images), labels).backward()
    for theirs, ours in zip(net.parameters(), twin.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-12


def test_the_path_of_a_gpu_without_kernels_is_right(monkeypatch):
    """The whole batch at once."""
    monkeypatch.setattr(dense_block, "slices", lambda maps: [slice(None)])
    for arguments in (BC, PLAIN):
        assert_equal_training(random_net(arguments), *batch(3, 16))


def test_a_parameter_that_was_changed_before_the_backward_pass_is_an_error():
    net = efficient_twin(random_net(BC))
    images, labels = batch(3, 16)
    loss = F.cross_entropy(net(images), labels)
    with torch.no_grad():
        net.dense2[0].conv1.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):  # copies are not changed
        loss = F.cross_entropy(net(images), labels)
    with torch.no_grad():
        net.dense2[0].bn1.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"^the parameters or drop rates of an efficient block were changed before"):
        loss.backward()


REPLACEMENTS = {  # of a module of a layer
    "a convolution by nothing": lambda layer: setattr(layer, "conv1", nn.Identity()),
    "a batch norm by another": lambda layer: setattr(layer, "bn1", nn.BatchNorm2d(10)),
    "dropout by nothing": lambda layer: setattr(layer, "dropout", nn.Identity()),
    "no second batch norm": lambda layer: delattr(layer, "bn2"),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_a_module_that_was_replaced_before_the_backward_pass_is_an_error(name):
    net = efficient_twin(random_net(BC))
    loss = net(batch(2, 8)[0]).sum()
    REPLACEMENTS[name](net.dense1[0])
    with pytest.raises(RuntimeError, match=r"^the parameters or drop rates of an efficient block were changed before"):
        loss.backward()


def test_other_parameters_for_a_call():
    """As meta-learning gives them, by torch.func.functional_call: tensors for all or some, or another net's parameters."""
    net = random_net(BC)
    others = dict(random_net(BC).named_parameters())
    images, labels = batch(3, 16)
    for part in ("", "conv", "bn1.weight", "bn2.bias"):
        tensors = {name: (1.5 * p).detach().requires_grad_() for name, p in others.items() if part in name}
        logits = [torch.func.functional_call(each, tensors, images) for each in (net, efficient_twin(net))]
        plain, ours = (torch.autograd.grad(F.cross_entropy(each, labels), list(tensors.values())) for each in logits)
        assert all(relative_error(*pair) < 1e-12 for pair in zip(ours, plain, strict=True)), part
    loss = F.cross_entropy(torch.func.functional_call(efficient_twin(net), others, images), labels)
    with pytest.raises(RuntimeError, match="were changed before its backward pass: use efficient=False"):
        loss.backward()


# ------------------------------------------------------------------------------- what is not a layer as it was made


def each_batch_norm(change):
    return lambda net: [change(module) for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def without(*buffers):
    return each_batch_norm(lambda bn: [setattr(bn, name, None) for name in buffers])


def attributes_for_buffers(bn):
    del bn.running_mean, bn.running_var
    bn.running_mean = bn.running_var = None


def with_bias(conv):
    conv.bias = nn.Parameter(torch.ones(conv.out_channels, dtype=conv.weight.dtype))


def circular(conv):
    """The convolution as for pictures that are tiles: its own method is replaced, in this module alone."""
    conv._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


def pruned(net):
    """By hand: the last layer gives one map, and its convolution still says five."""
    conv = net.dense3[1].conv2
    conv.weight = nn.Parameter(conv.weight[:1].detach())
    channels = net.bn1.num_features - 4
    net.bn1, net.fc = nn.BatchNorm2d(channels), nn.Linear(channels, 10)


class Absolute(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).abs()


class Doubled(Bottleneck):
    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = {  # of a net with bottlenecks
    "all batch norms in evaluation mode": each_batch_norm(nn.Module.eval),
    "a block in evaluation mode": lambda net: net.dense2.eval(),
    "a layer in evaluation mode": lambda net: net.dense2[1].eval(),
    "one batch norm in evaluation mode": lambda net: net.dense1[1].bn2.eval(),
    "dropout in evaluation mode": lambda net: net.dense1[0].dropout.eval(),
    "a dropout of all": lambda net: setattr(net.dense1[0].dropout, "p", 1.0),
    "no running statistics": without("running_mean", "running_var"),
    "no running statistics as buffers": each_batch_norm(attributes_for_buffers),
    "batches that are not counted": without("num_batches_tracked"),
    "no running statistics used": each_batch_norm(lambda bn: setattr(bn, "track_running_stats", False)),
    "means over all batches": each_batch_norm(lambda bn: setattr(bn, "momentum", None)),
    "no affine batch norm": lambda net: setattr(net.dense1[0], "bn2", nn.BatchNorm2d(20, affine=False)),
    "another eps": lambda net: setattr(net.dense1[1].bn1, "eps", 1e-3),
    "another batch norm": lambda net: setattr(net.dense1[0].bn2, "__class__", Absolute),
    "a bias": lambda net: with_bias(net.dense1[1].conv1),
    "a bias of the 3x3": lambda net: with_bias(net.dense3[0].conv2),
    "a dilation": lambda net: vars(net.dense1[0].conv2).update(dilation=(2, 2), padding=(2, 2)),
    "a dilation and a kernel of the same reach": lambda net: vars(net.dense1[0].conv1).update(dilation=(2, 2)),
    "another padding": lambda net: setattr(net.dense1[0].conv2, "padding_mode", "reflect"),
    "groups": lambda net: setattr(net.dense2[0], "conv2", nn.Conv2d(20, 5, 3, 1, 1, bias=False, groups=5)),
    "a wider kernel": lambda net: setattr(net.dense2[1], "conv2", nn.Conv2d(20, 5, 5, 1, 2, bias=False)),
    "a parametrization": lambda net: nn.utils.parametrizations.weight_norm(net.dense1[0].conv1),
    "spectral norm by a hook": lambda net: nn.utils.spectral_norm(net.dense1[0].conv2),
    "another class of layer": lambda net: setattr(net.dense2[1], "__class__", Doubled),
    "another forward": lambda net: setattr(net.dense2[0].conv1, "forward", lambda x: x[:, :1].expand(-1, 20, -1, -1)),
    "no batch norm": lambda net: setattr(net.dense1[0], "bn1", nn.Identity()),
    "no batch norm before the 3x3": lambda net: setattr(net.dense2[1], "bn2", nn.Identity()),
    "no dropout": lambda net: setattr(net.dense1[1], "dropout", nn.Identity()),
    "another convolution": lambda net: setattr(net.dense1[0], "conv2", nn.Sequential(net.dense1[0].conv2)),
    "a wrapped block": lambda net: setattr(net, "dense1", nn.Sequential(net.dense1)),
    "a compiled block": lambda net: setattr(net, "dense2", torch.compile(net.dense2, backend="eager")),
    "another method of a convolution": lambda net: circular(net.dense1[1].conv2),
    "a pruned convolution": pruned,
    "a plain layer in between": lambda net: setattr(net.dense1, "1", SingleLayer(15, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_layer_goes_through_the_plain_modules(name):
    """Outputs, statistics and gradients are those of the plain net."""
    torch.manual_seed(0)
    drop_rate = 0.3 if "dropout" in name else 0.0
    net = randomize(DenseNet(**BC, drop_rate=drop_rate), seed=0)
    twin = efficient_twin(net)
    results = []
    for each in (net, twin):
        torch.manual_seed(1)
        CHANGES[name](each)
        each.double().to(memory_format=torch.channels_last)
        torch.manual_seed(2)
        images, labels = batch(3, 16)
        logits = each(images)
        F.cross_entropy(logits, labels).backward()
        grads = {f"grad/{key}": p.grad for key, p in each.named_parameters() if p.grad is not None}
        results.append({"logits": logits.detach(), **grads, **dict(each.named_buffers())})
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert (results[1][key] - value).abs().max() <= 1e-11 * max(1, value.abs().max()), key


def each_first_layer(change):
    return lambda net: [change(block[0]) for block in (net.dense1, net.dense2, net.dense3)]


def sine_of_output(module, inputs, out):
    return out.sin()


@pytest.mark.xdist_group("compiler")  # imported by one process
@pytest.mark.parametrize(
    "change",
    [
        each_batch_norm(nn.Module.eval),
        each_first_layer(lambda layer: layer.register_forward_hook(sine_of_output)),
        each_first_layer(lambda layer: layer.conv2.register_forward_hook(sine_of_output)),
        each_first_layer(lambda layer: setattr(layer, "bn1", nn.Identity())),
    ],
    ids=["frozen norms", "hooked layers", "hooked convolutions", "no batch norms"],
)
def test_a_net_whose_blocks_are_changed_is_one_graph_in_training(change):
    net, (images, _) = random_net(dict(depth=10, growth_rate=2)), batch(2, 8)
    change(net)
    twin = efficient_twin(net)
    torch._dynamo.reset()
    outputs = [net(images), torch.compile(twin, backend="eager", fullgraph=True)(images)]
    for out in outputs:
        out.sin().sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    gradients = [[parameter.grad for parameter in each.parameters()] for each in (net, twin)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def with_vectors(**vectors):
    def change(layer):
        for name, vector in vectors.items():
            setattr(layer.bn1, name, nn.Parameter(vector) if name in ("weight", "bias") else vector)

    return change


UNTAKEN = {  # of a first layer of 10 channels
    "weights with gaps": with_vectors(weight=torch.ones(10, 2)[:, 0]),
    "a mean with gaps": with_vectors(running_mean=torch.ones(10, 2)[:, 1]),
    "one variance for all": with_vectors(running_var=torch.ones(1).expand(10)),
    "a bias of one value": with_vectors(bias=torch.ones(1)),
    "a mean of one value": with_vectors(running_mean=torch.ones(1)),
    "more rows in a convolution": lambda layer: setattr(layer.conv1, "weight", nn.Parameter(torch.ones(40, 10, 1, 1))),
    "fewer rows in a convolution": lambda layer: setattr(layer.conv2, "weight", nn.Parameter(torch.ones(1, 20, 3, 3))),
    "a stride": lambda layer: setattr(layer.conv2, "stride", (2, 2)),
    "groups of which the weights know nothing": lambda layer: setattr(layer.conv2, "groups", 5),
    "no padding": lambda layer: setattr(layer.conv2, "padding", (0, 0)),
}


@pytest.mark.parametrize("name", UNTAKEN)
def test_parameters_statistics_and_outputs_of_other_shapes_are_left_to_the_plain_modules(name):
    """Which raise an error or take them; memory is not read beyond them."""
    block, images = DenseBlock(Bottleneck, 2, 10, 5, 0.0, efficient=True), torch.randn(2, 10, 8, 8)
    assert block.runs_efficiently(images)
    UNTAKEN[name](block[0])
    assert not block.runs_efficiently(images)


def test_a_batch_norm_of_two_layers_is_left_to_the_plain_modules():
    block, images = DenseBlock(Bottleneck, 2, 10, 5, 0.0, efficient=True), torch.randn(2, 10, 8, 8)
    block[1].bn2 = block[0].bn2
    assert not block.runs_efficiently(images)


def test_a_block_without_layers_gives_its_input():
    block, images = DenseBlock(Bottleneck, 1, 4, 2, 0.0, efficient=True), torch.randn(2, 4, 8, 8)
    del block[:]
    assert block(images) is images


def with_other_meanings(**names):
    """The same code, in which these names stand for other modules."""
    return lambda forward: types.FunctionType(forward.__code__, {**forward.__globals__, **names})


def with_another_name(forward):
    """Calls another function at one place; its bytecode is the same."""
    names = tuple("gelu" if name == "relu" else name for name in forward.__code__.co_names)
    return types.FunctionType(forward.__code__.replace(co_names=names), forward.__globals__)


def with_another_constant(forward):
    """NumPy's name of torch.cat's argument; the bytecode is the same."""
    constants = tuple(("axis",) if each == ("dim",) else each for each in forward.__code__.co_consts)
    return types.FunctionType(forward.__code__.replace(co_consts=constants), forward.__globals__)


EDITS = {
    "another output": lambda forward: lambda self, x: 2 * forward(self, x),
    "another gradient": lambda forward: lambda self, x: torch.cat([x, forward(self, x.detach())[:, x.shape[1] :]], dim=1),
    "an attribute that a new layer has not": lambda forward: lambda self, x: getattr(self, "scale", 1) * forward(self, x),
    "many channels": lambda forward: lambda self, x: (2 if x.shape[1] > 15 else 1) * forward(self, x),
    "the mode": lambda forward: lambda self, x: forward(self, x) + (0.1 if self.training else 0),
    "another activation": with_other_meanings(F=SimpleNamespace(relu=torch.sigmoid)),
    "another concatenation": with_other_meanings(torch=SimpleNamespace(cat=lambda maps, dim: 2 * torch.cat(maps, dim))),
    "another name": with_another_name,
    "another constant": with_another_constant,
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("kind", [Bottleneck, SingleLayer])
def test_a_forward_method_that_was_edited_goes_through_the_plain_modules(monkeypatch, kind, name):
    """Of the class, as in densenet.py by somebody who does not know dense_block.py."""
    net = random_net(BC if kind is Bottleneck else PLAIN)
    net.dense2[0].scale = 3
    images, labels = batch(2, 8)
    assert_equal_training(net, images, labels)  # what it was before is not remembered
    monkeypatch.setattr(kind, "forward", EDITS[name](kind.forward))
    told = f"^{kind.__name__}.forward, or what it calls, differs from dense_block.Definition: it is called as it is$"
    with pytest.warns(UserWarning, match=told):
        assert_equal_training(net, images, labels)


RENAMED = [(kind, name) for kind in (Bottleneck, SingleLayer, Transition) for name in ("bn1", "conv1", "dropout")]


@pytest.mark.parametrize("becomes", ["nothing", None])
@pytest.mark.parametrize(("kind", "name"), [*RENAMED, (Bottleneck, "bn2"), (Bottleneck, "conv2")])
def test_a_layer_whose_modules_were_renamed_goes_through_the_plain_modules(monkeypatch, kind, name, becomes):
    net = random_net(PLAIN if kind is SingleLayer else BC)
    for module in net.modules():
        if type(module) is kind and name in module._modules:
            module.other = module._modules.pop(name)
            if becomes is None:
                module._modules[name] = None
    edited = dict(vars(densenet))
    exec(textwrap.dedent(inspect.getsource(kind.forward)).replace(f"self.{name}(", "self.other("), edited)
    monkeypatch.setattr(kind, "forward", edited["forward"])
    assert_equal_training(net, *batch(2, 8))


def test_memory_of_parameters_that_is_replaced_before_the_backward_pass_is_an_error():
    """As by PyTorch's vector_to_parameters(); it counts as no write."""
    net = efficient_twin(random_net(BC))
    loss = net(batch(2, 8)[0]).sum()
    for parameter in net.parameters():
        parameter.data = 1.5 * parameter.data
    with pytest.raises(RuntimeError, match="were changed before its backward pass"):
        loss.backward()


def doubled_call(self, x):
    return 2 * nn.Module.__call__(self, x)


REPLACED = {  # owner, name, what is put there
    "another activation": (F, "relu", F.gelu),
    "another convolution": (F, "conv2d", lambda x, weight, *rest, conv2d=F.conv2d: conv2d(x, weight.tanh(), *rest)),
    "another batch norm": (F, "batch_norm", lambda *arguments, batch_norm=F.batch_norm: 2 * batch_norm(*arguments)),
    "PyTorch's batch norm": (torch, "batch_norm", lambda *arguments, batch_norm=torch.batch_norm: 2 * batch_norm(*arguments)),
    "another dropout": (F, "dropout", lambda x, *rest: 2 * x),
    "another concatenation": (torch, "cat", lambda tensors, dim, cat=torch.cat: 2 * cat(tensors, dim)),
    "a convolution by somebody": (nn.Conv2d, "forward", lambda self, x, forward=nn.Conv2d.forward: 2 * forward(self, x)),
    "its method": (nn.Conv2d, "_conv_forward", lambda self, *rest, method=nn.Conv2d._conv_forward: 2 * method(self, *rest)),
    "a batch norm by somebody": (nn.BatchNorm2d, "forward", lambda self, x, own=nn.BatchNorm2d.forward: 2 * own(self, x)),
    "a dropout by somebody": (nn.Dropout, "forward", lambda self, x: 2 * x),
    "a call": (Bottleneck, "__call__", doubled_call),
}


@pytest.mark.parametrize("name", REPLACED)
def test_where_what_a_layer_calls_is_replaced_the_plain_modules_call_it(monkeypatch, name):
    net = random_net(BC)
    images, labels = batch(2, 8)
    assert_equal_training(net, images, labels)
    monkeypatch.setattr(*REPLACED[name])
    with pytest.warns(UserWarning, match=r"^Bottleneck.forward, or what it calls, differs from dense_block.Definition"):
        assert_equal_training(net, images, labels)


def test_no_test_compares_plain_modules_with_themselves_unnoticed(monkeypatch):
    """By the filter of warnings in pyproject.toml."""
    monkeypatch.setattr(F, "relu", F.gelu)
    with pytest.raises(UserWarning, match="differs from"):
        efficient_twin(random_net(BC))(batch(2, 8)[0])


class Sigmoid(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.relu:
            return torch.sigmoid(args[0])
        return function(*args, **kwargs or {})


def test_where_a_mode_replaces_what_a_layer_calls_the_plain_modules_run():
    net, (images, _) = random_net(BC), batch(2, 8)
    with Sigmoid():
        plain, ours = (each(images) for each in (net, efficient_twin(net)))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_under_a_default_device_a_block_is_efficient():
    """Which PyTorch sets by such a mode."""
    block, images = DenseBlock(Bottleneck, 2, 4, 2, 0.0, efficient=True), torch.randn(2, 4, 8, 8)
    with torch.device("meta"):
        assert block.runs_efficiently(images)


def dual(net, images):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(images, torch.ones_like(images)))).tangent


def gradient_by_functorch(net, images):
    def loss(images):  # buffers of its own are updated
        return torch.func.functional_call(net, {name: each.clone() for name, each in net.named_buffers()}, images).sin().sum()

    return torch.func.grad(loss)(images)


def logits_of_several_classifiers(net, images):
    """Only the last layer is transformed; the blocks' input is a plain tensor."""
    buffers = {name: each.clone() for name, each in net.named_buffers()}

    def logits(weight):
        return torch.func.functional_call(net, {**buffers, "fc.weight": weight}, images)

    return torch.func.vmap(logits)(torch.stack([net.fc.weight, 2 * net.fc.weight]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "transform",
    [
        dual,
        gradient_by_functorch,
        logits_of_several_classifiers,
        lambda net, images: torch.fx.symbolic_trace(net)(images),
        lambda net, images: make_fx(net)(images)(images),
        lambda net, images: torch.jit.trace(net, images, check_trace=False)(images),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore:Converting a tensor to a Python")
def test_what_traces_or_transforms_a_net_meets_the_plain_modules(transform, training):
    net, (images, _) = random_net(BC).train(training), batch(3, 8)
    plain, ours = (transform(each, images) for each in (net, efficient_twin(net)))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arguments", [BC, PLAIN])
def test_an_input_of_a_subclass_goes_through_the_plain_modules(arguments):
    """A wrapper of two tensors does everything twice, so also what is added to a plain tensor in place."""
    net, (images, _) = random_net(arguments), batch(3, 8)
    gradients = []
    for each in (net, efficient_twin(net)):
        each(TwoTensor(images, images.clone())).sin().sum().backward()
        gradients.append([getattr(parameter.grad, "a", parameter.grad) for parameter in each.parameters()])
    assert all(relative_error(ours, theirs) < 1e-12 for theirs, ours in zip(*gradients, strict=True))


@pytest.mark.xdist_group("compiler")  # imported by one process
def test_in_evaluation_mode_and_without_efficient_it_is_one_graph():
    net, (images, _) = random_net(dict(depth=10, growth_rate=4)), batch(3, 8)
    for each in (efficient_twin(net).eval(), copy.deepcopy(net).eval(), net.train()):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(each, backend="eager", fullgraph=True)(images), each(images))


@pytest.mark.xdist_group("compiler")  # imported by one process
@pytest.mark.parametrize("strict", [False, True])
def test_exported_in_training_mode_it_is_the_plain_modules(strict):
    """As for training with simulated quantisation."""
    net, (images, _), results = random_net(dict(depth=10, growth_rate=2)), batch(3, 8), []
    for each in (net, torch.export.export(efficient_twin(net), (images,), strict=strict).module()):
        each(images).sin().sum().backward()
        grads = {f"grad/{name}": parameter.grad for name, parameter in each.named_parameters()}
        results.append({**dict(each.named_buffers()), **grads})
    plain, exported = results
    assert plain.keys() == exported.keys()
    for name, value in plain.items():
        torch.testing.assert_close(exported[name], value, rtol=1e-12, atol=1e-12)


def test_a_net_that_is_made_in_inference_mode():
    with torch.inference_mode():
        net, (images, _) = random_net(BC), batch(3, 8)
        torch.testing.assert_close(efficient_twin(net)(images), net(images), rtol=1e-12, atol=1e-12)


def test_a_drop_rate_that_was_changed_before_the_backward_pass_is_an_error():
    net = efficient_twin(random_net({**BC, "drop_rate": 0.2}))
    loss = net(batch(2, 8)[0]).sum()
    net.dense3[1].dropout.p = 0.5
    with pytest.raises(RuntimeError, match="drop rates of an efficient block were changed before its backward pass"):
        loss.backward()


def test_an_image_that_is_no_batch_is_an_error():
    with pytest.raises(ValueError, match="expected 4D input"):
        efficient_twin(random_net(BC))(torch.zeros(3, 10, 10, dtype=torch.float64))


@pytest.mark.parametrize("where", ["dense1.0", "dense2.1.bn1", "dense3.1.conv2", "dense1.1.dropout"])
@pytest.mark.parametrize("when", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_are_called(where, when):
    net, called = efficient_twin(random_net(BC)), []
    getattr(net.get_submodule(where), f"register_{when}")(lambda *arguments: called.append(arguments[0]))
    images, labels = batch(2, 8)
    F.cross_entropy(net(images), labels).backward()
    assert {*called} == {net.get_submodule(where)}


def test_hooks_of_all_modules_are_called():
    net, called = efficient_twin(random_net(BC)), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    net(batch(2, 8)[0])
    handle.remove()
    assert {*net.modules()} <= {*called}


@pytest.mark.parametrize("arguments", [BC, PLAIN, {**BC, "drop_rate": 0.2}])
def test_what_was_not_changed_is_efficient(monkeypatch, arguments):
    """Also after a time in evaluation mode, with weights that get no gradient, and behind a hook that was removed."""
    blocks = []
    monkeypatch.setattr(densenet, "dense_block", lambda x, layers: blocks.append(layers) or dense_block.dense_block(x, layers))
    net = efficient_twin(random_net(arguments)).eval()
    net.dense1[0].conv1.weight.requires_grad_(False)
    net.dense1[0].conv1.register_forward_hook(print).remove()
    net(batch(2, 8)[0])
    assert not blocks
    net.train()
    net(batch(2, 8)[0])
    assert len(blocks) == 3


def test_a_single_value_per_channel_is_an_error():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        DenseBlock(Bottleneck, 1, 4, 2, 0.0, efficient=True)(torch.zeros(1, 4, 1, 1))


def test_gradients_of_many_slices_are_added_up_in_float32(monkeypatch):
    """Under autocast: of a thousand positive parts, added up in bf16, the last ones would change nothing."""
    torch.manual_seed(0)
    block = DenseBlock(SingleLayer, 1, 10, 5, 0.0, efficient=True).to(memory_format=torch.channels_last)
    images, target = torch.randn(1024, 10, 2, 2), torch.rand(1024, 15, 2, 2)
    exact = block_pass(copy.deepcopy(block).double(), images.double(), target)[-1:]
    monkeypatch.setattr(dense_block, "SLICE_PIXELS", 4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = block_pass(block, images.bfloat16(), target)[-1:]
    assert distance(rounded, exact) < 0.01


def test_sums_over_pixels_are_float32():
    """Under autocast, with weights and gradients that bf16 has exactly: beta's gradient has more digits than bf16."""
    torch.manual_seed(0)
    block = DenseBlock(SingleLayer, 1, 10, 5, 0.0, efficient=True).to(memory_format=torch.channels_last)
    block[0].conv1.weight.data = block[0].conv1.weight.data.bfloat16().float()
    images, target = torch.randn(64, 10, 8, 8).bfloat16(), torch.rand(64, 15, 8, 8).bfloat16()
    exact = block_pass(copy.deepcopy(block).double(), images.double(), target)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = block_pass(block, images, target)
    assert relative_error(rounded[3], exact[3]) < 5e-4


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        (None, None),
        ("driver", "AssertionError: libcuda.so cannot found!"),
        ("compiler", "no C compiler gcc"),
        ("headers", r"no \S+/Python.h, of a package such as python3-dev"),
    ],
)
def test_whether_triton_starts(monkeypatch, tmp_path, missing, told):
    error = AssertionError("libcuda.so cannot found!\nPossible files are located at [].")
    target = Mock(side_effect=error if missing == "driver" else None)
    driver = pytest.importorskip("triton").runtime.driver
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=target))
    monkeypatch.delenv("CC", raising=False)
    compiler = Mock(return_value=None if missing == "compiler" else "gcc")
    monkeypatch.setattr(dense_block.shutil, "which", compiler)
    if missing != "headers":
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(dense_block.sysconfig, "get_path", lambda name: tmp_path)
    sentence = rf"^Triton does not start \({told}\), so kernels.py is not used$"
    with pytest.warns(UserWarning, match=sentence) if missing else contextlib.nullcontext():
        assert dense_block.triton_starts() == (missing is None)
