"""How far a program is, where there is no terminal."""

import io
import itertools
import os
import pty
import re
import sys
import termios

from conftest import TINY, read_terminal

import progress

# A run in whose log a line is due at each step.
OFTEN = """
import progress, sys, train
progress.LOG_SECONDS = 0
sys.argv[0] = train.__file__
train.main()
"""


def test_a_log_gets_lines_within_an_epoch_and_within_its_test(forked, tmp_path):
    flags = [*TINY, "--epochs", "2", "--batch-size", "2", "--no-plot", "--save", str(tmp_path / "run")]
    done = forked(["-c", OFTEN, *flags]).wait()
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    pattern = r"epoch (\d), lr [\d.]+: [\d.]+ of 192 images, .* images/s(, loss [\d.]+, error [\d.]+ %)?, \d\d:\d\d left"
    told = [found[1] for line in lines if (found := re.fullmatch(pattern, line))]
    assert told.count("1") > 40
    assert told.count("2") > 40
    assert any(re.fullmatch(r"test: \d of 2 batches, .* left", line) for line in lines)
    assert not any("\r" in line or "\x1b" in line for line in lines)
    assert all(lines)  # none is empty


def test_a_terminal_without_width_or_height_shows_no_bar(monkeypatch):
    """As some editors and containers have them."""
    master, slave = pty.openpty()
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        shown = []
        for size in [(0, 0), (40, 0), (0, 160), (40, 160)]:
            termios.tcsetwinsize(slave, size)
            shown.append(progress.on_terminal())
    os.close(master)
    assert shown == [False, False, False, True]


def test_a_line_of_a_log_is_in_its_file_at_once(monkeypatch):
    file = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", file)
    for text in ("\r1 of 2 batches", "\r"):
        progress.Log().write(text)
    assert file.buffer.getvalue() == b"1 of 2 batches\n"


def test_a_clock_that_is_set_back_does_not_stop_the_log(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    for name in ("time.time", "tqdm.std.time"):
        monkeypatch.setattr(name, itertools.count(0, -3600).__next__)
    assert [*progress.progress(range(3), desc="test", unit=" batches")] == [0, 1, 2]
    assert re.findall(r"test: (\d) of 3 batches", capsys.readouterr().out) == ["0", "1", "2", "3"]


def test_a_bar_on_a_terminal_is_gone_in_the_end(monkeypatch):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 60))
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert [*progress.progress(range(3), desc="test", mininterval=0, file=terminal)] == [0, 1, 2]
    shown = read_terminal(master).decode()
    assert "test: 100%" in shown
    assert re.search(r"\r *\r$", shown), shown
