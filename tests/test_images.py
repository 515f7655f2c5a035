"""The scripts that draw the figures of the README. Copies run in a temporary folder, since they write beside themselves."""

import json
import runpy
import shutil

import pytest
from conftest import ROOT
from matplotlib.patches import FancyArrowPatch
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


def test_the_header(script, tmp_path):
    done = script("draw_header.py")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "images" / "header.png").size == Image.open(ROOT / "images" / "header.png").size


# ------------------------------------------------------------------------------------------------ memory against the depth


def report_of(peaks):
    """A report of attic/compare-speed.py with these peaks at L=40, 100 and 250."""
    variants = ("plain", "efficient")
    of_depth = {
        depth: {"variants": {name: {"ms_per_step": [9, 1, 7], "peak_mb_per_image": peak} for name in variants}}
        for depth, peak in zip((40, 100, 250), peaks, strict=True)
    }
    return {"growth_rate": 12, "batch_size": 8, "conditions": "fp32, batch 8, a CPU, 2 threads", "depths": of_depth}


WITHOUT_CONDITIONS = json.dumps(report_of([3, 7, 18])).replace('"conditions"', '"others"')


def test_memory_and_time_against_the_depth(run_script, tmp_path):
    (tmp_path / "memory.json").write_text(json.dumps(report_of([3, 7, 18])))
    done = run_script("images/draw_memory.py", tmp_path / "memory.json")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'memory.png'}\n"), done.stderr
    assert Image.open(tmp_path / "memory.png").size == Image.open(ROOT / "images" / "memory.png").size


def test_a_report_is_read_as_it_was_measured(tmp_path):
    (tmp_path / "memory.json").write_text(json.dumps(report_of([3, 7, 18])))
    read_curves = runpy.run_path(str(ROOT / "images" / "draw_memory.py"))["read_curves"]
    growth_rate, conditions, curves = read_curves(tmp_path / "memory.json")
    assert (growth_rate, conditions) == (12, "fp32, batch 8, a CPU, 2 threads")
    assert [*curves] == ["plain modules", "--efficient"]
    assert curves["--efficient"] == ([40, 100, 250], [3, 7, 18], [7 / 8, 7 / 8, 7 / 8])


def test_the_exponents_are_those_between_the_second_and_the_last_of_four_depths(saved, tmp_path):
    """Of the README: between L=100 and L=250."""
    draw = runpy.run_path(str(ROOT / "images" / "draw_memory.py"))["draw"]
    curves = {"a net": ([40, 100, 160, 250], [9, 4, 9, 4 * 2.5**1.5], [9, 2, 9, 2 * 2.5**2])}
    draw(12, "batch 8", curves, tmp_path / "memory.png")
    labels = [axes.get_legend().get_texts()[0].get_text() for axes in saved[0].axes]
    assert (labels, saved[0]._suptitle.get_text()) == (["a net: $L^{1.5}$", "a net: $L^{2.0}$"], "batch 8")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({**report_of([3, 7, 18]), "depths": {}}),
        json.dumps(report_of([3, None, 18])),
        json.dumps(report_of([3, 7, 18])).replace("peak_mb_per_image", "peak"),  # of another version
        WITHOUT_CONDITIONS,
    ],
)
def test_another_report_is_refused(run_script, tmp_path, text):
    (tmp_path / "memory.json").write_text(text)
    done = run_script("images/draw_memory.py", tmp_path / "memory.json")
    assert done.returncode == 2
    assert any(f"memory.json {why}" in done.stderr for why in ("lacks counted peaks", "is not a report of attic"))
    assert not (tmp_path / "memory.png").exists()


def test_every_layer_of_the_header_reads_all_maps_before_it(monkeypatch, saved):
    monkeypatch.setattr("sys.argv", ["draw_header.py"])
    runpy.run_path(str(ROOT / "images" / "draw_header.py"))["main"]()
    arrows = [patch for patch in saved[0].axes[0].patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) == 4 + 3 + 2 + 1 + 4  # from each group to all layers behind it, and from each layer
