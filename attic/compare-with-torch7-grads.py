#!/usr/bin/env python3
"""Compares DenseNet with the authors' own Lua Torch code: hidden states, logits, loss, all gradients, running statistics.

    attic/compare-with-torch7-grads.py

official-bc40.npz, beside this script, holds one forward and backward pass of the official implementation (liuzhuang13/DenseNet,
commit e3d24fb, unmodified) on a CPU in double precision: DenseNet-BC, L=40, k=12, random weights, a batch of seven images.
The same weights and the same batch go through densenet.py in float64. Exit status 1 if anything differs by more than 1e-9.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attic.comparison import relative_errors, running_statistics, training_pass, worst
from densenet import DenseNet
from endings import LARGER, handle_errors, make_parser

REFERENCE = Path(__file__).with_name("official-bc40.npz")
BOUND = 1e-9  # a correct implementation reaches 1e-13; an epsilon of batch norm off by a tenth already gives 3e-6

# What is compared, and the prefix of its names in the file.
GROUPS = {
    "hidden states": "hidden_",
    "logits": "logits",
    "loss": "loss",
    "gradients": "grad",
    "running statistics": "buffer/",
}


def main():
    parser = make_parser(__doc__)
    parser.parse_args()
    with handle_errors(parser, "the nets", LARGER):
        reference = load_reference(REFERENCE)
        ours = same_pass(build_net(reference), reference)
        print_gradient_norms(ours, reference)
        errors = relative_errors(ours, expected(reference))
        print_errors(errors)
    sys.exit(max(errors.values()) > BOUND)


def load_reference(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def expected(reference):
    """What the official code computed: the file without the configuration, the parameters and the batch."""
    return {name: values for name, values in reference.items() if name.startswith(tuple(GROUPS.values()))}


def build_net(reference):
    """DenseNet in float64 with every parameter of the reference; BN's running statistics are those of a new net."""
    names = ["depth", "growth_rate", "reduction"]
    net = DenseNet(**{name: reference[name].item() for name in names}, bottleneck=bool(reference["bottleneck"])).double()
    parameters = {name.removeprefix("param/"): values for name, values in reference.items() if name.startswith("param/")}
    if parameters.keys() != dict(net.named_parameters()).keys():
        raise ValueError("the parameters of the reference are not those of the net")
    net.load_state_dict({**net.state_dict(), **parameters})
    return net


def same_pass(net, reference):
    """Everything that `expected` holds, by the same names: a pass in training mode, then the logits in evaluation mode."""
    images, labels = reference["input"].double(), reference["targets"]
    states = watch(net, [name.removeprefix("hidden_mean/") for name in reference if name.startswith("hidden_mean/")])
    results = training_pass(net, images, labels)
    results |= {"grad_logits": states.pop("fc").grad, **summarize(states, reference["growth_rate"].item())}
    results |= running_statistics(net)
    with torch.no_grad():
        logits = net.eval()(images)
    return results | {"logits_eval": logits, "loss_eval": F.cross_entropy(logits, labels)}


def watch(net, names):
    """A dictionary that a pass fills with the outputs of the modules of these names, and with the logits under "fc".

    The name "pool" stands for the input of fc, which is no module's output.
    """
    states = {}

    def keep_last(module, inputs, output):
        states.update(pool=inputs[0], fc=output)
        if output.requires_grad:
            output.retain_grad()

    def keep(name):
        return lambda module, inputs, output: states.update({name: output})

    for name in names:
        if name != "pool":
            net.get_submodule(name).register_forward_hook(keep(name))
    net.fc.register_forward_hook(keep_last)
    return states


def summarize(states, growth_rate):
    """Mean and L2 norm of each hidden state, and of the new maps alone where it is a layer's concatenation."""
    numbers = {}
    for name, state in states.items():
        numbers |= {f"hidden_mean/{name}": state.mean(), f"hidden_l2/{name}": state.norm()}
        if name.startswith("dense"):
            new = state[:, -growth_rate:]
            numbers |= {f"hidden_new_mean/{name}": new.mean(), f"hidden_new_l2/{name}": new.norm()}
    return numbers


def print_gradient_norms(ours, reference):
    """The L2 norm of every convolution's and the last layer's weight gradient, from the first layer to the last."""
    print(f"{'norm of the gradient':24}{'official':>20}{'ours':>20}")
    for name, gradient in reference.items():
        if name.startswith("grad/") and gradient.dim() > 1:
            print(f"{name.removeprefix('grad/'):24}{gradient.norm():20.15f}{ours[name].norm():20.15f}")


def print_errors(errors):
    print(f"\n{'largest relative difference':28}{'tensors':>8}{'':12}of")
    for group, prefix in GROUPS.items():
        name, error = worst(errors, prefix)
        print(f"{group:28}{sum(n.startswith(prefix) for n in errors):8}{error:12.1e}  {name}")
    verdict = "the same" if max(errors.values()) <= BOUND else "DIFFERENT"
    print(f"\nofficial implementation and ours are {verdict} (bound {BOUND:g})")


if __name__ == "__main__":
    main()
