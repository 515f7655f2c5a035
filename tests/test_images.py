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


# ------------------------------------------------------------------------------------------------ memory against the depth


def report_of(peaks):
    """A report of attic/compare-speed.py with these peaks at L=40, 100 and 250."""
    of_depth = {
        depth: {"variants": {name: {"ms_a_step": [9, 1, 7], "peak_mb_an_image": peak} for name in ("plain", "efficient")}}
        for depth, peak in zip((40, 100, 250), peaks, strict=True)
    }
    return {"growth_rate": 12, "batch_size": 8, "depths": of_depth}


def test_memory_and_time_against_the_depth(run_script, tmp_path):
    (tmp_path / "memory.json").write_text(json.dumps(report_of([3, 7, 18])))
    done = run_script("images/draw_memory.py", tmp_path / "memory.json")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'memory.png'}\n"), done.stderr
    assert Image.open(tmp_path / "memory.png").size == Image.open(ROOT / "images" / "memory.png").size


def test_a_report_is_read_as_it_was_measured(tmp_path):
    (tmp_path / "memory.json").write_text(json.dumps(report_of([3, 7, 18])))
    read_curves = runpy.run_path(str(ROOT / "images" / "draw_memory.py"))["read_curves"]
    growth_rate, curves = read_curves(tmp_path / "memory.json")
    assert (growth_rate, [*curves]) == (12, ["plain modules", "--efficient"])
    assert curves["--efficient"] == ([40, 100, 250], [3, 7, 18], [7 / 8, 7 / 8, 7 / 8])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", json.dumps({**report_of([3, 7, 18]), "depths": {}}), json.dumps(report_of([3, None, 18]))]
)
def test_another_report_is_refused(run_script, tmp_path, text):
    (tmp_path / "memory.json").write_text(text)
    done = run_script("images/draw_memory.py", tmp_path / "memory.json")
    assert done.returncode == 2
    assert any(f"memory.json {why}" in done.stderr for why in ("has no counted peaks", "is no report of attic"))
    assert not (tmp_path / "memory.png").exists()
