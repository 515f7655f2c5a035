import argparse
import contextlib
import json
import os
import resource
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

import bench
import endings
import flags
from step import TrainingStep

CPU = torch.device("cpu")
TINY = ["--depth", "10", "--growth-rate", "2", "--batch-size", "4", "--image-size", "8"]


def parse(*arguments):
    args = flags.parse_args(bench.build_parser("", bench.VARIANTS), [*TINY, *arguments])
    flags.fill_in(args, CPU)
    return args


def test_the_table_and_its_json(call_main, monkeypatch, tmp_path):
    worker, ended = bench.worker, []

    @contextlib.contextmanager
    def watched(*arguments):
        with worker(*arguments) as (process, connection):
            yield process, connection
        ended.append(process.exitcode)

    monkeypatch.setattr(bench, "worker", watched)
    settings = ["--rounds", 2, "--steps", 1, "--device", "cpu", "--only", "efficient", "plain"]
    status, out, errors = call_main(bench, *TINY, *settings, "--json", tmp_path / "report.json")
    assert (status, ended) == (0, [0, 0]), errors  # each by itself
    heading, _, names, rule, *rows = out.splitlines()
    assert "bench.py --depth 10" in heading
    assert ": L=10, k=2, fp32, batch 4, 2 x 1 steps, " in heading
    assert heading.endswith("torch " + torch.__version__)
    assert names == "| | ms/step | images/s | ratio | memory, GB |"
    assert len({line.count("|") for line in (names, rule, *rows)}) == 1  # Markdown takes it for a table
    assert [row.split(" | ")[0] for row in rows] == ["| efficient", "| plain"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert "\n".join(report["table"]) + "\n" == out
    assert [len(result["ms_per_step"]) for result in report["variants"].values()] == [2, 2]
    assert all(0.1 < result["memory_gb"] < 10 for result in report["variants"].values())


def test_the_numbers_are_medians_and_quartiles():
    results = {"plain": {"ms_per_step": [50, 10, 20, 40, 30], "memory_gb": 1.5}}
    results["efficient"] = {"ms_per_step": [60], "memory_gb": 1}
    *_, plain, efficient = bench.table(results, parse(), CPU)
    assert plain == "| plain | 30.0 | 133.3 (100.0 to 200.0) | 1.00 | 1.50 |"
    assert efficient == "| efficient | 60.0 | 66.7 (66.7 to 66.7) | 0.50 | 1.00 |"


# -------------------------------------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("plain", [], (False, False, None)),
        ("efficient", [], (True, False, None)),
        ("efficient-captured", [], (True, True, None)),
        ("plain-compiled", [], (False, False, "auto")),
        ("efficient-compiled", ["--compile", "default"], (True, False, "default")),
        ("efficient-compiled", ["--compile", "none"], (True, False, "auto")),
    ],
)
def test_what_a_variant_is(name, asked, expected):
    args = bench.variant_arguments(name, parse(*asked))
    assert (args.efficient, args.capture, args.compile) == expected


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_is_captured_or_compiled_is_measured_unasked_on_a_gpu_only(call_main, monkeypatch, kind):
    measured = []
    monkeypatch.setattr(bench, "choose_device", lambda name: torch.device(kind))
    monkeypatch.setattr(bench, "device_name", lambda device: "a machine")
    monkeypatch.setattr(bench, "measure", lambda factories, args, device: measured.extend(factories))
    monkeypatch.setattr(bench, "table", lambda results, args, device: [str(args.steps)])
    assert call_main(bench) == (0, "10\n" if kind == "cuda" else "2\n", "")
    assert measured == list(bench.VARIANTS[: 6 if kind == "cuda" else 2])


def test_a_step_is_that_of_train():
    """The same numbers as of the loop of train.py on the same batches, from the same weights."""
    args = bench.variant_arguments("plain", parse())
    step = bench.make_step(args, CPU)
    results = [step() for _ in range(18)]  # an epoch of the random images has 16 batches
    torch.manual_seed(args.seed)
    train_step = TrainingStep(flags.make_net(args).to(memory_format=torch.channels_last), args, CPU, bench.World())
    train_step.begin_epoch(args.lr)
    batches = bench.random_batches(args, CPU)
    assert all(torch.equal(result, train_step(*next(batches))) for result in results)


def test_batches_are_augmented_and_drawn_anew():
    batches = bench.random_batches(parse(), CPU)
    epochs = [[next(batches) for _ in range(16)] for _ in range(2)]
    first, second = (torch.cat([images for images, _, _ in epoch]) for epoch in epochs)
    assert first.shape == (64, 3, 8, 8)
    assert len(first.flatten(1).unique(dim=0)) == 64
    assert not torch.equal(first, second)
    borders = first[:, :, [0, -1]].flatten(1)
    assert (borders == 0).any()  # padded, where an image was shifted
    assert all(share == 1 for _, _, share in epochs[0])


# ------------------------------------------------------------------------------------------------------------ the workers


def step_with_troubles():
    """A step that fails in one way after the other, and then ends its process."""
    troubles = iter([ZeroDivisionError("of the step"), torch.OutOfMemoryError("CUDA out of memory."), None])

    def step():
        trouble = next(troubles, signal.SIGKILL)
        if isinstance(trouble, Exception):
            raise trouble
        if trouble is not None:
            os.kill(os.getpid(), trouble)

    return step


def test_a_bug_in_a_worker_is_a_bug_and_a_killed_one_is_named():
    before = signal.getsignal(signal.SIGINT)
    with bench.worker("efficient", step_with_troubles, CPU) as worker:
        assert signal.getsignal(signal.SIGINT) == before != signal.SIG_IGN  # Ctrl-C is the parent's again
        process, _ = worker
        with pytest.raises(ZeroDivisionError, match="of the step") as bug:
            bench.take_steps([worker], 3)
        ending = argparse.Namespace(needs="batches", remedy="fewer", resume=None)
        assert endings.status_and_message(bug.value, ending) == (None, "this is a bug")
        assert "in step\n" in bug.value.__notes__[0]  # the traceback of the worker
        with pytest.raises(torch.OutOfMemoryError) as full:
            bench.take_steps([worker], 1)
        assert endings.status_and_message(full.value, ending) == (1, "memory ran out for batches: choose fewer")
        os.kill(process.pid, signal.SIGINT)  # Ctrl-C reaches all processes, and is the parent's
        [(ms, gigabytes)] = bench.take_steps([worker], 1)
        assert ms > 0 < gigabytes
        for _ in range(2):  # it is gone also when it is asked again
            with pytest.raises(endings.Refused, match=r"^efficient's process was killed: if memory ran out, choose a smaller"):
                bench.take_steps([worker], 1)


def test_a_number_is_of_one_step_and_memory_is_in_bytes(monkeypatch):
    """Of four steps that take a quarter of a second each, by a clock that they move."""
    now = [0.0]
    monkeypatch.setattr(bench, "time", argparse.Namespace(perf_counter=lambda: now[0]))
    ms, gigabytes = bench.measured(lambda: now.append(now.pop() + 0.25), 4, CPU)
    unit = 1 if sys.platform == "darwin" else 1024
    assert ms == 250
    assert gigabytes == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, rel=0.01)


@pytest.mark.parametrize(("kind", "warm_ups"), [("cpu", ["a", "x-compiled", "b", "y-compiled"]), ("cuda", ["xy", "a", "b"])])
def test_variants_warm_up_and_then_take_turns(monkeypatch, kind, warm_ups):
    """What is measured first is in no number: kernels are compiled and chosen in it, the compiler's for all at once."""
    asked, names = [], ["a", "x-compiled", "b", "y-compiled"]

    def take_steps(workers, steps):
        if workers:
            asked.append(([process.name for process, _ in workers], steps))
        return [(len(asked), len(asked) / 8)] * len(workers)

    monkeypatch.setattr(bench, "worker", lambda name, *_: contextlib.nullcontext((SimpleNamespace(name=name), None)))
    monkeypatch.setattr(bench, "take_steps", take_steps)
    results = bench.measure(dict.fromkeys(names), argparse.Namespace(rounds=2, steps=30), torch.device(kind))
    groups = [["x-compiled", "y-compiled"] if group == "xy" else [group] for group in warm_ups]
    assert asked == [(group, 5) for group in groups] + [([name], 30) for name in names] * 2
    for i, name in enumerate(names, start=len(groups) + 1):
        assert results[name] == {"ms_per_step": [i, i + 4], "memory_gb": (i + 4) / 8}


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", 41], "nearest are 40 and 46"),
        (["--growth-rate", 0], "growth_rate 0 is too small"),
        (["--efficient"], "--efficient and --capture are what variants differ in: choose them with --only"),
        (["--device", "cpu", "--only", "plain", "plain-captured"], "captured variants need a CUDA GPU: leave them out"),
        (["--capture"], "--efficient and --capture are what variants differ in: choose them with --only"),
        (["--device", "cpu", "--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["--json", "."], "argument --json: . is a folder: name a file in it"),
        (["--json", f"{__file__}/report.json"], "test_bench.py is not a writable folder: name another for"),
        (["--json", endings.__file__], "endings.py exists already and is not from this program, or damaged: name another"),
        (["--sync-bn"], "--sync-bn has no effect on one process, and a bench has no more: leave it out"),
        (["--device", "cuda:99"], "--device 'cuda:99' is not a device that PyTorch can use here"),
        (["--image-size", 30], "30 is not a multiple of 4: the nearest are 28 and 32"),
        (["--only", "torchvision"], "invalid choice: 'torchvision'"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence_and_status_2(call_main, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "measure", None)  # nothing is measured
    status, out, errors = call_main(bench, *arguments)
    assert (status, out, len(errors.splitlines())) == (2, "", 2)
    assert message in errors
    assert not list(tmp_path.iterdir())


def test_a_step_is_over_when_the_device_has_computed_it(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cpu, "synchronize", lambda: events.append("wait"))
    bench.measured(lambda: events.append("step"), 2, CPU)
    assert events == ["step", "step", "wait"]


@pytest.mark.parametrize("flags", [[], ["--deterministic"]])
def test_kernels_and_memory_are_those_of_a_run(monkeypatch, flags):
    told = []
    monkeypatch.setattr(bench, "keep_freed_memory", told.append)
    monkeypatch.setattr(bench, "set_determinism", told.append)
    bench.make_step(bench.variant_arguments("plain", parse(*flags)), CPU)
    assert told == [CPU, bool(flags)]


class Ending:
    """A process that has ended, with this status, and the connection to it."""

    name = "plain"

    def __init__(self, exitcode):
        self.exitcode = exitcode

    def join(self):
        pass

    def recv(self):
        raise EOFError


@pytest.mark.parametrize(
    ("exitcode", "error", "told"),
    [(0, RuntimeError, "^plain's process has ended$"), (1, RuntimeError, "has ended"), (-9, endings.Refused, "was killed")],
)
def test_only_a_process_that_was_killed_may_have_lacked_memory(exitcode, error, told):
    with pytest.raises(error, match=told):
        bench.receive(Ending(exitcode), Ending(exitcode))
