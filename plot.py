#!/usr/bin/env python3
"""Draws the loss and the error of one or several runs from their train.csv and test.csv, also while they are being written.

    ./plot.py work/cifar10.base                              loss.png, error.png and loss-error.png in that folder
    ./plot.py work/sgd work/adam --out images                both runs in the same figures
    ./plot.py work/sgd --out images/sgd.pdf                  loss and error side by side, in this file
    ./plot.py work/sgd --since 150 --linear --format pdf     the second half, linear loss axis, as PDF
    ./plot.py work/sgd-* work/adam-* --average --out images  the mean of each setting's seeds, a band for the test set

Thin lines are the training loss and error of each step, smoothed over one epoch; thick lines are those of the test set,
dashed ones those of the validation images. A dotted line marks a change of the learning rate, unless it changes all the time.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

import pandas as pd

import drawing
from endings import Refused, at_least, handle_errors, make_parser, nonempty, say
from files import PICTURE, refuse_foreign
from runs import COLUMNS, arguments_of, in_words, name_runs, read_csv, settings

MANY_CHANGES = 10  # more changes of the learning rate are a curve, such as a cosine, and are not marked
STRETCHES = 1500  # of a long curve; the lowest and the highest point of each are drawn
LABELS = {"loss": "cross-entropy loss", "error": "error, %"}
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]  # of Okabe and Ito
MARKERS = "os^Dv<>pP*X"  # more of these than colours, so that a repeated colour gets another marker
PARTS = {
    "train": {"linewidth": 0.7, "alpha": 0.7},
    "val": {"linewidth": 1.2, "linestyle": "--"},
    "test": {"linewidth": 1.5, "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.5},
}
POINT = {part: {"marker": marker, "markersize": 5, "linestyle": "none"} for part, marker in zip(PARTS, "._o", strict=True)}
BAND = {"linewidth": 0, "alpha": 0.2}
CHANGE = {"linewidth": 0.8, "linestyle": ":", "color": "grey"}


class Curve(NamedTuple):
    """What is drawn in one colour: a run, or all runs of a setting."""

    tables: dict  # {part: mean, min and max over the runs of loss and error, by epoch}
    changes: set  # the epochs after which the learning rate changed
    runs: int
    last: float  # epoch


def main():
    parser = build_parser()
    args = parser.parse_args()
    with handle_errors(parser, "the figures", "a larger --since"):
        folders = name_runs(args.runs)
        curves = average_curves(folders, args.smooth) if args.average else run_curves(folders, args.smooth)
        if not curves:
            raise Refused("there is nothing to draw yet: train.csv and test.csv have no row")
        check_since(curves, args.since)
        figures = panels(args.out or Path(os.path.commonpath(folders.values())), args.format)
        for path in figures:
            refuse_foreign(path, PICTURE)
        for path, columns in figures.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(curves, columns, path, args)
            say(path)


def build_parser():
    parser = make_parser(__doc__, "%(prog)s DIR [DIR ...] [options], which --help lists")
    add, number = parser.add_argument, at_least(0, float)
    add("runs", nargs="+", type=nonempty(Path), metavar="DIR", help="folder of a run")
    text = "folder for the figures, or file of a single one (default: the run, or the folder that holds all runs)"
    add("--out", type=nonempty(Path), metavar="DIR|FILE", help=text)
    add("--format", choices=drawing.FORMATS, help="(that of --out FILE, else png)")
    add("--average", action="store_true", help="draw the mean of runs that differ in --seed only, and the range of their test")
    add("--smooth", type=number, metavar="EPOCHS", default=1.0, help="moving average of the training curve (%(default)s)")
    add("--since", type=number, metavar="EPOCH", default=0.0, help="leave out the epochs before this one (%(default)s)")
    add("--linear", action="store_true", help="linear instead of logarithmic loss axis")
    add("--log-error", action="store_true", help="logarithmic instead of linear error axis")
    add("--title", help="text above the figure")
    return parser


def panels(out, suffix):
    """{path: columns}: three figures in a folder, or one of both columns if out is a file. Refused for contradictions."""
    kind = drawing.picture_format(out)
    if not kind:
        return {out / f"{'-'.join(columns)}.{suffix or 'png'}": columns for columns in (["loss"], ["error"], ["loss", "error"])}
    if suffix not in (None, kind):
        raise Refused(f"--format {suffix} contradicts --out {out}: leave out --format")
    return {out: ["loss", "error"]}


def run_curves(folders, smooth):
    """{label: curve} of the runs in {label: folder} that have rows."""
    return {label: curve for label, folder in folders.items() if (curve := read_curve([folder], smooth))}


def average_curves(folders, smooth):
    """{label: curve} of the settings; a label is what distinguishes a setting, and its number of runs that have rows."""
    curves = {}
    for differences, _, members in settings(folders.values()):
        if curve := read_curve(members, smooth):
            names = [f"{name.replace('_', ' ')} {in_words(value)}" for name, value in differences.items()]
            curves[", ".join([*names, f"{curve.runs} run{'s' * (curve.runs > 1)}"])] = curve
    return curves


def read_curve(folders, smooth):
    """The curve of runs of one setting, or None if none of them has a row yet."""
    runs = {folder: run for folder in folders if (run := read_run(folder, smooth))}
    if not runs:
        return None
    tables, changes, ends = zip(*runs.values(), strict=True)
    parts = {part: over_runs(each) for part, each in zip(PARTS, zip(*tables, strict=True), strict=True)}
    if all(table.empty for table in parts.values()):
        names = ", ".join(map(str, folders))
        raise Refused(f"nothing to draw yet of {names}: wait until train.csv or test.csv has the same row in each run")
    if max(ends) > min(ends):
        say(f"{[*runs][ends.index(min(ends))]} ends at epoch {min(ends):g}, and so does the mean of its setting")
    last = max(table.index.max() for table in parts.values() if not table.empty)
    return Curve(parts, {change for change in set.union(*changes) if change < last}, len(runs), last)


def read_run(folder, smooth):
    """((train, val, test), the epochs at which the learning rate changes, the last epoch), or None if the run has no row yet.

    The training curve is smoothed over `smooth` epochs.
    """
    train, test = (read_csv(folder / f"{part}.csv") for part in ("train", "test"))
    if train.empty and test.empty:
        say(f"{folder} has no row yet and is not drawn")
        return None
    val = test.reindex(columns=["epoch", "val_loss", "val_error"]).dropna().set_axis(COLUMNS, axis=1)
    args = known_arguments(folder)
    end = max(table["epoch"].max() for table in (train, test) if not table.empty)
    return (moving_average(train, smooth, last_batch(args)), val, test), rate_changes(args, test), end


def known_arguments(folder):
    """args.json of a run; {} where it is missing or damaged."""
    try:
        return arguments_of(folder)
    except Refused:
        return {}


def last_batch(args):
    """An epoch's last batch as a share of a whole one; 1 where args.json does not tell."""
    if args.get("train_images") and args.get("batch_size"):
        return (args["train_images"] % args["batch_size"] or args["batch_size"]) / args["batch_size"]
    return 1


def moving_average(train, epochs, last_batch):
    """The mean over the images of the `epochs` epochs up to each row; each epoch's last step has this share of a batch."""
    if train.empty:
        return train
    steps_per_epoch = len(train) / train["epoch"].iloc[-1]
    window = max(1, round(min(epochs * steps_per_epoch, len(train))))
    weights = (train["epoch"] % 1 == 0).map({True: last_batch, False: 1.0})
    sums = train[["loss", "error"]].mul(weights, axis=0).rolling(window, min_periods=1).sum()
    return sums.div(weights.rolling(window, min_periods=1).sum(), axis=0).assign(epoch=train["epoch"])


def over_runs(tables):
    """Mean, min and max over the runs at the epochs that all of them have."""
    groups = pd.concat(tables).groupby("epoch")[["loss", "error"]]
    return groups.agg(["mean", "min", "max"])[groups.size() == len(tables)]


def rate_changes(args, test):
    """The epochs done when the learning rate changes: by test.csv or, where that has no rates, by the schedule in args.json."""
    if "lr" in test:
        changes = {*(test["epoch"][test["lr"].diff().fillna(0) != 0] - 1)}
        return changes if len(changes) <= MANY_CHANGES else set()
    if args.get("opt") == "sgd" and args.get("lr"):
        return {math.ceil(args["epochs"] / 2), math.ceil(3 * args["epochs"] / 4)}
    return set()


def check_since(curves, since):
    """Refused if --since is after the last epoch."""
    last = max(curve.last for curve in curves.values())
    if since > last:
        raise Refused(f"--since {since:g} is after the last epoch, {last:g}: choose an earlier one")


def draw(curves, columns, path, args):
    """One figure with a panel for each of `columns`. The names of runs and the title are text: $ and _ are letters in them."""
    figure = drawing.new_figure(4.2 * len(columns), 3.2)
    (title, *names), style = drawing.as_text([args.title or "", *curves])
    markers = MARKERS if names[1:] else [None]
    looks = [{"color": COLORS[i % len(COLORS)], "marker": markers[i % len(markers)]} for i in range(len(names))]
    changes = {change for curve in curves.values() for change in curve.changes if change > args.since}
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        for curve, look in zip(curves.values(), looks, strict=True):
            draw_curve(axes, column, curve, args.since, **look)
        for change in changes:
            colors = [look["color"] for curve, look in zip(curves.values(), looks, strict=True) if change in curve.changes]
            color = colors[0] if len(colors) == 1 and len(curves) > 1 else CHANGE["color"]
            axes.axvline(change, zorder=0, **CHANGE | {"color": color})
        axes.set(xlabel="epoch", ylabel=LABELS[column])
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        if {"loss": not args.linear, "error": args.log_error}[column]:
            drawing.make_logarithmic(axes)
        axes.grid(alpha=0.3)
    entries = [(name, PARTS["test"] | look) for name, look in zip(names, looks, strict=True)]
    drawing.add_legend(figure, entries + meanings(curves.values(), changes, args), style)
    if title:
        figure.suptitle(drawing.wrapped(title, figure, letters=8), **style)
    drawing.save(figure, path)


def draw_curve(axes, column, curve, since, color, marker):
    """The mean of each part, and of the test a band over the runs. A few of its points are marked: one alone is no line."""
    for part, look in PARTS.items():
        table = curve.tables[part][column]
        table = thinned(table[table.index >= since])
        if part == "test":
            if curve.runs > 1:  # more bands of one colour could not be told apart; one epoch alone is a line
                band = BAND | {"linewidth": 3 * (len(table) == 1)}
                axes.fill_between(table.index, table["min"], table["max"], color=color, **band)
            look = look | {"marker": marker or ("o" if len(table) <= 20 else None), "markevery": max(1, len(table) // 12)}
        elif len(table) == 1:
            look = look | POINT[part]
        axes.plot(table.index, table["mean"], color=color, **look)


def thinned(table):
    """The rows of a very long table that a figure can show, the extremes of the mean and of the band among them."""
    if len(table) <= 3 * STRETCHES:
        return table
    stretches = table.groupby(pd.RangeIndex(len(table)) * STRETCHES // len(table))
    lowest, highest = stretches[["mean", "min"]].idxmin(), stretches[["mean", "max"]].idxmax()
    return table.loc[sorted({*lowest.to_numpy().flat, *highest.to_numpy().flat, table.index[-1]})]


def meanings(curves, changes, args):
    """[(label, look)] of what the legend explains once for all curves, if it is drawn."""
    train = f"train, averaged over {args.smooth:g} epoch{'s' * (args.smooth != 1)}" if args.smooth else "train"
    rows = {part: [(curve.tables[part].index >= args.since).sum() for curve in curves] for part in PARTS}
    lone = {part for part in PARTS if max(rows[part]) == 1}
    lone -= {"test"} if len(curves) > 1 else set()  # then each run has a marker of its own
    banded = any(curve.runs > 1 and shown for curve, shown in zip(curves, rows["test"], strict=True))
    looks = {part: PARTS[part] | (POINT[part] if part in lone else {}) for part in PARTS if any(rows[part])}
    entries = [(train if part == "train" else part, look) for part, look in looks.items()]
    entries += [("test, lowest to highest run", BAND | {"linewidth": 6})] * banded
    return [(word, {"color": "black", **look}) for word, look in entries] + [("learning rate changed", CHANGE)] * bool(changes)


if __name__ == "__main__":
    main()
