import numpy as np
import pandas as pd
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
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


def colored(path):
    """The share of pixels that are not grey, in the picture read back."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (np.ptp(pixels, axis=2) > 40).mean()


def test_three_figures_are_drawn_and_not_empty(call_main, tmp_path):
    run = write_run(tmp_path / "run")
    status, out, errors = call_main(plot, run)
    assert status == 0, errors
    names = ["loss.png", "error.png", "loss-error.png"]
    assert out.split() == [str(run / name) for name in names]
    for name in names:
        assert 0.002 < colored(run / name) < 0.2


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


def test_long_runs_are_thinned_and_keep_their_last_row():
    train = pd.DataFrame({"epoch": np.arange(1, 30_001) / 100, "loss": 1.0, "error": 1.0})
    thinned = plot.over_runs([plot.moving_average(train, 1)])
    assert 3000 <= len(thinned) <= 6000
    assert thinned.index[-1] == 300


def test_runs_are_compared_in_one_figure_with_one_legend(call_main, tmp_path):
    folders = [write_run(tmp_path / "a" / "base"), write_run(tmp_path / "b" / "base", level=3.0)]
    status, out, errors = call_main(plot, *folders, "--out", tmp_path / "figures", "--format", "svg", "--title", "Two runs")
    assert status == 0, errors
    text = (tmp_path / "figures" / "loss-error.svg").read_text()
    for label in ("a", "b", "train", "test", "Two runs", "cross-entropy loss"):
        assert text.count(f"<!-- {label} -->") == 1
    assert len(out.split()) == 3


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (["work/a/base", "work/b/base"], ["a", "b"]),
        (["work/sgd", "work/adam"], ["sgd", "adam"]),
        (["work/sgd"], ["sgd"]),
        (["work/a", "work/a/b", "work/a/b/b"], ["a", "a/b", "a/b/b"]),
        (["x/1/run", "x/2/run", "y/1/run"], ["x/1", "x/2", "y/1"]),
    ],
)
def test_labels_are_what_differs_between_the_paths(tmp_path, folders, labels):
    assert runs.name_runs([tmp_path / folder for folder in folders]) == {
        label: tmp_path / folder for label, folder in zip(labels, folders, strict=True)
    }


def test_out_may_be_the_file_of_one_figure(call_main, tmp_path):
    status, out, errors = call_main(plot, write_run(tmp_path / "run"), "--out", tmp_path / "new" / "both.pdf")
    assert (status, out.split()) == (0, [str(tmp_path / "new" / "both.pdf")]), errors
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["both.pdf"]


def test_without_out_several_runs_are_drawn_into_the_folder_that_holds_them(call_main, tmp_path):
    call_main(plot, write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    assert (tmp_path / "loss-error.png").exists()


@pytest.mark.parametrize("flags", [["--linear"], ["--since", "2"], ["--smooth", "0"], ["--format", "pdf"]])
def test_flags_to_tweak_a_figure(call_main, tmp_path, flags):
    run = write_run(tmp_path / "run")
    call_main(plot, run)
    before = (run / "loss.png").read_bytes()
    status, out, errors = call_main(plot, run, *flags)
    assert status == 0, errors
    assert (tmp_path / "run" / out.split()[0]).read_bytes() != before


def test_a_run_that_is_being_written(call_main, tmp_path):
    run = write_run(tmp_path / "run", epochs=1)
    with (run / "train.csv").open("a") as file:
        file.write("1.1,0.")  # half a row
    (run / "test.csv").write_text("epoch,loss,error\n")  # the first epoch is not done
    tables = plot.read_curve([run], 1.0).tables
    assert (len(tables["train"]), len(tables["test"])) == (10, 0)
    status, out, errors = call_main(plot, run)
    assert (status, len(out.splitlines())) == (0, 3), errors


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


def other_columns(run):
    (run / "train.csv").write_text("a,b\n1,2\n")


def text_in_cells(run):
    (run / "train.csv").write_text("epoch,loss,error\n1,good,2\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_files, "train.csv does not exist"),
        (empty_files, "has nothing to draw yet"),
        (header_only, "has nothing to draw yet"),
        (other_columns, "has no columns epoch, loss, error"),
        (text_in_cells, "train.csv is damaged, line 2 ('1,good,2') is not 3 finite numbers"),
        (no_text, "train.csv has no columns epoch, loss, error"),
        (a_folder, "test.csv is no table of numbers"),
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


NAMES = ["_try", "_", "lr$0.1$b", r"$\frac{$", r"a\$b\$", "x^2_3", "two\nlines", "<b>&--x"]


def texts(figure):
    """{text: whether it would be typeset as a formula} of the legend and the title of a figure."""
    found = figure.legends[0].get_texts()
    return {text.get_text(): text.get_parse_math() for text in [*found, *filter(None, [figure._suptitle])]}


@pytest.fixture
def saved(monkeypatch):
    """The figures that were saved."""
    figures = []
    savefig = Figure.savefig

    def record(figure, *arguments, **options):
        figures.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_names_and_titles_are_text_and_no_markup(call_main, saved, tmp_path, name):
    run = write_run(tmp_path / name)
    status, _, errors = call_main(plot, run, "--title", name)
    assert (status, errors) == (0, "")
    assert [texts(figure) for figure in saved] == [{name: False, "train": False, "test": False}] * 3


def test_a_name_that_is_no_text(call_main, saved, tmp_path):
    status, _, errors = call_main(plot, write_run(tmp_path / "bad\udcff"), "--out", tmp_path / "one.png")
    assert (status, errors) == (0, "")
    assert "bad?" in texts(saved[0])


@pytest.mark.filterwarnings("error")
def test_letters_that_no_font_has_are_boxes_without_a_warning(call_main, tmp_path):
    status, _, errors = call_main(plot, write_run(tmp_path / "\u4e2d\u6587"), "--title", "\U0001f642")
    assert (status, errors) == (0, "")


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


def test_an_installed_font_that_has_the_letters_is_used(chinese_font, saved, call_main, tmp_path):
    assert drawing.font_families("abc") == ["sans-serif"]
    assert drawing.font_families("a\u4e2d") == ["sans-serif", chinese_font]
    run = write_run(tmp_path / "run")
    pictures = []
    for title in ("\u4e2d" * 20, "\u6587" * 20):  # squares, and boxes with a sign in them
        assert call_main(plot, run, "--title", title, "--out", tmp_path / "one.png")[0] == 0
        pictures.append(np.asarray(Image.open(tmp_path / "one.png").convert("L"))[:50])
    squares, boxes = ((picture < 40).mean() for picture in pictures)
    assert squares > 1.5 * boxes > 0


# ---------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("since", ["99", "4.5"])
def test_since_an_epoch_that_is_not_there_yet(call_main, tmp_path, since):
    run = write_run(tmp_path / "run")
    status, _, errors = call_main(plot, run, "--since", since)
    assert (status, f"--since {since} is behind the last epoch that there is, 4: choose less" in errors) == (2, True)
    assert not list(run.glob("*.png"))
    assert call_main(plot, run, "--since", 4)[0] == 0


def test_a_smoothing_that_is_longer_than_the_run_is_one_over_all(tmp_path):
    folder = write_run(tmp_path / "run")
    smooth = plot.read_curve([folder], smooth=1e300).tables["train"]
    assert smooth["loss"]["mean"].iloc[-1] == pytest.approx(pd.read_csv(folder / "train.csv")["loss"].mean())
