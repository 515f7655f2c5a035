import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, contents
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image

import drawing
import plot
import runs


def write_run(folder, epochs=4, steps=10, level=1.0):
    """A run whose loss and error fall from epoch to epoch; the loss alternates from step to step."""
    folder.mkdir(parents=True)
    step = np.arange(1, epochs * steps + 1)
    loss = level * (2 / np.ceil(step / steps) + 0.5 * (-1.0) ** step)
    train = pd.DataFrame({"epoch": step / steps, "loss": loss, "error": 20 * loss})
    epoch = np.arange(1, epochs + 1)
    train.round(6).to_csv(folder / "train.csv", index=False)
    pd.DataFrame({"epoch": epoch, "loss": 2 / epoch, "error": 40 / epoch}).to_csv(folder / "test.csv", index=False)
    return folder


def write_arguments(run, **arguments):
    """An args.json with what plot.py reads in it."""
    facts = {"opt": "sgd", "lr": 0.1, "epochs": 4, "seed": 1, "depth": 40, "save": str(run)}
    (run / "args.json").write_text(json.dumps(facts | arguments))
    return run


def colored(path):
    """The share of pixels that are not grey, in the picture read back."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (np.ptp(pixels, axis=2) > 40).mean()


@pytest.mark.pixels
def test_three_figures_are_drawn_and_not_empty(call_main, tmp_path):
    run = write_run(tmp_path / "run")
    status, out, errors = call_main(plot, run)
    assert status == 0, errors
    names = ["loss.png", "error.png", "loss-error.png"]
    assert out.split() == [str(run / name) for name in names]
    for name in names:
        assert 0.002 < colored(run / name) < 0.2


def test_a_figure_is_written_when_it_is_drawn(call_main, monkeypatch, tmp_path):
    """Who looks at the file meanwhile sees the old one."""
    run, savefig = write_run(tmp_path / "run"), Figure.savefig
    path = run / "curve.png"
    path.write_bytes(b"old, by Matplotlib")
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda *a, **k: [savefig(*a, **k), seen.append(path.read_bytes())])
    assert call_main(plot, run, "--out", path)[0] == 0
    assert seen == [b"old, by Matplotlib"]
    assert Image.open(path).format == "PNG"


@pytest.mark.parametrize("steps", [1, 10, 782])
def test_training_curve_is_averaged_over_one_epoch_whatever_the_batch_size(tmp_path, steps):
    folder = write_run(tmp_path / "run", epochs=3, steps=steps)
    smooth = plot.read_curve([folder], smooth=1.0).tables["train"]
    raw = pd.read_csv(folder / "train.csv")
    assert smooth.index[-1] == 3
    assert smooth["loss"]["mean"].iloc[-1] == pytest.approx(raw["loss"][-steps:].mean())
    assert len(smooth) == len(raw)
    unsmoothed = plot.read_curve([folder], smooth=0).tables["train"]
    np.testing.assert_allclose(unsmoothed["loss"]["mean"], raw["loss"])


def test_at_the_end_of_an_epoch_the_training_curve_is_at_the_mean_of_its_images(tiny_run):
    """The last batch of an epoch is smaller, and counts for less."""
    curve = plot.read_curve([tiny_run], smooth=1.0).tables["train"]
    test = pd.read_csv(tiny_run / "test.csv").set_index("epoch")
    assert [plot.last_batch({"train_images": images, "batch_size": 40}) for images in (79, 80, 81)] == [39 / 40, 1, 1 / 40]
    assert 0 < plot.last_batch(plot.known_arguments(tiny_run)) < 1
    for column in ("loss", "error"):
        means = curve[column]["mean"]
        np.testing.assert_allclose(means[test.index], test[f"train_{column}"], rtol=1e-4)


@pytest.mark.parametrize("name", ["mine.png", "mine.pdf", "mine.svg", "loss.png"])
def test_a_picture_of_another_program_is_not_replaced(call_main, tmp_path, name):
    run, mine = write_run(tmp_path / "run"), tmp_path / "out" / name
    mine.parent.mkdir()
    mine.write_bytes(b"a photograph")
    status, _, errors = call_main(plot, run, "--out", mine.parent if name == "loss.png" else mine)
    told = f"{mine} exists already and is not from this program, or damaged: name another place, or remove it"
    assert (status, told in errors, mine.read_bytes()) == (2, True, b"a photograph")
    mine.write_bytes(b"")
    for _ in range(2):  # an empty one, and its own
        assert call_main(plot, run, "--out", mine)[0] == 0
        assert mine.read_bytes()


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"a photograph"), lambda path: path.mkdir()])
def test_no_figure_is_drawn_where_one_of_them_cannot_be(call_main, tmp_path, spoil):
    run = write_run(tmp_path / "run")
    spoil(run / "loss-error.png")
    before = contents(run)
    status, _, errors = call_main(plot, run)
    assert (status, f"plot.py: error: {run / 'loss-error.png'} " in errors, contents(run)) == (2, True, before), errors


def test_a_long_curve_is_thinned_and_keeps_its_last_row_and_its_extremes(call_main, saved, tmp_path):
    """Also where --since leaves a part of it, of which every row is drawn if they are few."""
    run, epochs = write_run(tmp_path / "run"), np.arange(1, 30_008) / 100
    loss = np.random.default_rng(0).uniform(1, 2, len(epochs))
    loss[[777, 22_222]] = 900, 0.25
    pd.DataFrame({"epoch": epochs, "loss": loss, "error": 1.0}).to_csv(run / "train.csv", index=False)
    for since in (0, 280):
        assert call_main(plot, run, "--smooth", 0, "--since", since, "--out", tmp_path / "one.png")[0] == 0
    look = plot.COLORS[0], "-", plot.PARTS["train"]["linewidth"]
    (x, y), (late_x, late_y) = (curves(figure.axes[0])[look] for figure in saved)
    assert (3000 <= len(x) <= 4501, max(y), min(y), x[-1], (np.diff(x) > 0).all()) == (True, 900, 0.25, 300.07, True)
    assert {*zip(x, y, strict=True)} <= {*zip(epochs, loss, strict=True)}
    np.testing.assert_array_equal([late_x, late_y], [epochs[27_999:], loss[27_999:]])


def test_a_long_band_keeps_the_extremes_of_its_runs_where_their_mean_has_none():
    error = np.random.default_rng(0).normal(50, 0.1, (2, 6000))
    error[:, 3000:3004] = [50, 95, 50, 60], [40, 5, 60, 50]
    tables = [pd.DataFrame({"epoch": np.arange(1, 6001), "loss": each, "error": each}) for each in error]
    shown = plot.thinned(plot.over_runs(tables)["error"])
    assert (len(shown) < 6000, shown["min"].min(), shown["max"].max()) == (True, 5, 95)
    assert (shown["mean"].min(), shown["mean"].max()) == (error.mean(axis=0).min(), error.mean(axis=0).max())


def test_the_legend_says_over_what_the_training_curve_is_averaged(call_main, saved, tmp_path):
    run = write_run(tmp_path / "run")
    for smooth in (0, 0.5, 1, 10):
        assert call_main(plot, run, "--smooth", smooth, "--out", tmp_path / "one.png")[0] == 0
    words = ["train", "train, averaged over 0.5 epochs", "train, averaged over 1 epoch", "train, averaged over 10 epochs"]
    assert [[*texts(figure)][1] for figure in saved] == words


def test_runs_are_compared_in_one_figure_with_one_legend(call_main, tmp_path):
    folders = [write_run(tmp_path / "a" / "base"), write_run(tmp_path / "b" / "base", level=3.0)]
    status, out, errors = call_main(plot, *folders, "--out", tmp_path / "figures", "--format", "svg", "--title", "Two runs")
    assert status == 0, errors
    text = (tmp_path / "figures" / "loss-error.svg").read_text()
    for label in ("a/base", "b/base", "train, averaged over 1 epoch", "test", "Two runs", "cross-entropy loss"):
        assert text.count(f"<!-- {label} -->") == 1
    assert len(out.split()) == 3


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (["work/a/base", "work/b/base"], ["a/base", "b/base"]),
        (["work/sgd", "work/adam"], ["sgd", "adam"]),
        (["work/sgd"], ["sgd"]),
        (["work/a", "work/a/b", "work/a/b/b"], ["a", "a/b", "a/b/b"]),
        (["x/1/run", "x/2/run", "y/1/run"], ["x/1/run", "x/2/run", "y/1/run"]),
    ],
)
def test_labels_are_what_differs_between_the_paths(tmp_path, folders, labels):
    assert runs.name_runs([tmp_path / folder for folder in folders]) == {
        label: tmp_path / folder for label, folder in zip(labels, folders, strict=True)
    }


def test_out_may_be_the_file_of_one_figure(call_main, saved, tmp_path):
    status, out, errors = call_main(plot, write_run(tmp_path / "run"), "--out", tmp_path / "new" / "both.pdf")
    assert (status, out.split()) == (0, [str(tmp_path / "new" / "both.pdf")]), errors
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["both.pdf"]


def test_without_out_several_runs_are_drawn_into_the_folder_that_holds_them(call_main, saved, tmp_path):
    call_main(plot, write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    assert (tmp_path / "loss-error.png").exists()


def test_a_run_that_is_being_written(call_main, tmp_path):
    run = write_run(tmp_path / "run", epochs=1)
    with (run / "train.csv").open("a") as file:
        file.write("1.1,0.")  # half a row
    (run / "test.csv").write_text("epoch,loss,error\n")  # the first epoch is not done
    tables = plot.read_curve([run], 1.0).tables
    assert (len(tables["train"]), len(tables["test"])) == (10, 0)
    status, out, errors = call_main(plot, run)
    assert (status, len(out.splitlines())) == (0, 3), errors


@pytest.mark.parametrize("line", ["1.45,0.1", "1.45,0.1,2,3", "1.45,nan,2", "1.45,0.1,inf", "1.45,good,2", "1.3,0.1,2", ""])
def test_a_damaged_row_is_left_out_and_told_of(call_main, saved, tmp_path, line):
    run = write_run(tmp_path / "run")
    lines = (run / "train.csv").read_text().splitlines(keepends=True)
    (run / "train.csv").write_text("".join([*lines[:15], line + "\n", *lines[15:]]))
    status, out, errors = call_main(plot, run, "--smooth", 0, "--out", tmp_path / "one.png")
    assert (status, errors) == (0, "")
    told = f"{run / 'train.csv'}: line 16 ({line!r}) is left out: damaged, or of a run that diverged"
    assert out.splitlines() == [told, str(tmp_path / "one.png")]
    x, y = saved[0].axes[0].lines[0].get_data()
    np.testing.assert_allclose(np.stack([x, y]), np.loadtxt(lines[1:], delimiter=",").T[:2])


def test_a_column_that_somebody_has_added_may_have_gaps(tmp_path):
    (tmp_path / "test.csv").write_text("epoch,loss,error,calibration\n1,2,3,nan\n2,2,3,0.5\n3,nan,3,0.5\n")
    assert runs.read_csv(tmp_path / "test.csv")["epoch"].tolist() == [1, 2]


def test_a_csv_that_an_editor_has_saved_is_read(tmp_path):
    """With the mark that some put before the first column."""
    run = write_run(tmp_path / "run")
    before = runs.read_csv(run / "test.csv")
    (run / "test.csv").write_text((run / "test.csv").read_text(), encoding="utf-8-sig")
    pd.testing.assert_frame_equal(runs.read_csv(run / "test.csv"), before)


def test_of_several_damaged_rows_the_first_is_told_of_and_their_number(call_main, saved, tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "train.csv").open("a") as file:
        file.write("4.1,nan,90\n4.2,inf,90\n4.3,0")  # a run that diverged; the last row is not written yet
    status, out, errors = call_main(plot, run, "--out", tmp_path / "one.png")
    assert (status, errors) == (0, "")
    assert f"{run / 'train.csv'}: line 42 ('4.1,nan,90') and 1 more are left out: damaged, " in out


def no_files(run):
    (run / "train.csv").unlink()


def empty_files(run):
    for part in ("train", "test"):
        (run / f"{part}.csv").write_text("")


def header_only(run):
    for part in ("train", "test"):
        (run / f"{part}.csv").write_text("epoch,loss,error\n")


def no_text(run):
    (run / "train.csv").write_bytes(b"\xff\x00\xff\n")


def a_folder(run):
    (run / "test.csv").unlink()
    (run / "test.csv").mkdir()


def no_epoch(run):
    (run / "train.csv").write_text("epoch,loss,error\n0,1,1\n")


def a_column_too_many(run):
    (run / "train.csv").write_text("epoch,loss,error\n0.5,1,1,1\n")


def a_column_twice(run):
    (run / "train.csv").write_text("epoch,loss,error,loss\n0.5,1,1,1\n")


def other_columns(run):
    (run / "train.csv").write_text("a,b\n1,2\n")


def text_in_cells(run):
    (run / "train.csv").write_text("epoch,loss,error\n1,good,2\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_files, "train.csv does not exist"),
        (empty_files, "there is nothing to draw yet: train.csv and test.csv have no row"),
        (header_only, "there is nothing to draw yet: train.csv and test.csv have no row"),
        (other_columns, "has no columns epoch, loss, error"),
        (a_column_twice, "has no columns epoch, loss, error"),
        (text_in_cells, "train.csv is damaged, line 2 ('1,good,2') is no row of 3 numbers"),
        (no_text, "train.csv has no columns epoch, loss, error"),
        (a_folder, "test.csv: Is a directory"),
        (no_epoch, "train.csv is damaged, line 2 ('0,1,1')"),
        (a_column_too_many, "train.csv is damaged, line 2 ('0.5,1,1,1')"),
    ],
)
def test_wrong_csvs_are_one_sentence_and_status_2(call_main, tmp_path, spoil, message):
    run = write_run(tmp_path / "run")
    spoil(run)
    status, _, errors = call_main(plot, run)
    assert status == 2
    assert len(errors.splitlines()) == 2  # usage and the sentence
    assert message in errors
    assert not list(run.glob("*.png"))


def test_a_run_named_twice(call_main, tmp_path):
    run = write_run(tmp_path / "run")
    status, _, errors = call_main(plot, run, run)
    assert (status, "is named twice" in errors) == (2, True)


# ---------------------------------------------------------------------------------------------------------- names as text


NAMES = ["_try", "_", "lr$0.1$b", r"$\frac{$", r"two $\frac{$", r"a\$b\$", "x^2_3", "two\nlines", "<b>&--x"]


def texts(figure):
    """{text: whether it would be typeset as a formula} of the legend and the title of a figure."""
    found = figure.legends[0].get_texts()
    return {text.get_text(): text.get_parse_math() for text in [*found, *filter(None, [figure._suptitle])]}


def letters(text):
    """Without the spaces at which it may be wrapped."""
    return "".join(text.split())


@pytest.mark.filterwarnings("error")
def test_names_and_titles_are_text_and_no_markup(call_main, saved, tmp_path):
    title = " ".join(NAMES)
    status, _, errors = call_main(plot, *(write_run(tmp_path / name) for name in NAMES), "--title", title, "--out", tmp_path)
    assert (status, errors, len(saved)) == (0, "", 3)
    for figure in saved:
        figure.draw_without_rendering()
        found = texts(figure)
        assert {*map(letters, found)} == {*map(letters, [*NAMES, title, "train, averaged over 1 epoch", "test"])}
        assert not any(found.values())


def test_a_name_that_is_no_text(call_main, saved, tmp_path):
    status, _, errors = call_main(plot, write_run(tmp_path / "bad\udcff"), "--out", tmp_path / "one.png")
    assert (status, errors) == (0, "")
    saved[0].draw_without_rendering()
    assert "bad?" in texts(saved[0])


def test_control_characters_in_a_name_are_escaped(call_main, saved, tmp_path):
    """Matplotlib cuts a text off at a carriage return."""
    status, out, errors = call_main(plot, write_run(tmp_path / "a\rb\x1b[31m"), "--title", "two\nlines", "--out", tmp_path)
    assert (status, errors, "\x1b" in out) == (0, "", False)
    saved[0].draw_without_rendering()
    assert {"a\\rb\\x1b[31m", "two\nlines"} <= {*texts(saved[0])}


def test_letters_that_no_font_has_are_boxes_without_a_warning(run_script, tmp_path):
    done = run_script("plot.py", write_run(tmp_path / "\u4e2d\u6587"), "--title", "\U0001f642")
    assert (done.returncode, done.stderr) == (0, "")


def test_letters_that_no_font_has_are_told_of_once(monkeypatch, capsys):
    monkeypatch.setattr(drawing.fontManager, "ttflist", [])
    drawing.say_once.cache_clear()
    for _ in range(2):
        assert drawing.font_families("a\u6587\u4e2d\u00e9\n") == ["sans-serif"]
    assert capsys.readouterr().out == "no installed font has \u4e2d\u6587: they are drawn as boxes until you install one\n"
    many = "".join(map(chr, range(0x4E00, 0x4E15)))
    for text in (many[:20], many):
        assert drawing.font_families(text) == ["sans-serif"]
    told = [line.split(":")[0].split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert told == [many[:20], many[:20] + "\u2026"]


@pytest.fixture
def chinese_font(tmp_path):
    """An installed font with one letter, a black square at the place of U+4E2D, and no other."""
    builder = FontBuilder(1000, isTTF=True)
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in [(0, 900), (900, 900), (900, 0)]:
        pen.lineTo(corner)
    pen.closePath()
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({0x4E2D: "square"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=0)
    builder.setupNameTable({"familyName": "One Square", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "square.ttf")
    before = list(fontManager.ttflist)
    fontManager.addfont(tmp_path / "square.ttf")
    yield "One Square"
    fontManager.ttflist[:] = before


@pytest.mark.pixels
@pytest.mark.filterwarnings("ignore:Glyph .* missing")
def test_an_installed_font_that_has_the_letters_is_used(chinese_font, call_main, tmp_path):
    assert drawing.font_families("abc") == ["sans-serif"]
    assert drawing.font_families("a\u4e2d") == ["sans-serif", chinese_font]
    assert drawing.font_families("a\u4e2d\uffff") == ["sans-serif", chinese_font]
    run = write_run(tmp_path / "run")
    pictures = []
    for title in ("\u4e2d" * 20, "\u6587" * 20):  # squares, and boxes with a sign in them
        assert call_main(plot, run, "--title", title, "--out", tmp_path / "one.png")[0] == 0
        pictures.append(np.asarray(Image.open(tmp_path / "one.png").convert("L"))[:50])
    squares, boxes = ((picture < 40).mean() for picture in pictures)
    assert squares > 1.5 * boxes > 0


# ---------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("since", ["99", "4.5"])
def test_since_an_epoch_that_is_not_there_yet(call_main, saved, tmp_path, since):
    run = write_run(tmp_path / "run")
    status, _, errors = call_main(plot, run, "--since", since)
    assert (status, f"--since {since} is after the last epoch, 4: choose an earlier one" in errors) == (2, True)
    assert not list(run.glob("*.png"))
    assert call_main(plot, run, "--since", 4)[0] == 0


def test_a_smoothing_that_is_longer_than_the_run_is_one_over_all(tmp_path):
    folder = write_run(tmp_path / "run")
    smooth = plot.read_curve([folder], smooth=1e300).tables["train"]
    assert smooth["loss"]["mean"].iloc[-1] == pytest.approx(pd.read_csv(folder / "train.csv")["loss"].mean())


# ------------------------------------------------------------------------------------------------------- several runs


def curves(axes):
    """{(colour, style): (x, y)} of the lines in a panel that are not of the legend and do not stand upright."""
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
    return {(line.get_color(), line.get_linestyle(), line.get_linewidth()): line.get_data() for line in lines}


def write_seeds(folder, levels, **arguments):
    """Runs of one setting: the seed and the level of the loss differ, and the number of epochs as it is given."""
    return [
        write_arguments(write_run(folder / str(seed), level=level, epochs=epochs), seed=seed, **arguments)
        for seed, (level, epochs) in enumerate(levels)
    ]


def test_average_draws_a_curve_and_a_band_for_each_setting(call_main, saved, tmp_path):
    deep = write_seeds(tmp_path / "deep", [(1, 30), (2, 30), (4, 25)], depth=100)
    flat = write_seeds(tmp_path / "flat", [(8, 30), (9, 30)])
    (flat[0] / "test.csv").write_text("epoch,loss,error\n")  # its first epoch is not done
    pd.read_csv(deep[1] / "test.csv").eval("loss = 3 * loss").to_csv(deep[1] / "test.csv", index=False)
    status, _, errors = call_main(plot, *deep, *flat, "--average", "--smooth", 0, "--out", tmp_path / "one.png")
    assert (status, errors) == (0, "")
    saved[0].draw_without_rendering()
    panel = saved[0].axes[0]
    train, test, other = curves(panel).values()
    losses = [pd.read_csv(run / "train.csv")["loss"][:250] for run in deep]
    np.testing.assert_allclose(train[1], np.mean(losses, axis=0))
    np.testing.assert_allclose(train[0], np.arange(1, 251) / 10)
    assert test[0].tolist() == [*range(1, 26)]
    assert len(other[0]) == 300
    tested = [pd.read_csv(run / "test.csv")["loss"][:25] for run in deep]
    np.testing.assert_allclose(test[1], np.mean(tested, axis=0))
    (band,) = (path.vertices for each in panel.collections for path in each.get_paths())
    for extreme in (np.min(tested, axis=0), np.max(tested, axis=0)):
        assert {*map(tuple, np.stack([test[0], extreme], axis=1).round(6))} <= {*map(tuple, band.round(6))}
    labels = ["depth 100, 3 runs", "depth 40, 2 runs", "train", "test", "test, lowest to highest run"]
    assert [*texts(saved[0])][:5] == labels
    assert [line.get_color() for line in saved[0].legends[0].get_lines()][:2] == plot.COLORS[:2]
    assert call_main(plot, *flat, "--average", "--out", tmp_path / "two.png")[0] == 0
    assert [*texts(saved[1])][:3] == ["2 runs", "train, averaged over 1 epoch", "learning rate changed"]


def test_a_run_without_rows_counts_in_no_average(call_main, saved, tmp_path):
    folders = write_seeds(tmp_path, [(1, 3), (2, 3), (3, 3)])
    for folder, label in zip(folders, ("2 runs", "1 run"), strict=False):
        for part in ("train.csv", "test.csv"):
            (folder / part).write_text("epoch,loss,error\n")
        assert call_main(plot, *folders, "--average", "--out", tmp_path / "one.png")[0] == 0
        assert next(iter(texts(saved[-1]))) == label


def test_the_band_of_one_epoch_is_a_line(call_main, saved, tmp_path):
    folders = write_seeds(tmp_path, [(1, 1), (2, 1)])
    assert call_main(plot, *folders, "--average", "--out", tmp_path / "one.png")[0] == 0
    (band,) = saved[0].axes[0].collections
    losses = [pd.read_csv(folder / "test.csv")["loss"].item() for folder in folders]
    heights = [height for path in band.get_paths() for height in path.vertices[:, 1]]
    assert band.get_linewidth() > 0
    np.testing.assert_allclose([min(heights), max(heights)], sorted(losses))


def test_runs_without_a_common_row_have_no_average_yet(call_main, saved, tmp_path):
    begun, other = (write_arguments(write_run(tmp_path / name), seed=seed) for seed, name in enumerate("ab"))
    for path in [begun / "train.csv", other / "test.csv"]:
        path.write_text("epoch,loss,error\n")
    assert call_main(plot, begun, other, "--out", tmp_path)[0] == 0
    status, _, errors = call_main(plot, begun, other, "--average")
    assert (status, f"nothing to draw yet of {begun}, {other}: wait until" in errors) == (2, True)


def test_the_mean_is_that_of_the_curves_smoothed_one_by_one(tmp_path):
    folders = write_seeds(tmp_path, [(1, 3), (5, 3)])
    mean = plot.read_curve(folders, 1.0).tables["train"]["loss"]["mean"]
    alone = [plot.read_curve([folder], 1.0).tables["train"]["loss"]["mean"] for folder in folders]
    np.testing.assert_allclose(mean, np.mean(alone, axis=0))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"epochs": "300", "seed": 1}', '{"epochs": 300}'])
def test_only_the_average_needs_args_json(call_main, saved, tmp_path, content):
    run = write_run(tmp_path / "run")
    if content is not None:
        (run / "args.json").write_text(content)
    assert call_main(plot, run, "--out", tmp_path / "one.png")[0] == 0
    status, _, errors = call_main(plot, run, "--average")
    assert (status, len(errors.splitlines())) == (2, 2)
    assert f"{run / 'args.json'} {'is damaged' if content else 'does not exist'}" in errors
    assert ("or leave out this run" if content else "put it back, or name a run that has it") in errors


def test_the_same_seed_twice_is_no_average(call_main, tmp_path):
    twins = [write_arguments(write_run(tmp_path / name), torch="2.11") for name in "ab"]
    status, _, errors = call_main(plot, *twins, "--average")
    assert (status, f"{twins[0]} and {twins[1]} have the same arguments and the same seed" in errors) == (2, True)


@pytest.mark.parametrize("count", [1, 16])
def test_the_legend_covers_no_panel_and_lies_in_the_figure(call_main, saved, tmp_path, count):
    folders = [write_arguments(write_run(tmp_path / f"a-rather-long-name-{number}")) for number in range(count)]
    assert call_main(plot, *folders)[0] == 0
    for figure in saved:
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box, width = legend.get_window_extent(), figure.bbox.width
        assert 0 <= box.x0 < box.x1 <= width
        assert box.y0 >= 0
        top = max(text.get_window_extent().y1 for text in legend.get_texts())
        assert all(top < axes.get_tightbbox().y0 and axes.get_legend() is None for axes in figure.axes)
        assert len(legend.get_texts()) == count + 3  # train, test, learning rate changed
        assert all(axes.get_window_extent().height > 2 * figure.dpi for axes in figure.axes)


def test_sixteen_runs_differ_in_colour_or_marker_and_a_few_without_colours(call_main, saved, tmp_path):
    folders = [write_run(tmp_path / str(number), epochs=2) for number in range(16)]
    assert call_main(plot, *folders, "--out", tmp_path / "one.png")[0] == 0
    looks = [(line.get_color(), line.get_marker()) for line in saved[0].axes[1].lines if line.get_marker() != "None"][:16]
    assert len({*looks}) == 16
    assert len({color for color, _ in looks[:8]}) == len({marker for _, marker in looks[:8]}) == 8


# --------------------------------------------------------------------------------------------- columns of test.csv, axes


def write_columns(run, **columns):
    """More columns in the run's test.csv."""
    pd.read_csv(run / "test.csv").assign(**columns).to_csv(run / "test.csv", index=False)
    return run


def test_the_curve_of_the_validation_images_is_dashed(call_main, saved, tmp_path):
    run = write_columns(write_run(tmp_path / "run"), val_loss=[4, 3, 2, 1], val_error=[8, 7, 6, 5])
    assert call_main(plot, run, "--out", tmp_path / "one.png")[0] == 0
    saved[0].draw_without_rendering()
    for axes, values in zip(saved[0].axes, ([4, 3, 2, 1], [8, 7, 6, 5]), strict=True):
        widths = {style: width for _, style, width in curves(axes)}
        assert [y.tolist() for (_, style, _), (_, y) in curves(axes).items() if style == "--"] == [values]
        assert len(curves(axes)) == 3
        assert plot.PARTS["train"]["linewidth"] < widths["--"] < widths["-"]
    assert [*texts(saved[0])] == ["run", "train, averaged over 1 epoch", "val", "test"]


def upright(axes):
    """Where lines stand upright in a panel."""
    return sorted(line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2 and np.ptp(line.get_xdata()) == 0)


@pytest.mark.parametrize(
    ("rates", "arguments", "flags", "expected"),
    [
        (None, {"epochs": 8}, [], [4, 6]),
        (None, {"epochs": 7}, [], [4, 6]),  # schedule() of step.py: 3.5 and 5.25 epochs
        (None, {"epochs": 10}, [], [5]),  # the second is not reached
        (None, {"epochs": 16}, [], []),  # at the end of what is drawn
        (None, {"epochs": 8}, ["--since", 5], [6]),
        (None, {"epochs": 8, "opt": "adam", "lr": None}, [], []),
        (None, None, [], []),
        ([1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.1], {"epochs": 8}, [], [3, 7]),
        ([1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.1], None, ["--since", 3], [7]),
        ([1] * 8, {"epochs": 8}, [], []),
        ([1, 1, 2, 2, 2, 2, 2, 2], None, [], [2]),
        ([8, 7, 6, 5, 4, 3, 2, 1], None, [], [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_changes_of_the_learning_rate_are_upright_lines(call_main, saved, tmp_path, rates, arguments, flags, expected):
    folders = [write_run(tmp_path / name, epochs=8) for name in ("one", "two")]
    for run in folders:  # both have the same changes
        if rates:
            write_columns(run, train_loss=1, train_error=1, lr=rates, seconds=1)
        if arguments:
            write_arguments(run, **arguments)
    assert call_main(plot, *folders, "--out", tmp_path / "one.png", *flags)[0] == 0
    assert [upright(axes) for axes in saved[0].axes] == [expected] * 2
    assert ("learning rate changed" in texts(saved[0])) == bool(expected)


def test_a_learning_rate_that_changes_all_the_time_is_not_marked(call_main, saved, tmp_path):
    """As by a cosine: the figure would be full of lines."""
    run = write_run(tmp_path / "run", epochs=12)
    write_columns(run, train_loss=1, train_error=1, lr=range(12, 0, -1), seconds=1)
    assert call_main(plot, run)[0] == 0
    assert [upright(axes) for axes in saved[0].axes] == [[]]
    assert "learning rate changed" not in texts(saved[0])


def test_what_has_one_point_yet_is_marked(call_main, saved, tmp_path):
    """A line of one point is not seen. The axis has whole epochs."""
    run = write_run(tmp_path / "run")
    (run / "train.csv").write_text("epoch,loss,error\n1,2.3,90\n")
    (run / "test.csv").write_text("epoch,loss,error,val_loss,val_error\n1,2.2,89,2.1,88\n")
    call_main(plot, run, "--out", tmp_path / "one.png")
    saved[0].draw_without_rendering()
    axes = saved[0].axes[0]
    marks = {line.get_ydata()[0]: line.get_marker() for line in axes.lines if len(line.get_ydata())}
    assert marks == {2.3: ".", 2.1: "_", 2.2: "o"}
    assert not axes.collections  # a band is of several runs
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_a_change_that_one_run_has_alone_is_in_its_colour(call_main, saved, tmp_path):
    folders = [write_arguments(write_run(tmp_path / str(epochs), epochs=epochs), epochs=epochs) for epochs in (8, 12)]
    call_main(plot, *folders, "--out", tmp_path / "one.png")
    saved[0].draw_without_rendering()
    found = {line.get_xdata()[0]: line.get_color() for line in saved[0].axes[1].lines if line.get_linestyle() == ":"}
    assert found == {4: plot.COLORS[0], 6: "grey", 9: plot.COLORS[1]}


def test_a_change_beyond_the_epochs_that_are_averaged_is_not_drawn(call_main, saved, tmp_path):
    folders = write_seeds(tmp_path, [(1, 30), (2, 20)], epochs=30)
    for flags, expected in [([], [15, 23]), (["--average"], [15])]:
        assert call_main(plot, *folders, "--out", tmp_path / "one.png", *flags)[0] == 0
        assert upright(saved[-1].axes[0]) == expected


def numbers(axes):
    """The numbers that stand at a panel's y axis, within its limits, as they are written."""
    low, high = axes.get_ylim()
    return [
        label.get_text() for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True) if low <= tick <= high
    ]


def test_the_numbers_of_a_logarithmic_axis_are_plain_decimals(call_main, saved, tmp_path):
    run = write_run(tmp_path / "run", epochs=100, level=0.01)
    assert call_main(plot, run, "--out", tmp_path / "one.png", "--smooth", 0.2, "--log-error")[0] == 0
    loss, error = saved[0].axes
    expected = ["0.0002", "0.0005", "0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]
    assert numbers(loss) == expected
    assert loss.yaxis.get_major_formatter()(2e-5) == "0.00002"
    assert numbers(error) == ["0.005", *expected[5:], "5", "10", "20", "50"]
    assert call_main(plot, run, "--out", tmp_path / "one.png", "--linear")[0] == 0
    assert [axes.get_yscale() for axes in saved[1].axes] == ["linear", "linear"]
    assert call_main(plot, run, "--out", tmp_path / "one.png", "--linear", "--log-error")[0] == 0
    assert [axes.get_yscale() for axes in saved[2].axes] == ["linear", "log"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("low", "high"),
    [(0.41, 0.45), (0.54, 1.01), (1.05, 2.9), (0.9, 1.8), (0.25, 1.3), (1e-4, 1e4), (0.1, 1e8), (2, 6e10), (1e-9, 8e19)],
)
def test_a_short_or_a_long_logarithmic_axis_has_numbers_and_one_without_values_is_linear(call_main, saved, tmp_path, low, high):
    """Not many, and short: a run that diverges is looked at, too."""
    run = write_run(tmp_path / "run")
    (run / "train.csv").write_text(f"epoch,loss,error\n1,{high},0\n2,{low},0\n")
    (run / "test.csv").write_text(f"epoch,loss,error\n1,{high},0\n2,{low},0\n")
    assert call_main(plot, run, "--out", tmp_path / "one.png", "--log-error")[0] == 0
    saved[0].draw_without_rendering()
    shown = [*map(float, numbers(saved[0].axes[0]))]
    assert 3 <= len(shown) <= 16
    assert max(map(len, numbers(saved[0].axes[0]))) <= 7
    ends = 1.3 if high < 100 * low else 1000  # of many decades there are only some
    assert (shown[0] <= ends * low, shown[-1] >= high / ends) == (True, True)
    assert [axes.get_yscale() for axes in saved[0].axes] == ["log", "linear"]


def test_the_error_axis_begins_where_the_curves_end(call_main, saved, tmp_path):
    run = write_run(tmp_path / "run")
    (run / "test.csv").write_text("epoch,loss,error\n1,1,31\n2,1,30\n")
    (run / "train.csv").write_text("epoch,loss,error\n1,1,35\n2,1,34\n")
    call_main(plot, run, "--out", tmp_path / "one.png")
    assert 29 < saved[0].axes[1].get_ylim()[0] < 30


# ----------------------------------------------------------------------------------------------------- files of figures


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "x.jpg"], "x.jpg has a format that cannot be written: name a file in .png, .pdf, .svg, or a folder"),
        (["--out", "new/x.TIFF"], "x.TIFF has a format"),
        (["--out", __file__], "test_plot.py has a format that cannot be written"),
        (["--format", "pdf", "--out", "x.png"], "--format pdf contradicts --out x.png: leave out --format"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_and_no_folder(call_main, monkeypatch, tmp_path, flags, message):
    run = write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    status, _, errors = call_main(plot, run, *flags)
    assert (status, message in errors, len(errors.splitlines())) == (2, True, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--out", "x.PNG"], ["x.PNG"]),
        (["--out", "x.pdf"], ["x.pdf"]),
        (["--out", "x.svg", "--format", "svg"], ["x.svg"]),
        (["--out", "v1.2"], ["v1.2/error.png", "v1.2/loss-error.png", "v1.2/loss.png"]),
        (["--out", "old.png", "--format", "svg"], ["old.png/error.svg", "old.png/loss-error.svg", "old.png/loss.svg"]),
    ],
)
def test_a_picture_is_told_from_a_folder_by_its_suffix(call_main, monkeypatch, tmp_path, flags, names):
    run = write_run(tmp_path / "run")
    (tmp_path / "old.png").mkdir()
    monkeypatch.chdir(tmp_path)
    status, out, errors = call_main(plot, run, *flags)
    assert (status, sorted(out.split())) == (0, names), errors
    beginnings = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    assert all((tmp_path / name).read_bytes().startswith(beginnings[name[-3:].lower()]) for name in names)


@pytest.mark.pixels
def test_settings_of_the_machine_change_no_figure(call_main, tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\naxes.facecolor: black\nsavefig.bbox: tight\n")
    command = [sys.executable, ROOT / "plot.py", run, "--out", "theirs.png"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"MPLBACKEND": "nonsense"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert call_main(plot, run, "--out", tmp_path / "ours.png")[0] == 0
    assert (tmp_path / "theirs.png").read_bytes() == (tmp_path / "ours.png").read_bytes()


def test_a_run_without_rows_is_left_out_and_a_shorter_one_told_of(call_main, tmp_path):
    one, short, empty = (write_arguments(write_run(tmp_path / name), seed=seed) for seed, name in enumerate("abc"))
    for part in ("train.csv", "test.csv"):
        lines = (short / part).read_text().splitlines(keepends=True)
        (short / part).write_text("".join(lines[: 1 + len(lines) // 2]))
        (empty / part).write_text("epoch,loss,error\n")
    for more in ([], ["--average"]):
        status, out, errors = call_main(plot, one, short, empty, "--out", tmp_path / "x.png", *more)
        assert (status, errors, f"{empty} has no row yet and is not drawn" in out) == (0, "", True)
        assert (f"{short} ends at epoch" in out) == bool(more)


def test_the_legend_names_each_curve_by_its_colour(call_main, saved, tmp_path):
    """In the order in which runs were named, not of the alphabet."""
    folders = [write_run(tmp_path / name, level=level) for name, level in [("b", 1), ("c", 3), ("a", 9)]]
    assert call_main(plot, *folders, "--smooth", 0, "--out", tmp_path / "one.png")[0] == 0
    (legend,) = saved[0].legends
    named = {text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}
    losses = {look[0]: y for look, (_, y) in curves(saved[0].axes[0]).items() if look[2] == plot.PARTS["train"]["linewidth"]}
    for folder in folders:
        np.testing.assert_allclose(losses[named[folder.name]], pd.read_csv(folder / "train.csv")["loss"])


def test_since_keeps_what_is_of_that_epoch(call_main, saved, tmp_path):
    run = write_run(tmp_path / "run")
    assert call_main(plot, run, "--smooth", 0, "--since", 2, "--out", tmp_path / "one.png")[0] == 0
    for axes in saved[0].axes:
        assert {x[0] for x, _ in curves(axes).values()} == {2}


def test_the_first_epoch_is_averaged_over_what_there_is(tmp_path):
    run = write_run(tmp_path / "run")
    smooth = plot.read_curve([run], smooth=1.0).tables["train"]["loss"]["mean"]
    np.testing.assert_allclose(smooth[:10], pd.read_csv(run / "train.csv")["loss"][:10].expanding().mean())


def test_in_the_middle_of_an_epoch_an_epoch_has_as_many_steps(tmp_path):
    run = write_run(tmp_path / "run", epochs=2, steps=3)
    lines = (run / "train.csv").read_text().splitlines(keepends=True)
    (run / "train.csv").write_text("".join(lines[:6]))  # 5 steps, of 3 an epoch; the last is at 1.666667
    smooth = plot.read_curve([run], smooth=1.0).tables["train"]["loss"]["mean"]
    assert smooth.iloc[-1] == pytest.approx(pd.read_csv(run / "train.csv")["loss"][-3:].mean())


def test_fonts_of_a_pdf_are_truetype(call_main, tmp_path):
    assert call_main(plot, write_run(tmp_path / "run"), "--out", tmp_path / "one.pdf")[0] == 0
    content = (tmp_path / "one.pdf").read_bytes()
    assert (b"/FontFile2" in content, b"/Type3" in content) == (True, False)


def test_a_figure_has_a_name_of_its_own_until_it_is_written(call_main, disk, tmp_path):
    """A run and a person may draw the same one at the same time."""
    assert call_main(plot, write_run(tmp_path / "run"), "--out", tmp_path / "curve.png")[0] == 0
    assert ("replace", f"curve.png.{os.getpid()}.tmp", "curve.png") in disk


# ---------------------------------------------------------------------------------------------------- what a reader sees


def test_each_axis_says_what_it_shows(call_main, saved, tmp_path):
    assert call_main(plot, write_run(tmp_path / "run"), "--out", tmp_path / "one.png")[0] == 0
    named = [(axes.get_xlabel(), axes.get_ylabel()) for axes in saved[0].axes]
    assert named == [("epoch", "cross-entropy loss"), ("epoch", "error, %")]


def test_the_legend_shows_each_part_as_it_is_drawn(call_main, saved, tmp_path):
    """Of a run without validation images, whose curves are dashed."""
    assert call_main(plot, write_run(tmp_path / "run"), "--smooth", 0, "--out", tmp_path / "one.png")[0] == 0
    (legend,) = saved[0].legends
    entries = zip(legend.get_texts(), legend.get_lines(), strict=True)
    looks = {text.get_text(): (line.get_linestyle(), line.get_linewidth()) for text, line in entries}
    assert {looks["train"], looks["test"]} == {look[1:] for look in curves(saved[0].axes[0])}
    assert looks["train"][1] < looks["test"][1]


def markers(lines):
    return [line.get_marker() for line in lines]


def test_the_legend_shows_points_where_each_part_is_one(call_main, saved, tmp_path):
    run = write_run(tmp_path / "run")
    pd.read_csv(run / "test.csv").assign(val_loss=1, val_error=9).to_csv(run / "test.csv", index=False)
    for since, expected in [(4, [".", "_", "o"]), (3, ["None", "None", "None"])]:
        assert call_main(plot, run, "--since", since, "--smooth", 0, "--out", tmp_path / "one.png")[0] == 0
        (legend,) = saved[-1].legends
        names = [text.get_text() for text in legend.get_texts()]
        assert (names[:4], markers(legend.get_lines())[1:4]) == ([names[0], "train", "val", "test"], expected)
        if since == 4:
            assert markers(saved[-1].axes[0].lines)[:3] == expected


@pytest.mark.filterwarnings("ignore:Glyph .* missing")
@pytest.mark.parametrize("text", ["\u6587" * 150, "n" * 150, "\u6587" * 40 + " " + "nice words " * 12])
def test_a_title_lies_in_its_figure(call_main, saved, tmp_path, text):
    assert call_main(plot, write_run(tmp_path / "run"), "--title", text, "--out", tmp_path)[0] == 0
    for figure in saved:
        figure.draw_without_rendering()
        box = figure._suptitle.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
        assert letters(figure._suptitle.get_text()) == letters(text)


def test_a_band_has_the_colour_of_its_curve(call_main, saved, tmp_path):
    runs = write_seeds(tmp_path / "a", [(1, 4), (2, 4)]) + write_seeds(tmp_path / "b", [(5, 4), (6, 4)], depth=100)
    assert call_main(plot, *runs, "--average", "--out", tmp_path / "one.png")[0] == 0
    bands = [each.get_facecolor()[0][:3] for each in saved[0].axes[0].collections]
    assert [*map(to_hex, bands)] == [color.lower() for color in plot.COLORS[:2]]


def test_the_training_curve_is_averaged_over_an_epoch_unless_told_otherwise(call_main, saved, tmp_path):
    run = write_run(tmp_path / "run")
    assert call_main(plot, run, "--out", tmp_path / "one.png")[0] == 0
    look = plot.COLORS[0], "-", plot.PARTS["train"]["linewidth"]
    assert curves(saved[0].axes[0])[look][1][-1] == pytest.approx(pd.read_csv(run / "train.csv")["loss"][-10:].mean())
