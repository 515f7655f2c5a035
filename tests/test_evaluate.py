import contextlib
import errno
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY
from matplotlib.figure import Figure
from PIL import Image
from test_run_folder import damage

import data
import drawing
import evaluate
import train
from checkpoint import build_net, export, load_checkpoint, normalization
from endings import Refused
from pictures import read_pictures


def test_evaluation_gives_the_figures_of_test_csv(run_script, tiny_run, tmp_path):
    done = run_script("evaluate.py", tiny_run / "latest.pth", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    last = pd.read_csv(tiny_run / "test.csv").iloc[-1]
    assert f"test loss {last['loss']:.2f}   test error {last['error']:.2f} %" in done.stdout
    counts = pd.read_csv(tmp_path / "out" / "confusion.csv", index_col="true")
    assert counts.shape == (10, 10)
    assert counts.to_numpy().sum() == 360
    wrong = 360 - np.diag(counts).sum()
    assert 100 * wrong / 360 == pytest.approx(last["error"], abs=1e-3)
    mean = 100 - 100 * np.mean(np.diag(counts) / counts.sum(axis=1))
    assert f"mean per-class error {mean:.2f} %" in done.stdout
    rows = re.findall(r"(\d+)\s+([\d.]+) %  \((\d+) of (\d+) wrong\)", done.stdout)
    assert len(rows) == 10
    for name, error, errors, total in rows:
        assert (int(total) - int(errors), int(total)) == (counts.loc[int(name), name], counts.loc[int(name)].sum())
        assert float(error) == pytest.approx(100 * int(errors) / int(total), abs=0.005)
    assert Image.open(tmp_path / "out" / "confusion.png").size[0] > 500


@pytest.mark.parametrize(("part", "recorded"), [("test", 20.0), ("val", 40.0)])
def test_another_error_than_that_of_test_csv_is_told(tmp_path, part, recorded):
    """Such as that of a net whose densenet.py had another forward: its weights load into this one."""
    path = tmp_path / "test.csv"
    path.write_text("epoch,loss,error,val_loss,val_error\n1,1,90,1,90\n2,1,20,1,40\n")
    for difference, told in [(0, False), (0.15, False), (-0.15, False), (0.25, True), (-0.25, True)]:  # of 1,000 images
        lines = [*evaluate.other_error(path, 2, part, recorded + difference, 1000)]
        assert lines == [f"{path} has {recorded:.2f} %: the run used other code or other images"] * told
    assert not [*evaluate.other_error(path, 3, part, 0, 1000)]


def test_the_error_is_compared_with_test_csv(call_main, saved, run_with_val, tmp_path):
    save = shutil.copytree(run_with_val, tmp_path / "run")
    for flags in ([], ["--val"]):
        assert "test.csv has" not in call_main(evaluate, save, *flags)[1]
    header, *rows = (save / "test.csv").read_text().splitlines()
    (save / "test.csv").write_text("\n".join([header, *(row.split(",")[0] + ",1" * row.count(",") for row in rows)]) + "\n")
    for flags in ([], ["--val"]):
        assert f"\n{save / 'test.csv'} has 1.00 %: " in call_main(evaluate, save, *flags)[1]


@pytest.mark.parametrize("content", [None, "", "x", "epoch,loss,error\n", "epoch,loss,error\n1,a,b\n"])
def test_a_checkpoint_needs_no_test_csv(call_main, saved, tiny_run, tmp_path, content):
    (tmp_path / "latest.pth").write_bytes((tiny_run / "latest.pth").read_bytes())
    if content is not None:
        (tmp_path / "test.csv").write_text(content)
    status, out, errors = call_main(evaluate, tmp_path)
    assert (status, "test error" in out, "test.csv" in out) == (0, True, False), errors


def test_confusion_matrix_has_true_rows_and_predicted_columns():
    matrix = evaluate.confusion_matrix(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 0]), 3)
    assert matrix.tolist() == [[0, 1, 1], [0, 1, 0], [0, 0, 0]]


def test_the_mean_of_the_classes_errors_counts_each_class_alike():
    confusion = np.array([[9, 0, 1], [1, 1, 0], [0, 0, 0]])  # 1 of 10 wrong, 1 of 2, and a class without an image
    assert evaluate.mean_class_error(confusion) == pytest.approx((0.1 + 0.5) / 2)


def test_a_class_without_an_image_has_no_error():
    lines = evaluate.class_lines(np.array([[3, 1], [0, 0]]), ["a", "long"])
    assert [*lines] == ["  a      25.00 %  (1 of 4 wrong)", "  long     no image  (0 of 0 wrong)"]


def test_own_pictures_are_named(call_main, tiny_run, tmp_path):
    Image.new("L", (64, 50), 200).save(tmp_path / "one.png")
    Image.new("RGBA", (20, 20), (9, 8, 7, 6)).save(tmp_path / "two.png")
    status, out, errors = call_main(evaluate, tiny_run / "latest.pth", "--image", tmp_path / "one.png", tmp_path / "two.png")
    assert status == 0, errors
    assert [line.split(":")[0] for line in out.splitlines()] == [str(tmp_path / "one.png"), str(tmp_path / "two.png")]
    shares = [float(share) for share in re.findall(r"\d ([\d.]+) %", out.splitlines()[0])]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)


def test_data_with_other_classes_are_refused(call_main, tiny_run, tmp_path):
    checkpoint = torch.load(tiny_run / "latest.pth", weights_only=True)
    digits = checkpoint["classes"]
    for classes, told in [([*digits[:-1], "ten"], "9, ten"), (digits[::-1], "their order"), ([*"abcdefghij"], "0, 1, 2, 3, 4")]:
        torch.save({**checkpoint, "classes": classes}, tmp_path / "latest.pth")
        status, _, errors = call_main(evaluate, tmp_path / "latest.pth")
        assert (status, f" differ from those of the net ({told}): name its data with --data" in errors) == (2, True)
        assert not (tmp_path / "confusion.csv").exists()


def test_the_data_that_the_run_had_go_before_others_of_that_name_here(monkeypatch, tmp_path):
    (tmp_path / "here" / "pets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    checkpoint = {"args": {"data": "pets"}}
    args = SimpleNamespace(data=None, checkpoint=tmp_path / "latest.pth")
    assert evaluate.data_folder(args, checkpoint) == Path("pets")  # there is no args.json
    (tmp_path / "args.json").write_text(json.dumps({"epochs": 1, "data": str(tmp_path / "pets")}))
    assert evaluate.data_folder(args, checkpoint) == Path("pets")  # which were moved
    (tmp_path / "pets").mkdir()
    assert evaluate.data_folder(args, checkpoint) == tmp_path / "pets"
    args.data = "given"
    assert evaluate.data_folder(args, checkpoint) == Path("given")


def test_a_picture_that_cannot_be_read(call_main, tiny_run, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"broken")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    for name, told in [
        ("broken", "cannot be read as pictures: {} (cannot identify"),
        ("lost", "--image {} does not exist: name a"),
        ("dangling", "cannot be read as pictures: {} (there is no such file)"),
    ]:
        picture = tmp_path / f"{name}.png"
        status, _, errors = call_main(evaluate, tiny_run / "latest.pth", "--image", picture)
        assert (status, told.format(picture) in errors) == (2, True)


def test_pictures_that_cannot_be_read_are_named_after_the_classes_of_the_others(call_main, tiny_run, tmp_path):
    photos, table = tmp_path / "photos", tmp_path / "photos.csv"
    photos.mkdir()
    for name in ("a.png", "c.png"):
        Image.new("RGB", (9, 9), "red").save(photos / name)
    for name in ("b.png", "d.jpg", "e.HEIC", ".hidden"):
        (photos / name).write_bytes(b"broken")
    twice = ["--image", photos, photos / "a.png"]
    status, out, errors = call_main(evaluate, tiny_run, *twice, "--predictions", table)
    assert status == 2
    first, *classes, last = out.splitlines()
    assert first == f"{photos}: files that are not read: 1 .heic"
    named = [str(photos / name) for name in ("a.png", "c.png", "a.png")]
    assert [line.split(":")[0] for line in classes] == named
    assert classes[0] == classes[2]
    assert last == f"wrote {table}"
    assert pd.read_csv(table)["picture"].tolist() == named
    sentence = errors.splitlines()[-1]
    told = r"error: cannot be read as pictures: \S+/b.png \(.*\), \S+/d.jpg \(.*\): make them readable pictures in 8-bit RGB"
    assert re.search(told, sentence)


def test_tables_are_written_before_a_figure_that_fails(call_main, monkeypatch, tiny_run, tmp_path):
    (tmp_path / "confusion.png").write_bytes(b"old, by Matplotlib")

    def full(figure, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "confusion.png")

    monkeypatch.setattr(drawing, "replace_file", full)
    table = tmp_path / "table.csv"
    status, _, errors = call_main(evaluate, tiny_run, "--out", tmp_path, "--predictions", table)
    assert (status, "confusion.png: No space left on device: make room there" in errors) == (1, True)
    assert len(pd.read_csv(table)) == len(pd.read_csv(tmp_path / "confusion.csv")) * 36 == 360
    assert (tmp_path / "confusion.png").read_bytes() == b"old, by Matplotlib"


@pytest.mark.parametrize("name", ["confusion.csv", "confusion.png"])
def test_a_file_that_is_no_confusion_matrix_is_not_replaced(call_main, tiny_run, tmp_path, name):
    mine = tmp_path / name
    mine.write_text("of another study, true,")
    status, _, errors = call_main(evaluate, tiny_run, "--out", tmp_path)
    told = f"{mine} exists already and is not from this program, or damaged: name another place, or remove it"
    assert (status, told in errors, mine.read_text()) == (2, True, "of another study, true,")
    assert os.listdir(tmp_path) == [name]


def test_a_confusion_matrix_of_its_own_is_replaced(call_main, tiny_run, tmp_path):
    for _ in range(2):
        assert call_main(evaluate, tiny_run, "--out", tmp_path)[0] == 0


@pytest.mark.parametrize("name", ["new/confusion.csv", "new/confusion.png", "new", "new/confusion.csv/deep"])
def test_predictions_do_not_go_where_the_confusion_matrix_goes(call_main, tiny_run, tmp_path, name):
    path = tmp_path / "new" / ".." / name
    status, out, errors = call_main(evaluate, tiny_run, "--out", tmp_path / "new", "--predictions", path)
    told = f"--predictions {path} is where the confusion matrix goes: name another file"
    assert (status, out, told in errors, os.listdir(tmp_path)) == (2, "", True, [])


@pytest.mark.parametrize(
    ("flag", "place", "folder", "what"),
    [
        ("--out", "file", "file", "with --out"),
        ("--out", "file/new", "file/new", "with --out"),
        ("--predictions", "file/new/p.csv", "file/new", "for p.csv"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_evaluated(
    call_main, tiny_run, tmp_path, flag, place, folder, what
):
    (tmp_path / "file").write_text("mine")
    status, out, errors = call_main(evaluate, tiny_run / "latest.pth", flag, tmp_path / place)
    told = f"{tmp_path / folder} is not a writable folder: name another {what}"
    assert (status, out, told in errors, (tmp_path / "file").read_text()) == (2, "", True, "mine")


@pytest.mark.filterwarnings("error", "ignore:Glyph .* missing")  # as drawing.py does
def test_names_of_classes_are_text_in_the_picture(monkeypatch, tmp_path):
    names, figures, savefig = ["_x", "lr$0.1$b", r"$\frac{$", "\u4e2d\u6587", "bad\udcff"], [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: [figures.append(figure), savefig(figure, *a, **k)])
    evaluate.draw(np.diag([7, 8, 9, 10, 11]), names, "test images", tmp_path / "confusion.png")
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["7", "8", "9", "10", "11"]
    for labels, counts in [(axes.get_xticklabels(), [""] * 5), (axes.get_yticklabels(), [f" ({n})" for n in range(7, 12)])]:
        assert [label.get_text() for label in labels] == [a + b for a, b in zip([*names[:4], "bad?"], counts, strict=True)]
        assert not any(label.get_parse_math() for label in labels)


@pytest.mark.filterwarnings("error")
def test_long_names_of_classes_take_no_room_from_the_matrix(saved, tmp_path):
    for letters in (3, 200):
        evaluate.draw(np.eye(4, dtype=int), [f"{i}{'x' * letters}{i}" for i in range(4)], "test images", tmp_path / "a.png")
        saved[-1].draw_without_rendering()
    short, long = (figure.axes[0].get_window_extent().width / figure.dpi for figure in saved)
    assert short > 2.5
    assert long > 0.9 * short
    axes = saved[1].axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[1] == f"1{'x' * 24}…{'x' * 24}1"
    for text in (*axes.get_yticklabels(), *axes.get_xticklabels(), axes.title):
        box = text.get_window_extent()
        assert min(box.x0, box.y0, saved[1].bbox.width - box.x1, saved[1].bbox.height - box.y1) > -2, text


@pytest.mark.parametrize(("number", "name"), [(2, "x" * 62), (2, "W" * 200), (5, "W" * 62), (30, "x" * 62), (2, "a")])
def test_nothing_is_cut_off_at_the_edges_of_the_matrix(tmp_path, number, name):
    path = tmp_path / "confusion.png"
    evaluate.draw(np.eye(number, dtype=int), [f"{i}{name}{i}" for i in range(number)], "test images", path)
    pixels = np.asarray(Image.open(path).convert("L"))
    assert min(edge.min() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])) == 255


@pytest.mark.parametrize(("number", "named"), [(21, 21), (100, 100), (101, 51), (1000, 100)])
def test_names_of_many_classes_are_as_large_as_their_rows_are_high(saved, tmp_path, number, named):
    """Of more than a hundred, every second, third … is named."""
    evaluate.draw(np.eye(number, dtype=int), [f"class {i}" for i in range(number)], "test images", tmp_path / "a.png")
    (figure,) = saved
    figure.draw_without_rendering()
    axes, every = figure.axes[0], range(0, number, -(-number // 100))
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(above.y0 >= below.y1 - 1 for above, below in itertools.pairwise(boxes))
    assert boxes[0].height * 72 / figure.dpi > 5  # points
    assert [*axes.get_xticks()] == [*axes.get_yticks()] == [*every]
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"class {i}" for i in every]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"class {i} (1)" for i in every]
    assert len(every) == named
    assert figure.canvas.get_renderer() is figure.canvas.get_renderer()  # not a new one for each of the names
    assert [len(lines.get_segments()) for lines in axes.collections] == [number - 1] * 2  # between the cells


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [1.0]}, "is not a checkpoint of train.py"),
        ({"std": [1.0]}, "is not a checkpoint of train.py"),
        ({"epoch": "1"}, "is not a checkpoint of train.py"),
        ({"image_size": "32"}, "is not a checkpoint of train.py"),
        ({"classes": [*range(10)]}, "is not a checkpoint of train.py"),
        ({"classes": ["a"]}, "is not a checkpoint of train.py"),
        ({"args": {}}, "is not a checkpoint of train.py"),
        ({"args": {"dataset": "mnist", "data": "data", "val": 0}}, "was trained on mnist, which this version"),
    ],
)
def test_a_checkpoint_of_another_version(call_main, tiny_run, tmp_path, change, message):
    checkpoint = torch.load(tiny_run / "latest.pth", weights_only=True)
    torch.save({**checkpoint, **change}, tmp_path / "latest.pth")
    status, _, errors = call_main(evaluate, tmp_path / "latest.pth")
    assert (status, len(errors.splitlines()), message in errors) == (2, 2, True), errors


@hypothesis.given(
    position=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(["cut", "insert", "change"]), byte=st.integers(0, 255)
)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_a_damaged_card_is_a_sentence_or_a_net(exported, position, kind, byte):
    damaged = exported.with_name("damaged.pth")
    damaged.write_bytes(exported.read_bytes())
    damaged.with_suffix(".json").write_bytes(damage(exported.with_suffix(".json").read_bytes(), position, kind, byte))
    with contextlib.suppress(Refused):
        checkpoint = load_checkpoint(damaged)
        build_net(checkpoint)
        normalization(checkpoint, "cpu")


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    """Bare weights, with their card beside them."""
    path = tmp_path_factory.mktemp("exported") / "net.pth"
    export(load_checkpoint(tiny_run / "latest.pth"), path)
    return path


def test_the_pictures_of_a_folder_are_named(call_main, tiny_run, pictures):
    one = pictures / "train" / "red" / "0.jpg"
    status, out, errors = call_main(evaluate, tiny_run / "latest.pth", "--image", pictures / "test", one)
    assert status == 0, errors
    named = [pictures / "test" / "blue" / "0.jpg", pictures / "test" / "red" / "0.jpg", one]
    assert [line.split(":")[0] for line in out.splitlines()] == [*map(str, named)]
    (pictures / "empty").mkdir()
    status, _, errors = call_main(evaluate, tiny_run / "latest.pth", "--image", pictures / "empty")
    assert (status, f"{pictures / 'empty'} holds no picture (.jpg, " in errors) == (2, True)


def test_a_terminal_shows_how_far_the_test_is(run_on_terminal, tiny_run, tmp_path):
    shown = run_on_terminal("evaluate.py", tiny_run / "latest.pth", "--out", tmp_path)
    for part in (b"test images", b"batches", b"test error"):
        assert part in shown


@pytest.fixture(scope="module")
def run_with_val(tmp_path_factory, forked):
    save = tmp_path_factory.mktemp("runs") / "val"
    flags = [*TINY, "--val", "50", "--batch-size", "32", "--epochs", "1", "--no-plot", "--save", save]
    assert forked(["train.py", *flags]).wait().returncode == 0
    return save


def test_the_held_out_images_are_evaluated_as_the_run_did(call_main, run_with_val, tiny_run, tmp_path):
    status, out, errors = call_main(evaluate, run_with_val / "latest.pth", "--val", "--out", tmp_path)
    last = pd.read_csv(run_with_val / "test.csv").iloc[-1]
    assert f"val loss {last['val_loss']:.2f}   val error {last['val_error']:.2f} %" in out, errors
    assert "digits, 50 val images, epoch 1" in out
    assert pd.read_csv(tmp_path / "confusion-val.csv", index_col="true").to_numpy().sum() == 50
    assert (tmp_path / "confusion-val.png").exists()
    status, _, errors = call_main(evaluate, tiny_run / "latest.pth", "--val")
    assert (status, "the run of this net held out no images: leave out --val" in errors) == (2, True)
    checkpoint = torch.load(run_with_val / "latest.pth", weights_only=True)
    checkpoint["args"]["digests"]["val"] = "0"
    torch.save(checkpoint, tmp_path / "latest.pth")
    status, _, errors = call_main(evaluate, tmp_path / "latest.pth", "--val")
    assert (status, "are not those that the run held out: name its data with --data" in errors) == (2, True)


def test_other_test_images_than_the_runs_are_told_of(call_main, saved, run_with_val, tmp_path):
    checkpoint, told = load_checkpoint(run_with_val / "latest.pth"), []
    for digest in (checkpoint["args"]["digests"]["test"], "0"):
        checkpoint["args"]["digests"]["test"] = digest
        torch.save(checkpoint, tmp_path / "latest.pth")
        status, out, errors = call_main(evaluate, tmp_path / "latest.pth")
        assert status == 0, errors
        told.append("are not those that the run was tested with" in out)
    assert told == [False, True]


def test_a_checkpoint_without_digests_is_evaluated_on_what_there_is(run_with_val, tmp_path):
    """As an older version of train.py has written it."""
    checkpoint = torch.load(run_with_val / "latest.pth", weights_only=True)
    for digests in (None, {}):
        torch.save({**checkpoint, "args": checkpoint["args"] | {"digests": digests}}, tmp_path / "latest.pth")
        assert len(evaluate.read_split(load_checkpoint(tmp_path / "latest.pth"), ".", "val")) == 50


def test_pictures_of_a_folder_are_named_in_their_predictions(call_main, pictures, tmp_path):
    """Held-out ones are drawn from the training part. Each has a colour of its own here."""
    for i, file in enumerate(sorted(pictures.glob("t*/*/*"))):
        Image.new("RGB", (40, 50), (18 * i, 0, 0)).save(file)
    flags = [*TINY[2:6], "--device", "cpu", "--dataset", "folder", "--data", pictures, "--val", 4, "--epochs", 1, "--no-plot"]
    assert call_main(train, *flags, "--drop-rate", 0, "--save", tmp_path / "run")[0] == 0
    dataset = data.load("folder", pictures, val=4)
    for flags, split in [(["--val"], dataset.val), ([], dataset.test)]:
        path = tmp_path / f"{len(split)}.csv"
        status, _, errors = call_main(evaluate, tmp_path / "run", *flags, "--predictions", path)
        assert status == 0, errors
        table = pd.read_csv(path)
        images, _, _ = read_pictures([*map(Path, table["picture"])], 32)
        assert torch.equal(images, split.images)
        assert len(images.flatten(1).unique(dim=0)) == len(split)
        assert table["true"].tolist() == [Path(name).parent.name for name in table["picture"]]


def test_only_the_folders_that_are_written_to_have_to_be_writable(monkeypatch, tmp_path):
    """Pictures are classified by a net in a folder of others, and their classes go to a device of others."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    args = SimpleNamespace(image=["a.png"], export=None, val=False, data=None, out=None, checkpoint=tmp_path / "net.pth")
    evaluate.check_matrix_place(args)
    for args.predictions in (None, Path("/dev/null")):
        evaluate.refuse_contradictions(args)
    args.predictions = tmp_path / "new.csv"
    with pytest.raises(Refused, match=r"name another for new\.csv"):
        evaluate.refuse_contradictions(args)
    args = SimpleNamespace(image=None, predictions=None, out=None, val=False, checkpoint=tmp_path / "net.pth")
    with pytest.raises(Refused, match=f"{tmp_path} is not a writable folder: name another with --out"):
        evaluate.check_matrix_place(args)


def test_the_predictions_of_each_picture(call_main, tiny_run, pictures, tmp_path):
    table = tmp_path / "new" / "predictions.csv"
    command = [evaluate, tiny_run / "latest.pth", "--predictions", table]
    status, out, errors = call_main(*command, "--out", tmp_path)
    assert status == 0, errors
    read = pd.read_csv(table)
    assert (list(read.columns), read["picture"].tolist()) == (["picture", "true", "class", "probability"], [*range(360)])
    assert read["true"].tolist() == data.load("digits", ".").test.labels.tolist()
    confusion = pd.read_csv(tmp_path / "confusion.csv", index_col="true")
    assert read["class"].value_counts().reindex(range(10), fill_value=0).tolist() == confusion.sum().tolist()
    assert read["probability"].between(0.1, 1).all()
    status, _, errors = call_main(*command)
    assert (status, f"{table} exists already: name another file, or remove it" in errors) == (2, True)
    table.unlink()
    status, out, errors = call_main(*command, "--image", pictures / "test")
    *lines, last = out.splitlines()
    assert last == f"wrote {table}"
    answers = [re.fullmatch(r"(.*): (\d) ([\d.]+) %.*", line).groups() for line in lines]
    for (picture, name, percent), row in zip(answers, pd.read_csv(table).itertuples(index=False), strict=True):
        assert (picture, int(name), float(percent)) == (row[0], row[1], pytest.approx(100 * row[2], abs=0.051))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--export", "new.pth", "--val"],
            "--export evaluates nothing: leave out --image, --val, --predictions, --data and --out",
        ),
        (["--export", "new.pth", "--predictions", "p.csv"], "--export evaluates nothing"),
        (["--export", "new.pth", "--out", "folder"], "--export evaluates nothing"),
        (["--export", "new.pth", "--image", "a.png"], "--export evaluates nothing"),
        (["--export", "new.pth", "--data", "data"], "--export evaluates nothing"),
        (["--image", "a.png", "--data", "data"], "--image classifies your own pictures, no data set: leave out --val, --data"),
        (["--image", "a.png", "--val"], "--image classifies your own pictures"),
        (["--image", "a.png", "--out", "folder"], "--image classifies your own pictures"),
    ],
)
def test_flags_that_contradict_each_other(call_main, monkeypatch, tmp_path, tiny_run, flags, message):
    monkeypatch.chdir(tmp_path)
    status, out, errors = call_main(evaluate, tiny_run / "latest.pth", *flags)
    assert (status, out, message in errors) == (2, "", True)


def test_a_device_that_is_not_there_is_refused(call_main, tiny_run):
    status, _, errors = call_main(evaluate, tiny_run, "--device", "cuda:99")
    assert (status, "--device 'cuda:99' is not a device that PyTorch can use here" in errors) == (2, True)


def test_the_title_of_a_matrix_names_its_images(call_main, monkeypatch, run_with_val, tmp_path):
    titles = []
    monkeypatch.setattr(evaluate, "draw", lambda confusion, classes, what, path: titles.append((what, path.name)))
    for more in ([], ["--val"]):
        assert call_main(evaluate, run_with_val, "--out", tmp_path, *more)[0] == 0
    assert titles == [("test images", "confusion.png"), ("val images", "confusion-val.png")]


def test_fuller_cells_are_darker_and_up_to_20_classes_have_counts(saved, tmp_path):
    for number in (20, 21):
        evaluate.draw(np.eye(number, dtype=int), [str(i) for i in range(number)], "test images", tmp_path / "x.png")
    (image,) = saved[0].axes[0].images
    shades = [sum(image.cmap(share)[:3]) for share in (0.0, 0.5, 1.0)]
    assert shades == sorted(shades, reverse=True)
    assert [sum(text.get_text() == "1" for text in figure.axes[0].texts) for figure in saved] == [20, 0]


def test_the_matrix_is_drawn_with_true_rows_coloured_by_their_shares(saved, tmp_path):
    evaluate.draw(np.array([[1, 3, 0], [2, 3, 0], [0, 0, 0]]), ["a", "b", "c"], "test images", tmp_path / "x.png")
    axes = saved[0].axes[0]
    counts = {text.get_position(): text.get_text() for text in axes.texts if text.get_text()}
    assert counts == {(0, 0): "1", (1, 0): "3", (0, 1): "2", (1, 1): "3"}  # (column, row)
    white = [text.get_position() for text in axes.texts if text.get_color() == "white"]
    assert white == [(1, 0), (1, 1)]  # where the cell is dark
    (image,) = axes.images
    assert image.get_array().tolist() == [[25, 75, 0], [40, 60, 0], [0, 0, 0]]
    assert image.get_clim() == (0, 100)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class (number of images)")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a (4)", "b (5)", "c (0)"]


def test_a_picture_in_a_folder_that_may_not_be_searched_is_not_called_missing(monkeypatch):
    """As to a user who may not search it; root always may."""
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "secret/a.png")
    monkeypatch.setattr(Path, "lstat", Mock(side_effect=error))
    with pytest.raises(PermissionError):
        evaluate.named_pictures(Path("secret/a.png"))
