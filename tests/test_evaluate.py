import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import evaluate


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
    rows = re.findall(r"(\d+)\s+([\d.]+) %  \((\d+) of (\d+) wrong\)", done.stdout)
    assert len(rows) == 10
    for name, error, errors, total in rows:
        assert (int(total) - int(errors), int(total)) == (counts.loc[int(name), name], counts.loc[int(name)].sum())
        assert float(error) == pytest.approx(100 * int(errors) / int(total), abs=0.005)
    assert Image.open(tmp_path / "out" / "confusion.png").size[0] > 500


def test_exported_weights_are_bare_and_give_the_same_figures(call_main, tiny_run, tmp_path):
    status, out, errors = call_main(evaluate, tiny_run / "latest.pth", "--export", tmp_path / "net.pth")
    assert (status, out) == (0, f"wrote {tmp_path / 'net.pth'} and {tmp_path / 'net.json'}\n"), errors
    state = torch.load(tmp_path / "net.pth", weights_only=True)
    checkpoint = evaluate.load_checkpoint(tiny_run / "latest.pth")
    assert state.keys() == checkpoint["net"].keys()
    outputs = [call_main(evaluate, path, "--out", tmp_path) for path in (tiny_run / "latest.pth", tmp_path / "net.pth")]
    assert outputs[0] == outputs[1]
    status, _, errors = call_main(evaluate, tiny_run / "latest.pth", "--export", tmp_path / "net.pth")
    assert (status, "exists already" in errors) == (2, True)
    status, _, errors = call_main(evaluate, tiny_run / "latest.pth", "--export", tmp_path / "new" / "net.json")
    assert (status, "name a .pth file" in errors) == (2, True)
    status, _, errors = call_main(evaluate, tiny_run / "latest.pth", "--export", tmp_path / "new" / "net.pth")
    assert status == 0, errors
    (tmp_path / "net.json").unlink()
    status, _, errors = call_main(evaluate, tmp_path / "net.pth")
    assert (status, f"bare weights need {tmp_path / 'net.json'}" in errors) == (2, True)


def test_confusion_matrix_has_true_rows_and_predicted_columns():
    matrix = evaluate.confusion_matrix(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 0]), 3)
    assert matrix.tolist() == [[0, 1, 1], [0, 1, 0], [0, 0, 0]]


def test_own_pictures_are_named(call_main, tiny_run, tmp_path):
    Image.new("L", (64, 50), 200).save(tmp_path / "one.png")
    Image.new("RGBA", (20, 20), (9, 8, 7, 6)).save(tmp_path / "two.png")
    status, out, errors = call_main(evaluate, tiny_run / "latest.pth", "--image", tmp_path / "one.png", tmp_path / "two.png")
    assert status == 0, errors
    assert [line.split(":")[0] for line in out.splitlines()] == [str(tmp_path / "one.png"), str(tmp_path / "two.png")]
    shares = [float(share) for share in re.findall(r"\d ([\d.]+) %", out.splitlines()[0])]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)


def text_file(path):
    path.write_text("epoch,loss,error\n")


def other_checkpoint(path):
    torch.save({"state_dict": {}}, path)


def bare_tensor(path):
    torch.save(torch.zeros(3), path)


def nothing(path):
    pass


CARD = {"args": {}, "epoch": 1, "mean": [], "std": [], "classes": []}  # complete, so that it is the net that is refused


def vgg(path):  # as attic/train-vgg.py saves it
    torch.save({**CARD, "net": {}, "model": {"depth": None, "growth_rate": None, "num_classes": 10}}, path)


def other_net(path):
    torch.save({**CARD, "net": {}, "model": {"depth": 10}}, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (text_file, "is damaged or no checkpoint of train.py"),
        (other_checkpoint, "is no checkpoint of train.py"),
        (bare_tensor, "is no checkpoint of train.py"),
        (nothing, "does not exist"),
        (vgg, "is no checkpoint of train.py"),
        (other_net, "is no checkpoint of train.py"),
    ],
)
def test_a_file_that_is_no_checkpoint_of_ours(call_main, tmp_path, make, message):
    make(tmp_path / "file.pth")
    status, _, errors = call_main(evaluate, tmp_path / "file.pth")
    assert status == 2
    assert len(errors.splitlines()) == 2
    assert message in errors


def test_data_with_other_classes_are_refused(call_main, tiny_run, tmp_path):
    checkpoint = torch.load(tiny_run / "latest.pth", weights_only=True)
    torch.save({**checkpoint, "classes": [*checkpoint["classes"][:-1], "ten"]}, tmp_path / "latest.pth")
    status, _, errors = call_main(evaluate, tmp_path / "latest.pth")
    assert (status, "are not those that the net was trained on" in errors) == (2, True)
    assert not (tmp_path / "confusion.csv").exists()


def test_a_picture_that_cannot_be_read(call_main, tiny_run, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"broken")
    status, _, errors = call_main(evaluate, tiny_run / "latest.pth", "--image", tmp_path / "broken.png")
    assert (status, "broken.png cannot be read as an image" in errors) == (2, True)
