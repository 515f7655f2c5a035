"""The scripts that draw the figures of the README. Copies run in a temporary folder, since they write beside themselves."""

import json
import runpy
import shutil

import pytest
from conftest import ROOT
from PIL import Image


@pytest.fixture
def script(run_script, tmp_path):
    """Runs a copy of a script of images/, which therefore draws into the temporary folder."""
    (tmp_path / "images").mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)

    def run(name, *arguments):
        shutil.copy(ROOT / "images" / name, tmp_path / "images")
        return run_script(tmp_path / "images" / name, *arguments)

    return run


def copy_of_run(folder, **changes):
    """A copy of a finished run, in that folder, with other values in args.json."""
    shutil.copytree(ROOT / "work" / "bc-22-8", folder)
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(args | changes))
    return folder


def colours(path):
    image = Image.open(path).convert("RGB")
    return {colour for _, colour in image.getcolors(maxcolors=1 << 24)}


def test_the_header(script, tmp_path):
    done = script("draw_header.py")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "images" / "header.png").size == Image.open(ROOT / "images" / "header.png").size


def test_the_table_marks_what_was_measured(script, tmp_path):
    done = script("draw_err_table.py", ROOT / "work" / "bc-22-8")
    assert done.returncode == 0, done.stderr
    assert (0xC0, 0x39, 0x2B) in colours(tmp_path / "images" / "densenet-err-table.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 4}, "has 3 of 4 epochs: resume it first"),
        ({"dataset": "digits"}, "is no run on the whole of CIFAR-10 with augmentation"),
        ({"limit": 1000}, "is no run on the whole of CIFAR-10 with augmentation"),
    ],
)
def test_a_run_that_does_not_belong_into_the_table(script, tmp_path, changes, message):
    done = script("draw_err_table.py", copy_of_run(tmp_path / "run", **changes))
    assert (done.returncode, message in done.stderr) == (2, True)
    assert not (tmp_path / "images" / "densenet-err-table.png").exists()


def test_a_run_that_began_with_the_weights_of_another_says_so(tmp_path):
    row_of = runpy.run_path(str(ROOT / "images" / "draw_err_table.py"))["row_of"]
    assert row_of(ROOT / "work" / "bc-22-8")[0] == "DenseNet-BC, 3 epochs of SGD, here"
    assert row_of(copy_of_run(tmp_path / "run", init="net.pth"))[0] == "DenseNet-BC, 3 more epochs of SGD, here"
