#!/usr/bin/env python3
"""Draws the paper's error table with what was measured here, images/densenet-err-table.png.

    images/draw_err_table.py work/bc-40-12 work/bc-40-12-sgd work/bc-40-12-adam

Each folder is a finished run of train.py on CIFAR-10 with augmentation; its figure is the test error after the last epoch.
"""

import argparse
import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from densenet import DenseNet
from endings import Refused, worded
from run_folder import read_arguments

COLUMNS = ["", "depth L", "k", "parameters", "C10", "C10+", "C100", "C100+", "SVHN"]
PAPER = [  # Table 2 of the paper; + is augmentation by crops and flips
    ["DenseNet", 40, 12, "1.0M", "7.00", "5.24", "27.55", "24.42", "1.79"],
    ["DenseNet", 100, 12, "7.0M", "5.77", "4.10", "23.79", "20.20", "1.67"],
    ["DenseNet", 100, 24, "27.2M", "5.83", "3.74", "23.42", "19.25", "1.59"],
    ["DenseNet-BC", 100, 12, "0.8M", "5.92", "4.51", "24.15", "22.27", "1.76"],
    ["DenseNet-BC", 250, 24, "15.3M", "5.19", "3.62", "19.64", "17.60", "1.74"],
    ["DenseNet-BC", 190, 40, "25.6M", "", "3.46", "", "17.18", ""],
]
OPTIMISERS = {"sgd": "SGD", "adam": "Adam", "rmsprop": "RMSprop"}
MEASURED = "#c0392b"  # colour of a figure that a run of this code has given


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="folder of a finished run")
    args = parser.parse_args()
    path = Path(__file__).with_name("densenet-err-table.png")
    with worded(parser, "the figure", "fewer runs"):
        draw(PAPER + [row_of(folder) for folder in args.runs], path)
        print(path)


def row_of(folder):
    """The table's row for a run. Refused if the run is not finished, or of other data."""
    args = read_arguments(folder)
    if [args.get(name) for name in ("dataset", "augment", "limit")] != ["cifar10", True, None]:
        raise Refused(f"{folder} is no run on the whole of CIFAR-10 with augmentation: name one that is")
    last = [{"epoch": 0}, *csv.DictReader((folder / "test.csv").open())][-1]
    if float(last["epoch"]) != args["epochs"]:
        raise Refused(f"{folder} has {last['epoch']} of {args['epochs']} epochs: resume it first")
    names = ["growth_rate", "depth", "reduction", "bottleneck", "init_channels"]
    net = DenseNet(**{name: args[name] for name in names})
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    kind = "DenseNet-BC" if args["bottleneck"] else "DenseNet"
    more = " more" if args.get("init") else ""  # args.json of a run from before --init does not name it
    name = f"{kind}, {args['epochs']}{more} epochs of {OPTIMISERS[args['opt']]}, here"
    return [name, args["depth"], args["growth_rate"], f"{millions:.1f}M", "", f"{float(last['error']):.2f}", "", "", ""]


def draw(rows, path):
    figure = Figure(figsize=(11, 0.275 * (len(rows) + 3)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    widths = [0.34, 0.08, 0.05, 0.11] + [0.08] * 5
    table = axes.table(
        [list(map(str, row)) for row in rows], colLabels=COLUMNS, colWidths=widths, cellLoc="right", loc="center"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(11)
    table.scale(1, 1.6)
    for (row, column), cell in table.get_celld().items():
        cell.set(edgecolor="#bbbbbb", linewidth=0.6)
        cell.visible_edges = "B" if row else "BT"
        if row == 0:
            cell.set_text_props(weight="bold")
        cell.set_text_props(ha="left" if column == 0 else "right")
        if row > len(PAPER) and column == COLUMNS.index("C10+"):
            cell.set_text_props(weight="bold", color=MEASURED)
    caption = "Test error in percent after the last epoch; + is augmentation. Black: the paper, 300 epochs (SVHN 40). "
    axes.text(0.02, 0.02, caption + "Red: measured with this code.", fontsize=10, transform=axes.transAxes)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
