"""The README keeps its length, and the Python in it runs as it stands there, but for the names of files and the net's depth."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from onnx.reference import ReferenceEvaluator
from PIL import Image

import densenet
import evaluate
import flags
import train

README = (ROOT / "README.md").read_text()
PRETRAINED, OWN_CODE = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def run(code, replaced, **names):
    """Runs the code after replacing texts that must be in it; returns its names."""
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, new)
    exec(code, names)
    return names


def test_it_has_at_most_3000_words():
    assert len(README.split()) <= 3000


def test_from_a_picture_to_the_name_of_a_class(call_main, capsys, tmp_path):
    """The name that evaluate.py puts first."""
    names = []
    for colour in ("skyblue", "brown"):
        picture = Image.new("RGB", (90, 60), colour)
        picture.paste("white", (30, 20, 50, 60))
        picture.save(tmp_path / "cat.png")
        run(PRETRAINED, {"THIS-FOLDER": str(ROOT), "cat.jpg": str(tmp_path / "cat.png")})
        names.append(capsys.readouterr().out.strip())
        status, out, _ = call_main(evaluate, ROOT / "work" / "bc-40-12", "--image", tmp_path / "cat.png")
        assert (status, out.split()[1]) == (0, names[-1])
    assert names[0] != names[1]


@pytest.mark.xdist_group("compiler")  # imported by one process
def test_training_and_exporting_in_your_own_code(monkeypatch, tmp_path):
    """Compiled without the slow last stages; the programs are the net, for batches of another size, too.

    The efficient blocks are graph breaks: at our functions, and nowhere inside of them.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    names = run(OWN_CODE, {"depth=40": "depth=10", "net.onnx": str(tmp_path / "net.onnx")}, batches=[(images, labels)] * 20)
    assert names["loss"] < 1.5  # of 2.3: these four are learnt by heart
    assert breaks.total() >= 3
    assert all("torch.compiler.disable" in reason for reason in breaks)
    net, others = names["net"], torch.randn(7, 3, 32, 32)
    assert torch.allclose(names["program"].module()(others), net(others), atol=1e-5)
    onnx_net = ReferenceEvaluator(str(tmp_path / "net.onnx"))
    (logits,) = onnx_net.run(None, {onnx_net.input_names[0]: others.numpy()})
    assert torch.allclose(torch.from_numpy(logits), net(others), atol=1e-4)


@pytest.fixture
def efficient():
    torch.manual_seed(0)
    return densenet.DenseNet(growth_rate=4, depth=10, efficient=True)


def test_frozen_batch_norms_go_through_the_plain_modules(efficient, monkeypatch):
    for module in efficient.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    monkeypatch.setattr(densenet, "dense_block", None)  # not to be called
    efficient(torch.randn(2, 3, 8, 8)).sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_what_does_not_go(efficient):
    def twice(net):
        images = torch.randn(2, 3, 8, 8, requires_grad=True)
        loss = F.cross_entropy(net(images), torch.tensor([0, 1]))
        (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        twice(efficient)
    twice(densenet.DenseNet(growth_rate=4, depth=10, efficient=False))
    with pytest.raises(RuntimeError, match="Bottleneck"):
        torch.jit.script(efficient)


def test_make_takes_the_pythons_that_the_readme_names():
    found = re.search(r"\((\d+), (\d+)\) <= sys.version_info < \((\d+), (\d+)\)", (ROOT / "Makefile").read_text())
    low, high = (int(found[1]), int(found[2])), (int(found[3]), int(found[4]) - 1)
    assert f"Python {low[0]}.{low[1]} to {high[0]}.{high[1]}" in (ROOT / "README.md").read_text()
    assert f'requires-python = ">={low[0]}.{low[1]}"' in (ROOT / "pyproject.toml").read_text()


def test_make_demo_can_be_made_again():
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "train.py --dataset" in line]
    words = line.replace("$(DEMO)", "work/demo").split("train.py ")[1].split()
    args = flags.parse_args(train.build_parser(), words)
    assert (args.force, args.drop_rate, args.dataset) == (True, 0, "digits")
