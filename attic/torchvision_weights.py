"""Moves weights between our DenseNet and torchvision's: a mapping of state-dict names, and torchvision's net in our shape.

    twin = torchvision_net(net)
    twin.load_state_dict(to_torchvision(net.state_dict()))
    net.load_state_dict(from_torchvision(twin.state_dict()))

torchvision makes DenseNets for ImageNet. Weights fit ours if their net has three blocks and begins with one 3x3 convolution.
Its layers are bottlenecks; a plain net's layer is the second half of one, norm2 and conv2.
"""

import re
from collections import OrderedDict

import torch.nn as nn
import torchvision
from torchvision.models.densenet import _DenseBlock, _Transition

BOTTLENECK = {"bn1": "norm1", "conv1": "conv1", "bn2": "norm2", "conv2": "conv2"}
SINGLE_LAYER = {"bn1": "norm2", "conv1": "conv2"}
TRANSITION = {"bn1": "norm", "conv1": "conv"}
OTHERS = {"conv1": "features.conv0", "bn1": "features.norm5", "fc": "classifier"}


# ------------------------------------------------------------------------------------------------------------- the names


def to_torchvision(state):
    """A state dict of our DenseNet with torchvision's names."""
    layer = BOTTLENECK if any(name.startswith("dense1.0.bn2.") for name in state) else SINGLE_LAYER
    return {torchvision_name(name, layer): values for name, values in state.items()}


def from_torchvision(state):
    """A state dict of torchvision's DenseNet with our names. ValueError if it has a layer that ours lacks."""
    layer = BOTTLENECK if any(".denselayer1.norm1." in name for name in state) else SINGLE_LAYER
    return {our_name(name, layer): values for name, values in state.items()}


def torchvision_name(name, layer):
    module, _, tensor = name.rpartition(".")
    if match := re.fullmatch(r"dense(\d)\.(\d+)\.(\w+)", module):
        return f"features.denseblock{match[1]}.denselayer{int(match[2]) + 1}.{layer[match[3]]}.{tensor}"
    if match := re.fullmatch(r"trans(\d)\.(\w+)", module):
        return f"features.transition{match[1]}.{TRANSITION[match[2]]}.{tensor}"
    return f"{OTHERS[module]}.{tensor}"


def our_name(name, layer):
    module, _, tensor = name.rpartition(".")
    if match := re.fullmatch(r"features\.denseblock([123])\.denselayer(\d+)\.(\w+)", module):
        return f"dense{match[1]}.{int(match[2]) - 1}.{key_of(layer, match[3], name)}.{tensor}"
    if match := re.fullmatch(r"features\.transition([12])\.(\w+)", module):
        return f"trans{match[1]}.{key_of(TRANSITION, match[2], name)}.{tensor}"
    return f"{key_of(OTHERS, module, name)}.{tensor}"


def key_of(table, value, name):
    for key, candidate in table.items():
        if candidate == value:
            return key
    raise ValueError(f"{name} has no place in our DenseNet: only nets of three blocks after one 3x3 convolution fit")


# --------------------------------------------------------------------------------------------------------------- the net


def torchvision_net(net, memory_efficient=False):
    """torchvision's DenseNet, newly initialised, with as many layers and channels as our `net`, after a 3x3 convolution.

    With memory_efficient, it recomputes concatenations and activations in the backward pass.
    """
    features = OrderedDict(conv0=nn.Conv2d(3, net.conv1.out_channels, kernel_size=3, padding=1, bias=False))
    features["denseblock1"] = torchvision_block(net.dense1, memory_efficient)
    features["transition1"] = _Transition(net.trans1.conv1.in_channels, net.trans1.conv1.out_channels)
    features["denseblock2"] = torchvision_block(net.dense2, memory_efficient)
    features["transition2"] = _Transition(net.trans2.conv1.in_channels, net.trans2.conv1.out_channels)
    features["denseblock3"] = torchvision_block(net.dense3, memory_efficient)
    features["norm5"] = nn.BatchNorm2d(net.bn1.num_features)
    twin = torchvision.models.DenseNet(block_config=(1,))  # for its forward pass, whatever its layers
    twin.features = nn.Sequential(features)
    twin.classifier = nn.Linear(net.fc.in_features, net.fc.out_features)
    return twin


def torchvision_block(block, memory_efficient):
    first, bottleneck = block[0], hasattr(block[0], "bn2")
    growth_rate = (first.conv2 if bottleneck else first.conv1).out_channels
    channels = first.bn1.num_features
    twin = _DenseBlock(len(block), channels, 4, growth_rate, drop_rate=0.0, memory_efficient=memory_efficient)
    if not bottleneck:
        for layer, ours in zip(twin.values(), block, strict=True):
            make_single(layer, ours.bn1.num_features, growth_rate)
    return twin


def make_single(layer, in_channels, growth_rate):
    """Turns torchvision's BN-ReLU-Conv1x1-BN-ReLU-Conv3x3 into BN-ReLU-Conv3x3, the layer of the plain net."""
    layer.norm1 = layer.relu1 = layer.conv1 = nn.Identity()
    layer.norm2 = nn.BatchNorm2d(in_channels)
    layer.conv2 = nn.Conv2d(in_channels, growth_rate, kernel_size=3, padding=1, bias=False)
