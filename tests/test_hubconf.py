"""The weights that ship, loaded as a user would."""

import pandas as pd
import torch
from conftest import ROOT

import data
import evaluate

RUN = ROOT / "work" / "bc-40-12-sgd"


def load(**arguments):
    return torch.hub.load(str(ROOT), "densenet_bc_40_12", source="local", **arguments)


def test_the_entry_point_is_a_net():
    net = load(drop_rate=0.2)
    assert sum(p.numel() for p in net.parameters()) == 176122
    assert net.dense1[0].dropout.p == 0.2


def test_the_weights_are_those_of_the_finished_run():
    shipped = evaluate.load_checkpoint(RUN / "net.pth")
    assert shipped["epoch"] == pd.read_csv(RUN / "test.csv")["epoch"].iloc[-1] == shipped["args"]["epochs"]
    fresh, pretrained = load().state_dict(), load(pretrained=True).state_dict()
    assert all(torch.equal(pretrained[name], shipped["net"][name]) for name in fresh)
    assert not torch.equal(fresh["fc.weight"], shipped["net"]["fc.weight"])


def test_error_on_the_first_1000_test_images(cifar):
    shipped = evaluate.load_checkpoint(RUN / "net.pth")
    dataset = data.load("cifar10", cifar, torch.device("cpu"))
    mean, std = evaluate.normalization(shipped, torch.device("cpu"))
    logits = evaluate.predict(load(pretrained=True), dataset.test.images[:1000], mean, std)
    _, wrong = evaluate.loss_and_error_sums(logits, dataset.test.labels[:1000])
    assert wrong == 92
