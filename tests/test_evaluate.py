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
    torch.save({**checkpoint, "classes": [*checkpoint["classes"][:-1], "ten"]}, tmp_path / "latest.pth")
    status, _, errors = call_main(evaluate, tmp_path / "latest.pth")
    assert (status, "are not those that the net was trained on" in errors) == (2, True)
    assert not (tmp_path / "confusion.csv").exists()


def test_a_picture_that_cannot_be_read(call_main, tiny_run, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"broken")
    status, _, errors = call_main(evaluate, tiny_run / "latest.pth", "--image", tmp_path / "broken.png")
    assert (status, "broken.png cannot be read as an image" in errors) == (2, True)
