#!/usr/bin/env python3
"""The test error of a checkpoint, class by class, with its confusion matrix; or the classes of your own pictures.

    ./evaluate.py work/cifar10.base/latest.pth --data data
    ./evaluate.py work/cifar10.base/latest.pth --image cat.png dog.jpg
    ./evaluate.py work/cifar10.base/latest.pth --export net.pth     the bare weights, and net.json with what they are

The net is rebuilt from the checkpoint alone, or from what --export wrote. confusion.csv and confusion.png are written
beside it, or into --out DIR: one row for each true class, one column for each predicted class, counts of test images.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import data
import endings
from checkpoint import build_net, export, image_size_of, load_checkpoint, normalization
from endings import Refused, naming, say
from flags import add_device_flag, named
from folder import pictures_in
from machine import choose_device, keep_freed_memory
from metrics import loss_and_error_sums, predict
from pictures import read_pictures


def main():
    parser = build_parser()
    args = parser.parse_args()
    remedy = "--device cpu or " * (args.device != "cpu" and torch.cuda.is_available()) + "a machine that has more"
    with endings.worded(parser, "the net and its images", remedy):
        checkpoint = load_checkpoint(args.checkpoint)
        if args.export:
            say(f"wrote {args.export} and {export(checkpoint, args.export)}")
            return
        device = choose_device(args.device)
        keep_freed_memory(device)
        net = build_net(checkpoint).to(device, memory_format=torch.channels_last)
        if args.image:
            classify(net, checkpoint, args.image, device)
        else:
            evaluate(net, checkpoint, args.data, args.out or args.checkpoint.parent, device)


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s CHECKPOINT [options], which --help lists",
    )
    parser.add_argument("checkpoint", type=named(Path), help="latest.pth of a run, or weights of --export")
    add_device_flag(parser)
    parser.add_argument(
        "--data", metavar="DIR", type=named(str), help="folder of the data set (default: the one the run was trained on)"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=named(Path),
        help="folder for confusion.csv and confusion.png (default: beside the checkpoint)",
    )
    parser.add_argument(
        "--export", metavar="FILE", type=named(Path), help="write the bare weights to this .pth file instead, and a .json"
    )
    parser.add_argument(
        "--image",
        nargs="+",
        metavar="FILE|DIR",
        type=named(Path),
        help="name the most likely classes of these pictures, or of those in a folder, instead",
    )
    return parser


def evaluate(net, checkpoint, root, out, device):
    """Prints loss and error of the test set and writes the confusion matrix into the folder `out`."""
    args = checkpoint["args"]
    if args["dataset"] not in data.SOURCES:
        raise Refused(f"the net was trained on {args['dataset']}, which this version of the program does not know")
    split, classes = data.read_part(args["dataset"], root or args["data"], "test", image_size_of(checkpoint))
    if classes != checkpoint["classes"]:
        raise Refused(
            f"the classes in {root or args['data']} are not those that the net was trained on: name its data with --data"
        )
    say(f"{args['dataset']}, {len(split):,} test images, epoch {checkpoint['epoch']}")
    logits = predict(net, split.images.to(device), *normalization(checkpoint, device), title="test images")
    loss, error = (loss_and_error_sums(logits, split.labels) / len(split)).tolist()
    confusion = confusion_matrix(logits.argmax(dim=1), split.labels, len(classes))
    say(f"test loss {loss:.2f}   test error {100 * error:.2f} %")
    say(f"mean of the classes' errors {100 * mean_class_error(confusion):.2f} %", *class_lines(confusion, classes))
    out.mkdir(parents=True, exist_ok=True)
    write_csv(confusion, classes, out / "confusion.csv")
    draw(confusion, classes, out / "confusion.png")
    say(f"wrote {out / 'confusion.csv'} and {out / 'confusion.png'}")


def confusion_matrix(predicted, labels, num_classes):
    """(true, predicted) counts as a NumPy array of num_classes x num_classes."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes).numpy()


def mean_class_error(confusion):
    """The mean of the classes' shares of wrong answers, each counting alike; classes without an image do not count."""
    total = confusion.sum(axis=1)
    return (1 - confusion.diagonal()[total > 0] / total[total > 0]).mean().item()


def class_lines(confusion, classes):
    """A line for each class: its error, and the counts that make it."""
    width = max(map(len, classes))
    for name, row, right in zip(classes, confusion, confusion.diagonal(), strict=True):
        total = row.sum()
        error = f"{100 * (total - right) / total:6.2f} %" if total else "   no image"
        yield f"  {name:{width}}  {error}  ({total - right} of {total} wrong)"


def write_csv(confusion, classes, path):
    import pandas as pd

    with naming(path):
        pd.DataFrame(confusion, index=pd.Index(classes, name="true"), columns=classes).to_csv(path, errors="backslashreplace")


def draw(confusion, classes, path):
    """The share of each true class that was taken for each class, in percent, numbers written where they fit."""
    from matplotlib.figure import Figure

    import drawing

    size = max(4.5, min(0.62 * len(classes), 14))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot()
    percent = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, ax=axes, label="images of the true class, %", shrink=0.8)
    names, style = drawing.as_text(classes)
    style["fontsize"] = 9 if len(classes) <= 20 else 4
    axes.set_xticks(range(len(classes)), names, rotation=90, **style)
    axes.set_yticks(range(len(classes)), names, **style)
    axes.set(xlabel="predicted class", ylabel="true class", title="Confusion matrix, test set")
    if len(classes) <= 20:
        for (row, column), value in np.ndenumerate(percent):
            axes.text(
                column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 50 else "black"
            )
    drawing.save(figure, path)


def classify(net, checkpoint, paths, device):
    """Prints the three most likely classes of each picture, a folder's among them."""
    paths = [picture for path in paths for picture in (pictures_in(path) if path.is_dir() else [path])]
    images = read_pictures(paths, image_size_of(checkpoint))
    logits = predict(net, images.to(device), *normalization(checkpoint, device))
    classes = checkpoint["classes"]
    for path, probabilities in zip(paths, logits.softmax(dim=1), strict=True):
        best = probabilities.topk(min(3, len(classes)))
        answers = (f"{classes[i]} {100 * p:.1f} %" for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True))
        say(f"{path}: {', '.join(answers)}")


if __name__ == "__main__":
    main()
