"""Programs that cannot go on: their last sentence, their exit status, and what they leave behind."""

import argparse
import os
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from test_distributed import torchrun
from test_run_folder import assert_same_run

import endings
import train
from endings import Refused

# A program that may take so many MB more than it has when all its modules are there; the rest of argv is its own.
LIMITED = """
import importlib, os, resource, sys
import sklearn.datasets, sklearn.model_selection, torch
program, megabytes = sys.argv.pop(1), int(sys.argv.pop(1))
module = importlib.import_module(program)
size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * 10**6, resource.RLIM_INFINITY))
sys.argv[0] = module.__file__
module.main()
"""

# train.py with a bug.
BROKEN = """
import sys, train
def fail(*arguments):
    raise KeyError("unforeseen")
train.print_epoch = fail
sys.argv[0] = train.__file__
train.main()
"""


def run(*command, env=(), **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict(env)}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **options)


def flags(save, *more):
    return [*TINY, "--batch-size", "40", "--epochs", "2", "--no-plot", "--save", str(save), *more]


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("megabytes", "more", "asked", "remedies"),
    [
        (5, [], "a net of L=10, k=4", ["--limit"]),  # not even the data
        (300, ["--growth-rate", "1500"], "a net of L=10, k=1500", ["a smaller net"]),  # the net
        (
            300,
            ["--depth", "100", "--batch-size", "96"],
            "batches of 96 and a net of L=100, k=4",
            ["--efficient", "--batch-size"],
        ),
        (
            900,
            ["--growth-rate", "100", "--batch-size", "4"],
            "L=10, k=100",
            ["a smaller net"],
        ),  # the test, 250 images at a time
    ],
)
def test_memory_that_runs_out_is_one_sentence(tmp_path, megabytes, more, asked, remedies):
    done = run("-c", LIMITED, "train", megabytes, *flags(tmp_path / "run", *more))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("train.py: memory ran out for batches of ")
    assert all(part in line for part in [asked, ": choose ", *remedies])
    assert "--precision bf16" not in line  # which needs no less memory on a CPU for what cannot be trained there


def test_memory_that_runs_out_in_a_resumed_run_keeps_its_checkpoint(call_main, tiny_run, tmp_path):
    save = tmp_path / "run"
    assert call_main(train, *flags(save, "--epochs", "1"))[0] == 0
    before = (save / "latest.pth").read_bytes()
    done = run("-c", LIMITED, "train", 15, *flags(save, "--efficient", "--resume"))
    (line,) = done.stderr.splitlines()
    assert (done.returncode, "memory ran out" in line, "choose --efficient" in line) == (1, True, False)
    assert (save / "latest.pth").read_bytes() == before
    assert call_main(train, *flags(save, "--resume"))[0] == 0
    assert_same_run(tiny_run, save)


def test_memory_that_runs_out_in_evaluate(tiny_run):
    done = run("-c", LIMITED, "evaluate", 20, tiny_run / "latest.pth")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "evaluate.py: memory ran out for the net and its images" in done.stderr
    assert torch.cuda.is_available() or done.stderr.endswith(": choose a machine that has more\n")


def test_memory_that_runs_out_under_torchrun(tmp_path):
    program = tmp_path / "limited.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{LIMITED}")
    more = ["--depth", "100", "--batch-size", "96"]
    (done,) = torchrun("--nproc-per-node", 2, program, "train", 300, *flags(tmp_path / "run", *more))
    assert done.returncode == 1
    assert "train.py: memory ran out for batches of 96 and a net of L=100, k=4" in done.stderr
    assert f'File "{program}' not in done.stderr  # torchrun shows a traceback of its own


ENDING = argparse.Namespace(needs="x", remedy="y", resume=None)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("could not create a memory object"),
        MemoryError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_all_ways_to_say_that_memory_ran_out(error):
    wrapped = Refused("the file is damaged")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        assert endings.last_words(each, ENDING) == (1, "memory ran out for x: choose y")
    for other in ("shape mismatch", "could not create a primitive"):
        assert not endings.out_of_memory(RuntimeError(other))
    assert not endings.out_of_memory(OSError(28, "No space left on device"))


# --------------------------------------------------------------------------------------------- pipes, disks and mistakes


def test_a_reader_that_leaves_ends_the_run_and_is_told_how_to_go_on(tiny_run, tmp_path):
    command = shlex.join([sys.executable, "train.py", *flags(tmp_path / "run")])
    piped = f"set -o pipefail; {command} | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        pytest.fail("the program had written all before its reader left")
    assert (done.returncode, len(done.stderr.splitlines())) == (141, 1)
    resume = done.stderr.split("this continues the run: ")[1]
    assert subprocess.run(resume, shell=True, cwd=ROOT, capture_output=True).returncode == 0
    assert_same_run(tiny_run, tmp_path / "run")


@pytest.mark.parametrize("program", ["train.py", "evaluate.py", "plot.py", "make_graph.py"])
def test_a_reader_that_has_left_already(tiny_run, tmp_path, program):
    arguments = {
        "train.py": [*flags(tmp_path / "run", "--resume")],
        "evaluate.py": [tiny_run / "latest.pth", "--out", tmp_path],
        "plot.py": [tiny_run, "--out", tmp_path],
        "make_graph.py": ["--out", tmp_path / "graph"],
    }
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, ROOT / program, *arguments[program]]
    done = subprocess.run(list(map(str, command)), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert done.returncode in (141, -13)
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_log_that_does_not_fit_on_the_disk(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "train.py", *flags(tmp_path / "run")]
        done = subprocess.run(list(map(str, command)), stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "No space left on device; the last complete checkpoint is kept" in done.stderr


def test_a_bug_shows_its_traceback_and_how_to_go_on(call_main, tiny_run, tmp_path):
    program = tmp_path / "broken.py"
    program.write_text(BROKEN)
    done = run(program, *flags(tmp_path / "run"), env={"PYTHONPATH": str(ROOT)})
    *traceback, last = done.stderr.splitlines()
    assert (done.returncode, "KeyError: 'unforeseen'" in traceback) == (1, True)
    assert "this is a bug" in last
    assert "this continues the run: " in last
    assert call_main(train, *flags(tmp_path / "run", "--resume"))[0] == 0
    assert_same_run(tiny_run, tmp_path / "run")


def test_a_process_whose_partner_is_gone_says_so(capsys):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1")

    def end(resume):
        with endings.worded(argparse.ArgumentParser(prog="a.py"), "x", "y") as ending:
            ending.resume = resume
            raise error

    for resume, kept in [(None, ""), ("again", f"; {endings.KEPT}")]:
        with pytest.raises(SystemExit, match="1"):
            end(resume)
        assert capsys.readouterr().err == f"a.py: another process of this run has ended, see what it says{kept}\n"
