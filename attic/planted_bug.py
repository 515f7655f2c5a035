#!/usr/bin/env python3
"""Runs a program with the bug of pytorch/pytorch#708 in it: convolutions take the slice of a gradient for a whole tensor.

    attic/planted_bug.py attic/numcheck-grads.py
    attic/planted_bug.py --onednn attic/check-kernels.py --device cpu --no-compile
    attic/planted_bug.py train.py --dataset digits --depth 16 --growth-rate 8 --epochs 10 --save work/bug

The backward pass of torch.cat(..., dim=1) hands each of its inputs a slice of the gradient: a view into the memory of all
channels, with gaps between the images. Until February 2017 cuDNN's convolutions read it as if it were laid out like their
output, without gaps: the first image got its gradient, each later one that of other channels. Nothing failed, and the
forward pass was right. A batch of one image hid the bug, and so did any other kernel in the convolution's place.
"""

import argparse
import os
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_folder
from endings import make_parser


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--onednn", action="store_true", help="plant it in oneDNN's kernels only: not in float64, not if off")
    parser.add_argument("script", type=program, help="the program, a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    args = parser.parse_args()
    sys.argv = [args.script, *args.arguments]
    sys.path.insert(0, str(Path(args.script).resolve().parent))
    commit = f"{run_folder.git_commit()} with a planted bug"  # for args.json, and so for compare.py
    marked = mock.patch("run_folder.git_commit", return_value=commit)
    with marked, planted_bug(computed_by_onednn if args.onednn else everywhere):
        runpy.run_path(args.script, run_name="__main__")


def program(text):
    """An argparse type: the name of a file."""
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text} is not a file: name a program")
    return text


def everywhere(output):
    return True


def computed_by_onednn(output):
    return output.dtype != torch.float64 and torch.backends.mkldnn.enabled


@contextmanager
def planted_bug(strikes=everywhere):
    """Inside, every nn.Conv2d has the bug if `strikes` is true of its output."""
    forward = nn.Conv2d.forward

    def broken_forward(self, images):
        output = forward(self, images)
        return GradientReadWithStridesOfOutput.apply(output) if strikes(output) else output

    with mock.patch.object(nn.Conv2d, "forward", broken_forward):
        yield


class GradientReadWithStridesOfOutput(torch.autograd.Function):
    """The identity; its backward pass reads the memory of the gradient with the strides of the output."""

    @staticmethod
    def forward(ctx, output):
        ctx.strides = output.stride()
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.as_strided(gradient.shape, ctx.strides)


if __name__ == "__main__":
    main()
