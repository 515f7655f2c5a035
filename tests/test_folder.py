"""A person's own pictures, from the folder to a classified picture, by the real programs."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import contents
from PIL import Image

import evaluate
import folder
import train
from checkpoint import load_checkpoint

FLAGS = ["--dataset", "folder", "--depth", "10", "--growth-rate", "4", "--batch-size", "4", "--device", "cpu", "--no-plot"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Light and dark noise of 80 x 60: 8 of each to train on, 3 light and 1 dark to test."""
    root, chance = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, low, tests in [("dark", 0, 1), ("light", 128, 3)]:
        for part, number in [("train", 8), ("test", tests)]:
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = chance.integers(low, low + 128, (60, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.jpg")
    return root


@pytest.fixture
def run(call_main, pictures):
    def run(save, *flags, epochs=1):
        return call_main(train, *FLAGS, "--data", pictures, "--epochs", epochs, "--save", save, *flags)

    return run


def test_the_checkpoint_knows_the_size(call_main, run, pictures, monkeypatch, tmp_path):
    """Trained at 64, then exported, evaluated, a picture classified and training begun anew, without a flag."""
    status, out, errors = run(tmp_path / "run", "--image-size", 64, epochs=2)
    assert status == 0, errors
    lines = out.splitlines()
    assert lines[:2] == [f"reading 16 pictures in {pictures / 'train'}", f"reading 4 pictures in {pictures / 'test'}"]
    assert lines[3].startswith("folder (16 training, 4 test images), cpu (")
    assert lines[4:6] == [
        "  dark         8 training       1 test images",
        "  light        8 training       3 test images",
    ]
    assert json.loads((tmp_path / "run" / "args.json").read_text())["image_size"] == 64
    checkpoint, net = tmp_path / "run" / "latest.pth", tmp_path / "net.pth"
    assert load_checkpoint(checkpoint)["args"]["image_size"] == 64
    assert call_main(evaluate, checkpoint, "--export", net)[0] == 0
    assert json.loads(net.with_suffix(".json").read_text())["image_size"] == 64
    last = pd.read_csv(tmp_path / "run" / "test.csv").iloc[-1]
    for weights in (checkpoint, net):
        status, out, errors = call_main(evaluate, weights, "--out", tmp_path)
        assert f"test loss {last['loss']:.2f}   test error {last['error']:.2f} %" in out, errors
    shares = [[int(number) for number in row] for row in re.findall(r"\((\d+) of (\d+) wrong\)", out)]
    mean = 100 * np.mean([wrong / total for wrong, total in shares])
    assert f"mean per-class error {mean:.2f} %\n" in out
    sizes, read_pictures = [], evaluate.read_pictures
    monkeypatch.setattr(evaluate, "read_pictures", lambda paths, size: [sizes.append(size), read_pictures(paths, size)][1])
    status, out, errors = call_main(evaluate, net, "--image", pictures / "test" / "dark" / "0.jpg")
    assert (status, out.count(" %"), sizes) == (0, 2, [64]), errors
    status, _, errors = run(tmp_path / "more", "--init", net)
    assert status == 0, errors
    assert json.loads((tmp_path / "more" / "args.json").read_text())["image_size"] == 64
    status, _, errors = run(tmp_path / "smaller", "--init", net, "--image-size", 8)
    assert status == 0, errors
    assert json.loads((tmp_path / "smaller" / "args.json").read_text())["image_size"] == 8


def test_another_size_is_another_run(run, tmp_path):
    assert run(tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["image_size"] == 32
    before = contents(tmp_path / "run")
    status, _, errors = run(tmp_path / "run", "--resume", "--image-size", 64)
    assert (status, "begun with image_size 32, not 64" in errors) == (2, True)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-size", 30], "--image-size: 30 is not a multiple of 4: the nearest are 28 and 32"),
        (["--image-size", 4], "--image-size: 4 is out of range"),
        (["--image-size", -32], "--image-size: -32 is out of range"),
        (["--image-size", "large"], "--image-size: invalid"),
        (
            ["--image-size", 64, "--dataset", "digits"],
            "--image-size is for --dataset folder: the images of digits have a fixed size, leave it out",
        ),
        (["--image-size", 28, "--dataset", "cifar10"], "--image-size is for --dataset folder"),
        (["--image-size", 40_000], "GB are free: choose a smaller --image-size"),
    ],
)
def test_bad_sizes_are_one_sentence_and_nothing_is_written(run, tmp_path, flags, message):
    status, out, errors = run(tmp_path / "run", *flags)
    assert (status, out) == (2, "")
    assert len(errors.splitlines()) == 2
    assert message in errors
    assert not (tmp_path / "run").exists()


def test_files_that_are_not_read_are_told_of(run, pictures, tmp_path):
    """Of other extensions, or beside the classes; neither hidden ones nor what is beside train and test."""
    root = shutil.copytree(pictures, tmp_path / "set")
    names = [
        "train/dark/a.HEIC",
        "train/dark/deep/b.heic",
        "test/light/c.avif",
        "train/d.png",
        "test/README",
        "train/dark/.e.heic",
    ]
    for name in [*names, "train/.hidden/f.heic", "g.heic"]:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"")
    for name in ("train/dark/more", "test/light/labels.csv"):
        (root / name).symlink_to("/unmounted")
    status, out, errors = run(tmp_path / "run", "--data", root)
    assert status == 0, errors
    told = [line for line in out.splitlines() if "not read" in line]
    kinds = {"1 .avif", "1 .png beside the classes", "1 without extension", "2 linked to nothing"}
    start = f"{root}: files that are not read: 2 .heic, "
    assert (len(told), told[0].startswith(start)) == (1, True)
    assert {*told[0].removeprefix(start).split(", ")} == kinds
    (root / "train" / "dark").rename(tmp_path / "dark")
    (root / "train" / "dark").symlink_to(tmp_path / "dark")
    for number in range(9):
        (root / "train" / f"scan.{number}").write_bytes(b"")
    status, out, errors = run(tmp_path / "more", "--data", root)
    (told,) = (line for line in out.splitlines() if "not read" in line)
    assert (told.startswith(start), told.endswith(", …"), told.count(", ")) == (True, True, 5)


@pytest.mark.parametrize(
    ("name", "target"),
    [("train/dark", "/unmounted"), ("train/v1.0", "itself"), ("test/light", "itself"), ("test/new.jpg", "/unmounted")],
)
def test_a_class_that_is_a_link_to_nothing_is_refused(run, pictures, tmp_path, name, target):
    """As on a disk that is not mounted."""
    root = shutil.copytree(pictures, tmp_path / "set")
    shutil.rmtree(root / name, ignore_errors=True)
    (root / name).symlink_to(root / name if target == "itself" else target)
    status, _, errors = run(tmp_path / "run", "--data", root)
    assert (status, f"{root / name} is a link to nothing: put back what it names, or remove it" in errors) == (2, True), errors
    assert not (tmp_path / "run").exists()


def test_a_test_picture_that_is_a_training_picture_is_told_of(run, pictures, tmp_path):
    root = shutil.copytree(pictures, tmp_path / "set")
    shutil.copy(root / "train" / "dark" / "3.jpg", root / "test" / "dark" / "a copy.jpg")
    status, out, errors = run(tmp_path / "run", "--data", root)
    assert status == 0, errors
    assert "\n  1 of 5 test images are training images, too: new ones may have a higher error\n" in out


def test_held_out_pictures_that_are_training_pictures_are_told_of(run, pictures, tmp_path):
    root = shutil.copytree(pictures, tmp_path / "set")
    for folder_of_class in (root / "train").iterdir():
        first, *others = sorted(folder_of_class.iterdir())
        for other in others:
            shutil.copy(first, other)
    status, out, errors = run(tmp_path / "run", "--data", root, "--val", 4)
    assert (status, "\n  4 of 4 held-out images are training images, too" in out) == (0, True), errors


def test_pictures_that_cannot_be_read_stop_the_run_before_it_begins(call_main, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "set")
    for name in ("depth.tif", "more.tif"):
        Image.new("F", (40, 40), 0.5).save(tmp_path / "set" / "train" / "dark" / name)
    status, _, errors = call_main(train, *FLAGS, "--data", tmp_path / "set", "--save", tmp_path / "run")
    assert status == 2
    which = [f"{tmp_path / 'set' / 'train' / 'dark' / name} (its pixels are of type F, " for name in ("depth.tif", "more.tif")]
    assert f"cannot be read as pictures: {which[0]}" in errors
    assert f", {which[1]}" in errors
    assert len(errors.splitlines()) == 2
    assert not (tmp_path / "run").exists()


def test_ctrl_c_while_pictures_are_read(forked, tmp_path):
    """The same large picture two thousand times, which takes far longer than the signal."""
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png", compress_level=1)
    for part, number in [("train", 1000), ("test", 1)]:
        for name in ("one", "two"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(number):
                (tmp_path / part / name / f"{i}.png").symlink_to(tmp_path / "large.png")
    reader, writer = os.pipe()
    process = forked(["train.py", *FLAGS, "--data", tmp_path, "--save", tmp_path / "run"], stdout=writer)
    os.close(writer)
    with open(reader) as out:
        assert out.readline() == f"reading 2,000 pictures in {tmp_path / 'train'}\n"
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        assert (process.returncode, out.read(), process.stderr) == (130, "", "train.py: stopped\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["train", "train/cat", "test/new/deep"])
def test_nothing_is_drawn_among_the_pictures(call_main, run, pictures, tmp_path, place):
    """It would be taken for some of them, the next time; beside train and test it is not."""
    root = shutil.copytree(pictures, tmp_path / "pets")
    told = f"{root / place} is among the pictures of {root}, where figures would be read as pictures: choose another"
    before = sorted(root.rglob("*"))
    status, _, errors = run(root / place, "--data", root)
    assert (status, told in errors, sorted(root.rglob("*"))) == (2, True, before), errors
    assert run(root, "--data", root, "--no-plot")[0] == 0
    assert call_main(evaluate, root, "--out", root / "train" / "cat" / ".hidden")[0] == 0
    before = sorted(root.rglob("*"))
    status, _, errors = call_main(evaluate, root, "--out", root / place)
    assert (status, told in errors, sorted(root.rglob("*"))) == (2, True, before), errors


def test_the_predictions_of_a_folder_are_of_its_pictures_one_by_one(call_main, pictures, tmp_path):
    """As --image has them; the names of the classes are sorted otherwise than the paths below them."""
    for part in ("train", "test"):
        for old, new in [("dark", "a"), ("light", "a-b")]:
            shutil.copytree(pictures / part / old, tmp_path / "set" / part / new)
    flags = ["--data", tmp_path / "set", "--epochs", 3, "--lr", 0.01, "--save", tmp_path / "run"]
    assert call_main(train, *FLAGS, *flags)[0] == 0
    tables = {name: tmp_path / f"{name}.csv" for name in ("set", "pictures")}
    named = ["--image", tmp_path / "set" / "test" / "a", tmp_path / "set" / "test" / "a-b"]
    for table, more in zip(tables.values(), ([], named), strict=True):
        status, _, errors = call_main(evaluate, tmp_path / "run" / "latest.pth", "--predictions", table, *more)
        assert status == 0, errors
    ours, theirs = (pd.read_csv(table) for table in tables.values())
    assert ours["picture"].tolist() == theirs["picture"].tolist()
    assert ours["class"].tolist() == theirs["class"].tolist()
    np.testing.assert_allclose(ours["probability"], theirs["probability"], atol=1e-5)
    assert ours["probability"].nunique() > 1


@pytest.mark.parametrize(
    ("name", "alike"),
    [
        ("\uff43\uff41\uff54", "Cat"),  # as a Japanese keyboard writes it
        ("Stra\u00dfe", "STRASSE"),
        ("cat\u200b", "cat"),  # with a space of no width, as pasted from a web page
    ],
)
def test_names_that_look_alike(name, alike):
    assert folder.spelling(name) == folder.spelling(alike)


def test_up_to_five_extensions_are_told_of_and_up_to_20_classes_listed(tmp_path):
    for number in range(folder.MANY_KINDS):
        (tmp_path / f"a.{number}").touch()
    (line,) = folder.left_out(tmp_path)
    assert line == f"{tmp_path}: files that are not read: 1 .0, 1 .1, 1 .2, 1 .3, 1 .4"
    (tmp_path / "a.5").touch()
    assert [*folder.left_out(tmp_path)] == [f"{line}, …"]
    for classes, lines in [(20, 20), (21, 1)]:
        names, labels = [*map(str, range(classes))], torch.arange(classes)
        assert len(folder.describe_classes(names, labels, labels)) == lines
