"""The weights that ship, loaded as a user would."""

import sys
import types

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


@pytest.mark.parametrize("name", RUNS)
def test_for_another_number_of_classes_the_classifier_alone_is_new(name):
    trained = load(name, pretrained=True).state_dict()
    torch.manual_seed(3)
    net = load(name, pretrained=True, num_classes=3, drop_rate=0.2, reduction=0.5)
    torch.manual_seed(3)
    new = load(name, num_classes=3).state_dict()
    assert net.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    state = net.state_dict()
    assert all(torch.equal(state[key], (new if key in ("fc.weight", "fc.bias") else trained)[key]) for key in trained)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in net.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 22}, "pretrained=True has depth 40 and not 22: leave out depth, or pretrained"),
        ({"growth_rate": 8}, "growth_rate 12 and not 8"),
        ({"bottleneck": False}, "bottleneck True and not False"),
        ({"reduction": None, "init_channels": 16}, "init_channels 24 and not 16"),
        ({"num_classes": 3, "reduction": 1.0}, "reduction 0.5 and not 1.0"),
    ],
)
def test_trained_weights_for_another_net_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load("densenet_bc_40_12", pretrained=True, **arguments)
    assert load("densenet_bc_40_12", **arguments).fc.out_features == arguments.get("num_classes", 10)


@pytest.mark.parametrize("file", ["/elsewhere/densenet.py", None])
def test_another_module_called_densenet_is_named(monkeypatch, file):
    other = types.ModuleType("densenet")
    other.__file__ = file
    monkeypatch.setitem(sys.modules, "densenet", other)
    with pytest.raises(ImportError, match=rf"'densenet'.* was imported before {ROOT / 'densenet.py'}: load this net"):
        load("densenet_bc_40_12")


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
