#!/usr/bin/env python3
"""Draws the autograd graph of a net: graph.dot, and graph.png and graph.svg where the Graphviz program `dot` is installed.

    ./make_graph.py                                          a DenseNet-BC with one layer in each block
    ./make_graph.py --no-bottleneck --depth 7 --out images/plain

Blue boxes are parameters, by their names in the state dict; grey ones are the functions that autograd will run backward, the
logits at the bottom. The flags of the model are those of train.py.
"""

import argparse
from pathlib import Path

import graphviz
import torch
import torchviz

import endings
from endings import naming, new_file, say
from files import refuse_existing, refuse_foreign
from flags import USAGE, add_model_flags, make_net

PICTURES = ("png", "svg")


def main():
    parser = build_parser()
    args = parser.parse_args()
    args.drop_rate = args.drop_rate or 0.0
    with endings.worded(parser, f"L={args.depth}, k={args.growth_rate}", "a smaller net (--depth, --growth-rate)"):
        if args.efficient:
            raise endings.Refused("--efficient makes one node of each dense block, with nothing to see in it: leave it out")
        name = args.out.with_suffix("") if args.out.suffix in (".dot", ".png", ".svg") else args.out
        dot, *pictures = (Path(f"{name}.{kind}") for kind in ("dot", *PICTURES))
        refuse_foreign(dot, b"digraph")
        if not dot.exists():
            refuse_existing(*pictures)
        say(write_dot(make_net(args), name))
        try:
            for kind, picture in zip(PICTURES, pictures, strict=True):
                say(graphviz.render("dot", kind, dot, outfile=picture))
        except graphviz.ExecutableNotFound:
            say("dot, which makes pictures of it, is not installed: get Graphviz, for instance by apt install graphviz")


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=USAGE)
    add_model_flags(parser, depth=10)
    text = "the files' name; .dot, .png and .svg are added (%(default)s)"
    parser.add_argument("--out", metavar="NAME", type=new_file, default="graph", help=text)
    return parser


def write_dot(net, name):
    """Runs the net once on a batch of two images and writes the graph behind its logits to NAME.dot."""
    logits = net(torch.zeros(2, 3, 32, 32))
    graph = torchviz.make_dot(logits, params={**dict(net.named_parameters()), "logits": logits})
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    with naming(f"{name}.dot"):
        return graph.save(f"{name}.dot")


if __name__ == "__main__":
    main()
