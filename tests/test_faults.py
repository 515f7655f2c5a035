"""What happens to real runs when they are killed: slow, therefore run by `make test-faults` and not by `make test`."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import ROOT, TINY
from test_run_folder import assert_same_run

pytestmark = pytest.mark.faults

FLAGS = [*TINY, "--batch-size", "8", "--epochs", "40", "--drop-rate", "0.2", "--augment", "--no-plot"]
CIFAR_FLAGS = ["--depth", "10", "--growth-rate", "4", "--limit", "1000", "--batch-size", "20", "--epochs", "4", "--no-plot"]

# A training whose checkpoint stops for ever, when and where the arguments say, having told so; the rest of argv is train.py's.
PAUSED = """
import os, sys, run_folder, train
point, countdown = sys.argv.pop(1), int(sys.argv.pop(1))
sys.argv[0] = train.__file__

def pause():
    print("paused", flush=True)
    sys.stdin.read()

def replace_file(path, content, real=run_folder.replace_file):
    global countdown
    countdown -= path.name == "latest.pth"
    if countdown == 0 and point == "half":
        path.with_name("latest.pth.tmp").write_bytes(bytes(content)[: len(content) // 2])
        pause()
    if countdown == 0 and point == "before":
        os.replace = lambda *names: pause()
    real(path, content)
    if countdown == 0:
        pause()

run_folder.replace_file = replace_file
train.main()
"""


def start(*command, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environment, text=True, **pipes, **options)


def finish(process):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


def rows(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_rows(process, path, number):
    """Returns once the file has so many more rows than now, or the process has ended."""
    goal = rows(path) + number
    while process.poll() is None and rows(path) < goal:
        time.sleep(0.002)


def kill(process):
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # it had not ended by itself


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    save = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(start("train.py", *FLAGS, "--save", save))
    return save


def test_twenty_kills_lose_nothing(undisturbed, tmp_path):
    """kill -9 at 14 random moments and at 6 points inside the writing of a checkpoint, a resume after each."""
    save, chance = tmp_path / "run", random.Random(1)
    points = ["half", "before", "after"] * 2 + ["anywhere"] * 14
    chance.shuffle(points)
    for point in points:
        if point == "anywhere":
            process = start("train.py", *FLAGS, "--save", save, "--resume")
            wait_for_rows(process, save / "train.csv", chance.randint(0, 2))  # rows come in groups of up to 12
        else:
            process = start("-c", PAUSED, point, chance.randint(1, 2), *FLAGS, "--save", save, "--resume")
            assert any("paused" in line for line in iter(process.stdout.readline, ""))
        kill(process)
    out = finish(start("train.py", *FLAGS, "--save", save, "--resume"))
    assert "continuing after epoch" in out
    assert_same_run(undisturbed, save)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_the_printed_command_resumes(undisturbed, tmp_path, signum):
    save = tmp_path / "run"
    process = start("train.py", *FLAGS, "--save", save)
    wait_for_rows(process, save / "train.csv", 14)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "Traceback" not in errors
    command = re.search(r"stopped by (\w+); this continues the run: (.*)", errors)
    assert command[1] == signum.name
    done = subprocess.run(command[2], shell=True, cwd=ROOT, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert_same_run(undisturbed, save)


def test_a_second_signal_stops_at_once_without_damage(undisturbed, tmp_path):
    save = tmp_path / "run"
    process = start("-c", PAUSED, "half", 2, *FLAGS, "--save", save)  # the first signal would wait for ever
    assert any("paused" in line for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    process.communicate()
    assert process.returncode in (-signal.SIGTERM, -signal.SIGINT)
    finish(start("train.py", *FLAGS, "--save", save, "--resume"))
    assert_same_run(undisturbed, save)


def test_three_kills_on_cifar_lose_nothing(cifar, tmp_path):
    flags, chance = ["train.py", "--data", cifar, *CIFAR_FLAGS], random.Random(2)
    finish(start(*flags, "--save", tmp_path / "whole"))
    for _ in range(3):
        process = start(*flags, "--save", tmp_path / "parts", "--resume")
        wait_for_rows(process, tmp_path / "parts" / "train.csv", chance.randint(1, 60))
        kill(process)
    finish(start(*flags, "--save", tmp_path / "parts", "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def workers_of(process, save):
    """The processes that torchrun started; their titles are the run's folder."""
    found = subprocess.run(["ps", "-ww", "--ppid", str(process.pid), "-o", "pid=,args="], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if str(save) in line]


def test_torchrun_restarts_after_a_worker_was_killed_and_ends_with_all_epochs(tmp_path):
    save = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    flags = [*FLAGS, "--epochs", "12", "--save", save, "--resume"]
    process = start(*torchrun, "--nproc-per-node", 2, "--max-restarts", 2, "train.py", *flags)
    wait_for_rows(process, save / "train.csv", 30)
    assert process.poll() is None, process.communicate()
    workers = workers_of(process, save)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    out = finish(process)
    assert "continuing after epoch" in out
    assert pd.read_csv(save / "test.csv")["epoch"].tolist() == list(range(1, 13))
    assert len(pd.read_csv(save / "train.csv")) == 12 * 12
