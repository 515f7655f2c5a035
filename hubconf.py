"""The trained nets for torch.hub; work/README.md says how they were trained and what they are not for.

    net = torch.hub.load("<folder of this repository>", "densenet_bc_40_12", source="local", pretrained=True).eval()

Images are (N, 3, 32, 32), normalised by the mean and std in work/<run>/net.json, where the classes are named, too.
"""

import json
import pathlib

import torch

import densenet

dependencies = ["torch"]


def densenet_bc_40_12(pretrained=False, **arguments):
    """DenseNet-BC, L=40, k=12; pretrained on CIFAR-10 with SGD. Further arguments are those of densenet.DenseNet."""
    return _make("bc-40-12", pretrained, arguments)


def densenet_bc_40_12_adam(pretrained=False, **arguments):
    """The same net; pretrained with Adam."""
    return _make("bc-40-12-adam", pretrained, arguments)


def _make(run, pretrained, arguments):
    folder = pathlib.Path(__file__).resolve().parent / "work" / run
    net = densenet.DenseNet(**json.loads((folder / "net.json").read_text())["model"] | arguments)
    if pretrained:
        net.load_state_dict(torch.load(folder / "net.pth", map_location="cpu", weights_only=True))
    return net
