import numpy as np
import pandas as pd
import pytest
from PIL import Image

import plot


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
    smooth, _ = plot.read_run(folder, smooth=1.0)
    raw = pd.read_csv(folder / "train.csv")
    assert smooth["epoch"].iloc[-1] == 3
    assert smooth["loss"].iloc[-1] == pytest.approx(raw["loss"][-steps:].mean())
    assert len(smooth) == len(raw)
    unsmoothed, _ = plot.read_run(folder, smooth=0)
    np.testing.assert_allclose(unsmoothed["loss"], raw["loss"])


def test_long_runs_are_thinned_and_keep_their_last_row():
    train = pd.DataFrame({"epoch": np.arange(1, 30_001) / 100, "loss": 1.0, "error": 1.0})
    smooth = plot.moving_average(train, 1)
    assert 3000 <= len(smooth) <= 6000
    assert smooth["epoch"].iloc[-1] == 300


def test_runs_are_compared_in_one_figure_with_labels_that_tell_them_apart(call_main, tmp_path):
    runs = [write_run(tmp_path / "a" / "base"), write_run(tmp_path / "b" / "base", level=3.0)]
    assert list(plot.name_runs(runs)) == ["a/base", "b/base"]
    assert list(plot.name_runs([tmp_path / "sgd", tmp_path / "adam"])) == ["sgd", "adam"]
    status, out, errors = call_main(plot, *runs, "--out", tmp_path / "figures", "--format", "svg", "--title", "Two runs")
    assert status == 0, errors
    text = (tmp_path / "figures" / "loss-error.svg").read_text()
    for label in ("a/base, train", "b/base, test", "Two runs", "cross-entropy loss", "error, %", "epoch"):
        assert f"<!-- {label} -->" in text
    assert len(out.split()) == 3


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
    train, test = plot.read_run(run, 1.0)
    assert (len(train), len(test)) == (10, 0)
    status, _, errors = call_main(plot, run)
    assert status == 0, errors


def test_a_run_that_diverged(call_main, tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "train.csv").open("a") as file:
        file.write("4.1,nan,90\n4.2,inf,90\n")
    status, _, errors = call_main(plot, run)
    assert status == 0, errors


def no_files(run):
    (run / "train.csv").unlink()


def empty_files(run):
    for part in ("train", "test"):
        (run / f"{part}.csv").write_text("")


def header_only(run):
    for part in ("train", "test"):
        (run / f"{part}.csv").write_text("epoch,loss,error\n")


def other_columns(run):
    (run / "train.csv").write_text("a,b\n1,2\n")


def text_in_cells(run):
    (run / "train.csv").write_text("epoch,loss,error\n1,good,2\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_files, "train.csv does not exist"),
        (empty_files, "holds no figures yet"),
        (header_only, "holds no figures yet"),
        (other_columns, "has no columns epoch, loss, error"),
        (text_in_cells, "train.csv"),
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
