#!/usr/bin/env python3
"""The test error of a checkpoint, class by class, with its confusion matrix; or the classes of your own pictures.

    ./evaluate.py work/cifar10.base/latest.pth --data data
    ./evaluate.py work/cifar10.base/latest.pth --image cat.png dog.jpg
    ./evaluate.py work/cifar10.base/latest.pth --export net.pth     the bare weights, and net.json with what they are

The net is rebuilt from the checkpoint alone, or from what --export wrote. confusion.csv and confusion.png are written
beside it, or into --out DIR: one row for each true class, one column for each predicted class, counts of test images.
"""

import argparse
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from densenet import DenseNet

CARD = ("model", "args", "epoch", "mean", "std", "classes")  # of a checkpoint: what describes its net
BATCH_SIZE = 250  # images at a time; without gradients a net needs little memory


def main():
    parser = build_parser()
    args = parser.parse_args()
    try:
        checkpoint = load_checkpoint(args.checkpoint)
        device = choose_device(args.device)
        if args.export:
            export(checkpoint, args.export)
            return
        net = build_net(checkpoint).to(device, memory_format=torch.channels_last)
        if args.image:
            classify(net, checkpoint, args.image, device)
        else:
            evaluate(net, checkpoint, args.data, args.out or args.checkpoint.parent, device)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s CHECKPOINT [options], which --help lists",
    )
    parser.add_argument("checkpoint", type=Path, help="latest.pth of a run, or weights of --export")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(%(default)s)")
    parser.add_argument("--data", metavar="DIR", help="folder of the data set (default: the one the run was trained on)")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder for confusion.csv and confusion.png (default: beside the checkpoint)"
    )
    parser.add_argument(
        "--export", metavar="FILE", type=Path, help="write the bare weights to this .pth file instead, and a .json"
    )
    parser.add_argument("--image", nargs="+", metavar="FILE", help="name the most likely classes of these pictures instead")
    return parser


# ------------------------------------------------------------------------------------------------------ the checkpoint


def load_checkpoint(path):
    """The dictionary that train.py saved, on the CPU. ValueError if the file is something else or damaged.

    Only tensors and plain values are read, never code; PyTorch's own reader does not look at the checksums, hence testzip.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: name the latest.pth of a run") from error
    except Exception as error:  # torch.load raises nearly anything for a file that is not its own
        raise ValueError(f"{path} is damaged or no checkpoint of train.py: name the latest.pth of a run") from error
    if is_state_dict(checkpoint):
        checkpoint = {"net": checkpoint, **read_card(path.with_suffix(".json"))}
    if not isinstance(checkpoint, dict) or not {"net", *CARD} <= checkpoint.keys():
        raise ValueError(f"{path} is no checkpoint of train.py: name the latest.pth of a run")
    return checkpoint


def is_state_dict(values):
    return isinstance(values, dict) and len(values) > 0 and all(torch.is_tensor(value) for value in values.values())


def read_card(path):
    """What --export wrote beside the weights. ValueError if it is not there or something else."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"bare weights need {path}, which --export writes beside them: {error}") from error


def export(checkpoint, path):
    """Writes the state dict, which torch.load reads anywhere, and what else there is to know as JSON."""
    card = path.with_suffix(".json")
    if card == path:
        raise ValueError(f"{path} is where the description goes: name a .pth file")
    for file in (path, card):
        if file.exists():
            raise ValueError(f"{file} exists already: name another file, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint["net"], path)
    card.write_text(json.dumps({name: checkpoint[name] for name in CARD}, indent=2) + "\n")
    print(f"wrote {path} and {card}")


def build_net(checkpoint):
    """The trained DenseNet of a checkpoint, in evaluation mode. ValueError if the weights are not those of such a net."""
    try:
        net = DenseNet(**checkpoint["model"])
        net.load_state_dict(checkpoint["net"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            "the weights are not those of the DenseNet that the checkpoint names: it is no checkpoint of train.py"
        ) from error
    return net.eval()


def normalization(checkpoint, device):
    """(mean, std) of the training images, each (3, 1, 1)."""
    return [torch.tensor(checkpoint[name], device=device).view(3, 1, 1) for name in ("mean", "std")]


# ---------------------------------------------------------------------------------------------------------- evaluation


def choose_device(name):
    """The torch.device of --device; auto is the GPU if there is one. ValueError if the device is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"--device {name}: this machine has none that PyTorch can use: choose --device cpu")
    return torch.device(name)


@torch.inference_mode()
def predict(net, images, mean, std):
    """Logits (M, num_classes), on the CPU in float64, of M uint8 images by the net in evaluation mode."""
    net.eval()
    return torch.cat([net(data.normalize(batch, mean, std)) for batch in images.split(BATCH_SIZE)]).cpu().double()


def loss_and_error_sums(logits, labels):
    """(sum of the cross-entropies, number of wrong answers), float64, over all rows of logits."""
    wrong = (logits.argmax(dim=1) != labels).sum()
    return torch.stack([F.cross_entropy(logits, labels, reduction="sum"), wrong.double()])


def evaluate(net, checkpoint, root, out, device):
    """Prints the figures of the test set and writes the confusion matrix into the folder `out`."""
    args = checkpoint["args"]
    dataset = data.load(args["dataset"], root or args["data"], torch.device("cpu"))
    if dataset.classes != checkpoint["classes"]:
        raise ValueError(
            f"the classes in {root or args['data']} are not those that the net was trained on: name its data with --data"
        )
    logits = predict(net, dataset.test.images.to(device), *normalization(checkpoint, device))
    labels = dataset.test.labels
    loss, error = (loss_and_error_sums(logits, labels) / len(labels)).tolist()
    confusion = confusion_matrix(logits.argmax(dim=1), labels, len(dataset.classes))
    print(f"{args['dataset']}, {len(dataset.test)} test images, epoch {checkpoint['epoch']}")
    print(f"test loss {loss:.2f}   test error {100 * error:.2f} %")
    print_classes(confusion, dataset.classes)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(confusion, dataset.classes, out / "confusion.csv")
    draw(confusion, dataset.classes, out / "confusion.png")
    print(f"wrote {out / 'confusion.csv'} and {out / 'confusion.png'}")


def confusion_matrix(predicted, labels, num_classes):
    """(true, predicted) counts as a NumPy array of num_classes x num_classes."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes).numpy()


def print_classes(confusion, classes):
    width = max(map(len, classes))
    for name, row, right in zip(classes, confusion, confusion.diagonal(), strict=True):
        total = row.sum()
        error = f"{100 * (total - right) / total:6.2f} %" if total else "   no image"
        print(f"  {name:{width}}  {error}  ({total - right} of {total} wrong)")


def write_csv(confusion, classes, path):
    import pandas as pd

    pd.DataFrame(confusion, index=pd.Index(classes, name="true"), columns=classes).to_csv(path)


def draw(confusion, classes, path):
    """The share of each true class that was taken for each class, in percent, numbers written where they fit."""
    from matplotlib.figure import Figure

    size = max(4.5, min(0.62 * len(classes), 14))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot()
    percent = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, ax=axes, label="images of the true class, %", shrink=0.8)
    font = 9 if len(classes) <= 20 else 4
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=font)
    axes.set_yticks(range(len(classes)), classes, fontsize=font)
    axes.set(xlabel="predicted class", ylabel="true class", title="Confusion matrix, test set")
    if len(classes) <= 20:
        for (row, column), value in np.ndenumerate(percent):
            axes.text(
                column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 50 else "black"
            )
    figure.savefig(path, dpi=150)


def classify(net, checkpoint, paths, device):
    """Prints the three most likely classes of each picture."""
    images = torch.stack([data.read_image(path) for path in paths]).to(device)
    logits = predict(net, images, *normalization(checkpoint, device))
    classes = checkpoint["classes"]
    for path, probabilities in zip(paths, logits.softmax(dim=1), strict=True):
        best = probabilities.topk(min(3, len(classes)))
        answers = (f"{classes[i]} {100 * p:.1f} %" for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True))
        print(f"{path}: {', '.join(answers)}")


if __name__ == "__main__":
    main()
