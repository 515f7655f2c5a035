import contextlib
import itertools
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
import weakref
from functools import cache, partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY, TINY_RUN, contents
from PIL import Image
from test_flags import parse
from test_run_folder import assert_same_run
from torch._dynamo.utils import counters

import checkpoint
import data
import endings
import evaluate
import flags
import machine
import run_folder
import step
import train
from checkpoint import build_net, digest, load_checkpoint
from densenet import DenseNet
from distributed import World
from endings import Stopped
from flags import model_arguments
from machine import set_precision
from metrics import loss_and_error_sums, predict
from step import TrainingStep

# ------------------------------------------------------------------------------------------------------------- protocol


def test_no_flag_is_the_protocol_of_the_paper():
    args = parse()
    assert (args.dataset, args.augment, args.val, args.epochs, args.batch_size) == ("cifar10", True, 0, 300, 64)
    assert (args.opt, args.lr, args.momentum, args.weight_decay, args.nesterov) == ("sgd", 0.1, 0.9, 1e-4, True)
    assert str(args.save) == "work/cifar10.base"
    net = DenseNet(**model_arguments(args))
    assert sum(p.numel() for p in net.parameters()) == 769_162
    optimizer = step.make_optimizer(net, args)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["dampening"], group["nesterov"], group["weight_decay"]) == (0.9, 0, True, 1e-4)
    assert sum(p.numel() for p in group["params"]) == 769_162  # weight decay on all parameters


@pytest.mark.parametrize("epochs", [300, 40, 3, 7, 1])
def test_learning_rate_at_every_epoch(epochs):
    rates = step.schedule(parse("--epochs", str(epochs)))
    half, three_quarters = math.ceil(epochs / 2), math.ceil(epochs * 3 / 4)
    expected = [0.1] * half + [0.01] * (three_quarters - half) + [0.001] * (epochs - three_quarters)
    assert rates == pytest.approx(expected)
    if epochs == 300:
        assert rates.count(rates[0]) == 150  # whole epochs at 0.1
        assert rates[224:226] == pytest.approx([0.01, 0.001])


def test_adam_and_rmsprop_keep_their_library_defaults():
    net = torch.nn.Linear(2, 2)
    for name, kind in [("adam", torch.optim.Adam), ("rmsprop", torch.optim.RMSprop)]:
        args = parse("--opt", name, "--epochs", "4")
        ours, theirs = step.make_optimizer(net, args), kind(net.parameters(), weight_decay=1e-4)
        assert step.schedule(args) == [None] * 4
        differences = dict(set(ours.defaults.items()) ^ set(theirs.defaults.items()))
        assert differences.keys() <= {"fused"}  # the same in one kernel
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
        for rate in (0.5, 0):
            assert step.make_optimizer(net, parse("--opt", name, "--lr", str(rate))).param_groups[0]["lr"] == rate


def test_a_step_is_that_of_plain_pytorch():
    """Three steps, Nesterov momentum and weight decay written out by hand, in float64."""
    torch.manual_seed(0)
    net = DenseNet(depth=10, growth_rate=4).double()
    twin = DenseNet(depth=10, growth_rate=4).double()
    twin.load_state_dict(net.state_dict())
    batches = [(torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.randint(10, (8,)), 1.0) for _ in range(3)]
    results = take_steps(net, batches)
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for (images, labels, _), result in zip(batches, results, strict=True):
        logits = twin(images)
        expected = torch.nn.functional.cross_entropy(logits, labels)
        error = 100 * (logits.argmax(dim=1) != labels).double().mean()
        torch.testing.assert_close(result, torch.stack([expected.detach(), error]))
        twin.zero_grad()
        expected.backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                gradient = p.grad + 1e-4 * p
                velocity[name] = 0.9 * velocity[name] + gradient
                p -= 0.1 * (gradient + 0.9 * velocity[name])
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def take_steps(net, batches):
    """The results of the steps that train.py takes without a flag."""
    take = TrainingStep(net, parse(), next(net.parameters()).device, World())
    take.begin_epoch(0.1)
    return [take(*batch) for batch in batches]


def test_a_whole_step_runs_on_the_meta_device():
    """Meta tensors have no numbers: a tensor made on another device, or a step that waits for a number, is an error."""
    with torch.device("meta"):
        net = DenseNet(depth=10, growth_rate=4, drop_rate=0.2)
        split = data.Split(torch.empty(100, 3, 32, 32, dtype=torch.uint8), torch.empty(100, dtype=torch.int64))
        mean, std = torch.empty(3, 1, 1), torch.empty(3, 1, 1)
    dataset = data.Dataset(split, None, None, mean, std, [])
    results = take_steps(net, data.training_batches(dataset, 64, True, None))
    assert [r.shape for r in results] == [(2,), (2,)]
    assert {r.device.type for r in results} == {"meta"}
    assert {p.grad.device.type for p in net.parameters()} == {"meta"}


@pytest.mark.parametrize("efficient", [False, True])
def test_nothing_of_a_step_outlives_it(efficient):
    """As a CUDA graph needs it: no gradient when the next forward pass begins, no output, and nothing that adds up gradients.

    The latter keeps the stream on which it was made; in a capture, any other stream is an error.
    """
    torch.manual_seed(0)
    net = DenseNet(depth=10, growth_rate=4, efficient=efficient)
    gradients, outputs, marked = [], [], []
    net.register_forward_pre_hook(lambda module, inputs: gradients.extend(p.grad for p in net.parameters()))
    for each in (net, net.dense1, net.dense2, net.dense3):
        each.register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    net.register_forward_hook(lambda *_: marked.extend(accumulator(p).setdefault("used", True) for p in net.parameters()))
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(10, (4,)), 1.0) for _ in range(3)]
    take = TrainingStep(net, parse(), torch.device("cpu"), World())
    for batch in batches:
        take(*batch)
        assert all(output() is None for output in outputs)
        assert not any(accumulator(p) for p in net.parameters())
    assert (len(outputs), len(marked)) == (3 * 4, len(gradients))
    assert all(gradient is None for gradient in gradients)


def accumulator(parameter):
    """What is noted on the node that adds up the parameter's gradients; on a new node nothing is."""
    return torch.autograd.graph.get_gradient_edge(parameter).node.metadata


class Rehearsed(step.CapturedForwardBackward):
    """On a CPU: a graph that computes anew when it is replayed, with results at fixed addresses."""

    def warm_up(self, *batch):
        self.warm_ups_left -= 1
        return self.eager(*batch)

    def capture(self, images, labels):
        self.images, self.labels = torch.zeros_like(images), torch.zeros_like(labels)
        self.result, self.replays = torch.zeros(2), 0
        self.fixed = [torch.zeros_like(p) if p.requires_grad else None for p in self.parameters]
        self.graph = self

    def replay(self):
        self.replays += 1
        before = [p.grad for p in self.parameters]  # a graph does not know of them
        self.result.copy_(self.eager(self.images, self.labels, 1.0))
        for fixed, parameter, gradient in zip(self.fixed, self.parameters, before, strict=True):
            if fixed is not None:
                fixed.copy_(parameter.grad)
            parameter.grad = gradient


@pytest.mark.parametrize("opt", ["sgd", "adam"])
def test_replays_and_smaller_batches_in_between_are_the_steps_of_an_eager_run(monkeypatch, opt):
    """Batches of 4, the third and the last smaller, after 3 warm-ups; a frozen layer. What a graph computes, a GPU shows."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(step, "CapturedForwardBackward", Rehearsed)
    torch.manual_seed(1)
    sizes = [4, 4, 2, 4, 4, 4, 4, 2, 4, 3]
    batches = [(torch.randn(n, 3, 8, 8), torch.randint(10, (n,)), 1.0) for n in sizes]
    results = {}
    for capture in (False, True):
        torch.manual_seed(0)
        net = DenseNet(depth=10, growth_rate=4)
        net.conv1.weight.requires_grad_(False)
        args = parse("--opt", opt, "--batch-size", "4")
        args.capture = capture
        take = TrainingStep(net, args, torch.device("cpu"), World())
        results[capture] = [take(*batch) for batch in batches], net.state_dict()
    assert take.forward_backward.replays == 4
    (eager, weights), (captured, same_weights) = results[False], results[True]
    assert torch.equal(torch.stack(eager), torch.stack(captured))
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)


@pytest.fixture
def streams_of_nothing(monkeypatch):
    """torch.cuda as far as a capture asks for it: streams and graphs that do nothing."""
    for name in ("Stream", "current_stream", "CUDAGraph", "get_sync_debug_mode", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, **options: contextlib.nullcontext())


def take_captured_steps(forward_hook):
    args = parse("--batch-size", "4")
    args.capture = True
    net = DenseNet(depth=10, growth_rate=4)
    net.register_forward_hook(forward_hook)
    take = TrainingStep(net, args, torch.device("cpu"), World())
    return take, [take(torch.randn(4, 3, 8, 8), torch.randint(10, (4,)), 1.0) for _ in range(8)]


def test_a_step_that_waits_for_the_device_is_not_captured_and_says_so_once(streams_of_nothing, capsys):
    def wait(module, inputs, output):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)  # as PyTorch does when it is asked to

    with pytest.warns(UserWarning, match="called a synchronizing"):  # outside of the step that is watched
        take, results = take_captured_steps(wait)
    assert take.forward_backward.graph is None
    for stream in (take.forward_backward.stream, torch.cuda.current_stream()):  # each waits for the other, around each warm-up
        assert stream.wait_stream.call_count == step.WARM_UP_STEPS
    assert torch.stack(results).isfinite().all()
    assert capsys.readouterr().out == "steps run eagerly, not captured: each waits for the device\n"


@pytest.mark.parametrize("draw", [random.random, np.random.rand, partial(torch.rand, 1)])
def test_a_step_that_draws_on_the_host_is_not_captured_and_says_so_once(streams_of_nothing, capsys, draw):
    """A graph would repeat one number in all steps: one depth of a net of stochastic depth, one share of mixup."""
    take, _ = take_captured_steps(lambda *_: draw() and None)
    assert take.forward_backward.graph is None
    told = "steps run eagerly, not captured: each draws random numbers on the host\n"
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    ("reason", "status", "message"),
    [
        ("not permitted\nmore", 1, "a step of this net cannot be captured (not permitted): choose --no-capture"),
        (None, 1, "a step of this net cannot be captured (invalid): choose --no-capture"),
        ("CUDA out of memory", 1, "memory ran out for batches: choose --no-capture"),
    ],
)
def test_a_capture_that_fails_ends_the_run_with_a_sentence(streams_of_nothing, monkeypatch, reason, status, message):
    calls = itertools.count(1)

    def fail(module, inputs, output):
        if reason and next(calls) == 4:
            raise RuntimeError(reason)

    @contextlib.contextmanager
    def graph(*arguments, **options):
        try:
            yield
        finally:
            raise RuntimeError("invalid")  # as PyTorch's does after an error inside, or on its own

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(RuntimeError if reason == "CUDA out of memory" else endings.Refused) as refused:
        take_captured_steps(fail)
    ending = SimpleNamespace(needs="batches", remedy="--no-capture", resume=None)
    assert endings.status_and_message(refused.value, ending) == (status, message)


# ------------------------------------------------------------------------------------------------------------ an epoch


def an_epoch(epoch, seed=1, rank=0, size=1):
    """(labels in their order, images, seed of the dropout) of the epoch of 24 digits in batches of 10; the last one has 4."""
    args = parse("--dataset", "digits", "--augment", "--batch-size", "10", "--seed", str(seed))
    batches = train.epoch_batches(data.load("digits", ".", limit=24), epoch, args, World(rank, rank, size))
    dropout_seed = torch.initial_seed()
    images, labels, shares = zip(*batches, strict=True)
    return images, labels, shares, dropout_seed


def test_what_python_numpy_and_torch_draw_in_an_epoch_follows_from_its_number():
    drawn = []
    for epoch in (0, 1, 0):
        an_epoch(epoch)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert drawn[0] == drawn[2]
    assert not {*drawn[0]} & {*drawn[1]}


def test_each_epoch_and_each_seed_has_its_own_order_crops_and_dropout():
    epochs = {key: an_epoch(*key) for key in [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2)]}
    again = an_epoch(2, 1)
    assert all(torch.equal(*pair) for pair in zip(again[0], epochs[2, 1][0], strict=True))
    assert again[3] == epochs[2, 1][3] == 10153658008414891177  # as ever: a later version may resume the run
    assert len({tuple(torch.cat(labels).tolist()) for _, labels, _, _ in epochs.values()}) == 5
    assert len({seed for *_, seed in epochs.values()}) == 5


def test_crops_are_drawn_anew_for_each_epoch(monkeypatch):
    """Also where the order of the images is the same."""
    drawn = []
    monkeypatch.setattr(torch, "randperm", lambda n, **options: torch.arange(n))
    monkeypatch.setattr(data, "crop_and_flip", lambda images, *windows: [images, drawn.append(torch.stack(windows))][0])
    for epoch, seed in [(0, 1), (1, 1), (0, 2)]:
        an_epoch(epoch, seed)
    firsts = drawn[::3]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(firsts, 2))
    assert not torch.equal(drawn[0], drawn[1])  # nor are they those of the batch before


def test_ranks_share_the_batches_and_have_dropout_of_their_own():
    """Three ranks together see what one process sees: the same images, crops and flips, in the same order."""
    whole, ranks = an_epoch(1), [an_epoch(1, rank=rank, size=3) for rank in range(3)]
    for i, (images, labels) in enumerate(zip(*whole[:2], strict=True)):
        assert torch.equal(torch.cat([rank[0][i] for rank in ranks]), images)
        assert torch.equal(torch.cat([rank[1][i] for rank in ranks]), labels)
        assert [rank[2][i] for rank in ranks] == [len(rank[1][i]) / len(labels) for rank in ranks]
    assert len({rank[3] for rank in ranks}) == 3


def test_a_net_begins_as_its_seed_says():
    nets = [train.initial_net(parse("--depth", "10", "--seed", seed), "0123456789", None) for seed in ("1", "1", "2")]
    weights = [net.fc.weight for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# --------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_writes_its_files(tiny_run):
    steps = pd.read_csv(tiny_run / "train.csv")
    assert list(steps.columns) == ["epoch", "loss", "error"]
    assert steps["epoch"].tolist() == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], abs=1e-6)  # 96 images, batches of 40
    epochs = pd.read_csv(tiny_run / "test.csv")
    assert list(epochs.columns) == ["epoch", "loss", "error", "train_loss", "train_error", "lr", "seconds"]
    assert epochs["epoch"].tolist() == [1, 2]
    assert epochs["lr"].tolist() == pytest.approx([0.1, 0.01])
    assert epochs["seconds"].between(0.001, 100).all()
    for name in ("loss", "error"):  # the mean over the images: the last batch has 16
        means = [np.average(steps[name][first : first + 3], weights=[40, 40, 16]) for first in (0, 3)]
        assert epochs[f"train_{name}"].tolist() == pytest.approx(means, rel=1e-5)
    facts = json.loads((tiny_run / "args.json").read_text())
    assert (facts["depth"], facts["batch_size"], facts["torch"]) == (10, 40, torch.__version__)
    assert facts["device"].startswith("cpu")
    assert (facts["commit"], facts["hardware"]) == (run_folder.git_commit(), machine.device_name(torch.device("cpu")))
    for name, inches in [("loss.png", 4.2), ("error.png", 4.2), ("loss-error.png", 8.4)]:
        assert Image.open(tiny_run / name).size[0] == pytest.approx(200 * inches)  # as printing needs it


def test_a_run_says_what_it_is_how_far_it_is_and_what_there_is(tiny_run):
    what, how, *epochs, error, files = (tiny_run / "stdout").read_text().splitlines()
    assert what == "DenseNet-BC, L=10, k=2, dropout 0.2, 786 parameters"
    assert how.startswith("digits (96 training, 360 test images), cpu (")
    assert how.endswith(f"fp32, {tiny_run}")
    assert [line.split("  ")[0] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert error == f"test error {pd.read_csv(tiny_run / 'test.csv')['error'].iloc[-1]:.2f} % after epoch 2"
    assert files == f"{tiny_run} has args.json, train.csv, test.csv, latest.pth, loss.png, error.png, loss-error.png"


def test_only_dropout_that_there_is_is_said(call_main, tmp_path):
    status, out, errors = call_main(train, *TINY, "--drop-rate", 0, "--epochs", 1, "--no-plot", "--save", tmp_path / "run")
    assert (status, out.splitlines()[0]) == (0, "DenseNet-BC, L=10, k=2, 786 parameters"), errors


def test_a_flag_is_not_shortened(call_main, tmp_path):
    """The command that goes on leaves out --force, and a flag is to be the one that was meant."""
    status, _, errors = call_main(train, *TINY, "--forc", "--save", tmp_path / "run")
    assert (status, "unrecognized arguments: --forc" in errors) == (2, True)


def test_the_line_of_an_epoch_has_its_figures(tiny_run):
    """Of training, the mean over its images: the last batch has 16, the others 40."""
    steps, epochs = (pd.read_csv(tiny_run / f"{part}.csv") for part in ("train", "test"))
    for epoch, line in enumerate((tiny_run / "stdout").read_text().splitlines()[2:4]):
        means = [np.average(steps[name][3 * epoch : 3 * epoch + 3], weights=[40, 40, 16]) for name in ("loss", "error")]
        pattern = r"train loss ([\d.]+) error ([\d.]+) %  test loss ([\d.]+) error ([\d.]+) %  lr ([\d.]+)"
        told = [float(number) for number in re.search(pattern, line).groups()]
        expected = [*means, epochs["loss"][epoch], epochs["error"][epoch], [0.1, 0.01][epoch]]
        assert told == pytest.approx(expected, abs=0.006, rel=0)
        assert told[::2] == pytest.approx(expected[::2], abs=6e-5, rel=0)


def test_rows_stand_at_the_end_of_their_steps_over_many_groups(call_main, monkeypatch, tmp_path):
    """50 steps an epoch, written in groups of 20, the last of a single image; errors are in percent of a step's images."""
    groups, append_rows = [], run_folder.append_rows

    def noting(path, rows):
        groups.append((path.name, len(rows)))
        append_rows(path, rows)

    monkeypatch.setattr(run_folder, "append_rows", noting)
    flags = [*TINY, "--limit", 99, "--batch-size", 2, "--epochs", 2, "--no-plot", "--save", tmp_path]
    status, out, errors = call_main(train, *flags)
    assert status == 0, errors
    rows = pd.read_csv(tmp_path / "train.csv")
    assert [count for name, count in groups if name == "train.csv"] == [20, 20, 10] * 2  # each waits for the device
    assert rows["epoch"].tolist() == pytest.approx([step / 50 for step in range(1, 101)], abs=1e-6)
    assert {50, 100} <= set(rows["error"]) <= {0, 50, 100}
    sizes = [2] * 49 + [1]
    for epoch, line in enumerate(out.splitlines()[2:4]):
        assert f"error {np.average(rows['error'][50 * epoch :][:50], weights=sizes):.2f} %  test" in line


def test_the_last_figures_are_of_the_finished_run(call_main, monkeypatch, tmp_path):
    """Each drawing lasts until it is ended or waited for: the last one begins behind the last row, and is waited for."""
    seen, waited_for = [], []

    class Drawing:
        pid, returncode = -1, None  # of no process

        def __init__(self, command, **options):
            seen.append(len((tmp_path / "test.csv").read_text().splitlines()) - 1)

        def poll(self):
            return self.returncode

        def kill(self):
            waited_for.append("end")

        def communicate(self):
            self.returncode = 0
            waited_for.append(seen[-1])
            return "", ""

    monkeypatch.setattr(run_folder, "git_commit", lambda: None)
    monkeypatch.setattr(subprocess, "Popen", Drawing)
    status, _, errors = call_main(train, *TINY, "--limit", 8, "--epochs", 3, "--save", tmp_path)
    assert status == 0, errors
    assert (seen, waited_for) == ([1, 3], ["end", 1, 3])


def test_test_csv_holds_exact_figures(tiny_run):
    """The last row equals loss and error of the saved net, image by image, summed and divided by their number."""
    checkpoint = torch.load(tiny_run / "latest.pth", weights_only=True)
    net = build_net(checkpoint).double()
    dataset = data.load("digits", ".")
    logits = torch.cat([net(data.normalize(image, dataset.mean, dataset.std).double()[None]) for image in dataset.test.images])
    losses = torch.nn.functional.cross_entropy(logits, dataset.test.labels, reduction="none")
    wrong = (logits.argmax(1) != dataset.test.labels).sum()
    last = pd.read_csv(tiny_run / "test.csv").iloc[-1]
    assert last["loss"] == pytest.approx(losses.sum().item() / 360, rel=1e-5)
    assert last["error"] == pytest.approx(100 * wrong.item() / 360, rel=1e-5)


@pytest.mark.xdist_group("compiler")  # imported by one process
def test_checkpoint_is_the_bare_net_even_if_a_compiled_one_was_trained(call_main, monkeypatch, tiny_run, tmp_path):
    """Compiled without the slow last stages; the run that was not compiled has the same losses, and goes on from it.

    The smaller last batch of an epoch is not compiled again: two epochs make one graph.
    """
    torch._dynamo.reset()
    counters.clear()
    compile_quickly = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda model, mode: compile_quickly(model))
    flags = [*TINY_RUN, "--no-plot", "--save", tmp_path / "run"]
    status, _, errors = call_main(train, *flags, "--compile")
    assert status == 0, errors
    assert counters["stats"]["unique_graphs"] == 1
    checkpoint = torch.load(tmp_path / "run" / "latest.pth", weights_only=True)
    assert list(checkpoint["net"]) == list(DenseNet(depth=10, growth_rate=4).state_dict())
    assert checkpoint["epoch"] == 2
    assert checkpoint["classes"] == [str(i) for i in range(10)]
    compiled, plain = (pd.read_csv(folder / "train.csv")["loss"] for folder in (tmp_path / "run", tiny_run))
    assert compiled.tolist() == pytest.approx(plain.tolist(), rel=1e-3)
    status, out, errors = call_main(train, *flags, "--resume")
    assert (status, f"{tmp_path / 'run'} is complete" in out) == (0, True), errors


def test_held_out_images_get_columns_of_their_own(call_main, tmp_path):
    status, out, errors = call_main(train, *TINY, "--val", 50, "--epochs", 1, "--no-plot", "--save", tmp_path / "run")
    assert status == 0, errors
    table = pd.read_csv(tmp_path / "run" / "test.csv")
    assert list(table.columns)[:5] == ["epoch", "loss", "error", "val_loss", "val_error"]
    line, last = out.splitlines()[2], out.splitlines()[3]
    (told,) = re.findall(r"val loss ([\d.]+) error ([\d.]+) %  test loss", line)
    assert [float(number) for number in told] == pytest.approx(table[["val_loss", "val_error"]].iloc[0].tolist(), abs=0.005)
    assert last == f"val error {table['val_error'][0]:.2f} %, test error {table['error'][0]:.2f} % after epoch 1"
    net, dataset = build_net(load_checkpoint(tmp_path / "run" / "latest.pth")), data.load("digits", ".", val=50)
    sums = loss_and_error_sums(predict(net, dataset.val.images, dataset.mean, dataset.std), dataset.val.labels) / 50
    assert table[["val_loss", "val_error"]].iloc[0].tolist() == pytest.approx([sums[0].item(), 100 * sums[1].item()], rel=1e-5)
    assert not list((tmp_path / "run").glob("*.png"))


@pytest.fixture
def steps(monkeypatch):
    """The steps that train.py takes, each with what holds while it is taken."""
    taken = []

    class Noted(TrainingStep):
        def __call__(self, images, labels, share):
            net, dtypes = self.model, []
            hook = net.fc.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
            result = super().__call__(images, labels, share)
            hook.remove()
            note = SimpleNamespace(net=net, optimizer=self.optimizer, training=net.training, dtype=dtypes[0], images=images)
            note.group = dict(self.optimizer.param_groups[0])
            note.deterministic = torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
            taken.append(note)
            return result

    monkeypatch.setattr(train, "TrainingStep", Noted)
    return taken


@cache
def digits():
    """The bytes of each training image, normalised."""
    dataset = data.load("digits", ".")
    return {image.numpy().tobytes() for image in data.normalize(dataset.train.images, dataset.mean, dataset.std)}


def is_augmented(images):
    return not {image.numpy().tobytes() for image in images} <= digits()


WAYS = {
    "--opt adam": lambda step: type(step.optimizer) is torch.optim.Adam,
    "--opt rmsprop": lambda step: type(step.optimizer) is torch.optim.RMSprop,
    "--lr 0.2": lambda step: step.group["lr"] in (0.2, 0.2 * 0.1),
    "--momentum 0.5": lambda step: step.group.get("momentum") == 0.5,
    "--no-nesterov": lambda step: not step.group.get("nesterov") and type(step.optimizer) is torch.optim.SGD,
    "--weight-decay 0.01": lambda step: step.group["weight_decay"] == 0.01,
    "--precision bf16": lambda step: step.dtype == torch.bfloat16,
    "--deterministic": lambda step: step.deterministic,
    "--augment": lambda step: is_augmented(step.images),
    "--no-bottleneck": lambda step: "dense1.0.conv2.weight" not in step.net.state_dict(),
    "--drop-rate 0.4": lambda step: step.net.dense1[0].dropout.p == 0.4,
    "--efficient": lambda step: step.net.dense1.efficient,
    "--init-channels 9": lambda step: step.net.conv1.weight.shape[0] == 9,
    "--batch-size 5": lambda step: len(step.images) == 5,
}


@pytest.mark.parametrize("flags", ["", *WAYS])
def test_other_ways_to_train(call_main, steps, tmp_path, flags):
    """A flag changes what it is for, from the first step to the last, and nothing of the other ways; no flag changes any."""
    small = ["--limit", 10, "--batch-size", 10, "--epochs", 2, "--no-plot", "--save", tmp_path / "run"]
    status, out, errors = call_main(train, *TINY, *small, *flags.split())
    assert status == 0, errors
    assert "epoch 2/2" in out
    assert np.isfinite(pd.read_csv(tmp_path / "run" / "train.csv")).all(axis=None)
    for step_taken in (steps[0], steps[-1]):
        assert {way for way, holds in WAYS.items() if holds(step_taken)} == ({flags} if flags else set())


def test_tf32_is_fp32_on_a_cpu(call_main, tiny_run, tmp_path):
    flags = [*TINY_RUN, "--precision", "tf32", "--no-plot", "--save", tmp_path / "run"]
    status, _, errors = call_main(train, *flags)
    assert status == 0, errors
    assert_same_run(tiny_run, tmp_path / "run")


def test_every_epoch_trains_with_its_own_rate_channels_last(call_main, steps, tmp_path):
    """Four epochs of one step each, in one go, and in two of which the second begins behind the first."""
    flags = [*TINY, "--limit", 8, "--batch-size", 8, "--no-plot"]
    for save, epochs, more in [("whole", 4, []), ("parts", 1, []), ("parts", 4, ["--resume"])]:
        status, _, errors = call_main(train, *flags, "--epochs", epochs, "--save", tmp_path / save, *more)
        assert status == 0, errors
    rates = [step_taken.group["lr"] for step_taken in steps]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.1, 0.1, 0.01, 0.001])
    assert all(step_taken.training for step_taken in steps)  # after each epoch the net was tested
    for weight in (step_taken.net.dense1[0].conv2.weight for step_taken in steps):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()


@pytest.mark.parametrize(
    ("flags", "device", "mode"),
    [
        (["--compile"], "cpu", "default"),
        (["--compile"], "cuda", "reduce-overhead"),
        (["--compile", "default"], "cuda", "default"),
        (["--compile", "reduce-overhead"], "cpu", "reduce-overhead"),
        ([], "cuda", None),
    ],
)
def test_what_is_compiled(monkeypatch, flags, device, mode):
    """Whole batches, in the mode of the flag; a smaller one, and the net that is saved, are not."""
    compiled, net = [], torch.nn.Linear(2, 2)
    monkeypatch.setattr(
        torch, "compile", lambda model, mode: lambda images: [model(images), compiled.append((mode, len(images)))][0]
    )
    take = TrainingStep(net, parse("--batch-size", "4", *flags), torch.device(device), World())
    for size in (4, 3):
        take(torch.zeros(size, 2), torch.zeros(size, dtype=torch.int64), 1.0)
    assert compiled == ([(mode, 4)] if mode else [])
    assert take.model is net


@pytest.mark.parametrize("exported", [False, True])
def test_init_begins_with_the_weights_of_another_run(call_main, tiny_run, tmp_path, exported):
    """At rate 0 they are also the weights that it ends with; the batch norms' running statistics have moved."""
    weights = tmp_path / "net.pth" if exported else tiny_run / "latest.pth"
    if exported:
        assert call_main(evaluate, tiny_run / "latest.pth", "--export", weights)[0] == 0
    flags = ["--seed", 2, "--lr", 0, "--epochs", 1, "--no-plot", "--save", tmp_path / "run"]
    status, _, errors = call_main(train, *TINY, "--init", weights if exported else tiny_run, *flags)
    assert status == 0, errors
    before, after = (build_net(load_checkpoint(path)) for path in (weights, tmp_path / "run" / "latest.pth"))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert not torch.equal(before.bn1.running_mean, after.bn1.running_mean)


def test_a_net_of_init_is_known_by_what_is_loaded_of_it(call_main, monkeypatch, tiny_run, tmp_path):
    """However somebody stored it: as parameters, in another order, in another precision, also in one that NumPy lacks."""
    weights = tmp_path / "net.pth"
    assert call_main(evaluate, tiny_run / "latest.pth", "--export", weights)[0] == 0
    words = [*TINY, "--init", str(weights)]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    state, digests = build_net(load_checkpoint(weights)).state_dict(keep_vars=True), []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.save({name: state[name].to(dtype) for name in reversed(state)}, weights)
        args, _, init = train.starting_point(train.build_parser(), parse(*words), {}, fresh=True)
        assert args.init_digest == digest(init["net"])
        digests.append(args.init_digest)
    assert (digests[0], len({*digests})) == (digest(load_checkpoint(tiny_run / "latest.pth")["net"]), 2)


@pytest.mark.parametrize(
    ("flags", "lacking"),
    [
        (["--growth-rate", 8], "--growth-rate=2 --init-channels=4"),
        (["--depth", 16, "--reduction", 0.6], "--depth=10 --reduction=0.5"),
        (["--no-bottleneck"], "--bottleneck --reduction=0.5 --init-channels=4"),
        (["--init-channels", 5], "--init-channels=4"),
    ],
)
def test_init_with_the_weights_of_another_net_touches_nothing(call_main, tiny_run, tmp_path, flags, lacking):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    flags = ["--dataset", "folder", "--data", "missing", *flags]  # which is not read
    status, _, errors = call_main(train, *TINY, *flags, "--init", tiny_run / "latest.pth", "--save", run, "--force")
    assert status == 2
    ways = f"leave these flags out, or give {lacking}"
    told = f"{tiny_run / 'latest.pth'} holds a different net from that of the model flags: {ways}"
    assert errors.splitlines()[1:] == [f"train.py: error: --init {told}"]
    trained = build_net(load_checkpoint(tiny_run / "latest.pth")).architecture
    train.refuse_another_net(parse(*TINY, *map(str, flags), *lacking.split()), trained)  # not refused
    assert (run / "latest.pth").read_bytes() == (tiny_run / "latest.pth").read_bytes()


@pytest.mark.parametrize("flags", [["--reduction", 0.5, "--init-channels", 4], ["--drop-rate", 0.1, "--efficient"]])
def test_init_takes_what_stands_for_the_same_shapes(tiny_run, flags):
    args, init = parse(*TINY, *map(str, flags)), load_checkpoint(tiny_run / "latest.pth")
    train.refuse_another_net(args, build_net(init).architecture)
    weights = init["net"]
    assert torch.equal(train.initial_net(args, init["classes"], init).fc.weight, weights["fc.weight"])


@pytest.mark.parametrize("flags", [[], ["--no-bottleneck"], ["--reduction", 0.6, "--init-channels", 5, "--drop-rate", 0.1]])
def test_init_makes_its_net_where_no_model_flags_are_given(call_main, tmp_path, flags):
    """Its shapes only: dropout is the run's own, 0.2 without augmentation."""
    more = ["--dataset", "digits", "--limit", 16, "--epochs", 1, "--no-plot"]
    first, second = tmp_path / "first", tmp_path / "second"
    for net, save in [(["--depth", 16, "--growth-rate", 2, *flags], first), (["--init", first / "latest.pth"], second)]:
        status, _, errors = call_main(train, *more, *net, "--save", save)
        assert status == 0, errors
    before, after = (load_checkpoint(run / "latest.pth")["model"] for run in (first, second))
    assert (after, after["depth"]) == (before | {"drop_rate": 0.2}, 16)


class Scaled(DenseNet):
    """A net with an argument that somebody has added: 0 makes the loss log 10."""

    def __init__(self, growth_rate=12, depth=100, reduction=None, num_classes=10, bottleneck=True, drop_rate=0.0,
                 init_channels=None, efficient=False, scale=1.0):  # fmt: skip
        super().__init__(growth_rate, depth, reduction, num_classes, bottleneck, drop_rate, init_channels, efficient)
        self.scale = scale

    def forward(self, x):
        return self.scale * super().forward(x)


def test_an_argument_that_is_added_to_the_net_needs_a_flag_of_its_name_and_no_more(call_main, monkeypatch, tiny_run, tmp_path):
    def add_model_flags(group, add=flags.add_model_flags):
        add(group)
        group.add_argument("--scale", type=float, default=1.0)

    with monkeypatch.context() as edited:
        edited.setattr(flags, "add_model_flags", add_model_flags)
        for module in (flags, checkpoint):
            edited.setattr(module, "DenseNet", Scaled)
        short = [*TINY, "--epochs", "1", "--no-plot"]
        assert call_main(train, *short, "--scale", "0", "--save", tmp_path / "a")[0] == 0
        assert call_main(train, *short, "--init", tmp_path / "a", "--save", tmp_path / "b")[0] == 0
        assert call_main(train, *short, "--init", tmp_path / "a", "--scale", "1", "--save", tmp_path / "c")[0] == 0
        losses = {name: float(run_folder.last_row(tmp_path / name / "test.csv")["loss"]) for name in "abc"}
        assert losses["a"] == losses["b"] == pytest.approx(math.log(10), abs=1e-5) != losses["c"]
        assert "test loss 2.30 " in call_main(evaluate, tmp_path / "b", "--out", tmp_path)[1]
        assert build_net(load_checkpoint(tiny_run / "latest.pth")).scale == 1  # which is older than the argument
    told = "the checkpoint's net has scale, which this densenet.py does not know: use that of its run"
    assert told in call_main(evaluate, tmp_path / "b")[2]


@pytest.mark.parametrize(
    ("flags", "begun", "size"), [([], {}, 64), ([], {"image_size": 8}, 8), (["--image-size", "16"], {}, 16), (TINY[:2], {}, 32)]
)
def test_pictures_have_the_size_of_the_net_of_init_unless_told_otherwise(monkeypatch, tiny_run, tmp_path, flags, begun, size):
    """By the flag, or by the run that was killed before its checkpoint; the images of other data sets have their own."""
    init = load_checkpoint(tiny_run / "latest.pth")
    torch.save(init | {"image_size": 67}, tmp_path / "net.pth")  # of data that somebody added; a folder's are multiples of 4
    words = ["--dataset", "folder", "--init", str(tmp_path / "net.pth"), *flags]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    args, _ = train.read_init(train.build_parser(), parse(*words), begun)
    assert (args.image_size, args.depth) == (size, 10)


def test_a_run_is_not_replaced_by_one_that_begins_with_its_net(call_main, tiny_run, tmp_path):
    save = shutil.copytree(tiny_run, tmp_path / "run")
    (save / "confusion.png").touch()  # evaluate.py's
    flags = [*TINY, "--epochs", 1, "--no-plot", "--save", save, "--force"]
    status, _, errors = call_main(train, *flags, "--init", tmp_path / "run" / ".." / "run" / "latest.pth")
    assert (status, "--force would delete --init" in errors) == (2, True)
    assert (save / "latest.pth").read_bytes() == (tiny_run / "latest.pth").read_bytes()
    assert call_main(train, *flags, "--init", tiny_run / "latest.pth")[0] == 0
    assert not (save / "confusion.png").exists()


@pytest.mark.parametrize("theirs", [["0", "1"], ["red", "blue"], ["blue", "red"]])
def test_a_classifier_is_taken_over_for_the_same_classes_in_their_order_alone(capsys, theirs):
    args, trained = parse(*TINY, "--init", "net.pth"), DenseNet(depth=10, growth_rate=2, num_classes=2)
    net = train.initial_net(args, ["blue", "red"], {"net": trained.state_dict(), "classes": theirs})
    same = theirs == ["blue", "red"]
    assert torch.equal(net.fc.weight, trained.fc.weight) == same
    assert torch.equal(net.bn1.weight, trained.bn1.weight)
    told = "--init net.pth: a new classifier, because that net has other classes; the rest is loaded\n"
    assert capsys.readouterr().out == told * (not same)
    wider = DenseNet(depth=10, growth_rate=3, num_classes=2).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for conv1\.weight"):  # what is left out is the classifier alone
        train.initial_net(args, ["blue", "red"], {"net": wider, "classes": theirs})


def test_init_for_other_classes_has_a_new_classifier(call_main, tiny_run, pictures, tmp_path):
    """Two, instead of ten: the one that --seed gives. At rate 0 the net ends with the weights that it began with."""
    weights, run = tiny_run / "latest.pth", tmp_path / "run"
    flags = [*TINY, "--dataset", "folder", "--data", pictures, "--limit", 12, "--seed", 2, "--lr", 0, "--epochs", 1]
    status, out, errors = call_main(train, *flags, "--no-plot", "--init", weights, "--save", run)
    assert status == 0, errors
    told = f"--init {weights}: a new classifier, because that net has other classes; the rest is loaded"
    assert out.splitlines().count(told) == 1
    new = train.initial_net(parse(*TINY, "--seed", "2"), ["blue", "red"], None)
    begun, ended = (build_net(load_checkpoint(path)) for path in (weights, run / "latest.pth"))
    expected = {**dict(begun.named_parameters()), "fc.weight": new.fc.weight, "fc.bias": new.fc.bias}
    assert all(torch.equal(parameter, expected[name]) for name, parameter in ended.named_parameters())
    assert len(ended.fc.bias) == 2


@pytest.fixture(scope="module")
def begun_from_init(tiny_run, tmp_path_factory, forked):
    """(a run that begins with the net of --init, and its flags); the file is in the working directory."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [*TINY, "--batch-size", 32, "--no-plot", "--opt", "adam", "--epochs", 2, "--init", "net.pth"]
    shutil.copy(tiny_run / "latest.pth", folder / "net.pth")
    assert forked([ROOT / "train.py", *flags, "--save", folder / "whole"], cwd=folder).wait().returncode == 0
    return folder / "whole", flags


@pytest.mark.parametrize(("stop_at", "told"), [(1, "from the start"), (2, "from the start"), (5, "continuing after epoch 1")])
def test_a_run_that_is_resumed_needs_the_file_of_init_no_more(
    call_main, monkeypatch, begun_from_init, tiny_run, tmp_path, stop_at, told
):
    """Stopped in its first epoch of three steps, or later; and continued from another working directory."""
    (whole, flags), weights, place = begun_from_init, tmp_path / "net.pth", ["--save", tmp_path / "parts"]
    shutil.copy(tiny_run / "latest.pth", weights)
    monkeypatch.chdir(tmp_path)
    for number, more in [(stop_at, flags), (2, ["--resume"])]:  # the second time in the epoch that goes on
        with monkeypatch.context() as patch:
            patch.setattr(train.TrainingStep, "__call__", stopping(train.TrainingStep.__call__, number))
            assert call_main(train, *more, *place)[0] == 128 + signal.SIGTERM
        weights.unlink(missing_ok=True)
        assert load_checkpoint(tmp_path / "parts" / "latest.pth")["epoch"] == (stop_at > 3)
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
    status, out, errors = call_main(train, *place, "--resume")
    assert (status, told in out) == (0, True), errors
    assert_same_run(whole, tmp_path / "parts")


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_run_goes_on_with_the_net_of_init_at_another_path(call_main, tiny_run, tmp_path, checkpoint):
    """As in a cluster's scratch folder; another net there, or none, is refused."""
    run, moved = tmp_path / "run", tmp_path / "moved.pth"
    flags = [*TINY, "--no-plot", "--opt", "adam", "--save", run]
    assert call_main(train, *flags, "--epochs", 1, "--init", tiny_run)[0] == 0
    if not checkpoint:
        (run / "latest.pth").unlink()
    before = contents(run)
    missing = "leave out --init, which the run no longer needs" if checkpoint else "put it back, --init needs it until"
    weights = {"net": DenseNet(depth=10, growth_rate=2).state_dict()}
    torch.save(torch.load(tiny_run / "latest.pth") | weights, tmp_path / "other")
    other = f"the net in --init {tmp_path / 'other'} is not the one that the run was begun with"
    for path, told in [(moved, f"{moved} does not exist: {missing}"), (tmp_path / "other", other)]:
        status, _, errors = call_main(train, *flags, "--epochs", 2, "--init", path, "--resume")
        assert (status, told in errors) == (2, True), errors
        assert contents(run) == before
    shutil.copy(tiny_run / "latest.pth", moved)
    status, out, errors = call_main(train, *flags, "--epochs", 2, "--init", moved, "--resume")
    assert (status, ("continuing after epoch 1" if checkpoint else "from the start") in out) == (0, True), errors
    assert json.loads((run / "args.json").read_text())["init"] == str(moved)


def test_a_run_that_was_begun_without_init_cannot_go_on_with_it(call_main, tiny_run, tmp_path):
    """Told whether or not the file is there."""
    shutil.copytree(tiny_run, tmp_path / "run")
    for path in (tiny_run, tmp_path / "none"):
        status, _, errors = call_main(train, "--save", tmp_path / "run", "--resume", "--init", path)
        assert (status, f"was begun with init None, not {path}: resume it as it was begun" in errors) == (2, True), errors


def stopping(take, stop_at):
    """A step that takes all before the one of this number, which ends the run."""
    numbers = itertools.count(1)

    def step(*arguments):
        if next(numbers) == stop_at:
            raise Stopped(signal.SIGTERM)
        return take(*arguments)

    return step


def test_a_checkpoint_that_was_lost_before_the_first_epoch_ended_is_the_file_of_init_again(call_main, tiny_run, tmp_path):
    run, weights = tmp_path / "run", tmp_path / "net.pth"
    flags = [*TINY, "--no-plot", "--epochs", 1, "--save", run, "--init", weights]
    shutil.copy(tiny_run / "latest.pth", weights)
    assert call_main(train, *flags)[0] == 0
    whole = shutil.copytree(run, tmp_path / "whole")
    (run / "latest.pth").unlink()
    weights.rename(tmp_path / "gone")
    before = contents(run)
    status, _, errors = call_main(train, *flags, "--resume")
    told = f"{weights} does not exist: put it back, --init needs it until the run has a checkpoint"
    assert (status, told in errors) == (2, True)
    assert contents(run) == before
    torch.save(torch.load(tmp_path / "gone") | {"net": torch.load(whole / "latest.pth")["net"]}, weights)
    status, _, errors = call_main(train, *flags, "--resume")
    told = f"the net in --init {weights} is not the one that the run was begun with: put that back, or choose another --save"
    assert (status, told in errors) == (2, True)
    assert contents(run) == before
    (tmp_path / "gone").rename(weights)
    assert call_main(train, *flags, "--resume")[0] == 0
    assert_same_run(whole, run)


def test_a_terminal_shows_a_bar_with_loss_rate_and_time_left_and_one_of_the_test(run_on_terminal, tmp_path):
    shown = run_on_terminal("train.py", *TINY, "--epochs", 1, "--no-plot", "--save", tmp_path / "run")
    for part in (b"images/s", b"loss", b"error", b"lr 0.1", b"epoch 1", b"96.0/96.0", b"test: ", b"reading digits: "):
        assert part in shown


def test_an_epoch_of_cifar(cifar, call_main, tmp_path):
    flags = ["--depth", 10, "--growth-rate", 2, "--limit", 144, "--epochs", 1, "--device", "cpu", "--no-plot"]
    status, out, errors = call_main(train, "--data", cifar, *flags, "--save", tmp_path / "run")
    assert status == 0, errors
    assert out.splitlines()[2].startswith("epoch 1/1  ")
    rows, tests = (pd.read_csv(tmp_path / "run" / f"{part}.csv") for part in ("train", "test"))
    assert rows["epoch"].tolist() == pytest.approx([1 / 3, 2 / 3, 1], abs=1e-6)
    assert tests["epoch"].tolist() == [1]
    wrong = tests["error"] * 100  # of 10,000 test images
    assert wrong.tolist() == pytest.approx(wrong.round().tolist(), abs=0.06)
    checkpoint = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert (checkpoint["epoch"], checkpoint["classes"][3], checkpoint["args"]["augment"]) == (1, "cat", True)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth", 41], "depth 41 does not fit: depth - 4 must be a multiple of 6, the nearest are 40 and 46"),
        (["--depth", 41, "--no-bottleneck"], "nearest are 40 and 43"),
        (["--growth-rate", 0], "growth_rate 0 is too small: it must be 1 or more"),
        (["--batch-size", 0], "--batch-size/--batchSz: 0 is out of range: it must be 1 or more"),
        (["--batch-size", 10**9], "1000000000 is out of range: it must be 10000000 or less"),
        (["--batch-size", "many"], "invalid int value: 'many'"),
        (["--reduction", 0], "reduction 0.0 is out of range: it must be in (0, 1]"),
        (["--reduction", 1.5], "reduction 1.5 is out of range"),
        (["--drop-rate", 1], "drop_rate 1.0 is out of range"),
        (["--lr", "nan"], "nan is out of range"),
        (
            ["--limit", 2000],
            "1,437 training images are too few for --limit 2000, or a class would have none left: choose fewer",
        ),
        (
            ["--val", 1437, "--limit", 1],
            "1,437 training images are too few for --val 1437 and --limit 1, or a class would have none left: choose fewer",
        ),
        (["--dataset", "mnist"], "invalid choice: 'mnist'"),
        (["--dataset", "cifar100"], "put cifar-100-python.tar.gz there"),
        (["--dataset", "folder"], "train is not a folder"),
        (["--precision", "fp16", "--device", "cpu"], "--precision fp16 needs a GPU"),
        (["--init", "missing.pth"], "missing.pth does not exist"),
        (["--compile", "fast"], "invalid choice: 'fast'"),
        (["--seed", "9" * 23], "--seed: " + "9" * 23 + " is out of range: it must be 18446744073709551615 or less"),
        (["--epochs", "9" * 30], "is out of range: it must be 100000 or less"),
        (["--depth", "1000000"], "--depth: 1000000 is out of range"),
        (["--weight-decay", "inf"], "inf is out of range"),
        (["--momentum", "1.1"], "--momentum: 1.1 is out of range: it must be 1 or less"),
        (["--save", ""], "--save: the name is empty: give one, or leave out the flag"),
        (["--device", "gpu"], "'gpu' is not a device that PyTorch can use here: choose auto, "),
        (["--device", "meta"], "'meta' is not a device"),
        (["--device", "cuda:-1"], "'cuda:-1' is not a device"),
        (["--device", ""], "--device: the name is empty"),
        (["--save", f"{__file__}/run", "--dataset", "cifar100"], "run is not a writable folder: choose another"),
        (["--save", __file__], f"--save {__file__} is not a folder: name that of a run, or a new one"),
        (["--save", __file__, "--resume"], f"--save {__file__} is not a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(call_main, tmp_path, flags, message):
    save = [] if "--save" in flags else ["--save", tmp_path / "run"]
    status, out, errors = call_main(train, *TINY, "--epochs", 1, "--data", tmp_path / "data", *save, *flags)
    assert status == 2
    usage, *lines = errors.splitlines()
    assert usage.startswith("usage: train.py")
    assert len(lines) == 1
    assert message in lines[0]
    assert out == ""
    assert not list(tmp_path.iterdir())  # neither a run nor, of a name mistyped, a folder of data


def test_a_link_to_nothing_is_no_folder_of_a_run(call_main, tmp_path):
    link = tmp_path / "link"
    link.symlink_to("gone")
    status, _, errors = call_main(train, *TINY, "--save", link)
    assert (status, f"--save {link} is not a folder: name that of a run, or a new one" in errors) == (2, True)
    assert not link.exists()


def test_a_folder_with_a_run_is_kept_unless_forced(call_main, tiny_run, tmp_path):
    save = shutil.copytree(tiny_run, tmp_path / "run")
    (save / "notes.txt").write_text("mine")
    before = contents(save)
    status, _, errors = call_main(train, *TINY, "--save", save)
    assert (status, "already holds a run" in errors, "--force" in errors) == (2, True, True)
    assert contents(save) == before
    status, _, errors = call_main(train, *TINY, "--epochs", 1, "--no-plot", "--save", save, "--force")
    assert status == 0, errors
    assert len(pd.read_csv(save / "train.csv")) == 2
    assert (save / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "--depth", "41", "--save", "run"],
        ["train.py", "--dataset", "folder", "--data", "missing", "--save", "run"],
        ["train.py", "--dataset", "digits", "--init", "missing.pth", "--save", "run"],
        ["train.py", "--dataset", "digits", "--limit", "many", "--save", "run"],
        ["evaluate.py", "missing.pth"],
        ["plot.py", "missing"],
        ["make_graph.py", "--depth", "11"],
    ],
)
def test_no_traceback_reaches_a_person(run_script, tmp_path, command):
    """Each program in a process of its own: the line of its usage, and one that says what is wrong."""
    done = run_script(*command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    usage, line = done.stderr.splitlines()
    assert usage.startswith(f"usage: {command[0]} ")
    assert line.startswith(f"{command[0]}: error: ")
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(call_main, tmp_path):
    flags = ["--lr", "1e30", "--epochs", 3, "--batch-size", 32, "--no-plot", "--save", tmp_path / "run"]
    status, _, errors = call_main(train, *TINY, *flags)
    assert (status, "at step 2 of epoch 1: start again with a lower --lr" in errors) == (1, True)
    rows = pd.read_csv(tmp_path / "run" / "train.csv")
    assert np.isfinite(rows["loss"][0])
    assert not np.isfinite(rows["loss"][1])
    assert not (tmp_path / "run" / "latest.pth").exists()


def test_a_net_that_is_not_finite_is_not_saved(call_main, tmp_path):
    """The last step of the epoch spoils the weights: its loss was still finite, that of the test images is not."""
    flags = ["--lr", "1e38", "--epochs", 1, "--batch-size", 96, "--no-plot", "--save", tmp_path / "run"]
    status, _, errors = call_main(train, *TINY, *flags)
    assert (status, "in the test after epoch 1" in errors) == (1, True)
    assert not (tmp_path / "run" / "latest.pth").exists()


def test_a_test_loss_may_be_far_beyond_that_of_a_step(call_main, monkeypatch, tmp_path):
    """The running statistics lag behind the weights; the loss of the held-out images has to be finite, too."""
    flags = [*TINY, "--epochs", 1, "--batch-size", 96, "--val", 9, "--no-plot", "--save", tmp_path / "run"]
    status, _, errors = call_main(train, *flags, "--lr", 1e4)
    assert status == 0, errors
    assert pd.read_csv(tmp_path / "run" / "test.csv")["loss"][0] > train.MAX_LOSS
    monkeypatch.setattr(train, "test", lambda *arguments: [1.0, 1.0, math.nan, 1.0])
    status, _, errors = call_main(train, *flags, "--force")
    assert (status, "the loss is nan in the test after epoch 1" in errors) == (1, True)


def test_a_step_rounds_as_its_run_says(put_back):
    """Whatever was set before. Losses are scaled in fp16 alone."""
    for before, precision in itertools.pairwise(["fp32", "tf32", "fp32", "bf16", "fp32", "fp16"]):
        set_precision(before)
        take = TrainingStep(torch.nn.Linear(2, 2), parse("--precision", precision), torch.device("cpu"), World())
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision != "fp32")
        assert take.scaler.is_enabled() == (precision == "fp16")


def test_in_fp16_a_step_that_overflows_is_left_out_and_the_scale_is_halved():
    torch.manual_seed(0)
    net = DenseNet(depth=10, growth_rate=4)
    take = TrainingStep(net, parse("--precision", "fp16"), torch.device("cpu"), World())
    before, scale = [p.clone() for p in net.parameters()], take.scaler.get_scale()
    take(torch.full((4, 3, 8, 8), math.inf), torch.zeros(4, dtype=torch.int64), 1.0)
    assert all(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True))
    assert take.scaler.get_scale() == scale / 2


@pytest.mark.parametrize("flags", [[], ["--no-nesterov"], ["--momentum", "0"]])
def test_in_fp16_an_overflow_in_the_first_step_leaves_no_garbage_in_the_momentum(flags):
    """PyTorch's fused SGD allocates it in that step, and fills it only if nothing overflows; without that, nothing changes."""
    results = []
    for precision, overflows in [("fp32", False), ("fp16", False), ("fp16", True)]:
        net = torch.nn.Linear(300, 300)
        torch.nn.init.ones_(net.weight)
        optimizer = step.make_optimizer(net, parse("--precision", precision, *flags))
        for found_inf in (overflows, False, False):
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, 0.5)
            optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.tensor(float(found_inf))
            optimizer.step()
            results.append(net.weight.detach().clone())
    plain, fp16, overflown = results[:3], results[3:6], results[6:]
    assert all(map(torch.equal, fp16, plain))
    assert torch.equal(overflown[0], torch.ones(300, 300))
    assert all(map(torch.equal, overflown[1:], plain[:2]))


def test_seconds_are_of_an_epochs_steps_and_the_time_left_is_of_whole_epochs(call_main, monkeypatch, tmp_path):
    """By a clock on which a step lasts a second and a test 100."""
    now = [0]

    def lasting(seconds, real):
        return lambda *arguments: [now.append(now[-1] + seconds), real(*arguments)][1]

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[-1]))
    monkeypatch.setattr(train, "test", lasting(100, train.test))
    monkeypatch.setattr(TrainingStep, "__call__", lasting(1, TrainingStep.__call__))
    flags = [*TINY_RUN, "--no-plot", "--save", tmp_path / "run"]
    status, out, errors = call_main(train, *flags)
    assert status == 0, errors
    assert [line.split("  ")[-2:] for line in out.splitlines()[2:4]] == [
        ["32 images/s", "0:01:43 left"],
        ["32 images/s", "0:00:00 left"],
    ]
    assert pd.read_csv(tmp_path / "run" / "test.csv")["seconds"].tolist() == [3, 3]


def test_sgd_without_momentum_has_none_of_nesterovs():
    """Which PyTorch refuses without momentum."""
    (group,) = step.make_optimizer(torch.nn.Linear(2, 2), parse("--momentum", "0")).param_groups
    assert (group["momentum"], group["nesterov"]) == (0, False)


def test_the_loss_of_a_step_in_bf16_is_that_of_its_logits_in_float32():
    torch.manual_seed(0)
    net, outputs = DenseNet(depth=10, growth_rate=4), []
    net.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    labels = torch.randint(10, (4,))
    loss, _ = TrainingStep(net, parse("--precision", "bf16"), torch.device("cpu"), World())(
        torch.randn(4, 3, 8, 8), labels, 1.0
    )
    assert outputs[0].dtype == torch.bfloat16
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(outputs[0].float(), labels), rtol=1e-6, atol=0)


def test_freed_memory_is_kept_for_the_next_step(call_main, monkeypatch, tmp_path):
    devices = []
    monkeypatch.setattr(train, "keep_freed_memory", devices.append)
    assert call_main(train, *TINY, "--limit", 8, "--epochs", 1, "--no-plot", "--save", tmp_path / "run")[0] == 0
    assert devices == [torch.device("cpu")]


def test_the_bar_of_a_resumed_run_begins_where_the_run_does(call_main, monkeypatch, tmp_path):
    words = [*TINY, "--opt", "adam", "--no-plot", "--save", tmp_path / "run"]
    assert call_main(train, *words, "--epochs", 1)[0] == 0
    bars, progress = [], train.progress
    monkeypatch.setattr(train, "progress", lambda **options: [bars.append(options), progress(**options)][1])
    status, _, errors = call_main(train, *words, "--epochs", 3, "--resume")
    assert status == 0, errors
    assert [(bar["initial"], bar["total"]) for bar in bars] == [(96, 288)]


def test_a_new_classifier_is_told_of_by_one_rank(capsys):
    args, trained = parse(*TINY, "--init", "net.pth"), DenseNet(depth=10, growth_rate=2, num_classes=2)
    train.initial_net(args, ["blue", "red"], {"net": trained.state_dict(), "classes": ["red", "blue"]}, quiet=True)
    assert capsys.readouterr().out == ""


def test_how_the_steps_are_taken_is_said():
    args, dataset = parse(*TINY, "--efficient", "--compile", "--precision", "bf16"), data.load("digits", ".", limit=8)
    args.capture = True
    _, how = train.opening_lines(DenseNet(depth=10, growth_rate=2), dataset, args, None)
    assert how.endswith(", bf16, capture, compile, efficient, work/digits.base")


def test_the_host_may_wait_for_the_device_again_when_one_step_was_watched(streams_of_nothing):
    before = torch.cuda.get_sync_debug_mode()
    with pytest.raises(ZeroDivisionError), step.noted_obstacles():
        raise ZeroDivisionError
    assert torch.cuda.set_sync_debug_mode.call_args_list == [mock.call("warn"), mock.call(before)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_weight_is_kept_rounded_for_the_next_step(precision):
    """A captured step computes what it reads; a cache would be filled in a step before it."""
    net, cached = torch.nn.Linear(2, 2), []
    net.register_forward_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    TrainingStep(net, parse("--precision", precision), torch.device("cpu"), World())(
        torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), 1.0
    )
    assert cached == [False]


def test_an_optimiser_that_is_a_choice_only_is_not_sgd():
    args = SimpleNamespace(opt="adamw", lr=None, weight_decay=0.0001, momentum=0.9, nesterov=True, precision="fp32")
    with pytest.raises(ValueError, match="does not know --opt adamw"):
        step.make_optimizer(torch.nn.Linear(1, 1), args)


def test_rates_of_groups_of_parameters_are_not_replaced_by_one(monkeypatch):
    net = torch.nn.Linear(2, 2)
    groups = [{"params": [net.weight]}, {"params": [net.bias], "lr": 0.01}]
    monkeypatch.setattr(step, "make_optimizer", lambda net, args: torch.optim.SGD(groups, lr=0.1))
    take = TrainingStep(net, parse("--precision", "fp32"), torch.device("cpu"), World())
    assert take.begin_epoch(None) == 0.1
    with pytest.raises(ValueError, match="the parameter groups have different ones"):
        take.begin_epoch(0.1)
    assert [group["lr"] for group in take.optimizer.param_groups] == [0.1, 0.01]


def test_a_learning_rate_of_0_is_set_as_any_other():
    """As at the end of a cosine."""
    take = TrainingStep(torch.nn.Linear(2, 2), parse(), torch.device("cpu"), World())
    assert [take.begin_epoch(rate) for rate in (0.1, 0.0, None)] == [0.1, 0.0, 0.0]
