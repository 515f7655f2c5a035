"""The trained nets for torch.hub; work/README.md says how they were trained and what they are not for.

    net = torch.hub.load("<folder of this repository>", "densenet_bc_40_12", source="local", pretrained=True).eval()
    preprocess = torch.hub.load("<folder of this repository>", "preprocess", source="local")
    logits = net(preprocess(PIL.Image.open("cat.png")))

Images are (N, 3, 32, 32), normalised by the mean and std in work/<run>/net.json, which also names the classes.
With another num_classes the classifier is a new one, and the rest is loaded.
The nets need torch alone; preprocess needs Pillow, NumPy, torchvision and tqdm as well. Neither can be sent to worker
processes that are not forked (macOS, Python 3.14): load them there.
"""

import importlib
import json
import pathlib
import sys
import threading

import torch

import densenet

dependencies = ["torch"]
HERE = pathlib.Path(__file__).resolve().parent
imported = getattr(densenet, "__file__", None)  # None: a folder of that name
if not imported or pathlib.Path(imported).resolve().parent != HERE:
    raise ImportError(f"{densenet} was imported before {HERE / 'densenet.py'}: load this net in a process without it")


def densenet_bc_40_12(pretrained=False, **arguments):
    """DenseNet-BC, L=40, k=12; pretrained on CIFAR-10 with SGD. Further arguments are those of densenet.DenseNet."""
    return _make("bc-40-12", pretrained, arguments)


def densenet_bc_40_12_adam(pretrained=False, **arguments):
    """The same net; pretrained with Adam."""
    return _make("bc-40-12-adam", pretrained, arguments)


def preprocess(size=None):
    """A function that turns a Pillow picture, or a list of them, into a batch (N, 3, size, size) for the nets.

    As evaluate.py --image reads a file: upright RGB, white where transparent, shorter side resized to `size`, centre-cropped;
    then normalised as CIFAR-10 was. size is 32 by default, as in CIFAR-10.
    """
    to_tensor = _import_ours("pictures", "endings", "machine", "progress").to_tensor
    card = json.loads((HERE / "work" / "bc-40-12" / "net.json").read_text())
    mean, std = (torch.tensor(card[name]).view(3, 1, 1) for name in ("mean", "std"))

    def batch(pictures):
        pictures = pictures if isinstance(pictures, list | tuple) else [pictures]
        images = torch.stack([to_tensor(picture, size or card["image_size"]) for picture in pictures])
        return (images.float() - mean) / std

    return batch


def _import_ours(name, *needed):
    """Imports a module of this folder; leaves its name, and those of the modules it needs, to the caller's own modules."""
    names = (name, *needed)
    with vars(densenet).setdefault("_importing", threading.Lock()):  # torch.hub runs this file again in each thread
        theirs = {each: sys.modules.pop(each) for each in names if each in sys.modules}
        try:
            return importlib.import_module(name)
        finally:
            for each in names:
                sys.modules.pop(each, None)
            sys.modules.update(theirs)


def _make(run, pretrained, arguments):
    folder = HERE / "work" / run
    model = json.loads((folder / "net.json").read_text())["model"]
    net = densenet.DenseNet(**model | arguments)
    if pretrained:
        _refuse_another_net(net, model, arguments)
        state = torch.load(folder / "net.pth", map_location="cpu", weights_only=True)
        if net.fc.out_features != model["num_classes"]:
            state |= {"fc.weight": net.fc.weight, "fc.bias": net.fc.bias}
        net.load_state_dict(state)
    return net


def _refuse_another_net(net, model, arguments):
    """ValueError if an argument gives shapes other than those of the trained net."""
    with torch.device("meta"):
        trained = densenet.DenseNet(**model).architecture
    for name, value in arguments.items():
        if name in trained and net.architecture[name] != trained[name]:
            raise ValueError(f"pretrained=True has {name} {trained[name]} and not {value}: leave out {name}, or pretrained")
