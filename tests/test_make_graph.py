import re
import shutil
from pathlib import Path

import graphviz
import pytest
from PIL import Image

import make_graph
from densenet import DenseNet


@pytest.mark.parametrize("flags", [[], ["--no-bottleneck", "--depth", "7", "--growth-rate", "5"]])
def test_every_parameter_stands_in_the_graph_by_name(call_main, tmp_path, flags):
    status, out, errors = call_main(make_graph, *flags, "--out", tmp_path / "sub" / "graph")
    assert status == 0, errors
    text = (tmp_path / "sub" / "graph.dot").read_text()
    net = DenseNet(depth=7, growth_rate=5, bottleneck=False) if flags else DenseNet(depth=10)
    for name, parameter in net.named_parameters():
        assert f"{name}\n ({', '.join(map(str, parameter.shape))})" in text
    assert "logits\n (2, 10)" in text
    assert str(tmp_path / "sub" / "graph.dot") in out


@pytest.mark.parametrize(("flags", "name"), [([], "graph.dot"), (["--out", "net.v2"], "net.v2.dot")])
def test_the_graph_has_the_name_that_is_given(call_main, monkeypatch, tmp_path, flags, name):
    """Without one graph, here; what is no extension of the program's stays a part of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # without dot
    assert call_main(make_graph, *flags)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(not shutil.which("dot"), reason="Graphviz is not installed")
def test_pictures_are_made_with_dot(call_main, tmp_path):
    status, out, errors = call_main(make_graph, "--out", tmp_path / "graph.png")
    assert status == 0, errors
    assert out.split() == [str(tmp_path / f"graph.{kind}") for kind in ("dot", "png", "svg")]
    assert Image.open(tmp_path / "graph.png").size[1] > 1000
    assert "dense1.0.conv1.weight" in (tmp_path / "graph.svg").read_text()


@pytest.mark.skipif(not shutil.which("dot"), reason="Graphviz is not installed")
@pytest.mark.parametrize(("depth", "shrunk"), [(10, False), (46, True)])
def test_a_large_graph_is_drawn_smaller(tmp_path, depth, shrunk):
    """120 inches are 8640 points."""
    dot = make_graph.write_dot(DenseNet(depth=depth), tmp_path / "graph.dot")
    svg = graphviz.render("dot", outfile=tmp_path / "graph.svg", filepath=dot)
    height, scale = re.search(r'height="(\d+)pt".*?"scale\((\S+) ', Path(svg).read_text(), re.DOTALL).groups()
    assert (float(scale) < 1, int(height) <= 8640) == (shrunk, True)


def test_without_dot_the_file_is_written_and_one_sentence_says_how_to_get_it(call_main, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, out, errors = call_main(make_graph, "--out", tmp_path / "graph")
    assert status == 0, errors
    assert (tmp_path / "graph.dot").exists()
    assert "apt install graphviz" in out
    assert not (tmp_path / "graph.png").exists()


@pytest.mark.parametrize("name", ["mine.dot", "mine.png", "mine.svg"])
def test_a_file_that_is_no_graph_is_not_replaced(call_main, tmp_path, name):
    mine = tmp_path / name
    mine.write_text("a photograph")
    status, _, errors = call_main(make_graph, "--out", tmp_path / "mine")
    assert (status, f"{mine} exists already" in errors, mine.read_text()) == (2, True, "a photograph")


def test_its_own_files_are_replaced_also_where_one_is_missing(call_main, tmp_path):
    flags = ["--no-bottleneck", "--depth", 7, "--out", tmp_path / "mine"]

    def files():
        return sorted(tmp_path.glob("mine.*"))

    assert call_main(make_graph, *flags)[0] == 0
    for path in (complete := files()):
        path.unlink()
        assert call_main(make_graph, *flags)[0] == 0
        assert files() == complete
    assert call_main(make_graph, *flags)[0] == 0


def test_bad_depth(call_main, tmp_path):
    status, _, errors = call_main(make_graph, "--depth", 11, "--out", tmp_path / "graph")
    assert (status, "nearest are 10 and 16" in errors) == (2, True)
    assert not (tmp_path / "graph.dot").exists()


def test_efficient_blocks_have_no_graph_to_show(call_main, tmp_path):
    status, _, errors = call_main(make_graph, "--efficient", "--out", tmp_path / "graph")
    assert (status, "--efficient makes one node of each dense block" in errors) == (2, True)
    assert not (tmp_path / "graph.dot").exists()


@pytest.mark.parametrize(("flags", "dropped"), [([], False), (["--drop-rate", 0.2], True)])
def test_dropout_stands_in_the_graph(call_main, tmp_path, flags, dropped):
    assert call_main(make_graph, *flags, "--out", tmp_path / "graph")[0] == 0
    text = (tmp_path / "graph.dot").read_text()
    assert ("NativeDropoutBackward" in text or "MulBackward" in text) == dropped
