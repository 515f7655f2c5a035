"""A terminal that is closed, for real: a run on a pseudo-terminal, whose other end goes away."""

import os
import pkgutil
import pty
import signal
import sys

import pandas as pd
import pytest
import torch
from conftest import TINY
from test_run_folder import assert_same_run
from torch._inductor.exc import CppCompileError, InductorError

import endings
import train

# A run that says when its third step is under way, and waits there until a byte comes: by the descriptors 100 and 101.
WAITING = """
import os, sys, step, train
sys.argv[0] = train.__file__
taken = []
def take(*arguments, real=step.TrainingStep.__call__):
    taken.append(1)
    if len(taken) == 3:
        os.write(100, b"1")
        os.read(101, 1)
    return real(*arguments)
step.TrainingStep.__call__ = take
train.main()
"""
# As nohup starts a program, and as a terminal of its own does.
NOHUP = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
TERMINAL = "import fcntl, os, termios\nos.setsid()\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
FLAGS = [*TINY, "--limit", "32", "--batch-size", "8", "--epochs", "2", "--no-plot"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, forked):
    save = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert forked(["train.py", *FLAGS, "--save", save]).wait().returncode == 0
    return save


@pytest.fixture
def start(forked, tmp_path):
    """Starts a run in tmp_path / "run" that waits in its third step, and returns it when it is there."""

    def start(before="", **streams):
        ready, its_ready = os.pipe()
        its_go, go = os.pipe()
        run = forked(["-c", before + WAITING, *FLAGS, "--save", tmp_path / "run"], more=[its_ready, its_go], **streams)
        os.close(its_ready)
        assert os.read(ready, 1), "the run ended before its third step"
        run.go = lambda: os.write(go, b"1" * 100)
        descriptors.extend([ready, its_go, go])
        return run

    descriptors = []
    yield start
    for descriptor in descriptors:
        os.close(descriptor)


def finish(run):
    run.go()
    return run.wait(timeout=100)


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1])
def test_the_step_is_finished_and_the_command_that_goes_on_is_told(call_main, start, undisturbed, tmp_path, signum):
    run = start()
    run.send_signal(signum)
    finish(run)
    assert (run.returncode, len(run.stdout.splitlines())) == (128 + signum, 2)
    assert run.stderr.startswith(f"train.py: stopped by {signum.name}; this continues the run: {sys.executable} -c ")
    assert run.stderr.endswith(f"{tmp_path / 'run'} --resume\n")
    assert len(pd.read_csv(tmp_path / "run" / "train.csv")) == 3
    assert call_main(train, *FLAGS, "--save", tmp_path / "run", "--resume")[0] == 0
    assert_same_run(undisturbed, tmp_path / "run")


def test_a_closed_terminal_stops_after_the_step(call_main, start, undisturbed, tmp_path):
    """Its messages and its bar go to the terminal, which is there no more; the shell says it once again."""
    master, slave = pty.openpty()
    run = start(TERMINAL, stdin=slave, stdout=slave, stderr=slave)  # it is its own, so that the system tells it
    os.close(slave)
    os.close(master)
    assert finish(run).returncode == 128 + signal.SIGHUP
    assert len(pd.read_csv(tmp_path / "run" / "train.csv")) == 3
    assert call_main(train, *FLAGS, "--save", tmp_path / "run", "--resume")[0] == 0
    assert_same_run(undisturbed, tmp_path / "run")


def test_under_nohup_the_run_goes_on(start, undisturbed, tmp_path):
    run = start(NOHUP)
    run.send_signal(signal.SIGHUP)
    assert finish(run).returncode == 0
    assert_same_run(undisturbed, tmp_path / "run")


def test_the_command_is_told_where_somebody_still_reads(start):
    """As with `train.py | tee log`: Ctrl-C has ended the reader before the run has finished its step."""
    reader, writer = os.pipe()
    run = start(stdout=writer)
    os.close(writer)
    os.close(reader)
    run.send_signal(signal.SIGINT)
    assert finish(run).returncode == 128 + signal.SIGINT
    assert run.stderr.startswith("train.py: stopped by SIGINT; this continues the run: ")
    assert "Traceback" not in run.stderr


# ------------------------------------------------------------------------------------------- Ctrl-C, whenever it is pressed

BEFORE = ["train.choose_device", "flags.make_net", "data.load", "train.initial_net", "run_folder.locked"]
OPENING = ["run_folder.git_commit", "run_folder.begin"]
IN_FIT = ["endings.StopSignals.__init__", "train.TrainingStep", "train.restore", "run_folder.Plots", "data.training_batches"]
IN_FIT += ["train.test", "run_folder.end_epoch", "run_folder.Plots.redraw"]


def press_ctrl_c_in(place, monkeypatch):
    """From its first call on, the function, named by its module, presses Ctrl-C and then does what it always did."""
    holder, name = place.rsplit(".", 1)
    real = getattr(pkgutil.resolve_name(holder), name)

    def pressing(*arguments, **options):
        monkeypatch.setattr(place, real)
        signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(place, pressing)


@pytest.mark.parametrize("place", [*BEFORE, *OPENING])
def test_ctrl_c_before_the_run_began(call_main, monkeypatch, tmp_path, place):
    press_ctrl_c_in(place, monkeypatch)
    status, out, errors = call_main(train, *FLAGS, "--save", tmp_path / "run")
    assert (status, out, errors) == (130, "", "train.py: stopped\n")
    assert (tmp_path / "run").exists() == (place in OPENING)
    assert not (tmp_path / "run" / "train.csv").exists()


@pytest.mark.parametrize("place", IN_FIT)
def test_ctrl_c_between_the_steps(call_main, monkeypatch, undisturbed, tmp_path, place):
    """One line, the command that goes on among it; the run then is the one that was never stopped."""
    press_ctrl_c_in(place, monkeypatch)
    status, _, errors = call_main(train, *FLAGS, "--save", tmp_path / "run")
    stopped = "stopped" if place == "endings.StopSignals.__init__" else "stopped by SIGINT"
    assert (status, len(errors.splitlines())) == (130, 1)
    assert errors.startswith(f"train.py: {stopped}; this continues the run: ")
    assert call_main(train, *FLAGS, "--save", tmp_path / "run", "--resume")[0] == 0
    assert_same_run(undisturbed, tmp_path / "run")


def test_ctrl_c_that_a_compiler_gets_as_well(call_main, monkeypatch, tmp_path):
    """It belongs to the group of processes of the terminal, too, and leaves its work undone. A bug remains one."""

    def compile(model, mode):
        def compiled(images):
            signal.raise_signal(signal.SIGINT)
            raise failures.pop()

        return compiled

    failures = [ValueError("a bug"), InductorError(CppCompileError(["g++"], ""), None)]
    monkeypatch.setattr(torch, "compile", compile)
    words = [*FLAGS, "--compile", "--save", tmp_path / "run"]
    status, _, errors = call_main(train, *words)
    assert (status, len(errors.splitlines())) == (130, 1)
    assert errors.startswith("train.py: stopped by SIGINT; this continues the run: ")
    with pytest.raises(ValueError, match="a bug"):
        call_main(train, *words, "--force")


@pytest.mark.parametrize("place", ["run_folder.end_epoch", "run_folder.Plots.redraw", "run_folder.Plots.wait"])
def test_ctrl_c_after_the_last_step_comes_too_late(call_main, monkeypatch, tmp_path, place):
    """The run is complete, and ends as one."""
    press_ctrl_c_in(place, monkeypatch)
    status, _, errors = call_main(train, *FLAGS, "--epochs", "1", "--save", tmp_path / "run")
    assert (status, errors) == (0, "")
    assert (tmp_path / "run" / "latest.pth").exists()


# A run that gets a second of the processor, which a cluster's limit on it does.
LIMITED = """
import resource, sys, time, train
limit = int(time.process_time()) + 2
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 60))
sys.argv[0] = train.__file__
train.main()
"""


def test_a_limit_on_processor_time_is_a_signal_to_stop(forked, tmp_path):
    flags = [*TINY, "--epochs", "100000", "--no-plot", "--save", tmp_path / "run"]
    done = forked(["-c", LIMITED, *flags]).wait(timeout=100)
    assert done.returncode == 128 + signal.SIGXCPU
    assert done.stderr.startswith("train.py: stopped by SIGXCPU; this continues the run: ")
    assert len(pd.read_csv(tmp_path / "run" / "train.csv")) > 0


@pytest.fixture
def handlers_put_back():
    before = {each: signal.getsignal(each) for each in endings.STOPPING}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def test_signals_that_the_shell_ignores_stop_a_run_but_a_closed_terminal_does_not(handlers_put_back):
    """A batch script may ignore SIGUSR1, and a shell ignores SIGINT for what it starts in the background."""
    for each in endings.STOPPING:
        signal.signal(each, signal.SIG_IGN)
    endings.StopSignals()
    assert {each for each in endings.STOPPING if signal.getsignal(each) == signal.SIG_IGN} == {signal.SIGHUP}


def test_the_first_signal_is_the_one_that_counts(handlers_put_back):
    stop = endings.StopSignals()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # they end it at once
    for signum in (signal.SIGHUP, signal.SIGXCPU):
        os.kill(os.getpid(), signum)
    assert stop.received == signal.SIGUSR1
