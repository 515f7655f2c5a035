"""The weights that ship, loaded as a user would."""

import pandas as pd
import pytest
import torch
from conftest import ROOT

import data
from checkpoint import load_checkpoint, normalization
from metrics import loss_and_error_sums, predict

RUNS = {
    "densenet_bc_40_12": ROOT / "work" / "bc-40-12",
    "densenet_bc_40_12_adam": ROOT / "work" / "bc-40-12-adam",
}


def load(name, **arguments):
    return torch.hub.load(str(ROOT), name, source="local", **arguments)


@pytest.mark.parametrize("name", RUNS)
def test_each_entry_point_is_a_net(name):
    net = load(name, drop_rate=0.2)
    assert sum(p.numel() for p in net.parameters()) == 176122
    assert net.dense1[0].dropout.p == 0.2


@pytest.mark.parametrize("name", RUNS)
def test_the_weights_are_those_of_the_finished_run(name):
    shipped = load_checkpoint(RUNS[name] / "net.pth")
    assert shipped["epoch"] == pd.read_csv(RUNS[name] / "test.csv")["epoch"].iloc[-1] == shipped["args"]["epochs"]
    fresh, pretrained = load(name).state_dict(), load(name, pretrained=True).state_dict()
    assert all(torch.equal(pretrained[key], shipped["net"][key]) for key in fresh)
    assert not torch.equal(fresh["fc.weight"], shipped["net"]["fc.weight"])


@pytest.fixture(scope="module")
def test_set(cifar):
    return data.load("cifar10", cifar).test


@pytest.mark.parametrize(("name", "wrong"), [("densenet_bc_40_12", 75), ("densenet_bc_40_12_adam", 129)])
def test_error_on_the_first_1000_test_images(name, wrong, test_set):
    shipped = load_checkpoint(RUNS[name] / "net.pth")
    mean, std = normalization(shipped, torch.device("cpu"))
    logits = predict(load(name, pretrained=True), test_set.images[:1000], mean, std)
    _, errors = loss_and_error_sums(logits, test_set.labels[:1000])
    assert errors == wrong
