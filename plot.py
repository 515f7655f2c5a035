#!/usr/bin/env python3
"""Draws the loss and the error of one or several runs from their train.csv and test.csv, also while they are being written.

    ./plot.py work/cifar10.base                              loss.png, error.png and loss-error.png in that folder
    ./plot.py work/sgd work/adam --out images                both runs in the same figures
    ./plot.py work/sgd --out images/sgd.png                  loss and error side by side, in this file
    ./plot.py work/sgd --since 150 --linear --format pdf     the second half, linear loss axis, as PDF

Thin lines are the training loss and error of each step, smoothed over one epoch; thick lines are those of the test set.
"""

import argparse
import io
import itertools
import math
import os
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import drawing
import endings
from endings import Refused, at_least, named, say

FORMATS = ("png", "pdf", "svg")
MAX_POINTS = 3000
LABELS = {"loss": "cross-entropy loss", "error": "error, %"}


def main():
    parser = build_parser()
    args = parser.parse_args()
    with endings.worded(parser, "the figures", "a larger --since"):
        runs = {label: read_run(folder, args.smooth) for label, folder in name_runs(args.runs).items()}
        check_since(runs, args.since)
        out = args.out or Path(os.path.commonpath([folder.resolve() for folder in args.runs]))
        for path, columns in panels(out, args.format).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(runs, columns, path, args.title, args.since, args.linear)
            say(path)


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s DIR [DIR ...] [options], which --help lists",
    )
    parser.add_argument("runs", nargs="+", type=named(Path), metavar="DIR", help="folder of a run")
    parser.add_argument(
        "--out",
        type=named(Path),
        metavar="DIR|FILE",
        help="their folder, or the file of one figure (default: the run, or what holds all)",
    )
    parser.add_argument("--format", choices=FORMATS, default="png", help="(%(default)s)")
    parser.add_argument(
        "--smooth", type=at_least(0, float), metavar="EPOCHS", default=1.0, help="training curve's moving average (%(default)s)"
    )
    parser.add_argument("--linear", action="store_true", help="linear instead of logarithmic loss axis")
    parser.add_argument("--title", help="text above the figure")
    parser.add_argument(
        "--since", type=at_least(0, float), metavar="EPOCH", default=0.0, help="leave out what came before (%(default)s)"
    )
    return parser


def panels(out, suffix):
    """{path: columns}: three figures in a folder, or one of both columns if out is a file."""
    if out.suffix.lstrip(".") in FORMATS:
        return {out: ["loss", "error"]}
    return {out / f"{'-'.join(columns)}.{suffix}": columns for columns in (["loss"], ["error"], ["loss", "error"])}


def name_runs(folders):
    """{label: folder}; a label is the shortest end of the path that tells the runs apart. Refused if one is named twice."""
    paths = [folder.resolve() for folder in folders]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice:
        raise Refused(f"{twice} is named twice: name each run once")
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return {str(Path(*path.parts[-length:])): path for path in paths}


def read_run(folder, smooth):
    """(train, test) of a run as data frames; train smoothed over `smooth` epochs. Refused if both are empty."""
    train, test = (read_csv(folder / f"{part}.csv") for part in ("train", "test"))
    if train.empty and test.empty:
        raise Refused(f"{folder} has nothing to draw yet: train.csv and test.csv have no row")
    if not train.empty:
        train = moving_average(train, smooth)
    return train, test


def check_since(runs, since):
    """Refused if --since is after the last epoch."""
    last = max(table["epoch"].max() for tables in runs.values() for table in tables if not table.empty)
    if since > last:
        raise Refused(f"--since {since:g} is behind the last epoch that there is, {last:g}: choose less")


def read_csv(path):
    """The rows of a CSV but for a last one that is only half written. Refused if it is missing, damaged or another."""
    if not path.exists():
        raise Refused(f"{path} does not exist: name the folder of a run of train.py")
    try:
        text = path.read_text()
        table = pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1] or "epoch,loss,error\n"), dtype=float)
    except (ValueError, OSError) as error:
        raise Refused(f"{path} is no table of numbers ({str(error).strip()}): it was not written by train.py") from error
    if not {"epoch", "loss", "error"} <= set(table.columns) or not isinstance(table.index, pd.RangeIndex):  # a column too many
        raise Refused(f"{path} has no columns epoch, loss, error: it was not written by train.py")
    epochs = [0, *table["epoch"], math.inf]
    if not all(one < other for one, other in itertools.pairwise(epochs)):
        raise Refused(f"{path} is damaged, its epochs do not rise from row to row: put back a whole one")
    return table


def moving_average(train, epochs):
    """Averages each row over the steps of the `epochs` epochs before it, and keeps a few thousand of the rows to be drawn."""
    steps_per_epoch = 1 / train["epoch"].iloc[0]  # the first row stands at the end of the first step
    window = max(1, round(min(epochs * steps_per_epoch, len(train))))
    smooth = train[["loss", "error"]].rolling(window, min_periods=1).mean().assign(epoch=train["epoch"])
    every = max(1, len(smooth) // MAX_POINTS)
    return smooth[(len(smooth) - 1) % every :: every]  # the last row among them


def draw(runs, columns, path, title, since, linear):
    """One figure with a panel for each of `columns`. The names of runs and the title are text: $ and _ are letters in them."""
    figure = Figure(figsize=(1.2 + 5.3 * len(columns), 4.3), layout="constrained")
    (title, *names), style = drawing.as_text([title or "", *runs])
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        for color, (label, tables) in enumerate(zip(names, runs.values(), strict=True)):
            draw_run(axes, column, label, f"C{color}", *(table[table["epoch"] >= since] for table in tables))
        axes.set(xlabel="epoch", ylabel=LABELS[column])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if column == "loss" and not linear:
            axes.set_yscale("log")
        if column == "error":
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3, which="both")
        lines = axes.get_lines()
        for text in axes.legend(lines, [line.get_label() for line in lines]).get_texts():
            text.set(**style)
    if title:
        figure.suptitle(title, **style)
    drawing.save(figure, path)


def draw_run(axes, column, label, color, train, test):
    marker = "o" if len(test) <= 20 else None  # a line of one point would not be seen
    axes.plot(train["epoch"], train[column], color=color, linewidth=0.9, alpha=0.6, label=f"{label}, train")
    axes.plot(test["epoch"], test[column], color=color, linewidth=2, marker=marker, markersize=4, label=f"{label}, test")


if __name__ == "__main__":
    main()
