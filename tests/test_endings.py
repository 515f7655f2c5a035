"""Programs that cannot go on: their last sentence, their exit status, and what they leave behind."""

import argparse
import contextlib
import errno
import functools
import io
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY, TINY_RUN
from PIL import Image
from test_distributed import run_ranks
from test_run_folder import assert_same_run
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import CppCompileError, GPUTooOldForTriton, InductorError, TritonMissing

import compare
import endings
import evaluate
import make_graph
import plot
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
FAILING = """
import sys, train
def fail(*arguments):
    raise KeyError("unforeseen")
train.print_epoch = fail
sys.argv[0] = train.__file__
train.main()
"""


@pytest.fixture
def run(forked):
    """Runs `python` with arguments; returns the completed process."""
    return lambda *command, **options: forked(command, **options).wait()


def flags(save, *more):
    return [*TINY_RUN, "--no-plot", "--save", str(save), *more]


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("megabytes", "more", "asked", "remedies"),
    [
        (5, [], "a net of L=10, k=2", ["--limit"]),  # not even the data
        (300, ["--growth-rate", "1500"], "a net of L=10, k=1500", ["a smaller net"]),  # the net
        (
            300,
            ["--depth", "100", "--batch-size", "96"],
            "batches of 96 and a net of L=100, k=2",
            ["--efficient", "--batch-size"],
        ),
        (
            900,
            ["--growth-rate", "100", "--batch-size", "4", "--limit", "8"],
            "the test after an epoch",
            ["a smaller net (--depth, --growth-rate) or"],
        ),
    ],
)
def test_memory_that_runs_out_is_one_sentence(run, tmp_path, megabytes, more, asked, remedies):
    done = run("-c", LIMITED, "train", megabytes, *flags(tmp_path / "run", *more))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("train.py: memory ran out for ")
    assert all(part in line for part in [asked, ": choose ", *remedies])
    assert "--precision bf16" not in line  # which needs no less memory on a CPU for what cannot be trained there
    assert ("--batch-size" in line) == (asked != "the test after an epoch")


def test_memory_that_runs_out_in_a_resumed_run_keeps_its_checkpoint(run, call_main, tiny_run, tmp_path):
    save = tmp_path / "run"
    assert call_main(train, *flags(save, "--epochs", "1"))[0] == 0
    before = (save / "latest.pth").read_bytes()
    done = run("-c", LIMITED, "train", 15, *flags(save, "--efficient", "--resume"))
    (line,) = done.stderr.splitlines()
    assert (done.returncode, "memory ran out" in line, "choose --efficient" in line) == (1, True, False)
    assert (save / "latest.pth").read_bytes() == before
    assert call_main(train, *flags(save, "--no-efficient", "--resume"))[0] == 0
    assert_same_run(tiny_run, save)


def test_memory_that_runs_out_in_evaluate(run, tiny_run):
    done = run("-c", LIMITED, "evaluate", 20, tiny_run / "latest.pth")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "evaluate.py: memory ran out for the net and its images" in done.stderr
    assert torch.cuda.is_available() or done.stderr.endswith(": choose a machine with more memory\n")


def test_memory_that_runs_out_on_two_ranks(forked, tmp_path):
    """One of them says so, and the other that, or that it has lost its partner."""
    more = ["--depth", "100", "--batch-size", "96"]
    ranks = run_ranks(forked, "-c", LIMITED, "train", 300, *flags(tmp_path / "run", *more))
    assert [done.returncode for done in ranks] == [1, 1]
    assert "train.py: memory ran out for batches of 96 and a net of L=100, k=2" in "".join(done.stderr for done in ranks)
    for done in ranks:
        (last,) = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
        assert "memory ran out" in last or "another process of this run cannot be reached" in last
        assert "Traceback" not in done.stderr


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
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_all_ways_to_say_that_memory_ran_out(error):
    wrapped = Refused("the file is damaged")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        assert endings.status_and_message(each, ENDING) == (1, "memory ran out for x: choose y")
    for other in ("shape mismatch", "could not create a primitive"):
        assert not endings.out_of_memory(RuntimeError(other))
    assert not endings.out_of_memory(OSError(28, "No space left on device"))


# --------------------------------------------------------------------------------------------- pipes, disks and mistakes


def test_a_reader_that_leaves_ends_the_run_and_is_told_how_to_go_on(forked, tiny_run, tmp_path):
    reader, writer = os.pipe()
    started = forked(["train.py", *flags(tmp_path / "run")], stdout=writer)
    os.close(writer)
    assert os.read(reader, 1) == b"D"  # the first letter of what it says
    os.close(reader)
    done = started.wait()
    if done.returncode == 0:
        pytest.fail("the program had written all before its reader left")
    assert (done.returncode, len(done.stderr.splitlines())) == (141, 1)
    resume = done.stderr.split("this continues the run: ")[1]
    assert forked(shlex.split(resume)[1:]).wait().returncode == 0
    assert_same_run(tiny_run, tmp_path / "run")


@pytest.fixture(params=["train.py", "evaluate.py", "plot.py", "compare.py", "make_graph.py"])
def printing(request, tiny_run, tmp_path):
    """A program that prints, with its arguments."""
    arguments = {
        "train.py": flags(tmp_path / "run"),
        "evaluate.py": [tiny_run / "latest.pth", "--out", tmp_path],
        "plot.py": [tiny_run, "--out", tmp_path],
        "compare.py": [tiny_run],
        "make_graph.py": ["--out", tmp_path / "graph"],
    }
    return request.param, *arguments[request.param]


def test_a_reader_that_has_left_already(run, printing):
    reader, writer = os.pipe()
    os.close(reader)
    done = run(*printing, stdout=writer)
    os.close(writer)
    assert done.returncode in (141, -13)
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_log_that_does_not_fit_on_the_disk(run, printing):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full:
        done = run(*printing, stdout=full.fileno())
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    advice = "; this continues the run: " if printing[0] == "train.py" else ", or name another place\n"
    assert f"No space left on device: make room there{advice}" in done.stderr


def test_a_link_to_itself_is_refused_in_one_sentence(call_main, tiny_run, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(link)
    commands = [
        (train, *flags(tmp_path / "run"), "--dataset", "cifar10", "--data", link),
        (train, *flags(tmp_path / "run"), "--dataset", "folder", "--data", link),
        (evaluate, tiny_run, "--image", tiny_run, "--predictions", link),
        (plot, link),
        (compare, link),
        (compare, tiny_run, "--csv", link),
    ]
    for module, *arguments in commands:
        status, _, errors = call_main(module, *arguments)
        assert (status, len(errors.splitlines()), "link" in errors.splitlines()[-1]) == (2, 2, True), errors
    assert [*tmp_path.iterdir()] == [link]


PRINTS = """
import argparse, endings
with endings.handle_errors(argparse.ArgumentParser("program"), "x", "y"):
    print("the result")
    {}
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("last", "stream", "status"),
    [("pass", "stdout", 1), ("raise endings.Refused('no')", "stderr", 2), ("raise endings.Refused('no', 1)", "stderr", 1)],
)
def test_the_status_where_a_stream_does_not_fit_on_the_disk(last, stream, status):
    """Python's own would be 0 where the last line was not flushed, and 120 for what is flushed at exit."""
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # as if unset
        done = subprocess.run([sys.executable, "-c", PRINTS.format(last)], cwd=ROOT, env=environment, text=True, **streams)
    assert done.returncode == status
    if stream == "stdout":
        assert done.stderr == "program: standard output: No space left on device: make room there, or name another place\n"


def test_a_bug_shows_its_traceback_and_how_to_go_on(run, call_main, tiny_run, tmp_path):
    program = tmp_path / "broken.py"
    program.write_text(FAILING)
    done = run(program, *flags(tmp_path / "run"))
    *traceback, last = done.stderr.splitlines()
    assert (done.returncode, "KeyError: 'unforeseen'" in traceback) == (1, True)
    assert "this is a bug" in last
    assert "this continues the run: " in last
    assert call_main(train, *flags(tmp_path / "run", "--resume"))[0] == 0
    assert_same_run(tiny_run, tmp_path / "run")


# ------------------------------------------------------------------------------------------------ bugs, wherever they are


def value_error(*arguments, **options):
    raise ValueError("planted")


def type_error(*arguments, **options):
    raise TypeError("planted")


def unequal_lengths(*arguments, **options):
    return list(zip([1], [], strict=True))


BUGS = [value_error, type_error, unequal_lengths]
PLACES = {  # what each program calls, by the names it calls it by
    "train": """densenet.DenseNet.__init__ densenet.block_channels densenet.init_weights flags.make_net train.choose_device
        train.set_determinism train.initial_net data.load data.hold_out distributed.check_batches
        run_folder.refuse_to_replace run_folder.git_commit run_folder.begin""",
    "train, begun": """step.TrainingStep.__init__ step.TrainingStep.__call__ step.make_optimizer densenet.DenseNet.forward
        data.training_batches data.normalize train.EpochLog.write train.EpochLog.mean train.restore train.make_card
        train.predict train.loss_and_error_sums run_folder.append_rows run_folder.end_epoch run_folder.flush_to_disk
        run_folder.encoded run_folder.Plots.redraw run_folder.Plots.wait train.print_epoch""",
    "train --resume": "run_folder.resume run_folder.compare_rates run_folder.fits run_folder.rows_until",
    "train --init": "train.load_checkpoint train.build_net train.read_init train.refuse_another_net train.checkpoint_in",
    "train on pictures": """folder.list_classes folder.left_out folder.check_classes folder.read_pictures pictures.to_rgb
        pictures.num_cpus pictures.read_picture data.mean_and_std""",
    "evaluate": """evaluate.load_checkpoint evaluate.build_net checkpoint.fits densenet.DenseNet.__init__
        densenet.DenseNet.forward data.read_part evaluate.predict evaluate.confusion_matrix evaluate.mean_class_error
        evaluate.class_lines evaluate.write_text evaluate.draw drawing.as_text drawing.save""",
    "evaluate --image": """evaluate.read_pictures evaluate.tell_classes pictures.to_rgb pictures.signed pictures.pil_to_tensor
        evaluate.predict""",
    "evaluate --export": "evaluate.export checkpoint.encoded checkpoint.replace_file files.flush_to_disk",
    "plot": """plot.name_runs plot.read_curve plot.moving_average plot.check_since plot.panels plot.draw plot.draw_curve
        drawing.font_families drawing.save""",
    "compare": "compare.settings compare.read_csv compare.summary compare.in_short compare.latex runs.arguments_of",
    "make_graph": """make_graph.make_net densenet.DenseNet.__init__ densenet.DenseNet.forward make_graph.write_dot
        torchviz.make_dot""",
}


@pytest.fixture
def command(tiny_run, pictures, tmp_path):
    """(a program's module, arguments with which it succeeds) for each key of PLACES."""
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    small = [*TINY, "--limit", "8", "--epochs", "1", "--no-plot", "--save", tmp_path / "run"]
    trained = shutil.copytree(tiny_run, tmp_path / "trained") / "latest.pth"
    return {
        "train": (train, *small),
        "train, begun": (train, *small),
        "train --resume": (train, *flags(tmp_path / "trained", "--resume")),
        "train --init": (train, *small, "--init", trained),
        "train on pictures": (train, *small, "--dataset", "folder", "--data", pictures, "--drop-rate", 0),
        "evaluate": (evaluate, trained, "--out", tmp_path),
        "evaluate --image": (evaluate, trained, "--image", tmp_path / "one.png"),
        "evaluate --export": (evaluate, trained, "--export", tmp_path / "net.pth"),
        "plot": (plot, tiny_run, "--out", tmp_path),
        "compare": (compare, tiny_run),
        "make_graph": (make_graph, "--out", tmp_path / "graph"),
    }


@pytest.mark.parametrize(
    ("name", "place", "bug"),
    [(name, place, bug) for name, places in PLACES.items() for place, bug in zip(places.split(), cycle(BUGS), strict=False)],
)
def test_a_bug_anywhere_is_a_traceback_and_no_sentence(call_main, command, monkeypatch, capsys, name, place, bug):
    """What is raised here, the interpreter shows, with status 1; below it stands what is to be said."""
    module, *arguments = command[name]
    planted = functools.wraps(pkgutil.resolve_name(place))(lambda *arguments, **options: bug(*arguments, **options))
    monkeypatch.setattr(place, planted)  # with the signature of what it stands for
    with pytest.raises((ValueError, TypeError)) as caught:
        call_main(module, *arguments)
    assert bug.__name__ in [entry.name for entry in caught.traceback]
    assert "error:" not in capsys.readouterr().err
    (note,) = caught.value.__notes__
    said = f"{Path(module.__file__).name}: this is a bug"
    assert note.startswith(f"{said}; this continues the run: ") if name == "train, begun" else note == said
    assert note.endswith(" --resume") == (name == "train, begun")


BROKEN = """
import sys, evaluate, plot, make_graph, train
def planted(*arguments):
    raise ValueError("planted")
module, name = (sys.argv.pop(1) for _ in range(2))
sys.argv[0] = sys.modules[module].__file__
setattr(sys.modules[module], name, planted)
sys.modules[module].main()
"""


@pytest.mark.parametrize(
    ("name", "place"), [("train", "load_data"), ("evaluate", "draw"), ("plot", "draw"), ("make_graph", "write_dot")]
)
def test_a_bug_in_a_process_of_its_own(run, command, name, place):
    module, *arguments = command[name]
    done = run("-c", BROKEN, module.__name__, place, *arguments)
    first, *_, error, last = done.stderr.splitlines()
    assert (done.returncode, first, error) == (1, "Traceback (most recent call last):", "ValueError: planted")
    assert last == f"{Path(module.__file__).name}: this is a bug"
    assert done.stderr.count("this is a bug") == 1


def raising(error):
    def planted(*arguments, **options):
        raise error

    return planted


@pytest.mark.parametrize(
    ("name", "place", "status"),
    [
        ("train", "data.load", 2),
        ("train", "run_folder.begin", 2),
        ("train, begun", "run_folder.end_epoch", 1),
        ("train, begun", "train.predict", 1),
        ("evaluate", "data.read_part", 2),
        ("evaluate", "evaluate.draw", 2),
        ("plot", "plot.draw", 2),
        ("make_graph", "make_graph.write_dot", 2),
    ],
)
def test_an_error_of_the_system_is_a_sentence_where_it_names_its_file(call_main, command, monkeypatch, name, place, status):
    module, *arguments = command[name]
    monkeypatch.setattr(place, raising(OSError(13, "Permission denied", "some/file")))
    told, _, errors = call_main(module, *arguments)
    way_out = ": make it writable; this continues the run: .+" if status == 1 else ": fix this, or name another place"
    assert (told, bool(re.search(f": some/file: Permission denied{way_out}$", errors.splitlines()[-1]))) == (status, True)
    assert len(errors.splitlines()) == status  # the line of its usage is another, where it was asked wrongly
    monkeypatch.setattr(place, raising(OSError(28, "No space left on device", "some/file")))
    told, _, errors = call_main(module, *arguments, *["--force"] * (name[:5] == "train"))
    assert (told, len(errors.splitlines()), "some/file: No space left on device" in errors) == (1, 1, True)
    for error in (OSError(13, "Permission denied"), OSError("planted")):
        monkeypatch.setattr(place, raising(error))
        with pytest.raises(OSError, match=r"Permission denied|planted") as caught:
            call_main(module, *arguments, *["--force"] * (name[:5] == "train"))
        assert "this is a bug" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError(
                "[gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:1. This is typically caused by a remote worker"
            ),
            "[gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:1",
        ),
        (
            torch.distributed.DistBackendError("NCCL error: remote process exited\nLast error:\n"),
            "NCCL error: remote process exited",
        ),
        (torch.distributed.DistBackendError(""), "DistBackendError"),
        (
            torch.distributed.DistBackendError("NCCL error in: n.cpp, system error\nLast error:\nNo space left on device"),
            "No space left on device",
        ),
        (
            torch.distributed.DistNetworkError("failed to recv\nException raised from recvBytes at s.hpp:2\nframe #0: a\n"),
            "failed to recv",
        ),
    ],
)
def test_a_process_that_does_not_reach_its_partner_says_so(capsys, error, reason):
    def end(resume):
        with endings.handle_errors(argparse.ArgumentParser(prog="a.py"), "x", "y") as ending:
            ending.resume = resume
            raise error

    for resume, kept in [(None, ""), ("again", f"; {endings.KEPT}")]:
        with pytest.raises(SystemExit, match="1"):
            end(resume)
        told = f"a.py: another process of this run cannot be reached ({reason}), see its message{kept}\n"
        assert capsys.readouterr().err == told


# ------------------------------------------------------------------------------------------- streams, names, compilers


# train.py as Python starts it with >&- 2>&- <&-.
CLOSED = """
import os, sys, train
os.closerange(0, 3)
sys.stdin = sys.stdout = sys.stderr = None
sys.argv[0] = train.__file__
train.main()
"""


def test_closed_streams(run, tiny_run, tmp_path):
    """No file of the run gets the number of a stream, and with it what a library prints."""
    done = run("-c", CLOSED, *flags(tmp_path / "run"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert_same_run(tiny_run, tmp_path / "run")


NARROW = """
import runpy, sys
sys.stdout.reconfigure(encoding="ascii", errors="strict")
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
NAMES = [b"caf\xc3\xa9", b"\xe7\x8c\xab", b"bad\xff"]


def test_names_of_classes_that_the_output_cannot_encode(run, tmp_path):
    for part in ("train", "test"):
        for number, name in enumerate(NAMES):
            folder = tmp_path / "data" / part / os.fsdecode(name)
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (9, 9), (90 * number, 0, 0)).save(folder / f"{i}.png")
    more = ["--dataset", "folder", "--data", tmp_path / "data", "--limit", 9, "--drop-rate", 0, "--epochs", 1]
    done = run("-c", NARROW, ROOT / "train.py", *flags(tmp_path / "run", *more))
    assert (done.returncode, done.stderr) == (0, "")
    for evaluated in (["--out", tmp_path], ["--image", tmp_path / "data" / "test"]):
        done = run("-c", NARROW, ROOT / "evaluate.py", tmp_path / "run" / "latest.pth", *evaluated)
        assert (done.returncode, done.stderr) == (0, "")
        for told in ("caf\\xe9 ", "\\u732b ", "bad\\udcff "):
            assert told in done.stdout
    table = pd.read_csv(tmp_path / "confusion.csv", index_col="true")
    assert list(table.index) == list(table.columns) == ["bad\\udcff", "caf\u00e9", "\u732b"]
    assert Image.open(tmp_path / "confusion.png").size[0] > 300


def test_the_command_that_goes_on_can_be_pasted(forked, tiny_run, tmp_path):
    save = tmp_path / os.fsdecode("r\u00fcn 'x' \\\n\x1b[31m".encode() + b"\xff")
    done = forked(["-c", NARROW_ERRORS + FAILING, *flags(save)]).wait()
    assert (done.returncode, save.is_dir()) == (1, True)
    told = done.stderr.split("this continues the run: ")[1].rstrip("\n")
    assert told.isascii()
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {told}"], capture_output=True, check=True).stdout.split(b"\0")
    assert os.fsencode(save) in words
    done = forked(["train.py", "--save", save, "--resume"]).wait()
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_run(tiny_run, save)


@pytest.mark.parametrize("letter", [*"\0\t\n\r\x1b\x1f\x7f\x85\x9b\x9f\u2028\u2029\u202a\u202e\u2066\u2069"])
def test_a_control_character_is_escaped(letter, capsys):
    endings.say(f"a{letter}b")
    assert capsys.readouterr().out == f"a{ascii(letter)[1:-1]}b\n"


def test_letters_of_all_scripts_are_kept(capsys):
    name = "a b\u00a0c\u3000 '\"\\ e\u0301 \u0639\u0631\u0628\u064a\u200f \u732b \U0001f468\u200d\U0001f469 \ufe0f"
    endings.say(name)
    assert capsys.readouterr().out == name + "\n"


def test_control_characters_of_a_name_do_not_reach_the_terminal(run, tmp_path):
    """Of a class, a picture, a folder: in tables, CSVs, answers and refusals."""
    name = "a\n\r\x1b[31m\u202eb"
    for part in ("train", "test"):
        for number, folder in enumerate([tmp_path / "data" / part / name, tmp_path / "data" / part / "plain"]):
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (9, 9), (90 * number, 0, 0)).save(folder / f"{i}\r.png")
    save, more = tmp_path / name, ["--dataset", "folder", "--data", tmp_path / "data", "--limit", 6, "--drop-rate", 0]
    done = [run(ROOT / "train.py", *flags(save, *more, "--epochs", 1)) for _ in range(2)]
    done += [run(ROOT / "evaluate.py", save, "--predictions", tmp_path / "test.csv")]
    done += [run(ROOT / "evaluate.py", save, "--image", tmp_path / "data" / "test", "--predictions", tmp_path / "image.csv")]
    assert [each.returncode for each in done] == [0, 2, 0, 0], done
    escaped = "a\\n\\r\\x1b[31m\\u202eb"
    for each in done:
        assert escaped in each.stdout + each.stderr
        assert not {*"\r\x1b\u202e"} & {*each.stdout, *each.stderr}
    assert len(done[1].stderr.splitlines()) == 2  # usage and one sentence
    assert list(pd.read_csv(save / "confusion.csv", index_col="true").index) == [escaped, "plain"]
    for table in map(pd.read_csv, [tmp_path / "test.csv", tmp_path / "image.csv"]):
        assert table["picture"].str.endswith("\\r.png").tolist() == [True] * 6
        assert {*table["class"]} <= {escaped, "plain"}


NARROW_ERRORS = "import sys\nsys.stderr.reconfigure(encoding='ascii')\n"


@pytest.mark.parametrize("text", [".", "..", "new/", "new/..", "/"])
def test_a_folder_is_no_name_of_a_file(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{re.escape(text)} is a folder: name a file in it$"):
        endings.new_file(text)
    assert endings.new_file("new/./a.csv") == Path("new/a.csv")


def test_words_for_a_shell():
    assert endings.shell_word("plain") == "plain"
    assert endings.shell_word("r\u00fcn x") == "'r\u00fcn x'"
    assert endings.shell_word("it's\n\udcff\\") == r"$'it\x27s\x0a\xff\x5c'"


def test_a_compiler_that_is_not_there(run, call_main, tiny_run, tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": "/gone/c++", "PATH": "/gone"}
    done = run("train.py", *flags(tmp_path / "run", "--compile", "--efficient"), env=environment)  # compiled in small parts
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    reason = "InvalidCxxCompiler: No working C++ compiler found"
    assert done.stderr.startswith(f"train.py: torch.compile does not work here ({reason}")
    assert f"): install what is missing, or choose --compile none; {endings.KEPT}" in done.stderr
    assert call_main(train, "--save", tmp_path / "run", "--resume", "--compile", "none", "--no-efficient")[0] == 0
    assert_same_run(tiny_run, tmp_path / "run")


MISSING = "x.cpp:2:10: fatal error: Python.h: No such file or directory"
OLD_GPU = SimpleNamespace(name="Tesla P100", major=6, minor=0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InductorError(PermissionError(13, "No", "/sys/x"), None), "PermissionError: [Errno 13] No: '/sys/x'"),
        (InductorError(CppCompileError(["g++"], f"In file\n{MISSING}\n"), None), MISSING),
        (InductorError(subprocess.CalledProcessError(1, "gcc"), None), "CalledProcessError: Command 'gcc' returned non-zero"),
        (BackendCompilerFailed("x", subprocess.CalledProcessError(1, "gcc"), None), "CalledProcessError: Command 'gcc'"),
        (TritonMissing(None), "Cannot find a working triton installation."),
        (GPUTooOldForTriton(OLD_GPU, None), "Found Tesla P100 which is too old to be supported by the triton GPU compiler"),
    ],
)
def test_why_a_compiler_does_not_work(error, reason):
    status, sentence = endings.status_and_message(error, ENDING)
    assert status == 1
    assert sentence.startswith(f"torch.compile does not work here ({reason}")
    assert sentence.endswith("): install what is missing, or choose --compile none")


# No address space holds such a stack, so no thread can start.
STACKS = """
import sys, threading, train
sys.argv[0] = train.__file__
threading.stack_size(2**50)
train.main()
"""


def test_a_machine_that_starts_no_thread(run, pictures, tmp_path):
    done = run("-c", STACKS, *flags(tmp_path / "run", "--dataset", "folder", "--data", str(pictures)))
    told = "no further thread or process can be started here: raise the limit (ulimit -u or -v, or the container's)"
    assert (done.returncode, done.stderr) == (1, f"train.py: {told}\n")
    forking = BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    begun = argparse.Namespace(resume="it")
    for error in (forking, BackendCompilerFailed("inductor", forking, None)):
        assert endings.status_and_message(error, begun) == (1, f"{told}; this continues the run: it")


@pytest.mark.parametrize(
    "error",
    [
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable", "standard output"),
        BlockingIOError(errno.EAGAIN, "write could not complete without blocking", 0),
        torch.distributed.DistBackendError("NCCL error: socket\nLast error:\nResource temporarily unavailable"),
        Refused("Resource temporarily unavailable"),
    ],
)
def test_a_pipe_that_is_full_and_a_lost_partner_are_no_lack_of_threads(error):
    assert "thread" not in endings.status_and_message(error, ENDING)[1]


def test_a_notebook_whose_streams_are_no_files(monkeypatch, tiny_run):
    out, errors = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)
    for run, status in [(tiny_run, 0), (tiny_run / "gone", 2)]:
        monkeypatch.setattr(sys, "argv", ["compare.py", str(run)])
        with pytest.raises(SystemExit) if status else contextlib.nullcontext():
            compare.main()
    assert len(out.getvalue().splitlines()) == len(errors.getvalue().splitlines()) == 2
    assert endings.shell_word("caf\u00e9") == "'caf\u00e9'"


def test_training_that_diverges_ends(call_main, tmp_path):
    save = tmp_path / "run"
    status, _, errors = call_main(train, *flags(save, "--lr", 1000))
    assert (status, len(errors.splitlines())) == (1, 1)
    assert errors.startswith("train.py: training diverged, the loss is ")
    assert "of epoch 1: start again with a lower --lr, in another --save or with --force" in errors
    losses = pd.read_csv(save / "train.csv")["loss"]
    assert losses.max() > train.MAX_LOSS
    assert (save / "args.json").exists()


@pytest.mark.parametrize(
    ("number", "status", "way_out", "way_out_of_a_run"),
    [
        ("ENOSPC", 1, ": make room there, or name another place", ": make room there"),
        ("EDQUOT", 1, ": make room there, or name another place", ": make room there"),
        ("EFBIG", 1, ": raise the file size limit (ulimit -f)", ": raise the file size limit (ulimit -f)"),
        ("EMFILE", 2, ": raise the limit of open files (ulimit -n)", ": raise the limit of open files (ulimit -n)"),
        ("EIO", 1, "", ""),
        ("EACCES", 2, ": fix this, or name another place", ": make it writable"),
        ("ENOENT", 2, ": fix this, or name another place", ": put back what is missing"),
    ],
)
def test_a_disk_that_is_full_or_fails_is_no_error_of_the_user(number, status, way_out, way_out_of_a_run):
    """Also where the run has not begun; a quota that is used up is a full disk."""
    error = OSError(getattr(errno, number), "why", "file")
    ending = argparse.Namespace(needs="", remedy="", resume=None)
    assert endings.status_and_message(error, ending) == (status, f"file: why{way_out}")
    ending.resume = "it"
    assert endings.status_and_message(error, ending) == (1, f"file: why{way_out_of_a_run}; this continues the run: it")


@pytest.mark.parametrize("flag", ["--force", "--resume"])
def test_a_forced_run_goes_on_by_resume_alone(monkeypatch, flag):
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", flag, "--save", "work/run"])
    assert endings.resume_command(1) == "python train.py --save work/run --resume"
    several = "the same torchrun command with --resume" + " in place of --force" * (flag == "--force")
    assert endings.resume_command(2) == several


def test_memory_that_ran_out_while_another_error_was_handled():
    error = ValueError("while it was handled")
    error.__context__ = MemoryError()
    assert endings.out_of_memory(error)


def test_what_needed_the_memory_is_told_whatever_the_error():
    for full in (MemoryError(), RuntimeError("out of memory"), OSError(errno.ENOMEM, "Cannot allocate memory")):
        with pytest.raises(type(full)), endings.memory_for("the test", "a smaller net"):
            raise full
        assert endings.status_and_message(full, ENDING) == (1, "memory ran out for the test: choose a smaller net")
