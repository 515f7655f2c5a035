#!/usr/bin/env python3
"""Checks backpropagated gradients against numeric differentiation, from a single concatenation to a whole tiny DenseNet.

    attic/numcheck-grads.py

Concatenation is checked with fully connected layers and with convolutions, because different kernels read the gradient of a
concatenated slice: checking only the former once hid a bug of the framework (pytorch/pytorch#708). For the same reason
every batch here has two images: the slices of a batch of one have no gaps in memory. Exit status 1 if a check fails.
"""

import sys
from functools import partial
from pathlib import Path

import numdifftools
import numpy as np
import torch
import torch.nn as nn
from torch.autograd.gradcheck import GradcheckError, gradcheck
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attic.comparison import randomize, relative_error
from densenet import Bottleneck, DenseNet, SingleLayer, Transition
from endings import LARGER, handle_errors, make_parser

BOUND = 1e-8  # of the relative error against numdifftools, which extrapolates and reaches 1e-12
TOLERANCE = dict(eps=1e-6, atol=1e-6, rtol=1e-5)  # of gradcheck, whose single central difference reaches 1e-8


def main():
    parser = make_parser(__doc__)
    parser.parse_args()
    with handle_errors(parser, "the nets", LARGER):
        print(f"{'checked':36}{'parameters':>10}{'':4}{'by':16}result")
        right = [print_row(title, module, *check(module, images)) for title, check, module, images in checks()]
        print(f"\n{sum(right)} of {len(right)} checks find the gradients right")
    sys.exit(not all(right))


def checks():
    """(title, the check, the module in float64, its input) of every row of the table."""
    torch.manual_seed(0)
    conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
    tiny = dict(growth_rate=2, num_classes=3, init_channels=2)
    rows = [
        ("concatenation, fully connected", against_numdifftools, chain(nn.Linear), torch.randn(2, 2)),
        ("concatenation, convolutions", against_numdifftools, chain(conv3x3), torch.randn(2, 2, 4, 4)),
        ("Bottleneck", against_gradcheck, Bottleneck(3, growth_rate=2), torch.randn(2, 3, 4, 4)),
        ("SingleLayer", against_gradcheck, SingleLayer(3, growth_rate=2), torch.randn(2, 3, 4, 4)),
        ("Transition", against_gradcheck, Transition(4, 2), torch.randn(2, 4, 4, 4)),
        ("DenseNet-BC, L=16, k=2", against_gradcheck, DenseNet(depth=16, **tiny), torch.randn(2, 3, 8, 8)),
        ("plain DenseNet, L=10, k=2", against_gradcheck, DenseNet(depth=10, bottleneck=False, **tiny), torch.randn(2, 3, 8, 8)),
    ]
    return [(title, check, randomize(module.double(), seed=0), images.double()) for title, check, module, images in rows]


def print_row(title, module, method, right, remark):
    numbers = sum(parameter.numel() for parameter in module.parameters())
    print(f"{title:36}{numbers:10}{'':4}{method:16}{'right' if right else 'WRONG'}, {remark}")
    return right


# ------------------------------------------------------------------------------------------------- concatenation by itself


class Concatenation(nn.Module):
    """A layer whose output is concatenated to its input."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.cat([x, self.layer(x)], dim=1)


def chain(make_layer):
    """Two such layers: the second one follows the concatenation of the first."""
    return nn.Sequential(Concatenation(make_layer(2, 2)), Concatenation(make_layer(4, 2)))


# ------------------------------------------------------------------------------------------------------------- the checks


def against_numdifftools(module, images):
    """The gradient of the mean squared distance to a random target, by all parameters. Returns method, verdict and remark."""
    with torch.no_grad():
        target = torch.randn_like(module(images))
    start = parameters_to_vector(module.parameters()).detach().numpy()

    def loss_at(values):
        vector_to_parameters(torch.from_numpy(np.asarray(values)), module.parameters())
        return nn.functional.mse_loss(module(images), target)

    numeric = numdifftools.Gradient(lambda values: loss_at(values).item())(start)
    backpropagated = torch.autograd.grad(loss_at(start), list(module.parameters()))
    error = relative_error(parameters_to_vector(backpropagated), numeric)
    return "numdifftools", error <= BOUND, f"relative error {error:.1e}"


def against_gradcheck(module, images):
    """Gradients of all outputs by the images and all parameters, in training mode. Returns method, verdict and remark."""
    names = [name for name, _ in module.named_parameters()]
    inputs = [images, *module.parameters()]

    def outputs(images, *parameters):
        return functional_call(module, dict(zip(names, parameters, strict=True)), images)

    try:
        gradcheck(outputs, [tensor.detach().requires_grad_() for tensor in inputs], **TOLERANCE)
        return "gradcheck", True, f"within {TOLERANCE['atol']:g} + {TOLERANCE['rtol']:g} of the value"
    except GradcheckError as error:
        return "gradcheck", False, str(error).splitlines()[0].rstrip(",")


if __name__ == "__main__":
    main()
