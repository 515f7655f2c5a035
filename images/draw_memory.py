#!/usr/bin/env python3
"""Draws memory and time of a training step against the depth, from a report: images/memory.png beside images/memory.json.

    images/draw_memory.py images/memory.json

This measures the report, in minutes:

    attic/compare-speed.py --depths 40 100 160 250 --only plain torchvision-checkpointed efficient --batch-size 8 --json FILE
"""

import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import drawing
from endings import Refused, handle_errors, make_parser, nonempty

LABELS = {
    "plain": "plain modules",
    "torchvision-checkpointed": "checkpointed (torchvision)",
    "efficient": "--efficient",
}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("report", type=nonempty(Path), metavar="REPORT.json", help="of attic/compare-speed.py --depths")
    args = parser.parse_args()
    with handle_errors(parser, "the figure", "fewer depths"):
        growth_rate, conditions, curves = read_curves(args.report)
        path = args.report.with_suffix(".png")
        draw(growth_rate, conditions, curves, path)
        print(path)


def read_curves(path):
    """(growth rate, conditions, {variant: (depths, peaks in MB/image, ms/image)}). Refused if it is another report."""
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise Refused(f"{path} is not a report of attic/compare-speed.py ({error}): make one") from error
    if not isinstance(report, dict) or not report.keys() >= {"conditions", "depths"} or len(report["depths"]) < 2:
        raise Refused(f"{path} is not a report of attic/compare-speed.py --depths: make one")
    by_depth = {int(depth): entry["variants"] for depth, entry in report["depths"].items()}
    curves = {}
    for name in next(iter(by_depth.values())):
        peaks = [variants[name].get("peak_mb_per_image") for variants in by_depth.values()]
        times = [statistics.median(variants[name]["ms_per_step"]) / report["batch_size"] for variants in by_depth.values()]
        if None in peaks:
            raise Refused(f"{path} lacks counted peaks: make a report in fp32 or tf32 with this version")
        curves[LABELS.get(name, name)] = [*by_depth], peaks, times
    return report["growth_rate"], report["conditions"], curves


def draw(growth_rate, conditions, curves, path):
    """Beside each name the exponent between the depth in the middle and the last."""
    figure = drawing.new_figure(10, 4.2)
    memory, time = figure.subplots(1, 2)
    for label, (depths, peaks, times) in curves.items():
        for axes, values in [(memory, peaks), (time, times)]:
            middle = (len(depths) - 1) // 2
            exponent = math.log(values[-1] / values[middle]) / math.log(depths[-1] / depths[middle])
            axes.plot(depths, values, marker="o", label=f"{label}: $L^{{{exponent:.1f}}}$")
    figure.suptitle(conditions, fontsize="medium")
    memory.set_ylabel("peak memory, counted, MB/image")
    time.set_ylabel("time of a training step, median, ms/image")
    for axes in (memory, time):
        drawing.make_logarithmic(axes)
        axes.set(xscale="log", xlabel=f"depth L of DenseNet-BC, k = {growth_rate}")
        axes.set_xticks(depths, depths)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    drawing.save(figure, path)


if __name__ == "__main__":
    main()
