import contextlib
import errno
import functools
import itertools
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY, TINY_RUN, contents
from PIL import Image

import data
import evaluate
import flags
import plot
import run_folder
import train
from checkpoint import digest, load_checkpoint
from endings import Refused

FLAGS = [*TINY, "--batch-size", 40, "--drop-rate", 0.2, "--augment", "--no-plot"]


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory, forked):
    save = tmp_path_factory.mktemp("runs") / "one epoch"
    assert forked(["train.py", *FLAGS, "--epochs", 1, "--save", save]).wait().returncode == 0
    return save


@pytest.fixture
def relayed(relay, monkeypatch):
    """Figures of a run are drawn by a fork, which starts sooner."""

    class Relayed(run_folder.Plots):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.command[:1] = relay

    monkeypatch.setattr(run_folder, "Plots", Relayed)


@pytest.fixture
def resume_tiny(call_main):
    """Resumes a copy of tiny_run as it was begun, with more flags."""
    return lambda save, *more: call_main(train, *TINY_RUN, "--no-plot", "--save", save, "--resume", *more)


@pytest.fixture
def begun(one_epoch, tmp_path):
    """A run of its own that has done one epoch."""
    return shutil.copytree(one_epoch, tmp_path / "begun")


def weights(folder):
    return torch.load(folder / "latest.pth", weights_only=True)["net"]


def assert_same_run(one, other):
    """Byte for byte, but for the seconds that an epoch took, the last column of test.csv."""
    assert (one / "train.csv").read_bytes() == (other / "train.csv").read_bytes()
    assert_same_epochs(one / "test.csv", other / "test.csv")
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def assert_same_epochs(one, other):
    ours, theirs = ([line.rsplit(",", 1) for line in path.read_text().splitlines()] for path in (one, other))
    assert [line for line, _ in ours] == [line for line, _ in theirs]
    assert ours[0][1] == theirs[0][1] == "seconds"


@pytest.mark.parametrize("opt", ["adam", "sgd"])
def test_a_resumed_run_is_byte_identical_to_one_that_never_stopped(call_main, tmp_path, opt):
    """With dropout and augmentation. SGD: of 2 epochs the first has the rate that it has in 4, so more are allowed after it."""
    flags = [*FLAGS, "--opt", opt]
    status, _, errors = call_main(train, *flags, "--epochs", 4, "--save", tmp_path / "whole")
    assert status == 0, errors
    call_main(train, *flags, "--epochs", 1, "--save", tmp_path / "parts")
    with (tmp_path / "parts" / "train.csv").open("a") as file:
        file.write("1.333333,2.5,90\n1.66")  # rows that the checkpoint does not know of, the last one half written
    status, out, errors = call_main(train, *flags, "--epochs", 4, "--save", tmp_path / "parts", "--resume")
    assert status == 0, errors
    assert "continuing after epoch 1" in out
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_resumed_run_keeps_its_precision_on_whatever_device(call_main, tmp_path):
    """Begun in tf32, as on a GPU that has it; where args.json does not say, it is that of the device."""
    flags, save = [*TINY, "--limit", 8, "--batch-size", 8, "--no-plot", "--save", tmp_path], tmp_path / "args.json"
    assert call_main(train, *flags, "--epochs", 1, "--precision", "tf32")[0] == 0
    assert call_main(train, *flags, "--epochs", 1, "--resume")[0] == 0
    facts = json.loads(save.read_text())
    assert facts["precision"] == "tf32"
    (tmp_path / "latest.pth").unlink()
    for precision, kept in [({"precision": "bf16"}, "bf16"), ({}, "fp32")]:
        for name in ("train.csv", "test.csv"):
            (tmp_path / name).unlink()
        save.write_text(json.dumps({name: fact for name, fact in facts.items() if name != "precision"} | precision))
        status, out, errors = call_main(train, *flags, "--epochs", 1, "--resume")
        assert (status, "from the start" in out) == (0, True), errors
        assert json.loads(save.read_text())["precision"] == kept
        (tmp_path / "latest.pth").unlink()


def test_resume_of_a_finished_run_changes_nothing(resume_tiny, tiny_run, tmp_path):
    save = shutil.copytree(tiny_run, tmp_path / "run")
    status, _, errors = resume_tiny(save)
    assert status == 0, errors
    assert_same_run(tiny_run, save)


@pytest.mark.parametrize("options", [[], ["--resume"], ["--force"]])
@pytest.mark.parametrize("name", run_folder.FILES[1:])
def test_a_file_with_the_name_of_a_runs_is_kept_where_there_is_no_run(call_main, tmp_path, name, options):
    """Such as a figure of yours, or the train.csv of a competition."""
    (tmp_path / name).write_text("yours")
    status, _, errors = call_main(train, *FLAGS, "--epochs", 1, "--save", tmp_path, *options)
    told = f"{tmp_path} holds {name} but no args.json: put it back, move the files away, or choose another --save\n"
    assert (status, errors.endswith(told), contents(tmp_path)) == (2, True, {name: b"yours"})


@pytest.mark.parametrize("options", [[], ["--resume"], ["--force"]])
def test_arguments_of_another_program_are_kept_and_what_lies_beside_them(call_main, tmp_path, options):
    before = {"args.json": b'{"dataset": "imagenet", "lr": 0.1}', "train.csv": b"yours", "latest.pth": b"yours"}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    status, _, errors = call_main(train, *FLAGS, "--epochs", 1, "--save", tmp_path, *options)
    assert (status, "args.json exists already and is not from this program" in errors) == (2, True), errors
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
def test_a_csv_beside_arguments_that_could_be_a_runs_is_kept_by_resume(call_main, tmp_path, name):
    (tmp_path / "args.json").write_text('{"dataset": "digits", "epochs": 1, "growth_rate": 4, "limit": 8}')
    (tmp_path / name).write_text("id,label\n1,cat\n")
    before = contents(tmp_path)
    status, _, errors = call_main(train, "--save", tmp_path, "--resume")
    assert (status, f"{name} exists already and is not from this program" in errors) == (2, True), errors
    assert contents(tmp_path) == before | {".lock": b""}


def test_exported_weights_are_not_left_beside_a_new_run_that_they_would_seem_to_be_of(call_main, tiny_run, tmp_path):
    save = shutil.copytree(tiny_run, tmp_path / "run")
    assert call_main(evaluate, save, "--export", save / "net.pth")[0] == 0
    before = contents(save)
    status, _, errors = call_main(train, *FLAGS, "--epochs", 1, "--save", save, "--force")
    assert (status, "holds exported weights, net.pth: move them away, or choose another" in errors) == (2, True), errors
    assert contents(save) == before
    assert call_main(train, "--save", save, "--resume", "--no-plot")[0] == 0


def test_resume_begins_where_there_is_nothing_yet_and_says_so(call_main, tmp_path):
    save = tmp_path / "new"
    save.mkdir()
    status, out, errors = call_main(train, *FLAGS, "--epochs", 1, "--save", save, "--resume")
    assert status == 0, errors
    assert ("from the start" in out, out.splitlines()[0]) == (True, f"{save} holds no run yet: starting one")
    assert len(pd.read_csv(save / "train.csv")) == 3


def test_nothing_of_a_run_that_is_replaced_is_ever_beside_other_arguments_or_none(monkeypatch, tiny_run, tmp_path):
    """However far begin() comes: each of its steps fails once."""
    old = json.loads((tiny_run / "args.json").read_text())
    for fails_at in itertools.count(1):
        save, steps = shutil.copytree(tiny_run, tmp_path / str(fails_at)), itertools.count(1)

        def step(real, *arguments, steps=steps, fails_at=fails_at, **options):
            if next(steps) == fails_at:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Path, "unlink", functools.partialmethod(functools.partial(step, Path.unlink)))
            patch.setattr(run_folder, "replace_file", functools.partial(step, run_folder.replace_file))
            run_folder.begin(save, old | {"lr": 0.2})
            break
        left = contents(save)
        if "args.json" not in left:
            assert not {*run_folder.FILES} & {*left}
        elif json.loads(left["args.json"])["lr"] != old["lr"]:
            assert not any(left[name].count(b"\n") > 1 for name in ("train.csv", "test.csv") if name in left)
            assert "latest.pth" not in left
        run_folder.refuse_to_replace(save, resume=False, force=True)  # --force is a way out
    assert fails_at > len(run_folder.FILES)


def test_what_the_files_of_a_run_that_is_replaced_are_links_to_is_kept(tiny_run, tmp_path):
    """Such as another run, or the store of git-annex."""
    store, save = shutil.copytree(tiny_run, tmp_path / "store"), tmp_path / "run"
    save.mkdir()
    before = contents(store)
    for name in before:
        (save / name).symlink_to(store / name)
    run_folder.begin(save, json.loads(before["args.json"]) | {"lr": 0.2})
    assert contents(store) == before
    assert json.loads((save / "args.json").read_text())["lr"] == 0.2


@pytest.mark.parametrize("also_gone", [[], ["test.csv"]])
def test_a_run_whose_checkpoint_is_gone_is_not_begun_anew(resume_tiny, tiny_run, tmp_path, also_gone):
    save = shutil.copytree(tiny_run, tmp_path / "run")
    for name in ("latest.pth", *also_gone):
        (save / name).unlink()
    before = contents(save)
    status, _, errors = resume_tiny(save)
    assert (status, len(errors.splitlines())) == (2, 2)
    assert f"{save / 'latest.pth'} is missing, and {save}" in errors
    assert contents(save) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_is_begun_anew(resume_tiny, tiny_run, tmp_path):
    """The first epoch's rows are there, and its checkpoint was not written."""
    save = shutil.copytree(tiny_run, tmp_path / "run")
    (save / "latest.pth").unlink()
    for name in ("train.csv", "test.csv"):
        rows = (save / name).read_text().splitlines(keepends=True)
        (save / name).write_text("".join(rows[: 1 + len(rows) // 2]))
    status, out, errors = resume_tiny(save)
    assert (status, "from the start" in out) == (0, True), errors
    assert_same_run(tiny_run, save)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lr", 0.2], "lr 0.1, not 0.2"),
        (["--seed", 2], "seed 1, not 2"),
        (["--depth", 16], "depth 10, not 16"),
        (["--batch-size", 20], "batch_size 40, not 20"),
        (["--augment"], "augment False, not True"),
        (["--precision", "tf32"], "precision fp32, not tf32"),
        (
            ["--epochs", 8],
            "with --epochs 8 the epochs that are done would have had other learning rates: resume it with --epochs 2, or",
        ),
        (["--epochs", 1], "--epochs 1 is less than the 2 that are done"),
    ],
)
def test_arguments_that_would_change_the_result_are_refused_by_name(resume_tiny, tiny_run, tmp_path, flags, named):
    save = shutil.copytree(tiny_run, tmp_path / "run")
    before = contents(save)
    status, _, errors = resume_tiny(save, *flags)
    assert (status, len(errors.splitlines())) == (2, 2)
    assert named in errors
    (save / ".lock").unlink()
    assert contents(save) == {name: content for name, content in before.items() if name != ".lock"}


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"processes": 2}, "processes 1, not 2"),
        ({"train_images": 97}, "train_images 96, not 97"),
        ({"classes": ["a", "b"]}, "classes ['0', '1', "),
    ],
)
def test_other_data_or_processes_than_the_run_was_begun_with_are_refused(tiny_run, facts, named):
    old = json.loads((tiny_run / "args.json").read_text())
    with pytest.raises(Refused, match=re.escape(named)):
        run_folder.compare_arguments(old, old | facts)


@pytest.mark.parametrize("more", ["", "1.5,3,3\n2,4,4\n2.00", "1.5,nan,inf\n", "1"])
def test_rows_behind_the_checkpoint_are_cut(tmp_path, more):
    path, rows = tmp_path / "train.csv", "epoch,loss,error\n0.5,1e-05,1\n1,2e+06,nan\n"
    path.write_text(rows + more)
    assert run_folder.rows_until(path, {"val": 0}, epochs_done=1, steps=2).decode() == rows
    for cut in (
        rows[:-1],
        rows.replace("1e-05", "x"),
        rows.replace("1e-05", "2.32.6"),
        rows.replace("1e-05", "1e"),
        rows.replace("\n1,", "\n1.0,"),
    ):
        path.write_text(cut)
        with pytest.raises(Refused, match=r"train.csv is damaged, line [23] is '[^']*' and not that of epoch (0.5|1): "):
            run_folder.rows_until(path, {"val": 0}, epochs_done=1, steps=2)


def test_rows_under_another_header_may_be_of_another_version(tmp_path):
    """As after somebody has added a column: nothing is damaged."""
    (tmp_path / "train.csv").write_text("epoch,loss,error,norm\n1,2,3,4\n")
    with pytest.raises(Refused, match=r"train.csv is damaged or from another version .*, it does not begin with epoch,"):
        run_folder.rows_until(tmp_path / "train.csv", {"val": 0}, epochs_done=1, steps=1)


def test_each_finished_epoch_has_to_have_had_its_rate():
    """Also where the last of them has the same with the old and the new number of epochs."""
    done, rates = ["0.1", "0.1", "0.01"], [0.1] + [0.1 * 0.1] * 2 + [0.001] * 3
    run_folder.compare_rates(done[:1], rates, begun_epochs=4)
    for epochs_done in (2, 3):
        with pytest.raises(Refused, match="with --epochs 6 the epochs that are done would have had other learning rates"):
            run_folder.compare_rates(done[:epochs_done], rates, begun_epochs=4)
    run_folder.compare_rates(["0.333333"], [1 / 3] * 4, begun_epochs=4)  # as append_rows writes it
    run_folder.compare_rates(["0.001"] * 3, [None] * 6, begun_epochs=4)  # of Adam


def test_another_schedule_in_the_code_is_refused(call_main, monkeypatch, begun):
    before = contents(begun)
    monkeypatch.setattr(train, "schedule", lambda args: [0.05] * args.epochs)
    for epochs, told in [
        (1, "the epochs that are done had other learning rates than step.py gives now: put back the code"),
        (2, "with --epochs 2 the epochs that are done would have had other learning rates: resume it with --epochs 1"),
    ]:
        status, _, errors = call_main(train, "--save", begun, "--resume", "--epochs", epochs)
        assert (status, told in errors, contents(begun)) == (2, True, before), errors


def with_a_group_of_its_own(first, others, lr):
    return torch.optim.SGD([{"params": [first], "weight_decay": 0}, {"params": others}], lr=lr)


def without_the_first(first, others, lr):
    return torch.optim.SGD(others, lr=lr)


@pytest.mark.parametrize("changed", [with_a_group_of_its_own, without_the_first])
def test_other_groups_of_parameters_in_the_code_are_refused(call_main, monkeypatch, begun, changed):
    """Before anything is written."""
    before = contents(begun)

    def make_optimizer(net, args):
        first, *others = net.parameters()
        return changed(first, others, args.lr)

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    status, _, errors = call_main(train, "--save", begun, "--resume", "--epochs", 2)
    assert (status, "is from another run or version of this program" in errors) == (2, True), errors
    assert contents(begun) == before


UNREADABLE = """
import os, sys, train
os.seteuid(65534)
sys.argv[0] = train.__file__
train.main()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("name", ["args.json", "latest.pth"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(forked, tiny_run, name):
    """Nor is it advised to replace the run."""
    with tempfile.TemporaryDirectory() as folder:
        save = shutil.copytree(tiny_run, Path(folder, "run"))
        for path, mode in [(Path(folder), 0o755), (save, 0o777), (save / ".lock", 0o666), (save / name, 0)]:
            path.chmod(mode)
        done = forked(["-c", UNREADABLE, "--save", save, "--resume"]).wait()
    told = f"{save / name}: Permission denied: fix this, or name another place\n"
    assert (done.returncode, done.stderr.endswith(told)) == (2, True), done.stderr


def test_other_code_and_other_versions_of_a_run_are_said_and_kept(call_main, monkeypatch, tmp_path):
    facts, a, b, c = [], "a" * 40, "b" * 40, "c" * 40
    for epochs, commit, version in [(1, a, "2.11.0"), (2, b, "2.11.0"), (3, b, "2.14.1"), (3, c, "9")]:
        monkeypatch.setattr(run_folder, "git_commit", lambda commit=commit: commit)
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(train, "schedule", lambda args: [0.1] * args.epochs)
        status, out, errors = call_main(train, *FLAGS, "--epochs", epochs, "--save", tmp_path, "--no-plot", "--resume")
        assert status == 0, errors
        facts.append({name: json.loads((tmp_path / "args.json").read_text())[name] for name in ("commit", "torch")})
        told = re.findall(r" continues with (\w+) \S+, not \S+; args.json keeps both$", out, re.MULTILINE)
        assert told == [[], ["commit"], ["torch"], []][len(facts) - 1]
    assert facts[1] == {"commit": f"{a}, then {b}", "torch": "2.11.0"}
    assert facts[2] == facts[3] == {"commit": f"{a}, then {b}", "torch": "2.11.0, then 2.14.1"}  # it was complete the last time
    before = contents(tmp_path)
    (tmp_path / "args.json").write_text(before["args.json"].decode().replace('"epochs": 3', '"epochs": 9'))
    assert call_main(train, "--save", tmp_path, "--resume", "--epochs", 3)[0] == 0
    assert contents(tmp_path) == before  # nor was anything trained with fewer epochs


def test_a_commit_may_be_unknown_before_or_after_a_run_was_resumed(capsys, tmp_path):
    """As of a copy without git."""
    known = {"commit": "a", "torch": "2.11.0", "hardware": "cpu"}
    unknown = known | {"commit": None}
    pairs = [(known, unknown), (unknown, known), (unknown, unknown)]
    assert [run_folder.history(tmp_path, *pair)["commit"] for pair in pairs] == ["a, then unknown", "unknown, then a", None]
    assert capsys.readouterr().out.count("continues with commit") == 2


@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
def test_a_csv_that_is_removed_ends_the_run(tmp_path, name):
    """A new one would lack the header and all rows before."""
    with pytest.raises(FileNotFoundError) as error:
        run_folder.append_rows(tmp_path / name, [(1, 2, 3)])
    assert (error.value.filename, contents(tmp_path)) == (str(tmp_path / name), {})


def test_rows_of_the_second_epoch_tell_of_a_checkpoint_that_is_lost(tmp_path):
    (tmp_path / "train.csv").write_text("epoch,loss,error\n0.5,2,3\n1,2,3\n")
    run_folder.refuse_lost_checkpoint(tmp_path)
    for later in ("1.5", "2"):  # where an epoch has one step, its only row has a whole number
        (tmp_path / "train.csv").write_text(f"epoch,loss,error\n0.5,2,3\n1,2,3\n{later},2,3\n")
        with pytest.raises(Refused, match=r"latest.pth is missing, and .*train.csv has rows of later epochs"):
            run_folder.refuse_lost_checkpoint(tmp_path)


# -------------------------------------------------------------------------------------------- disks, and other processes


FULL = """
import resource, sys, train
resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 1024, 20 * 1024))
sys.argv[0] = train.__file__
train.main()
"""


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(call_main, forked, tmp_path):
    """The kernel refuses to make a file of over 20 kB."""
    flags = [*FLAGS, "--opt", "adam", "--save", tmp_path]
    assert call_main(train, *flags, "--epochs", "1")[0] == 0
    before = (tmp_path / "latest.pth").read_bytes()
    assert len(before) > 20_480
    done = forked(["-c", FULL, *flags, "--epochs", "2", "--resume"]).wait()
    assert done.returncode == 1
    assert "latest.pth: File too large: raise the file size limit (ulimit -f); this continues the run: " in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "latest.pth").read_bytes() == before
    assert not (tmp_path / "latest.pth.tmp").exists()


def test_the_rows_of_an_epoch_are_on_the_disk_before_its_checkpoint(disk, tmp_path):
    for name, header in run_folder.headers({"val": 0}).items():
        (tmp_path / name).write_text(header)
    run_folder.append_rows(tmp_path / "train.csv", [(1 / 3, 3.14159265, 90), (1, 2, 80)])
    run_folder.end_epoch(tmp_path, [1.5, 70, 2, 71, 0.1, 9], {"epoch": 1})
    flushed = {name: content for kind, name, content in disk if kind == "flush"}
    assert flushed["train.csv"] == b"epoch,loss,error\n0.333333,3.14159,90\n1,2,80\n"
    assert flushed["test.csv"] == b"epoch,loss,error,train_loss,train_error,lr,seconds\n1,1.5,70,2,71,0.1,9\n"
    assert flushed["latest.pth.tmp"] == (tmp_path / "latest.pth").read_bytes()
    *rows, whole, replaced, named = [event[:2] for event in disk]
    assert sorted(rows) == [("flush", "test.csv"), ("flush", "train.csv")]
    assert [whole, replaced, named] == [("flush", "latest.pth.tmp"), ("replace", "latest.pth.tmp"), ("flush", tmp_path.name)]


def test_a_row_with_other_columns_than_the_header_is_not_written(tmp_path):
    """As of a column that headers() lacks: the run would end well, and nothing could read or resume it."""
    (tmp_path / "train.csv").write_text("epoch,loss,error\n")
    for row in [(1, 2), (1, 2, 3, 4)]:
        with pytest.raises(ValueError, match=r"a row of train.csv does not have the columns epoch,loss,error: "):
            run_folder.append_rows(tmp_path / "train.csv", [row])
    assert contents(tmp_path) == {"train.csv": b"epoch,loss,error\n"}


def test_rows_are_added_behind_all_that_a_long_run_has(tmp_path):
    """Which are more than what is read at once to get the header."""
    path = tmp_path / "train.csv"
    path.write_text("epoch,loss,error\n")
    for epoch in (0, 1):
        run_folder.append_rows(path, [(epoch + step / 782, 2.3, 90) for step in range(1, 783)])
    assert len(run_folder.rows_until(path, {"val": 0}, epochs_done=2, steps=782)) == path.stat().st_size


def test_a_second_process_on_the_same_folder_is_refused(call_main, tmp_path):
    save = tmp_path / "new" / "run"
    with run_folder.locked(save):
        status, _, errors = call_main(train, *FLAGS, "--epochs", 1, "--save", save, "--resume")
    assert (status, "another process is training in" in errors) == (2, True)


@pytest.mark.parametrize(
    ("place", "again"), [*itertools.product(["train.test", "train.print_epoch"], [False, True]), ("run_folder.encoded", False)]
)
def test_a_run_whose_folder_is_moved_away_writes_nothing_into_a_new_one(call_main, monkeypatch, tmp_path, place, again):
    """Before, while or after its first epoch is saved, whether or not another run was begun under the old name by then."""
    save, words = tmp_path / "run", [*FLAGS, "--epochs", 2]
    real = pkgutil.resolve_name(place)

    def moved(*arguments):
        result = real(*arguments)
        save.rename(tmp_path / "moved")
        monkeypatch.setattr(place, real)
        assert not again or call_main(train, *words, "--seed", 2, "--save", save)[0] == 0
        return result

    monkeypatch.setattr(place, moved)
    status, _, errors = call_main(train, *words, "--save", save)
    assert (status, f"{save} was moved or removed while the run was writing there: resume" in errors) == (1, True), errors
    assert save.exists() == again
    assert not again or json.loads((save / "args.json").read_text())["seed"] == 2
    assert not again or load_checkpoint(save / "latest.pth")["args"]["seed"] == 2
    assert not again or len((save / "train.csv").read_text().splitlines()) == 1 + 2 * 3  # steps
    assert call_main(train, "--save", tmp_path / "moved", "--resume", "--no-plot")[0] == 0


def meanwhile(monkeypatch, happens):
    """While the data is read, before the folder is locked, another process does what happens."""
    real = data.load

    def load(*arguments, **options):
        happens()
        return real(*arguments, **options)

    monkeypatch.setattr(data, "load", load)


def test_of_two_equal_starts_the_second_leaves_the_run_of_the_first(call_main, monkeypatch, tiny_run, tmp_path):
    save = tmp_path / "run"
    meanwhile(monkeypatch, lambda: shutil.copytree(tiny_run, save))
    status, _, errors = call_main(train, *TINY_RUN, "--no-plot", "--save", save)
    assert (status, f"{save} already holds a run: continue it" in errors) == (2, True)
    assert {**contents(save), ".lock": b""} == {**contents(tiny_run), ".lock": b""}


@pytest.mark.parametrize("vanishes", [True, False])
@pytest.mark.parametrize("init", [True, False])
def test_a_checkpoint_that_comes_or_goes_meanwhile(resume_tiny, monkeypatch, tiny_run, tmp_path, vanishes, init):
    """Whether --init was read depends on it; a run is neither begun nor continued then, and nothing else is touched."""
    save = shutil.copytree(tiny_run, tmp_path / "run")
    facts = json.loads((save / "args.json").read_text())
    begun = {"init": str(tiny_run / "latest.pth"), "init_digest": digest(weights(tiny_run))} if init else {}
    (save / "args.json").write_text(json.dumps(facts | begun))
    if vanishes:
        meanwhile(monkeypatch, (save / "latest.pth").unlink)
    else:
        (save / "latest.pth").unlink()
        meanwhile(monkeypatch, lambda: shutil.copy(tiny_run / "latest.pth", save))
    before = contents(save)
    status, _, errors = resume_tiny(save, *(["--init", tiny_run / "latest.pth"] if init else []))
    assert (status, f"another process has changed {save} in the meantime: start again" in errors) == (2, True), errors
    assert {**before, "latest.pth": b""} == {**contents(save), "latest.pth": b""}


def test_the_lock_dies_with_its_holder(forked, tmp_path):
    code = f"""
import os, pathlib, run_folder
with run_folder.locked(pathlib.Path({str(tmp_path)!r})):
    os.write(100, b"1")
    os.read(101, 1)
"""
    (ready, its_ready), (its_go, go) = os.pipe(), os.pipe()
    holder = forked(["-c", code], more=[its_ready, its_go])
    os.close(its_ready)
    assert os.read(ready, 1)
    with pytest.raises(Refused, match="another process"), run_folder.locked(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    assert holder.wait().returncode == -signal.SIGKILL
    with run_folder.locked(tmp_path):
        pass
    for descriptor in (ready, its_go, go):
        os.close(descriptor)


LOCKLESS = """
import errno, fcntl, sys, train
number = getattr(errno, sys.argv.pop(1))
def flock(*arguments):
    raise OSError(number, "as on such a file system")
fcntl.flock = flock
sys.argv[0] = train.__file__
train.main()
"""


def test_a_file_system_without_locks(forked, tiny_run, tmp_path):
    """The run goes on, says so once, and leaves nothing that would stand in the way of the next."""
    save = tmp_path / "run"
    flags = [*TINY_RUN, "--no-plot", "--save", save]
    for more in ([], ["--resume"]):
        done = forked(["-c", LOCKLESS, "ENOSYS", *flags, *more]).wait()
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count(f"{save}: its file system has no locks") == 1
        assert_same_run(tiny_run, save)


@pytest.mark.parametrize(("number", "status"), [(errno.EIO, 1), (errno.ENOSPC, 1), (errno.EPERM, 2)])
def test_a_lock_that_fails_otherwise_is_named(monkeypatch, tmp_path, number, status):
    """A disk that is full or fails is no mistake of the user."""

    def flock(*arguments):
        raise OSError(number, "the reason")

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        pytest.raises(Refused, match=re.escape(f"{tmp_path}/.lock cannot be locked (the reason)")) as refused,
        run_folder.locked(tmp_path),
    ):
        pass
    assert refused.value.status == status


# ------------------------------------------------------------------------------------------------------- damaged folders


def missing(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def folder(path):
    path.unlink()
    path.mkdir()


def no_text(path):
    path.write_bytes(b"\xff\x00" * 20)


def a_list(path):
    path.write_text('["growth_rate"]')


def test_a_run_that_older_code_has_resumed_goes_on(resume_tiny, tiny_run, tmp_path):
    """That wrote an args.json without the digest of the net of --init, which the checkpoint still has."""
    save = shutil.copytree(tiny_run, tmp_path / "run")
    checkpoint, facts = load_checkpoint(save / "latest.pth"), json.loads((save / "args.json").read_text())
    (save / "args.json").write_text(json.dumps(facts | {"init": "net.pth"}))
    begun = checkpoint["args"] | {"init": "net.pth", "init_digest": digest(checkpoint["net"])}
    torch.save(checkpoint | {"args": begun}, save / "latest.pth")
    status, _, errors = resume_tiny(save)
    assert status == 0, errors


@pytest.mark.parametrize("spoil", [missing, empty, cut_off, folder, no_text, a_list])
@pytest.mark.parametrize("name", ["args.json", "train.csv", "test.csv", "latest.pth"])
def test_a_file_that_is_not_whole_is_named_and_nothing_is_touched(resume_tiny, tiny_run, tmp_path, name, spoil):
    save = shutil.copytree(tiny_run, tmp_path / "run")
    spoil(save / name)
    before = contents(save)
    status, _, errors = resume_tiny(save)
    assert (status, len(errors.splitlines())) == (2, 2)
    assert name in errors
    assert str(save) in errors
    assert any(way in errors for way in ("put back", "put it back", "remove it", "name the latest.pth"))
    assert contents(save) == before


@pytest.mark.parametrize(
    ("name", "ways", "told"),
    [
        (".lock", ["--resume", "--force"], "{save}/.lock cannot be locked ("),
        ("latest.pth", ["--resume"], "{save}/latest.pth is not a file: "),
        ("train.csv", ["--resume"], "{save}/train.csv is missing: "),
        ("loss.png", ["--force"], "{save}/loss.png is a folder where a file is expected: remove it"),
    ],
)
def test_a_folder_where_a_file_should_be(call_main, tiny_run, tmp_path, name, ways, told):
    save = shutil.copytree(tiny_run, tmp_path / "run")
    (save / name).unlink()
    (save / name).mkdir()
    before = contents(save)
    for way in ways:
        status, _, errors = call_main(train, *TINY_RUN, "--save", save, way)
        assert (status, len(errors.splitlines()), told.format(save=save) in errors) == (2, 2, True), errors
        assert contents(save) == before


def of_another_net(checkpoint):
    checkpoint["net"] = {**checkpoint["net"], "fc.bias": torch.zeros(11)}


def of_a_larger_net(checkpoint):
    checkpoint["net"] = {**checkpoint["net"], "fc2.bias": torch.zeros(10)}


def without_optimizer(checkpoint):
    del checkpoint["optimizer"]


def of_another_run(checkpoint):
    checkpoint["args"] = {**checkpoint["args"], "opt": "adam"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_another_net, "latest.pth is from another run"),
        (of_a_larger_net, "latest.pth is from another run"),
        (without_optimizer, "latest.pth is from another run or version"),
        (of_another_run, "the run was begun with opt adam, not sgd"),
    ],
)
def test_a_checkpoint_that_is_whole_and_not_of_this_run(resume_tiny, tiny_run, tmp_path, change, message):
    save = shutil.copytree(tiny_run, tmp_path / "run")
    checkpoint = torch.load(save / "latest.pth", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, save / "latest.pth")
    before = contents(save)
    status, _, errors = resume_tiny(save)
    assert (status, message in errors) == (2, True), errors
    assert contents(save) == before


@pytest.mark.parametrize(
    ("name", "row", "other"),
    [
        ("train.csv", 3, None),  # a row that is gone
        ("train.csv", 3, "1,2\n"),
        ("train.csv", 3, "0.5,2,3\n"),
        ("test.csv", 1, "3,1,1\n"),
        ("test.csv", 0, "epoch,error,loss\n"),
    ],
)
def test_a_damaged_row_in_the_middle_does_not_survive(resume_tiny, tiny_run, tmp_path, name, row, other):
    save = shutil.copytree(tiny_run, tmp_path / "run")
    lines = (save / name).read_text().splitlines(keepends=True)
    lines[row : row + 1] = [other] if other else []
    (save / name).write_text("".join(lines))
    before = contents(save)
    status, _, errors = resume_tiny(save)
    assert (status, f"{save / name} is damaged" in errors) == (2, True), errors
    assert contents(save) == before


def test_a_csv_that_a_spreadsheet_has_saved_is_accepted(resume_tiny, tiny_run, tmp_path):
    save = shutil.copytree(tiny_run, tmp_path / "run")
    before = {name: (save / name).read_bytes() for name in ("train.csv", "test.csv")}
    for name, content in before.items():
        (save / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert resume_tiny(save)[0] == 0
    assert {name: (save / name).read_bytes() for name in before} == before


def damage(content, position, kind, byte):
    """The content with a byte changed, a byte inserted, or all cut off, at a place between 0 and 1."""
    at = int(position * len(content))
    return content[:at] + (b"" if kind == "cut" else bytes([byte]) + content[at + (kind == "change") :])


@pytest.mark.parametrize("name", ["args.json", "train.csv", "test.csv", "latest.pth"])
@hypothesis.given(
    position=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(["cut", "insert", "change"]), byte=st.integers(0, 255)
)
@hypothesis.settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_damage_anywhere_is_a_sentence_or_a_run_that_is_right(
    call_main, resume_tiny, tiny_run, tmp_path_factory, name, position, kind, byte
):
    """What no file tells is a digit of a loss, or what args.json says of the machine: then the rest of the run is right."""
    save = shutil.copytree(tiny_run, tmp_path_factory.mktemp("damaged") / "run")
    (save / name).write_bytes(damage((save / name).read_bytes(), position, kind, byte))
    before = contents(save)
    if name != "args.json":
        reader = [evaluate, save / "latest.pth"] if name == "latest.pth" else [plot, save]
        status, _, errors = call_main(*reader, "--out", save / "new" / "figure.svg")
        assert (status, len(errors.splitlines())) in [(0, 0), (2, 2)], errors
    status, _, errors = resume_tiny(save)
    if status == 2:
        assert len(errors.splitlines()) == 2
        assert contents(save) == before
        return
    assert status == 0, errors
    ours, theirs = weights(save), weights(tiny_run)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for part in ("train.csv", "test.csv"):
        assert pd.read_csv(save / part)["epoch"].tolist() == pd.read_csv(tiny_run / part)["epoch"].tolist()


def test_figures_that_fail_are_said_once_and_do_not_stop_the_run(relayed, tiny_run, tmp_path, capsys):
    save = tmp_path / "run"
    shutil.copytree(tiny_run, save)
    (save / "loss.png").unlink()
    (save / "loss.png").mkdir()  # no file can be written here
    plots = run_folder.Plots(save, enabled=True)
    for _ in range(2):
        plots.redraw()
        plots.wait()
    out = capsys.readouterr().out
    assert out.count("the figures could not be drawn, nothing else is affected: plot.py: error:") == 1
    assert "loss.png" in out


# ------------------------------------------------------------------------------------ data that changed, and what fails


def replaced(root):
    Image.new("RGB", (40, 50), (0, 9, 255)).save(root / "train" / "blue" / "0.jpg")


def relabelled(root):
    for part in ("train", "test"):
        (root / part / "blue").rename(root / part / "x")
        (root / part / "red").rename(root / part / "blue")
        (root / part / "x").rename(root / part / "red")


def moved(root):
    (root / "train" / "red" / "0.jpg").rename(root / "train" / "blue" / "r.jpg")


def added(root):
    Image.new("RGB", (40, 50), (255, 9, 0)).save(root / "test" / "red" / "1.png")


def removed(root):
    (root / "train" / "red" / "5.png").unlink()


@pytest.mark.parametrize(
    ("change", "parts"),
    [(replaced, "train"), (relabelled, "train and test"), (moved, "train"), (added, "test"), (removed, "train")],
)
def test_a_run_is_not_continued_on_other_data(call_main, pictures, tmp_path, change, parts):
    save, flags = tmp_path / "run", [*TINY[2:6], "--device", "cpu", "--drop-rate", 0, "--no-plot", "--save", tmp_path / "run"]
    flags += ["--dataset", "folder", "--data", pictures]
    assert call_main(train, *flags, "--epochs", 1)[0] == 0
    known = json.loads((save / "args.json").read_text())["digests"]
    assert known == torch.load(save / "latest.pth", weights_only=True)["args"]["digests"]
    assert (known.keys(), {len(digest) for digest in known.values()}) == ({"train", "test"}, {32})
    whole, before = shutil.copytree(pictures / "train", tmp_path / "elsewhere" / "train").parent, contents(save)
    shutil.copytree(pictures / "test", whole / "test")
    change(pictures)
    for also_gone in ("nothing", "args.json's"):
        status, _, errors = call_main(train, *flags, "--epochs", 2, "--resume")
        told = f"the images or labels of {parts} in {pictures} are not those that the run was begun with, or another version"
        assert (status, told in errors, contents(save)) == (2, True, before), also_gone
        facts = json.loads(before["args.json"])  # the checkpoint knows, too
        before["args.json"] = json.dumps(
            {name: facts[name] for name in facts if name not in ("digests", "train_images")}
        ).encode()
        (save / "args.json").write_bytes(before["args.json"])
    status, _, errors = call_main(train, *flags, "--data", whole, "--epochs", 2, "--resume")  # the same, in another place
    assert status == 0, errors


def test_each_part_has_a_digest_of_its_pixels_and_labels():
    whole, part = data.load("digits", ".", val=300), data.load("digits", ".", val=300, limit=100)
    ours, theirs = whole.digests(), part.digests()
    assert list(ours) == ["train", "val", "test"]
    assert [name for name in ours if ours[name] != theirs[name]] == ["train"]
    for split in whole[:3]:
        other = data.Split(split.images, split.labels.roll(1))
        assert other.digest() != split.digest() == data.Split(split.images.clone(), split.labels).digest()
        assert data.Split(split.images.mT, split.labels).digest() != split.digest()


# train.py on a file system that says what the first argument is when a file is flushed.
UNFLUSHED = """
import os, sys, train
number = int(sys.argv.pop(1))
def fsync(descriptor):
    raise OSError(number, os.strerror(number))
os.fsync = fsync
train.main()
"""


def test_a_file_system_that_cannot_flush(forked, tiny_run, tmp_path):
    """As CIFS, FUSE and VirtualBox say; a disk that fails says otherwise, and is no place for a run."""
    flags = [*TINY_RUN, "--no-plot", "--save", tmp_path / "run"]
    done = forked(["-c", UNFLUSHED, errno.EINVAL, *flags]).wait()
    assert (done.returncode, done.stderr) == (0, "")
    told = f"{tmp_path / 'run'}: its file system cannot flush a file ("
    assert done.stdout.count("cannot flush") == done.stdout.count(told) == 1
    assert_same_run(tiny_run, tmp_path / "run")
    done = forked(["-c", UNFLUSHED, errno.EIO, *flags, "--force"]).wait()
    assert (done.returncode, "Input/output error" in done.stderr) == (1, True)


# A run whose interpreter is gone when it draws.
GONE = """
import sys, train
sys.executable = "/gone/python"
sys.argv[0] = train.__file__
train.main()
"""


def test_figures_without_a_process_to_draw_them(forked, tiny_run, tmp_path):
    save = tmp_path / "run"
    done = forked(["-c", GONE, *TINY_RUN, "--save", save]).wait()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("the figures could not be drawn, nothing else is affected: No such file or directory\n") == 1
    assert done.stdout.endswith(f"{save} has args.json, train.csv, test.csv, latest.pth\n")
    assert_same_run(tiny_run, save)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_no_process_and_no_memory_for_figures(monkeypatch, capsys, tmp_path, number):
    def fork(*arguments, **options):
        raise OSError(number, os.strerror(number))

    plots = run_folder.Plots(tmp_path, enabled=True)
    monkeypatch.setattr(run_folder.subprocess, "Popen", fork)
    for _ in range(2):
        plots.redraw()
        plots.wait()
    assert capsys.readouterr().out == f"the figures could not be drawn, nothing else is affected: {os.strerror(number)}\n"


def test_resume_needs_nothing_but_the_folder(call_main, tmp_path):
    """Each kind of flag: numbers, names, switches on and off, a data set that is not the default one."""
    flags = [*TINY, "--batch-size", 40, "--no-augment", "--drop-rate", 0.1, "--no-nesterov", "--efficient", "--seed", 7]
    flags += ["--val", 200, "--no-plot", "--precision", "bf16", "--epochs", 2]
    assert call_main(train, *flags, "--save", tmp_path / "whole")[0] == 0
    assert call_main(train, *flags, "--epochs", 1, "--save", tmp_path / "parts")[0] == 0
    begun = tmp_path / "parts" / "args.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"help": True, "later": 1}))  # no arguments of a run
    for epochs in (["--epochs", 2], []):  # the second time it is complete
        status, _, errors = call_main(train, "--save", tmp_path / "parts", "--resume", *epochs)
        assert status == 0, errors
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    one, other = (json.loads((tmp_path / name / "args.json").read_text()) for name in ("whole", "parts"))
    assert {name for name in one if one[name] != other[name]} == {"save", "resume"}
    for more, told in [
        (["--lr", 0.2], "lr 0.1, not 0.2"),
        (["--augment"], "augment False, not True"),
        (["--image-size", 64], "image_size 32, not 64"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ]:
        status, _, errors = call_main(train, "--save", tmp_path / "parts", "--resume", *more)
        assert (status, told in errors) == (2, True), errors


@pytest.mark.parametrize(
    ("flag", "default", "value", "told"),
    [
        ({"type": float, "default": 0.0}, 0.0, [0.1], "0.0, not 0.1"),
        ({"type": float}, None, [0.1], "None, not 0.1"),
        ({"type": float, "default": "0.5"}, 0.5, [0.1], "0.5, not 0.1"),
        ({"type": float, "nargs": 2, "default": (0.9, 0.99)}, [0.9, 0.99], [1, 2], "[0.9, 0.99], not [1.0, 2.0]"),
        ({"type": Path, "default": Path("a.csv")}, "a.csv", ["b.csv"], "a.csv, not b.csv"),
        ({"action": "store_true"}, False, [], "False, not True"),
    ],
)
def test_a_flag_that_the_run_did_not_have_yet_stays_at_its_default(call_main, monkeypatch, begun, flag, default, value, told):
    """With another value the epochs done would count as trained by it."""
    real = train.build_parser

    def later_version():
        parser = real()
        parser.add_argument("--later", **flag)
        return parser

    monkeypatch.setattr(train, "build_parser", later_version)
    before = contents(begun)
    status, _, errors = call_main(train, "--save", begun, "--resume", "--later", *value)
    assert (status, f"the run was begun with later {told}: " in errors) == (2, True), errors
    assert contents(begun) == before
    for _ in range(2):
        assert call_main(train, "--save", begun, "--resume", "--epochs", 2)[0] == 0
        assert json.loads((begun / "args.json").read_text())["later"] == default


def test_a_folders_run_goes_on_where_its_pictures_are_now(call_main, pictures, tmp_path):
    save, data, moved = tmp_path / "run", tmp_path / "data", tmp_path / "moved"
    shutil.copytree(pictures, data, ignore=lambda folder, names: {"data"} & {*names})
    flags = ["--dataset", "folder", "--data", data, "--image-size", 16, *TINY[2:6], "--drop-rate", 0, "--no-plot"]
    assert call_main(train, *flags, "--epochs", 1, "--save", save)[0] == 0
    data.rename(moved)
    status, _, errors = call_main(train, "--save", save, "--resume", "--epochs", 2)
    assert (status, f"{data / 'train'} is not a folder" in errors) == (2, True)
    status, _, errors = call_main(train, "--save", save, "--resume", "--epochs", 2, "--data", moved)
    assert status == 0, errors
    facts = json.loads((save / "args.json").read_text())
    assert (facts["image_size"], facts["data"], facts["epochs"]) == (16, str(moved), 2)


@pytest.mark.parametrize(
    ("hardware", "had", "device", "more", "expected"),
    [
        ("cpu (x86_64, 8 threads)", (False, True), "cpu", [], (False, True)),
        ("cpu (x86_64, 8 threads)", (False, True), "cuda", [], (True, False)),
        ("NVIDIA H100", (False, True), "cuda", [], (False, True)),
        ("cpu (x86_64, 8 threads), then NVIDIA H100", (False, True), "cuda", [], (False, True)),
        ("NVIDIA H100", (True, True), "cuda", [], (True, True)),
        ("NVIDIA H100", (True, True), "cuda", ["--compile"], (False, True)),
        ("NVIDIA H100", (True, True), "cpu", [], (False, False)),
    ],
)
def test_how_a_step_is_taken_is_kept_on_a_machine_of_the_same_kind(hardware, had, device, more, expected):
    """On another kind, what is faster there; and no graph is captured where none can be."""
    begun = {"hardware": hardware, "capture": had[0], "efficient": had[1], "depth": 13, "bottleneck": False}
    args = flags.parse_args(train.build_parser(), more, begun)
    flags.fill_in(args, torch.device(device), old_args=begun)
    assert (args.depth, args.capture, args.efficient) == (13, *expected)
    flags.refuse_contradictions(args, torch.device(device))


@pytest.mark.parametrize(
    "damage",
    [
        *({"precision": none} for none in ("fp8", "", 32, ["fp32"], {})),
        *({"epochs": none} for none in ("two", "2", 0, 10**8)),
        *({"limit": 9.6}, {"opt": "sge"}, {"dataset": "digitt"}, {"depth": 10**6}, {"val": True}),
        *({"efficient": "no"}, {"capture": 1}, {"val": False}, {"epochs": False}, {"epochs": True}),
        *({name: 1} for name in ("data", "init_digest", "commit", "torch", "hardware")),
    ],
)
def test_arguments_that_no_flag_takes_are_a_sentence(call_main, monkeypatch, tiny_run, tmp_path, damage):
    """In a folder of --save, or in that of no --save."""
    save = shutil.copytree(tiny_run, tmp_path / "work" / "digits.base")
    facts = json.loads((save / "args.json").read_text())
    (save / "args.json").write_text(json.dumps(facts | damage))
    monkeypatch.chdir(tmp_path)
    for folder, named in [(save, ["--save", save]), (save.relative_to(tmp_path), ["--dataset", "digits"])]:
        status, _, errors = call_main(train, *named, "--resume")
        assert (status, len(errors.splitlines())) == (2, 2)
        assert f" {folder / 'args.json'} is damaged" in errors
        assert f": {run_folder.REMEDY}\n" in errors


def test_switches_of_a_run_can_be_taken_back(call_main, relayed, tmp_path):
    flags = [*TINY, "--batch-size", 40, "--no-plot", "--deterministic", "--epochs", 1]
    assert call_main(train, *flags, "--save", tmp_path / "run")[0] == 0
    assert call_main(train, "--save", tmp_path / "run", "--resume", "--epochs", 2, "--plot", "--no-deterministic")[0] == 0
    facts = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (facts["plot"], facts["deterministic"], (tmp_path / "run" / "loss.png").exists()) == (True, False, True)


def test_a_run_goes_on_from_another_working_directory(forked, pictures, tmp_path):
    """And is evaluated: --data was relative to the folder that it was begun in. Changes are refused before anything is read."""
    flags = ["--dataset", "folder", "--data", pictures.name, *TINY[2:6], "--drop-rate", 0, "--no-plot", "--device", "cpu"]
    command = [ROOT / "train.py", *map(str, flags), "--epochs", "1", "--save", tmp_path / "run"]
    assert forked(command, cwd=pictures.parent).wait().returncode == 0
    again = [ROOT / "train.py", "--save", tmp_path / "run", "--resume", "--epochs", "2"]
    done = forked(again, cwd="/").wait()
    assert (done.returncode, done.stderr) == (0, "")
    done = forked([ROOT / "evaluate.py", tmp_path / "run" / "latest.pth"], cwd="/").wait()
    error = float(run_folder.last_row(tmp_path / "run" / "test.csv")["error"])
    assert (done.returncode, f"test error {error:.2f} %" in done.stdout) == (0, True), done.stderr
    done = forked([*again, "--dataset", "svhn"], cwd="/").wait()
    assert (done.returncode, done.stdout) == (2, "")
    assert "the run was begun with dataset folder, not svhn: resume it as it was begun, or choose another" in done.stderr


def test_digests_that_are_none_are_a_sentence(call_main, tiny_run, tmp_path):
    save = shutil.copytree(tiny_run, tmp_path / "run")
    facts = json.loads((save / "args.json").read_text())
    for digests in (None, "x", {}, {"train": 1, "test": 2}):
        (save / "args.json").write_text(json.dumps(facts | {"digests": digests}))
        status, _, errors = call_main(train, "--save", save, "--resume", "--no-plot")
        assert (status, len(errors.splitlines())) == (2, 2), errors
    checkpoint = torch.load(save / "latest.pth", weights_only=True)
    for wrong in ({"digests": "x"}, {"val": "x"}):
        torch.save({**checkpoint, "args": checkpoint["args"] | wrong}, save / "latest.pth")
        told, _, errors = call_main(evaluate, save / "latest.pth")
        assert (told, "is not a checkpoint of train.py" in errors) == (2, True)
    torch.save({**checkpoint, "args": checkpoint["args"] | {"digests": None}}, save / "latest.pth")
    (save / "args.json").write_text(json.dumps(facts))
    status, _, errors = call_main(train, "--save", save, "--resume", "--no-plot")
    assert (status, "the images or labels of train and test in" in errors) == (2, True), errors


def test_the_commit_of_the_code_says_whether_files_have_changed_since(monkeypatch, tmp_path):
    monkeypatch.setattr(run_folder, "HERE", tmp_path)
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):  # as in git's hooks
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # somebody's may sign each commit
    assert run_folder.git_commit() is None
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "step.py").write_text("one")
    make = [["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "first"], ["tag", "--message", "", "v1"]]
    for command in [*make, ["config", "diff.external", "echo"]]:  # it prints the names of temporary files
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert run_folder.git_commit() == commit
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as in a hook of another repository
    assert run_folder.git_commit() == commit
    (tmp_path / "copied").mkdir()
    monkeypatch.setattr(run_folder, "HERE", tmp_path / "copied")  # into somebody's repository, whose commit says nothing
    assert run_folder.git_commit() is None
    monkeypatch.setattr(run_folder, "HERE", tmp_path)
    (tmp_path / "step.py").write_text("two")
    second = run_folder.git_commit()
    assert re.fullmatch(rf"{commit}-dirty-[0-9a-f]{{8}}", second)
    (tmp_path / "step.py").write_text("three")  # other code, which must not pass for the same
    assert run_folder.git_commit() != second
    (tmp_path / "step.py").write_text("two")
    assert run_folder.git_commit() == second
    monkeypatch.delenv("GIT_DIR")
    subprocess.run([*git, "add", "."], check=True)
    with contextlib.suppress(OSError):  # root alone may give it to another user, and not where there is no other one
        os.chown(tmp_path, 65534, 65534)
    assert run_folder.git_commit() == second
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert run_folder.git_commit() is None


def test_every_flag_is_refused_that_the_readme_does_not_let_change():
    """Of --resume: the flags that are named in README.md, where a run lies, and how it is started."""
    text = " ".join((ROOT / "README.md").read_text().split())
    (sentence,) = re.findall(r"are refused, except what changes nothing but rounding and random draws: (.*?)\. ", text)
    free = {flag.removeprefix("no-").replace("-", "_") for flag in re.findall(r"`--([a-z-]+)`", sentence)}
    assert {"device", "epochs", "plot", "data"} <= free
    for action in train.build_parser()._actions[1:]:  # behind --help
        if action.dest in free | {"save", "resume", "force"}:
            run_folder.compare_arguments({action.dest: 1}, {action.dest: 2})
        else:
            with pytest.raises(Refused, match=f"the run was begun with {action.dest} 1, not 2"):
                run_folder.compare_arguments({action.dest: 1}, {action.dest: 2})


def test_a_figure_is_drawn_again_when_the_last_one_is_done(tmp_path):
    plots = run_folder.Plots(tmp_path, enabled=True)
    plots.command = [sys.executable, "-c", ""]
    plots.redraw()
    first = plots.process
    first.wait()
    plots.redraw()
    assert plots.process is not first
    plots.wait()


def test_a_run_that_is_forced_leaves_nothing_of_the_old_one(call_main, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    for val in (False, True):
        table = evaluate.confusion_table(SimpleNamespace(out=tmp_path / "run", val=val))
        table.touch()
        table.with_suffix(".png").touch()
    status, _, errors = call_main(train, *TINY, "--epochs", 1, "--no-plot", "--force", "--save", tmp_path / "run")
    assert status == 0, errors
    assert {*contents(tmp_path / "run")} - {".lock", "stdout"} == {"args.json", "train.csv", "test.csv", "latest.pth"}


@pytest.mark.parametrize("name", ["error.png", "loss-error.png", "confusion.csv", "confusion-val.png"])
def test_a_file_of_the_users_is_not_deleted_with_a_run(call_main, tiny_run, tmp_path, name):
    """Neither by --force nor where a run goes on from the start."""
    save = shutil.copytree(tiny_run, tmp_path / "run")
    (save / name).write_text("mine")
    for more, file in [(["--force"], None), (["--resume"], "latest.pth")]:
        if file:
            (save / file).unlink()
        before = contents(save)
        status, _, errors = call_main(train, *TINY_RUN, "--save", save, *more)
        told = f"{save / name} exists already and is not from this program, or damaged: name another place, or remove it"
        assert (status, told in errors) == (2, True), errors
        assert contents(save) == before


def test_figures_yield_to_training_and_the_last_ones_to_nobody(tmp_path, capsys):
    """Ctrl-C is not meant for them."""
    plots = run_folder.Plots(tmp_path, enabled=True)
    plots.command = ["sleep", "60"]
    plots.redraw()
    try:
        assert os.getpgid(plots.process.pid) != os.getpgid(0)
        assert os.getsid(plots.process.pid) == os.getsid(0)  # Linux shares time evenly between sessions, whatever the priority
        assert os.getpriority(os.PRIO_PROCESS, plots.process.pid) == 19
        (tmp_path / f"loss.png.{plots.process.pid}.tmp").touch()
        plots.command = [sys.executable, "-c", "import os, sys; sys.exit(str(os.nice(0)))"]
        plots.finish()  # does not wait for what yields to all others
    finally:
        if plots.process:
            plots.process.kill()
            plots.process.communicate()
    assert [*tmp_path.iterdir()] == []
    assert capsys.readouterr().out == f"the figures could not be drawn, nothing else is affected: {os.nice(0)}\n"


def test_a_figure_that_failed_is_reported_when_the_next_is_drawn(tmp_path, capsys):
    """By the error itself, not by the line behind a bug's traceback."""
    plots = run_folder.Plots(tmp_path, enabled=True)
    bug = "error = ValueError('of the figure'); error.add_note('plot.py: this is a bug'); raise error"
    plots.command = [sys.executable, "-c", bug]
    plots.redraw()
    plots.process.wait()
    plots.command = [sys.executable, "-c", ""]
    plots.redraw()
    plots.wait()
    assert capsys.readouterr().out == "the figures could not be drawn, nothing else is affected: ValueError: of the figure\n"


def test_an_error_of_the_figures_that_is_no_text_does_not_stop_the_run(tmp_path, capsys):
    """Such as a library of fonts may print."""
    plots = run_folder.Plots(tmp_path, enabled=True)
    plots.command = [sys.executable, "-c", r"import os; os.write(2, b'broken: \xff\n'); os._exit(1)"]
    plots.redraw()
    plots.wait()
    assert capsys.readouterr().out == "the figures could not be drawn, nothing else is affected: broken: \ufffd\n"


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EINVAL"])
def test_every_way_to_say_that_there_are_no_locks(monkeypatch, capsys, tmp_path, name):
    """EINVAL, too, as some network file systems say."""

    def flock(*arguments):
        raise OSError(getattr(errno, name), "no locks")

    monkeypatch.setattr("fcntl.flock", flock)
    with run_folder.locked(tmp_path):
        assert capsys.readouterr().out.startswith(f"{tmp_path}: its file system has no locks: make sure")


def test_figures_of_a_folder_whose_name_begins_as_a_flag(relayed, tiny_run, monkeypatch, tmp_path, capsys):
    shutil.copytree(tiny_run, tmp_path / "-run", ignore=shutil.ignore_patterns("*.png"))
    monkeypatch.chdir(tmp_path)
    plots = run_folder.Plots(Path("-run"), enabled=True)
    plots.redraw()
    plots.wait()
    assert capsys.readouterr().out == ""
    assert (tmp_path / "-run" / "loss.png").exists()


def test_memory_that_runs_out_is_advised_by_how_the_run_was_begun(call_main, monkeypatch, tmp_path):
    """Not to choose what it has chosen already."""
    flags = [*TINY, "--limit", 8, "--no-plot", "--efficient", "--epochs", 1, "--save", tmp_path / "run"]
    assert call_main(train, *flags)[0] == 0

    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr(train, "load_data", full)
    status, _, errors = call_main(train, "--save", tmp_path / "run", "--resume")
    advice = "memory ran out for batches of 64 and a net of L=10, k=2: choose a machine with more memory"
    assert (status, advice in errors) == (1, True), errors


def test_a_run_that_has_begun_and_has_no_checkpoint_is_not_called_none(call_main, tmp_path):
    flags = [*TINY, "--limit", 8, "--no-plot", "--epochs", 1, "--save", tmp_path / "run"]
    assert call_main(train, *flags)[0] == 0
    (tmp_path / "run" / "latest.pth").unlink()
    status, out, errors = call_main(train, *flags, "--resume")
    assert (status, "from the start" in out, "holds no run yet" in out) == (0, True, False), errors
