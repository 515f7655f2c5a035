#!/usr/bin/env python3
"""Draws images/header.png, a dense block of four layers: every layer reads the feature maps of all layers before it.

images/draw_header.py
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon

COLORS = ["#4d4d4d", "#c0392b", "#2471a3", "#1e8449", "#b9770e"]  # of the block's input, and of what each layer adds
STEP = 2.6  # from one group of maps to the next
MAPS = [6, 4, 4, 4, 4]  # sheets drawn of each group: the input has more than the growth rate


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    figure = Figure(figsize=(12, 3.05))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1.0, 4 * STEP + 1.2), ylim=(-1.2, 2.0), aspect="equal")
    axes.axis("off")
    for source, color in enumerate(COLORS):
        for layer in range(source + 1, len(COLORS)):
            draw_connection(axes, source, layer, color)
        draw_maps(axes, source, color)
    for layer in range(1, len(COLORS)):
        draw_layer(axes, layer)
    path = Path(__file__).with_name("header.png")
    figure.savefig(path, dpi=120)
    print(path)


def draw_maps(axes, group, color):
    """A stack of sheets seen from the side."""
    for sheet in range(MAPS[group]):
        x = group * STEP + 0.13 * (sheet - MAPS[group] / 2)
        corners = [(x - 0.16, -0.62), (x + 0.16, -0.38), (x + 0.16, 0.62), (x - 0.16, 0.38)]
        axes.add_patch(Polygon(corners, facecolor=color, edgecolor="white", linewidth=0.8, alpha=0.9, zorder=3))
    name = "input" if group == 0 else f"+ k maps of layer {group}"
    axes.text(group * STEP, -0.88, name, color=color, ha="center", va="center", fontsize=11)


def draw_layer(axes, layer):
    x = (layer - 0.5) * STEP
    style = dict(boxstyle="round,pad=0,rounding_size=0.12", facecolor="white", edgecolor="#222222", zorder=4)
    axes.add_patch(FancyBboxPatch((x - 0.34, -0.42), 0.68, 0.84, **style))
    axes.text(x, 0.0, "BN ReLU\n1x1 conv\nBN ReLU\n3x3 conv", ha="center", va="center", fontsize=8, zorder=5)
    axes.text(x, -0.88, f"layer {layer}", ha="center", va="center", fontsize=11, color="#222222")


def draw_connection(axes, source, layer, color):
    """From a group of maps to a layer that reads it: straight to the next layer, above the others to a later one."""
    start, end = source * STEP, (layer - 0.5) * STEP
    distance = layer - source
    if distance == 1:
        ends, curve = ((start + 0.3, 0), (end - 0.36, 0)), "arc3"
    else:
        ends, curve = ((start, 0.55), (end - 0.2 + 0.1 * source, 0.44)), f"arc3,rad={-0.42 + 0.04 * distance}"
    draw_arrow(axes, *ends, color, curve)
    if distance == 1:  # what the layer adds
        draw_arrow(axes, (end + 0.36, 0), (layer * STEP - 0.38, 0), COLORS[layer], "arc3")


def draw_arrow(axes, start, end, color, curve):
    style = dict(arrowstyle="-|>", mutation_scale=11, linewidth=1.6, zorder=2)
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=curve, color=color, **style))


if __name__ == "__main__":
    main()
