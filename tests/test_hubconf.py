"""The weights that ship, loaded as a user would."""

import os
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_pictures import noise, png

import data
from checkpoint import load_checkpoint, normalization
from metrics import loss_and_error_sums, predict
from pictures import read_pictures

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


def test_the_nets_need_torch_alone(tmp_path):
    """Without a GPU also the efficient ones, whose kernels are not imported then."""
    code = f"""
import sys
sys.modules |= dict.fromkeys(["PIL", "numpy", "torchvision", "tqdm", "triton"])
import torch
net = torch.hub.load({str(ROOT)!r}, "densenet_bc_40_12", source="local", pretrained=True, efficient=True)
net(torch.zeros(2, 3, 8, 8)).sum().backward()
print(sys.modules["dense_block"].load_kernels.cache_info().currsize)
"""
    environment = os.environ | {"TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr


@pytest.fixture(scope="module")
def test_set(cifar):
    return data.read_part("cifar10", cifar, "test")[0]


@pytest.mark.parametrize(("name", "wrong"), [("densenet_bc_40_12", 23), ("densenet_bc_40_12_adam", 43)])
def test_error_on_the_first_300_test_images(name, wrong, test_set):
    shipped = load_checkpoint(RUNS[name] / "net.pth")
    mean, std = normalization(shipped, torch.device("cpu"))
    logits = predict(load(name, pretrained=True), test_set.images[:300], mean, std)
    _, errors = loss_and_error_sums(logits, test_set.labels[:300])
    assert errors == wrong


def save_turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(70, 41).save(path, exif=exif)


FILES = {
    "plain.png": lambda path: noise(70, 41).save(path),
    "turned.png": save_turned,
    "turned.tif": save_turned,
    "turned.jpg": save_turned,
    "deep.png": lambda path: Image.fromarray(np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 30).save(path),
    "clear.png": lambda path: Image.new("RGBA", (40, 50), (9, 8, 7, 100)).save(path),
    "few.png": lambda path: png(path, 2, 0, b"\x1b", transparent=1),
    "key.gif": lambda path: Image.new("P", (40, 50), 0).save(path, transparency=0),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [None, 16])
def test_a_picture_becomes_what_evaluate_gives_the_net(tmp_path, name, size):
    """The same bits; also a second time, from a picture that is decoded by then and still lies as it did."""
    FILES[name](tmp_path / name)
    mean, std = normalization(load_checkpoint(RUNS["densenet_bc_40_12"] / "net.pth"), torch.device("cpu"))
    expected = data.normalize(read_pictures([tmp_path / name], size or 32)[0], mean, std)
    preprocess, picture = load("preprocess", size=size), Image.open(tmp_path / name)
    before = picture.size
    assert torch.equal(preprocess(picture), expected)
    assert torch.equal(preprocess([picture, picture]), torch.cat([expected, expected]))
    assert picture.size == before


def test_a_photograph_is_the_same_to_rounding_and_keeps_its_size(tmp_path):
    noise(800, 600).save(tmp_path / "large.jpg", quality=95)
    picture = Image.open(tmp_path / "large.jpg")
    std = torch.tensor([63.0, 62.1, 66.7]).view(3, 1, 1)
    mean = torch.tensor([125.3, 123.0, 113.9]).view(3, 1, 1)
    difference = load("preprocess")(picture) * std + mean - read_pictures([tmp_path / "large.jpg"], 32)[0]
    assert difference.abs().max() <= 6.001  # evaluate.py decodes large photographs at a half or less
    assert picture.size == (800, 600)


def test_what_is_no_picture_is_a_value_error():
    with pytest.raises(ValueError, match="its pixels are of type F, whose range of values is unknown"):
        load("preprocess")(Image.new("F", (8, 8)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBA", "RGBa"])
def test_pictures_of_many_types_are_taken(mode):
    assert load("preprocess")(Image.new(mode, (8, 8))).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("folder", ["bc-40-12", "bc-40-12-sgd", "bc-40-12-adam"])
def test_the_card_says_what_its_pixels_are_and_preprocess_fits_each(folder):
    card = load_checkpoint(ROOT / "work" / folder / "net.pth")
    assert (card["image_size"], card["pixels"], card["args"]["dataset"]) == (32, "0..255", "cifar10")
    assert (card["mean"], card["std"]) == tuple(torch.tensor(moments).tolist() for moments in data.SOURCES["cifar10"][1])


THEIRS = """
import sys, torch
from PIL import Image
for name in sys.argv[2:]:  # which the server has imported
    sys.modules.pop(name, None)
import progress
preprocess = torch.hub.load(sys.argv[1], "preprocess", source="local")
import machine
print(preprocess(Image.new("RGB", (9, 9))).shape, sys.modules["progress"] is progress, machine.mine)
"""


def test_the_callers_modules_and_ours_may_have_the_same_names(forked, tmp_path):
    """Imported before and after."""
    for name in ("progress", "machine"):
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    ours = [path.stem for path in ROOT.glob("*.py")]
    done = forked(["-c", THEIRS, ROOT, *ours], cwd=tmp_path).wait()
    assert (done.returncode, done.stdout) == (0, "torch.Size([1, 3, 32, 32]) True True\n"), done.stderr


def test_threads_may_load_it_at_the_same_time():
    together = threading.Barrier(8)

    def load_one(_):
        together.wait()
        return load("preprocess")(Image.new("RGB", (9, 9))).shape

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert {*pool.map(load_one, range(8))} == {(1, 3, 32, 32)}
    finally:
        sys.setswitchinterval(before)


def test_several_pictures_may_be_a_tuple():
    preprocess, picture = load("preprocess"), Image.new("RGB", (40, 40))
    assert torch.equal(preprocess((picture, picture)), preprocess([picture, picture]))
