#!/usr/bin/env python3
"""Compares DenseNet with two other implementations that have the same weights and see the same batch, in float64.

    attic/compare-implementations.py

The first is torchvision's DenseNet: written by others, but running on the same kernels as ours. The second is the paper written
in JAX, below: it shares no kernel with PyTorch. Both compute logits, loss and the gradient of every parameter, for a
DenseNet-BC and for a plain net; torchvision's also the running statistics. Exit status 1 if anything differs by more than 1e-9.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attic.comparison import random_batch, randomize, relative_errors, running_statistics, training_pass, worst
from attic.torchvision_weights import from_torchvision, to_torchvision, torchvision_net
from densenet import DenseNet
from endings import LARGER, handle_errors, make_parser

BOUND = 1e-9
EPSILON = 1e-5  # of batch norm
NETS = {
    "DenseNet-BC, L=22, k=12": dict(depth=22, growth_rate=12, bottleneck=True),
    "plain DenseNet, L=13, k=12": dict(depth=13, growth_rate=12, bottleneck=False),
}


def main():
    parser = make_parser(__doc__)
    parser.parse_args()
    with handle_errors(parser, "the nets", LARGER):
        images, labels = random_batch(4, num_classes=10, seed=1)
        same = [compare(title, DenseNet(**arguments), images, labels) for title, arguments in NETS.items()]
        print(f"\nthe three implementations are {'the same' if all(same) else 'DIFFERENT'} (bound {BOUND:g})")
    sys.exit(not all(same))


def compare(title, net, images, labels):
    """Prints how far the others are from our net, with newly drawn weights. Returns whether all errors are below the bound."""
    net = randomize(net.double(), seed=0)
    images = images.double()
    others = {"torchvision": torchvision_pass(net, images, labels), "JAX": jax_pass(net, images, labels)}
    ours = training_pass(net, images, labels) | running_statistics(net)
    print(f"\n{title}, {sum(p.numel() for p in net.parameters()):,} parameters, {len(images)} images")
    print(f"  {'largest relative difference':28}{'tensors':>8}{'':12}of")
    errors = {name: relative_errors({key: ours[key] for key in other}, other) for name, other in others.items()}
    for name, of_other in errors.items():
        print_errors(name, of_other)
    return all(error <= BOUND for of_other in errors.values() for error in of_other.values())


def print_errors(other, errors):
    for prefix in ("logits", "loss", "grad/", "buffer/"):
        names = [name for name in errors if name.startswith(prefix)]
        if names:
            name, error = worst(errors, prefix)
            print(f"  {other + ', ' + prefix.strip('/'):28}{len(names):8}{error:12.1e}  {name}")


# ----------------------------------------------------------------------------------------------------------- torchvision


def torchvision_pass(net, images, labels):
    """training_pass and running_statistics of torchvision's net with the weights of ours, by our names."""
    twin = torchvision_net(net).to(images.dtype)
    twin.load_state_dict(to_torchvision(net.state_dict()))
    results = training_pass(twin, images, labels) | running_statistics(twin)
    renamed = {name: results.pop(name) for name in ("logits", "loss")}
    for prefix in ("grad/", "buffer/"):
        part = from_torchvision({name.removeprefix(prefix): t for name, t in results.items() if name.startswith(prefix)})
        renamed |= {prefix + name: tensor for name, tensor in part.items()}
    return renamed


# ------------------------------------------------------------------------------------------------------------------- JAX


def jax_pass(net, images, labels):
    """The logits, loss and gradients of training_pass, from the weights of our net alone, computed by JAX in float64."""
    jax.config.update("jax_enable_x64", True)
    weights = {name: jnp.asarray(parameter.detach().numpy()) for name, parameter in net.named_parameters()}
    value_and_grad = jax.jit(jax.value_and_grad(jax_loss, has_aux=True))
    (loss, logits), gradients = value_and_grad(weights, jnp.asarray(images.numpy()), jnp.asarray(labels.numpy()))
    results = {"logits": logits, "loss": loss, **{f"grad/{name}": gradient for name, gradient in gradients.items()}}
    return {name: np.array(values) for name, values in results.items()}


def jax_loss(weights, images, labels):
    """Mean cross-entropy, and the logits."""
    logits = jax_densenet(weights, images)
    log_probabilities = logits - jax.scipy.special.logsumexp(logits, axis=1, keepdims=True)
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1).mean(), logits


def jax_densenet(weights, images):
    """The logits in training mode of a DenseNet, BC or plain, whose layers follow from the names of the weights."""
    maps = jax_convolve(images, weights["conv1.weight"])
    for block in (1, 2, 3):
        layer = 0
        while f"dense{block}.{layer}.conv1.weight" in weights:
            maps = jnp.concatenate([maps, jax_layer(weights, f"dense{block}.{layer}", maps)], axis=1)
            layer += 1
        if block < 3:
            maps = jax_halve(jax_unit(weights, f"trans{block}", 1, maps))
    features = jax_norm_relu(weights, "bn1", maps).mean(axis=(2, 3))
    return features @ weights["fc.weight"].T + weights["fc.bias"]


def jax_layer(weights, name, maps):
    """The new maps of a layer: two units of BN-ReLU-convolution in a bottleneck, otherwise one."""
    out = jax_unit(weights, name, 1, maps)
    return jax_unit(weights, name, 2, out) if f"{name}.conv2.weight" in weights else out


def jax_unit(weights, name, number, maps):
    return jax_convolve(jax_norm_relu(weights, f"{name}.bn{number}", maps), weights[f"{name}.conv{number}.weight"])


def jax_norm_relu(weights, name, maps):
    """Batch norm by the statistics of the batch, with the biased variance, then ReLU."""
    mean = maps.mean(axis=(0, 2, 3), keepdims=True)
    variance = jnp.square(maps - mean).mean(axis=(0, 2, 3), keepdims=True)
    scale, shift = (weights[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
    return jnp.maximum((maps - mean) / jnp.sqrt(variance + EPSILON) * scale + shift, 0)


def jax_convolve(maps, kernel):
    return jax.lax.conv(maps, kernel, window_strides=(1, 1), padding="SAME")


def jax_halve(maps):
    """Average pooling by 2."""
    n, channels, height, width = maps.shape
    return maps.reshape(n, channels, height // 2, 2, width // 2, 2).mean(axis=(3, 5))


if __name__ == "__main__":
    main()
