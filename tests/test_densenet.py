import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from attic.comparison import relative_error
from attic.torchvision_weights import to_torchvision, torchvision_net
from densenet import Bottleneck, DenseNet, SingleLayer, Transition

PLAIN = {"bottleneck": False}
PARAMETERS = [  # the table of the paper's nets: arguments, CIFAR-10, CIFAR-100
    ({"depth": 40, **PLAIN}, 1_019_722, 1_060_132),
    ({"depth": 100, **PLAIN}, 6_979_642, 7_084_852),
    ({"depth": 100, "growth_rate": 24, **PLAIN}, 27_249_082, 27_457_972),
    ({"depth": 100}, 769_162, 800_032),
    ({"depth": 250, "growth_rate": 24}, 15_324_406, 15_480_556),
    ({"depth": 190, "growth_rate": 40}, 25_624_430, 25_821_620),
]


@pytest.mark.parametrize(("arguments", "cifar10", "cifar100"), PARAMETERS)
def test_parameter_counts_are_those_of_the_paper(arguments, cifar10, cifar100):
    with torch.device("meta"):
        nets = DenseNet(**arguments), DenseNet(**arguments, num_classes=100)
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [cifar10, cifar100]


def test_state_dict_keys_are_fixed():
    keys = list(DenseNet(depth=16).state_dict())
    assert keys[:3] == ["conv1.weight", "dense1.0.bn1.weight", "dense1.0.bn1.bias"]
    assert {"dense1.1.conv2.weight", "trans1.bn1.bias", "trans2.conv1.weight", "dense3.1.bn2.running_var", "bn1.weight"} <= {
        *keys
    }
    assert keys[-2:] == ["fc.weight", "fc.bias"]
    layer = {key.removeprefix("dense2.0.") for key in DenseNet(depth=7, bottleneck=False).state_dict() if "dense2.0" in key}
    assert layer == {"bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked", "conv1.weight"}


@pytest.mark.parametrize(
    ("depth", "bottleneck", "nearest"),
    [(41, True, "40 and 46"), (99, False, "97 and 100"), (4, True, "10 and 16"), (-2, True, "10 and 16")],
)
def test_depth_that_does_not_fit_names_the_nearest_two(depth, bottleneck, nearest):
    with pytest.raises(ValueError, match=f"depth {depth} .*{nearest}"):
        DenseNet(depth=depth, bottleneck=bottleneck)


@pytest.mark.parametrize(
    ("name", "value"),
    [("growth_rate", 0), ("reduction", 0.0), ("reduction", 1.1), ("drop_rate", 1.0), ("drop_rate", -0.1), ("num_classes", 0)],
)
def test_arguments_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} {value} "):
        DenseNet(**{"depth": 10, name: value})


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize(("batch", "size"), [(1, 32), (2, 64), (1, 96), (3, 36), (2, 30)])
def test_any_size_that_the_poolings_allow(bottleneck, batch, size):
    net = DenseNet(depth=16, growth_rate=4, bottleneck=bottleneck, num_classes=7)
    logits = net(torch.randn(batch, 3, size, size))
    assert logits.shape == (batch, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_pooling_of_a_transition_drops_a_border():
    transition, x = Transition(3, 2).eval(), torch.randn(2, 3, 7, 5)
    assert torch.equal(transition(x), transition(x[:, :, :6, :4]))


def test_a_slice_of_a_block_is_its_layers():
    block = DenseNet(depth=22, growth_rate=4, efficient=True).dense1
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(block[:2](x), block[1](block[0](x)))
    assert block[-1] is [*block][2]
    assert [*block[1:].named_children()] == [*block.named_children()][1:]


def test_a_transition_keeps_a_channel_at_least():
    with pytest.raises(ValueError, match="would keep none of its 216 channels: choose a larger reduction"):
        DenseNet(reduction=0.004)


def test_old_maps_come_first_and_reduction_is_rounded_down():
    x = torch.randn(2, 9, 8, 8)
    for layer in (Bottleneck(9, 5), SingleLayer(9, 5)):
        out = layer(x)
        assert out.shape == (2, 14, 8, 8)
        assert torch.equal(out[:, :9], x)
    assert DenseNet(depth=10, growth_rate=5, reduction=0.5).trans1.conv1.out_channels == 7  # of 15


def test_initialisation_is_that_of_the_official_code():
    torch.manual_seed(0)
    net = DenseNet(depth=100)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            w = module.weight
            std = math.sqrt(2 / (w.shape[2] * w.shape[3] * w.shape[0]))
            standard_error = std / math.sqrt(w.numel())
            assert abs(w.mean()) < 5 * standard_error
            assert abs(w.std() - std) < 5 * standard_error / math.sqrt(2)
            normal = math.erf(1 / math.sqrt(2))  # of all numbers are within one std; of uniform ones fewer
            assert abs((w.abs() < std).double().mean() - normal) < 5 * math.sqrt(normal * (1 - normal) / w.numel())
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            assert (module.eps, module.momentum) == (1e-5, 0.1)
    bound = 1 / math.sqrt(net.fc.in_features)
    assert (net.fc.bias == 0).all()
    assert 0.99 * bound < net.fc.weight.abs().max() <= bound


@pytest.mark.parametrize("layer", [Bottleneck(6, 4, 0.3), SingleLayer(6, 4, 0.3), Transition(6, 4, 0.3)])
def test_dropout_follows_every_convolution_but_the_first(layer):
    """Equal to the paper's layer written with functions and fed the same random state."""
    x = torch.randn(3, 6, 8, 8)
    convs = [(layer.bn1, layer.conv1)] + ([(layer.bn2, layer.conv2)] if isinstance(layer, Bottleneck) else [])
    torch.manual_seed(7)
    out = x
    for bn, conv in convs:
        out = F.relu(F.batch_norm(out, None, None, bn.weight, bn.bias, training=True))
        out = F.dropout(F.conv2d(out, conv.weight, padding=conv.padding), 0.3, training=True)
    expected = F.avg_pool2d(out, 2) if isinstance(layer, Transition) else torch.cat([x, out], 1)
    torch.manual_seed(7)
    torch.testing.assert_close(layer(x), expected)
    net = DenseNet(depth=10, growth_rate=4, drop_rate=0.3)
    assert sum(isinstance(m, nn.Dropout) and m.p == 0.3 for m in net.modules()) == 5  # three layers, two transitions


@pytest.mark.parametrize(("depth", "growth_rate"), [(40, 12), (22, 7)])
def test_output_and_every_gradient_equal_torchvision(depth, growth_rate):
    torch.manual_seed(1)
    net = DenseNet(depth=depth, growth_rate=growth_rate).double()
    for p in net.parameters():  # no zeros and ones: every gradient is exercised
        p.data += 0.1 * torch.randn_like(p)
    twin = torchvision_net(net).double()
    twin.load_state_dict(to_torchvision(net.state_dict()))
    x, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(10, (4,))
    logits = [module(x) for module in (net, twin)]
    for out in logits:
        F.cross_entropy(out, labels).backward()
    assert relative_error(logits[0], logits[1]) < 1e-10
    theirs = dict(twin.named_parameters())
    for name, parameter in to_torchvision(dict(net.named_parameters())).items():
        assert relative_error(parameter.grad, theirs[name].grad) < 1e-10
    assert relative_error(net.eval()(x), twin.eval()(x)) < 1e-10


def test_forward_makes_no_tensor_on_another_device():
    """On a GPU that is only pretended: shapes and devices are real, numbers are not."""
    with FakeTensorMode():
        with torch.device("cuda"):
            net, images = DenseNet(depth=16, growth_rate=4, drop_rate=0.2), torch.empty(2, 3, 32, 32)
        assert net(images).device.type == "cuda"
