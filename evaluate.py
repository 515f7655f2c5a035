#!/usr/bin/env python3
"""The error of a checkpoint, class by class, with its confusion matrix; or the classes of your own pictures.

    ./evaluate.py work/cifar10.base --data data
    ./evaluate.py work/cifar10.base --val                    the images held out by train.py --val
    ./evaluate.py work/cifar10.base --image cat.png photos --predictions photos.csv
    ./evaluate.py work/cifar10.base --export net.pth         the bare weights, and net.json that describes them

The net is rebuilt from the checkpoint alone, or from what --export wrote. confusion.csv and confusion.png are written
beside it, or into --out DIR (with --val, confusion-val): a row for each true class, a column for each predicted one.
"""

import contextlib
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import data
import drawing
from checkpoint import build_net, checkpoint_in, export, image_size_of, load_checkpoint, normalization
from endings import LARGER, Refused, handle_errors, in_one_line, make_parser, new_file, nonempty, say
from files import refuse_existing, refuse_foreign, writable, write_text
from flags import add_device_flag
from folder import in_order, left_out, list_classes, pictures_in, refuse_among_pictures
from machine import choose_device, keep_freed_memory
from metrics import loss_and_error_sums, predict
from pictures import read_pictures, refuse_unreadable
from run_folder import RESULTS, read_arguments
from runs import read_csv

MAX_NAMES = 100  # beside a confusion matrix


def main():
    parser = build_parser()
    args = parser.parse_args()
    remedy = "--device cpu or " * (args.device != "cpu" and torch.cuda.device_count() > 0) + LARGER
    with handle_errors(parser, "the net and its images", remedy):
        refuse_contradictions(args)
        args.checkpoint = checkpoint_in(args.checkpoint)
        checkpoint = load_checkpoint(args.checkpoint)
        if args.export:
            say(f"wrote {args.export} and {export(checkpoint, args.export)}")
            return
        check_matrix_place(args)
        device = choose_device(args.device)
        keep_freed_memory(device)
        net = build_net(checkpoint).to(device, memory_format=torch.channels_last)
        if args.image:
            classify(net, checkpoint, args, device)
        else:
            evaluate(net, checkpoint, args, device)


def build_parser():
    parser = make_parser(__doc__, "%(prog)s CHECKPOINT [options], which --help lists")
    add = parser.add_argument
    add("checkpoint", type=nonempty(Path), help="a run's folder or its latest.pth, or weights of --export")
    add_device_flag(parser)
    add("--data", metavar="DIR", type=nonempty(str), help="folder of the data set (the one the run was trained on)")
    add("--val", action="store_true", help="the images that the run held out, in place of the test set")
    add("--out", metavar="DIR", type=nonempty(Path), help="folder for confusion.csv and confusion.png (beside the checkpoint)")
    text = "write each picture's class, its probability, and the true class if known, as CSV"
    add("--predictions", metavar="FILE", type=new_file, help=text)
    text = "classify these pictures, or those in a folder, instead of evaluating the test set"
    add("--image", nargs="+", metavar="FILE|DIR", type=nonempty(Path), help=text)
    add("--export", metavar="FILE", type=new_file, help="write the bare weights to this .pth file instead, and a .json")
    return parser


def refuse_contradictions(args):
    """Refused for arguments that do not fit each other, and if --predictions exists or cannot be written."""
    if args.export and (args.image or args.val or args.predictions or args.data or args.out):
        raise Refused("--export evaluates nothing: leave out --image, --val, --predictions, --data and --out")
    if args.image and (args.val or args.data or args.out):
        raise Refused("--image classifies your own pictures, no data set: leave out --val, --data and --out")
    refuse_existing(args.predictions)


def check_matrix_place(args):
    """Unless --image is given, refused if the confusion matrix cannot be written or would replace another file."""
    if args.image:
        return
    table = confusion_table(args)
    if not writable(table.parent):
        raise Refused(f"{table.parent} is not a writable folder: name another with --out")
    for path in (table, table.with_suffix(".png")):
        refuse_foreign(path, RESULTS[path.name])
        if args.predictions:
            places = [str(each.resolve()) for each in (path, args.predictions)]
            if os.path.commonpath(places) in places:
                raise Refused(f"--predictions {args.predictions} is where the confusion matrix goes: name another file")


def confusion_table(args):
    """The CSV of the confusion matrix; its picture lies beside it."""
    return (args.out or args.checkpoint.parent) / ("confusion-val.csv" if args.val else "confusion.csv")


def evaluate(net, checkpoint, args, device):
    """Prints loss and error of the test set, or of the held-out images, and writes the confusion matrix."""
    part, classes = "val" if args.val else "test", [*map(in_one_line, checkpoint["classes"])]
    root = data_folder(args, checkpoint)
    if checkpoint["args"]["dataset"] == "folder":
        refuse_among_pictures(confusion_table(args).parent, root)
    split = read_split(checkpoint, root, part)
    files = files_of(checkpoint["args"], root, part) if args.predictions else []
    say(f"{checkpoint['args']['dataset']}, {len(split):,} {part} images, epoch {checkpoint['epoch']}")
    logits = predict(net, split.images.to(device), *normalization(checkpoint, device), title=f"{part} images")
    loss, error = (loss_and_error_sums(logits, split.labels) / len(split)).tolist()
    confusion = confusion_matrix(logits.argmax(dim=1), split.labels, len(classes))
    say(f"{part} loss {loss:.2f}   {part} error {100 * error:.2f} %")
    say(*other_error(args.checkpoint.parent / "test.csv", checkpoint["epoch"], part, 100 * error, len(split)))
    say(f"mean per-class error {100 * mean_class_error(confusion):.2f} %", *class_lines(confusion, classes))
    path = confusion_table(args)
    write_text(path, pd.DataFrame(confusion, index=pd.Index(classes, name="true"), columns=classes).to_csv())
    if args.predictions:
        write_text(args.predictions, predictions(files or range(len(split)), logits, classes, split.labels))
    draw(confusion, classes, f"{part} images", path.with_suffix(".png"))
    say(f"wrote {path.with_suffix('.png')}")


def data_folder(args, checkpoint):
    """--data, else the run's: the absolute path in args.json or, where that does not exist, the one that the run was given."""
    if args.data:
        return Path(args.data)
    with contextlib.suppress(Refused):
        absolute = read_arguments(args.checkpoint.parent).get("data")
        if absolute and os.path.exists(absolute):
            return Path(absolute)
    return Path(checkpoint["args"]["data"])


def read_split(checkpoint, root, part):
    """The test images of the net's data set in the folder root, or the images that the run held out."""
    run = checkpoint["args"]
    if run["dataset"] not in data.SOURCES:
        raise Refused(f"the net was trained on {run['dataset']}, which this version of the program does not know")
    if part == "val" and run["val"] < 1:
        raise Refused("the run of this net held out no images: leave out --val")
    source = "train" if part == "val" else "test"
    split, classes = data.read_part(run["dataset"], root, source, image_size_of(checkpoint))
    if classes != checkpoint["classes"]:
        differing = ", ".join(sorted({*classes} ^ {*checkpoint["classes"]})[:5]) or "their order"
        raise Refused(f"the classes in {root} differ from those of the net ({differing}): name its data with --data")
    if part == "val":
        _, held_out = data.hold_out(split.labels, run["val"])
        split = split.take(held_out)
    known = (run.get("digests") or {}).get(part) in (None, split.digest())
    if part == "val" and not known:
        raise Refused(f"the images held out of {root} are not those that the run held out: name its data with --data")
    if not known:
        say(f"the test images in {root} are not those that the run was tested with")
    return split


def other_error(path, epoch, part, error, num_images):
    """A line if test.csv has another error for this epoch, beyond rounding: weights also load into edited code."""
    with contextlib.suppress(Refused, KeyError, OSError):  # it is no part of a checkpoint
        recorded = read_csv(path).set_index("epoch")[{"test": "error", "val": "val_error"}[part]][epoch]
        if abs(recorded - error) > 0.1 + 100 / num_images:
            yield f"{path} has {recorded:.2f} %: the run used other code or other images"


def files_of(run, root, part):
    """The picture files of read_split's images, in its order; [] unless the data set is a folder."""
    if run["dataset"] != "folder":
        return []
    source = "train" if part == "val" else "test"
    files, labels = in_order(list_classes(root / source), source)
    if part == "val":
        _, held_out = data.hold_out(labels, run["val"])
        files = [files[i] for i in held_out.tolist()]
    return [*map(str, files)]


def confusion_matrix(predicted, labels, num_classes):
    """(true, predicted) counts as a NumPy array of num_classes x num_classes."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes).numpy()


def mean_class_error(confusion):
    """The unweighted mean of the classes' error rates, over the classes that have images."""
    total = confusion.sum(axis=1)
    return (1 - confusion.diagonal()[total > 0] / total[total > 0]).mean().item()


def class_lines(confusion, classes):
    """A line for each class: its error, and the counts that make it."""
    width = max(map(len, classes))
    for name, row, right in zip(classes, confusion, confusion.diagonal(), strict=True):
        total = row.sum()
        error = f"{100 * (total - right) / total:6.2f} %" if total else "   no image"
        yield f"  {name:{width}}  {error}  ({total - right} of {total} wrong)"


def predictions(pictures, logits, classes, labels=None):
    """As CSV, the true class of each picture, if known, its most likely class and how probable that is.

    Control characters in the pictures' names are escaped here, the classes come escaped: before Python 3.13 a carriage return
    is not quoted, and would break the row.
    """
    pictures = [in_one_line(str(picture)) for picture in pictures]
    best = logits.softmax(dim=1).max(dim=1)
    columns = {"true": labels, "class": best.indices}
    names = {name: [classes[i] for i in indices.tolist()] for name, indices in columns.items() if indices is not None}
    return pd.DataFrame({"picture": pictures, **names, "probability": best.values.numpy().round(6)}).to_csv(index=False)


def draw(confusion, classes, what, path):
    """Draws the confusion matrix: coloured by shares of the true class, with counts if there are 20 classes at most.

    Of many classes only every second, third … is named, evenly, so that the names can be read.
    """
    size = max(4.5, min(0.62 * len(classes), 14))
    figure = drawing.new_figure(size + 1, size)
    axes = figure.add_subplot()
    percent = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for draw_lines in (axes.hlines, axes.vlines):  # without them adjacent dark cells merge
        draw_lines(np.arange(0.5, len(classes) - 1), -0.5, len(classes) - 0.5, "white", linewidth=min(0.5, 10 / len(classes)))
    figure.colorbar(picture, ax=axes, label="images of the true class, %", shrink=0.8)
    named = range(0, len(classes), math.ceil(len(classes) / MAX_NAMES))
    names, style = drawing.as_text(shortened(classes[i]) for i in named)
    style["fontsize"] = min(9, 600 / len(named))
    axes.set_xticks(named, names, rotation=90, **style)
    totals = [f"{name} ({confusion[i].sum()})" for name, i in zip(names, named, strict=True)]
    axes.set_yticks(named, totals, **style)
    room = max(label.get_window_extent().width for label in axes.get_yticklabels()) / figure.dpi - 1  # of long names
    if room > 0:
        figure.set_size_inches(figure.get_size_inches() + [room, room + 0.3])  # Matplotlib forgets some of the title's height
    axes.set(xlabel="predicted class", ylabel="true class (number of images)", title=f"Confusion matrix, {what}")
    if len(classes) <= 20:
        centred = {"ha": "center", "va": "center", "fontsize": 8}
        for (row, column), count in np.ndenumerate(confusion):
            color = "white" if percent[row, column] > 50 else "black"
            axes.text(column, row, str(count) if count else "", color=color, **centred)
    drawing.save(figure, path)


def shortened(name):
    return name if len(name) <= 50 else f"{name[:25]}…{name[-25:]}"


def classify(net, checkpoint, args, device):
    """Classifies the pictures, and those in folders, that can be read; then refuses the others, by name."""
    paths = [picture for path in args.image for picture in named_pictures(path)]
    images, readable, unreadable = read_pictures(paths, image_size_of(checkpoint))
    if readable:
        logits = predict(net, images.to(device), *normalization(checkpoint, device))
        tell_classes(readable, logits, [*map(in_one_line, checkpoint["classes"])], args.predictions)
    refuse_unreadable(unreadable)


def named_pictures(path):
    """The picture of --image, or those in the folder, with a line on what else is there."""
    try:
        path.lstat()  # a link to nothing is one of the pictures that cannot be read
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refused(f"--image {path} does not exist: name a picture, or a folder with pictures") from error
    if not path.is_dir():
        return [path]
    say(*left_out(path))
    return pictures_in(path)


def tell_classes(paths, logits, classes, predictions_path):
    """Prints the three most likely classes of each picture, and writes the file of --predictions."""
    for path, probabilities in zip(paths, logits.softmax(dim=1), strict=True):
        best = probabilities.topk(min(3, len(classes)))
        answers = (f"{classes[i]} {100 * p:.1f} %" for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True))
        say(f"{path}: {', '.join(answers)}")
    if predictions_path:
        write_text(predictions_path, predictions(paths, logits, classes))


if __name__ == "__main__":
    main()
