"""DenseNet and DenseNet-BC for small images (CIFAR, SVHN).

Huang, Liu, Weinberger, van der Maaten: Densely Connected Convolutional Networks, arXiv:1608.06993.
The code follows the paper and the authors' Lua Torch code, which differ in one place: init_channels of DenseNet.

    >>> net = DenseNet(growth_rate=12, depth=100)            # DenseNet-BC, 769,162 parameters
    >>> net(torch.zeros(64, 3, 32, 32)).shape
    torch.Size([64, 10])
"""

import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

from dense_block import computable, dense_block, joinable


class ArgumentError(ValueError):
    """An argument out of range; the message names it and the valid values."""


class Bottleneck(nn.Module):
    """BN-ReLU-Conv1x1(4k)-BN-ReLU-Conv3x3(k), its output concatenated to its input (paper, section 3, "Bottleneck layers").

    Input (N, C, H, W), output (N, C + growth_rate, H, W): the old maps first, the new ones last.
    """

    def __init__(self, in_channels, growth_rate, drop_rate=0.0):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth_rate, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth_rate)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, kernel_size=3, padding=1, bias=False)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x):
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))  #   (N, 4k, H, W)
        out = self.dropout(self.conv2(F.relu(self.bn2(out))))  # (N, k, H, W)
        return torch.cat([x, out], dim=1)  #                     (N, C + k, H, W)


class SingleLayer(nn.Module):
    """BN-ReLU-Conv3x3(k), its output concatenated to its input: the layer of the plain DenseNet.

    Input (N, C, H, W), output (N, C + growth_rate, H, W).
    """

    def __init__(self, in_channels, growth_rate, drop_rate=0.0):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, growth_rate, kernel_size=3, padding=1, bias=False)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x):
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))  # (N, k, H, W)
        return torch.cat([x, out], dim=1)  #                   (N, C + k, H, W)


class Transition(nn.Module):
    """BN-ReLU-Conv1x1-average pool 2, between two dense blocks.

    Input (N, C, H, W), output (N, out_channels, H // 2, W // 2).
    """

    def __init__(self, in_channels, out_channels, drop_rate=0.0):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x):
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))  # (N, out_channels, H, W)
        return F.avg_pool2d(out, kernel_size=2)  #             (N, out_channels, H/2, W/2)


class DenseNet(nn.Module):
    """Three dense blocks, two transitions, global average pooling and a linear classifier (paper, section 3).

    Args:
        growth_rate: k, the number of feature maps that each layer adds.
        depth: L, the number of layers with weights; depth - 4 is divisible by 6 (bottleneck) or by 3 (plain).
        reduction: theta, the fraction of channels that a transition keeps, in (0, 1]; None is 0.5, and 1.0 for the plain net.
        num_classes: the number of logits.
        bottleneck: DenseNet-BC's layer (True) or the plain one (False).
        drop_rate: dropout after every convolution but the first, in [0, 1).
        init_channels: output channels of the first convolution; None is 2 * growth_rate, and 16 for the plain net.
            (The official code has 2 * growth_rate for the plain net as well; the paper's 27.2M parameters need 16.)
        efficient: train the dense blocks in linear memory; results differ by rounding only (dropout masks are those of a
            net in channels_last memory). A block with a module that is edited, hooked or frozen in evaluation mode runs
            as plain modules; so does evaluation, except on a GPU without gradients.

    Input (N, 3, H, W), H, W >= 4 (if not multiples of 4, pooling drops rows or columns); output logits (N, num_classes).
    A value out of its range raises ArgumentError, a ValueError.
    """

    def __init__(
        self,
        growth_rate=12,
        depth=100,
        reduction=None,
        num_classes=10,
        bottleneck=True,
        drop_rate=0.0,
        init_channels=None,
        efficient=False,
    ):
        super().__init__()
        reduction = (0.5 if bottleneck else 1.0) if reduction is None else reduction
        init_channels = (2 * growth_rate if bottleneck else 16) if init_channels is None else init_channels
        check_arguments(growth_rate, reduction, num_classes, drop_rate, init_channels)
        num_layers = layers_per_block(depth, bottleneck)
        layer = Bottleneck if bottleneck else SingleLayer
        (in1, out1), (in2, out2), (in3, out3) = block_channels(init_channels, num_layers * growth_rate, reduction)
        self.architecture = {"depth": depth, "growth_rate": growth_rate, "bottleneck": bottleneck}
        self.architecture |= {"reduction": reduction, "init_channels": init_channels}  # all shapes but fc's depend on these
        self.conv1 = nn.Conv2d(3, in1, kernel_size=3, padding=1, bias=False)
        self.dense1 = DenseBlock(layer, num_layers, in1, growth_rate, drop_rate, efficient)
        self.trans1 = Transition(out1, in2, drop_rate)
        self.dense2 = DenseBlock(layer, num_layers, in2, growth_rate, drop_rate, efficient)
        self.trans2 = Transition(out2, in3, drop_rate)
        self.dense3 = DenseBlock(layer, num_layers, in3, growth_rate, drop_rate, efficient)
        self.bn1 = nn.BatchNorm2d(out3)
        self.fc = nn.Linear(out3, num_classes)
        self.apply(init_weights)

    def forward(self, x):
        out = self.conv1(x)  #                                        (N, C0, H, W)
        out = block_and_transition(self.dense1, self.trans1, out)  #  (N, C1, H/2, W/2)
        out = block_and_transition(self.dense2, self.trans2, out)  #  (N, C2, H/4, W/4)
        out = F.relu(self.bn1(self.dense3(out)))  #                   (N, C3, H/4, W/4)
        return self.fc(out.mean(dim=(2, 3)))  #                       (N, num_classes)


class DenseBlock(nn.Sequential):
    """num_layers layers, each reading the concatenation of the block's input and all earlier outputs.

    Input (N, C, H, W), output (N, C + num_layers * growth_rate, H, W). Calling the layers in order defines the
    result; with efficient, dense_block.py computes it in less memory if no layer was changed. The output is then channels_last
    and must not be modified in place, not even by a hook.
    """

    def __init__(self, layer, num_layers, channels, growth_rate, drop_rate, efficient):
        super().__init__(*(layer(channels + i * growth_rate, growth_rate, drop_rate) for i in range(num_layers)))
        self.efficient = efficient

    def forward(self, x):
        if self.runs_efficiently(x):
            return dense_block(x, list(self))  # (N, C + num_layers * k, H, W)
        return super().forward(x)  #             (N, C + num_layers * k, H, W)

    def __getitem__(self, index):
        """A layer; for a slice, an nn.Sequential of the layers: nn.Sequential itself would call our constructor."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict([*self._modules.items()][index]))
        return super().__getitem__(index)

    def runs_efficiently(self, x):
        """Whether dense_block.py computes this block."""
        layers = list(self)
        return self.efficient and layers and type(layers[0]) in (Bottleneck, SingleLayer) and computable(x, layers)


def block_and_transition(block, transition, x):
    """transition(block(x)), (N, C', H // 2, W // 2); fused where dense_block.py can, without storing block(x)."""
    ours = type(block) is DenseBlock and type(transition) is Transition
    if ours and block.runs_efficiently(x) and joinable(x, block, transition):
        return dense_block(x, list(block), transition)
    return transition(block(x))


def layers_per_block(depth, bottleneck):
    """(depth - 4) / 6, or / 3 without bottlenecks. ArgumentError, naming depths that fit, if that is not a positive integer."""
    step = 6 if bottleneck else 3
    num_layers, remainder = divmod(depth - 4, step)
    if remainder or num_layers < 1:
        below = max(depth - remainder, 4 + step)
        nearest = f"the nearest are {below} and {below + step}"
        raise ArgumentError(f"depth {depth} does not fit: depth - 4 must be a multiple of {step}, {nearest}")
    return num_layers


def block_channels(channels, added, reduction):
    """[(input channels, output channels)] of the three blocks; the layers of each add `added` channels."""
    blocks = []
    for _ in range(3):
        if channels < 1:
            raise ArgumentError(f"a transition would keep none of its {blocks[-1][1]} channels: choose a larger reduction")
        blocks.append((channels, channels + added))
        channels = math.floor(reduction * (channels + added))
    return blocks


def check_arguments(growth_rate, reduction, num_classes, drop_rate, init_channels):
    """ArgumentError if a value is out of its range."""
    for name, value in [("growth_rate", growth_rate), ("num_classes", num_classes), ("init_channels", init_channels)]:
        if value < 1:
            raise ArgumentError(f"{name} {value} is too small: it must be 1 or more")
    if not 0 < reduction <= 1:
        raise ArgumentError(f"reduction {reduction} is out of range: it must be in (0, 1]")
    if not 0 <= drop_rate < 1:
        raise ArgumentError(f"drop_rate {drop_rate} is out of range: it must be in [0, 1)")


def init_weights(module):
    """Official initialisation: convolutions N(0, sqrt(2 / (kh * kw * out))), linear bias 0; all else is PyTorch's default:
    batch norm 1 and 0, linear weights U(-1/sqrt(in), 1/sqrt(in)) as in Torch."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
