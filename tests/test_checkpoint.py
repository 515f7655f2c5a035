import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_RUN, contents
from PIL import Image

import checkpoint
import data
import evaluate
import train
from checkpoint import build_net, checkpoint_in, export, load_checkpoint, make_checkpoint, normalization, restore
from densenet import DenseNet
from endings import Refused
from metrics import predict
from pictures import to_tensor


def test_a_flipped_bit_is_refused_or_harmless(tiny_run, tmp_path):
    """A bit in the padding between the parts of the file changes nothing; everywhere else the checksum tells."""
    content = (tiny_run / "latest.pth").read_bytes()
    original = torch.load(tiny_run / "latest.pth", weights_only=True)
    chance, refused = random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (tmp_path / "latest.pth").write_bytes(damaged)
        try:
            checkpoint = load_checkpoint(tmp_path / "latest.pth")
        except Refused:
            refused += 1
        else:
            assert all(torch.equal(checkpoint["net"][key], value) for key, value in original["net"].items())
            assert checkpoint["args"] == original["args"]
    assert refused > 20


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_that_carries_code_is_refused(call_main, tiny_run, tmp_path):
    save = shutil.copytree(tiny_run, tmp_path / "run")
    checkpoint = torch.load(save / "latest.pth", weights_only=True)
    torch.save({**checkpoint, "extra": Command(tmp_path / "was_run")}, save / "latest.pth")
    for module, *flags in [
        (train, *TINY_RUN, "--save", save, "--resume"),
        (evaluate, save / "latest.pth"),
    ]:
        status, _, errors = call_main(module, *flags)
        assert (status, "is damaged or no checkpoint" in errors) == (2, True)
    assert not (tmp_path / "was_run").exists()
    torch.load(save / "latest.pth", weights_only=False)  # the bait was a real one
    assert (tmp_path / "was_run").exists()


def test_a_checkpoint_has_the_mean_and_the_std_to_their_last_digit(tiny_run):
    dataset = data.load("digits", ".")
    mean, std = normalization(load_checkpoint(tiny_run / "latest.pth"), "cpu")
    assert torch.equal(mean, dataset.mean)
    assert torch.equal(std, dataset.std)


@pytest.mark.parametrize("kept", [["latest.pth", "net.pth"], ["net.pth"]])
def test_a_folder_stands_for_the_checkpoint_in_it(tmp_path, kept):
    for name in kept:
        (tmp_path / name).touch()
    assert checkpoint_in(tmp_path) == tmp_path / kept[0]
    assert checkpoint_in(tmp_path / "net.pth") == tmp_path / "net.pth"


def test_weights_of_another_shape_do_not_fit():
    net = DenseNet(depth=10, growth_rate=4)
    state = net.state_dict()
    assert checkpoint.fits(state, net)
    assert not checkpoint.fits({**state, "fc.weight": state["fc.weight"].t()}, net)  # as many numbers


def test_a_checkpoint_brings_back_the_net_the_optimizer_and_the_scaler():
    """In others that began differently, as a run of fp16 with Adam has them."""
    parts = []
    for seed, scale in [(0, 2.0), (1, 8.0)]:
        torch.manual_seed(seed)
        net = DenseNet(depth=10, growth_rate=4)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1 + seed)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        for _ in range(1 + seed):
            scaler.scale(net(torch.randn(2, 3, 8, 8)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        parts.append((net, optimizer, scaler))
    saved = make_checkpoint(*parts[0], 5, {})
    assert restore(saved, *parts[1]) == 5
    again = make_checkpoint(*parts[1], 5, {})
    assert all(torch.equal(saved["net"][name], again["net"][name]) for name in saved["net"])
    assert saved["scaler"] == again["scaler"]
    assert saved["optimizer"]["param_groups"] == again["optimizer"]["param_groups"]
    for number, state in saved["optimizer"]["state"].items():
        assert all(torch.equal(state[name], again["optimizer"]["state"][number][name]) for name in state)
    assert restore(None, *parts[0]) == 0


def test_exported_weights_are_bare_and_give_the_same_figures(call_main, tiny_run, tmp_path):
    status, out, errors = call_main(evaluate, tiny_run / "latest.pth", "--export", tmp_path / "net.pth")
    assert (status, out) == (0, f"wrote {tmp_path / 'net.pth'} and {tmp_path / 'net.json'}\n"), errors
    state = torch.load(tmp_path / "net.pth", weights_only=True)
    checkpoint = load_checkpoint(tiny_run / "latest.pth")
    assert state.keys() == checkpoint["net"].keys()
    outputs = [call_main(evaluate, path, "--out", tmp_path) for path in (tiny_run / "latest.pth", tmp_path / "net.pth")]
    assert outputs[0] == outputs[1]
    status, _, errors = call_main(evaluate, tiny_run / "latest.pth", "--export", tmp_path / "net.pth")
    assert (status, "exists already" in errors) == (2, True)
    status, _, errors = call_main(evaluate, tiny_run / "latest.pth", "--export", tmp_path / "new" / "net.json")
    assert (status, "name a .pth file" in errors) == (2, True)
    status, _, errors = call_main(evaluate, tiny_run / "latest.pth", "--export", tmp_path / "new" / "net.pth")
    assert status == 0, errors


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (None, "bare weights need {}, which evaluate.py --export writes beside them: put it there, or name the latest.pth"),
        ("{", "{} is damaged (Expecting property name"),
        ("[" * 100_000, "{} is damaged ("),
        ("[]", "{} is not what evaluate.py --export writes"),
        ('{"args": {}, "epoch": 1, "mean": [], "std": []}', "{} is not what evaluate.py --export writes"),
    ],
)
def test_bare_weights_without_their_card_are_refused_and_it_is_named(call_main, tmp_path, card, message):
    torch.save(DenseNet(depth=10, growth_rate=4).state_dict(), tmp_path / "net.pth")
    if card:
        (tmp_path / "net.json").write_text(card)
    for module, *arguments in [(evaluate, tmp_path / "net.pth"), (train, *TINY, "--init", tmp_path / "net.pth")]:
        status, _, errors = call_main(module, *arguments, *["--save", tmp_path / "run"] * (module is train))
        assert (status, len(errors.splitlines()), message.format(tmp_path / "net.json") in errors) == (2, 2, True), errors


def test_a_card_is_refused_in_place_of_its_weights_and_with_impossible_images(call_main, tiny_run, tmp_path):
    card = export(load_checkpoint(tiny_run / "latest.pth"), tmp_path / "net.pth")
    status, _, errors = call_main(evaluate, card)
    assert (status, f"{card} is JSON and holds no weights: name the .pth file beside it" in errors) == (2, True)
    facts = json.loads(card.read_text())
    for size in (2, -8, 2**63):
        card.write_text(json.dumps(facts | {"image_size": size}))
        status, _, errors = call_main(evaluate, tmp_path / "net.pth")
        assert (status, f"{card} is not what evaluate.py --export writes" in errors) == (2, True), errors


def test_exported_weights_are_contiguous_and_their_file_may_be_a_str(tiny_run, tmp_path):
    """A run's own are not: its net is channels last."""
    trained = load_checkpoint(str(tiny_run / "latest.pth"))
    assert not all(value.is_contiguous() for value in trained["net"].values())
    export(trained, tmp_path / "net.pth")
    bare = torch.load(tmp_path / "net.pth", weights_only=True)
    assert all(value.is_contiguous() for value in bare.values())
    assert all(torch.equal(value, trained["net"][name]) for name, value in bare.items())
    card = json.loads((tmp_path / "net.json").read_text())
    assert (card["image_size"], card["pixels"]) == (32, "0..255")  # of which mean and std are


@pytest.mark.parametrize("path", sorted(ROOT.glob("work/*/net.pth")), ids=lambda path: path.parent.name)
def test_the_weights_that_ship_are_contiguous(path):
    assert all(value.is_contiguous() for value in load_checkpoint(path)["net"].values())


def text_file(path):
    path.write_text("epoch,loss,error\n")


def other_checkpoint(path):
    torch.save({"state_dict": {}}, path)


def bare_tensor(path):
    torch.save(torch.zeros(3), path)


def nothing(path):
    pass


def folder(path):
    path.mkdir()


CARD = {"args": {"dataset": "digits", "data": "data", "val": 0}, "epoch": 1, "mean": [0.0] * 3, "std": [1.0] * 3}
CARD |= {"classes": ["cat", "dog"]}  # complete, so that it is the net that is refused
TINY_NET = dict(depth=10, growth_rate=2, reduction=0.5, num_classes=2, bottleneck=True, drop_rate=0.0, efficient=False)


def vgg(path):  # as attic/train-vgg.py saves it
    model = dict.fromkeys(TINY_NET) | {"num_classes": 2}
    torch.save({**CARD, "net": torch.nn.Linear(1, 2).state_dict(), "model": model}, path)


def no_net(path):
    torch.save({**CARD, "net": {}, "model": TINY_NET}, path)


def impossible_net(path):
    torch.save({**CARD, "net": DenseNet(**TINY_NET).state_dict(), "model": TINY_NET | {"depth": 11}}, path)


def other_net(path):
    torch.save({**CARD, "net": DenseNet(**TINY_NET).state_dict(), "model": TINY_NET | {"growth_rate": 3}}, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (text_file, "is damaged or no checkpoint of train.py"),
        (other_checkpoint, "is not a checkpoint of train.py"),
        (bare_tensor, "is not a checkpoint of train.py"),
        (nothing, "does not exist: name a run, or its latest.pth"),
        (folder, "file.pth holds no checkpoint, neither latest.pth nor net.pth: name a run that has one"),
        (no_net, "is not a checkpoint of train.py"),
        (vgg, "the checkpoint does not describe a DenseNet: name the latest.pth of train.py"),
        (impossible_net, "describes an impossible DenseNet (depth 11 does not fit"),
        (other_net, "the weights are not those of the DenseNet that the checkpoint names: use the densenet.py of its run"),
    ],
)
def test_a_file_that_is_no_checkpoint_of_ours(call_main, tmp_path, make, message):
    make(tmp_path / "file.pth")
    status, _, errors = call_main(evaluate, tmp_path / "file.pth")
    assert status == 2
    assert len(errors.splitlines()) == 2
    assert message in errors


def test_a_description_that_is_there_is_not_overwritten(tiny_run, tmp_path):
    """Nor are weights written beside it, of which it would not be."""
    (tmp_path / "net.json").write_text("mine")
    with pytest.raises(Refused, match=r"net\.json exists already: name another file, or remove it"):
        export(load_checkpoint(tiny_run / "latest.pth"), tmp_path / "net.pth")
    assert contents(tmp_path) == {"net.json": b"mine"}


def test_the_net_of_a_checkpoint_is_of_plain_modules_in_evaluation_mode(tiny_run):
    """Whatever its run computed the dense blocks with."""
    trained = load_checkpoint(tiny_run / "latest.pth")
    net = build_net({**trained, "model": trained["model"] | {"efficient": True}})
    assert not any(module.training for module in net.modules())
    assert not any(block.efficient for block in (net.dense1, net.dense2, net.dense3))


def test_pictures_of_a_net_that_does_not_tell_their_size_have_that_of_cifar():
    """As older versions of train.py saved it."""
    sizes = [checkpoint.image_size_of({"args": args}) for args in ({}, {"image_size": None}, {"image_size": 64})]
    assert sizes == [32, 32, 64]


def test_a_data_set_that_somebody_adds_may_have_images_of_another_size_and_any_names(call_main, monkeypatch, tmp_path):
    """The net's pictures have the size of its images, also after --export; classes are their names as text."""
    images = torch.randint(256, (12, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 3
    monkeypatch.setitem(data.SOURCES, "mine", (lambda root, part: (images, labels, np.arange(3)), None))
    flags = ["--dataset", "mine", "--depth", 10, "--growth-rate", 2, "--epochs", 1, "--device", "cpu", "--no-plot"]
    run, weights, picture = tmp_path / "run", tmp_path / "net.pth", tmp_path / "large.png"
    assert call_main(train, *flags, "--val", 3, "--save", run)[0] == 0
    assert call_main(evaluate, run, "--val")[0] == 0
    assert call_main(evaluate, run, "--export", weights)[0] == 0
    large = Image.fromarray(np.random.default_rng(0).integers(256, size=(96, 96, 3), dtype=np.uint8))
    large.save(picture)
    for net in (run, weights):
        loaded = load_checkpoint(checkpoint_in(net))
        logits = predict(build_net(loaded), to_tensor(large, 48)[None], *normalization(loaded, "cpu"))
        best = logits.softmax(dim=1)[0].sort(descending=True)
        answers = [f"{i} {100 * p:.1f} %" for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        assert call_main(evaluate, net, "--image", picture)[1] == f"{picture}: {', '.join(answers)}\n"


def test_a_checkpoint_of_a_gpu_is_read_without_one(tiny_run, tmp_path):
    """Its tensors are marked as a GPU's, as torch.save does there."""
    saved = torch.load(tiny_run / "latest.pth", weights_only=True)
    registry = torch.serialization._package_registry
    before = [*registry]
    torch.serialization.register_package(0, lambda storage: "cuda:0", lambda storage, location: None)
    try:
        torch.save(saved, tmp_path / "latest.pth")
    finally:
        registry[:] = before
    assert b"cuda:0" in (tmp_path / "latest.pth").read_bytes()
    loaded = load_checkpoint(tmp_path / "latest.pth")
    assert all(torch.equal(loaded["net"][name], value) for name, value in saved["net"].items())
