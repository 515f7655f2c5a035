import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import contents

import compare
import run_folder
import runs
from checkpoint import digest

FACTS = {
    **{"dataset": "cifar10", "data": "data", "augment": True, "val": 0, "depth": 40, "reduction": None, "epochs": 2},
    **{"opt": "sgd", "lr": 0.1, "seed": 1, "device": "auto", "precision": "tf32", "efficient": False, "save": "work/x"},
    **{"torch": "2.11.0", "hardware": "a GPU", "commit": "0123", "processes": 1, "train_images": 1000, "classes": ["a", "b"]},
}


def write_run(folder, error, done=None, columns="", values="", **arguments):
    """A run with this test error in the last row of its test.csv; `columns` are more of them, `values` theirs in each row."""
    folder.mkdir(parents=True)
    facts = FACTS | {"save": str(folder)} | arguments
    (folder / "args.json").write_text(json.dumps(facts))
    last = facts["epochs"] if done is None else done
    rows = [f"{epoch},1.5,{error if epoch == last else 90}{values}\n" for epoch in range(1, last + 1)]
    (folder / "test.csv").write_text(f"epoch,loss,error{columns}\n" + "".join(rows))
    return folder


def write_seeds(folder, errors, **arguments):
    return [write_run(folder / str(seed), error, seed=seed, **arguments) for seed, error in enumerate(errors)]


def table(out):
    """[{column: cell}] of a markdown table."""
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


@pytest.fixture
def tables(call_main, tmp_path):
    """(rows of the table, rows of its CSV, what was printed) of compare.py with these arguments."""

    def call(*arguments):
        shutil.rmtree(tmp_path / "written", ignore_errors=True)
        files = [tmp_path / "written" / "here" / name for name in ("table.md", "table.csv")]
        status, out, errors = call_main(compare, *arguments, "--markdown", files[0], "--csv", files[1])
        assert (status, errors) == (0, "")
        return table(files[0].read_text()), [*csv.DictReader(files[1].open())], out

    return call


def test_seeds_of_a_setting_are_one_row_of_mean_spread_and_extremes(tables, tmp_path):
    sgd, adam = [5.25, 5.5, 6.0], [7.5, 7.25]
    folders = write_seeds(tmp_path / "sgd", sgd) + write_seeds(tmp_path / "adam", adam, opt="adam", lr=None)
    shown, numbers, out = tables(*folders)
    speed = {"images/s": "-"}
    assert shown == [
        {"opt": "sgd", "lr": "0.1", "epochs": "2", "n": "3", "test error, %": "5.58 ± 0.38 (5.25 to 6.00)", **speed},
        {"opt": "adam", "lr": "not given", "epochs": "2", "n": "2", "test error, %": "7.38 ± 0.18 (7.25 to 7.50)", **speed},
    ]
    for row, errors in zip(numbers, (sgd, adam), strict=True):
        expected = [np.mean(errors), np.std(errors, ddof=1), min(errors), max(errors)]
        np.testing.assert_allclose([float(row[f"test_error_{name}"]) for name in ("mean", "std", "min", "max")], expected)
        assert (row["n"], row["incomplete"], row["epochs"]) == (str(len(errors)), "0", "2")
    assert out.splitlines()[0].split() == ["opt", "lr", "epochs", "n", "test", "error,", "%", "images/s"]
    assert "5.58 ± 0.38 (5.25 to 6.00)" in out
    assert "sorted" not in out


@pytest.mark.parametrize("numbers", [[1000, None], [None, 1000]])
def test_a_run_that_does_not_say_how_many_images_it_has_is_of_the_same_setting(tables, tmp_path, numbers):
    runs = [(tmp_path / str(seed), seed, number) for seed, number in enumerate(numbers)]
    folders = [write_run(path, 5, None, ",seconds", ",2", seed=seed, train_images=n) for path, seed, n in runs]
    (row,) = tables(*folders)[0]
    assert (row["n"], row["images/s"]) == ("2", "500")


@pytest.mark.parametrize("dataset", [None, "cifar10", "cifar100", "svhn", "digits"])
def test_data_that_are_always_the_same_are_one_setting_whatever_a_version_made_of_them(tables, tmp_path, dataset):
    folders = [write_run(tmp_path / str(n), 5, dataset=dataset, seed=n, digests={"train": str(n)}) for n in (1, 2)]
    assert [row["n"] for row in tables(*folders)[0]] == ["2"]


def test_one_run_alone_has_no_spread(tables, tmp_path):
    shown, numbers, _ = tables(write_run(tmp_path / "run", 5.5))
    assert shown == [{"epochs": "2", "n": "1", "test error, %": "5.50", "images/s": "-"}]
    assert (numbers[0]["test_error_mean"], numbers[0]["test_error_std"]) == ("5.5", "")


def test_a_run_that_is_not_complete_is_told_of_and_not_averaged(tables, tmp_path):
    folders = write_seeds(tmp_path, [5.0, 6.0])
    late = write_run(tmp_path / "late", 50, done=1, seed=7)
    new = write_run(tmp_path / "new", 50, done=0, seed=7, depth=100)
    shown, numbers, out = tables(*folders, late, new)
    assert [(row["n"], row["incomplete"], row["test error, %"]) for row in shown] == [
        ("2", "1", "5.50 ± 0.71 (5.00 to 6.00)"),
        ("0", "1", "-"),
    ]
    assert f"{late} has 1 of 2 epochs and is not averaged" in out
    assert f"{new} has 0 of 2 epochs and is not averaged" in out
    assert numbers[1]["test_error_mean"] == ""


def test_images_a_second_are_of_all_epochs_that_tell_their_time(tables, tmp_path):
    timed = {"columns": ",train_loss,train_error,lr,seconds"}
    folders = [
        write_run(tmp_path / "a", 5, seed=1, values=",1,2,0.1,4", **timed),
        write_run(tmp_path / "b", 5, seed=2, values=",1,2,0.1,6", **timed),
        write_run(tmp_path / "c", 5, seed=3),
        write_run(tmp_path / "gaps", 5, seed=5, values=",1,2,0.1,nan", **timed),
        write_run(tmp_path / "incomplete", 5, seed=4, done=1, values=",1,2,0.1,99", **timed),
    ]
    shown, numbers, _ = tables(*folders)
    assert (shown[0]["images/s"], float(numbers[0]["images_per_second"])) == ("200", 1000 * 4 / 20)


def test_the_validation_error_gives_the_order_and_the_line_says_so(tables, tmp_path):
    arguments = {"columns": ",val_loss,val_error", "val": 10}
    folders = [
        write_run(tmp_path / "none", 3, depth=10),
        write_run(tmp_path / "high", 4, values=",1,8.5", **arguments),
        *write_seeds(tmp_path, [6, 6], values=",1,7.25", depth=100, **arguments),
    ]
    shown, _, out = tables(*folders)
    assert [(row["depth"], row["val error, %"]) for row in shown] == [
        ("100", "7.25 ± 0.00 (7.25 to 7.25)"),
        ("40", "8.50"),
        ("10", "-"),
    ]
    assert "sorted by the error on the validation images" in out
    assert "sorted" not in tables(folders[1])[2]


def test_control_characters_of_a_value_do_not_break_the_tables(tables, tmp_path):
    names = ["a\rb\x1b[31m", "other"]
    rows, numbers, out = tables(*(write_run(tmp_path / str(n), 5, init=name, seed=n) for n, name in enumerate(names)))
    assert [row["init"] for row in rows] == [row["init"] for row in numbers] == ["a\\rb\\x1b[31m", "other"]
    assert not {*"\r\x1b"} & {*out}


@pytest.mark.parametrize("column", ["dataset", "data"])
def test_the_order_is_that_of_each_data_set_by_itself(tables, tmp_path, column):
    arguments = {"columns": ",val_loss,val_error", "val": 10, "dataset": "folder"}
    folders = []
    for name, error in [("dogs", 2), ("cats", 9), ("dogs", 1), ("cats", 8)]:
        facts = arguments | {column: name, "digests": {"train": name}, "lr": error}
        folders.append(write_run(tmp_path / str(error), 5, values=f",1,{error}", **facts))
    shown = tables(*folders)[0]
    order = [("cats", "8.00"), ("cats", "9.00"), ("dogs", "1.00"), ("dogs", "2.00")]
    assert [(row[column], row["val error, %"]) for row in shown] == order


@pytest.mark.parametrize(
    ("arguments", "columns"),
    [
        ({"depth": 100, "lr": 0.2}, ["depth", "lr"]),
        ({"augment": False}, ["augment"]),
        ({"precision": "fp32"}, ["precision"]),
        ({"epochs": 3}, []),  # has its column anyway
        ({"limit": 500, "train_images": 500}, ["limit"]),
        ({"depth": 100, "torch": "2.14", "commit": "4567", "data": "elsewhere", "efficient": True}, ["depth"]),
    ],
)
def test_columns_are_the_arguments_in_which_settings_differ(tables, tmp_path, arguments, columns):
    one, other = write_run(tmp_path / "one", 5), write_run(tmp_path / "other", 5, **{"seed": 2} | arguments)
    shown, numbers, _ = tables(one, other)
    assert len(shown) == 2
    assert [name for name in shown[0] if name in {*FACTS, "limit"} - {"epochs"}] == columns
    assert [name for name in numbers[0] if name in {*FACTS, "limit"} - {"epochs"}] == columns


def test_another_machine_or_version_is_another_setting_where_nothing_else_tells_equal_seeds_apart(tables, tmp_path):
    one, timed = write_run(tmp_path / "one", 5), {"columns": ",seconds", "values": ",2"}
    others = {"torch": "2.14", "hardware": "a CPU", "compile": "default", "capture": True, "deterministic": True}
    shown, _, out = tables(one, write_run(tmp_path / "seed", 6, seed=2, efficient=True, **others, **timed))
    assert [(row["n"], row["images/s"]) for row in shown] == [("2", "-")]
    names = "capture, compile, deterministic, efficient, hardware, torch"
    assert f"{one} and the other seeds of its setting differ in {names}\n" in out
    shown, _, out = tables(one, write_run(tmp_path / "commit", 6, seed=2, commit="4567", **timed))
    assert ("differ in commit\n" in out, [row["images/s"] for row in shown]) == (True, ["500"])
    assert "differ" not in tables(one, write_run(tmp_path / "device", 6, seed=2, device="cuda:1"))[2]
    shown, *_ = tables(one, write_run(tmp_path / "kernels", 6, efficient=True))
    assert [(row["efficient"], row["n"]) for row in shown] == [("no", "1"), ("yes", "1")]


def test_a_run_that_was_resumed_elsewhere_has_no_single_speed(tables, tmp_path):
    timed, commits = {"columns": ",seconds", "values": ",2"}, [letter * 40 for letter in "ab"]
    run = write_run(tmp_path / "run", 6, seed=2, torch="2.11.0, then 2.14.1", commit=", then ".join(commits), **timed)
    shown, _, out = tables(run, write_run(tmp_path / "twin", 6, seed=2, commit=commits[0], **timed))
    assert f"{run} was resumed with another commit, torch\n" in out
    assert [(row["commit"], row["images/s"]) for row in shown] == [("a" * 10 + ", then " + "b" * 10, "-"), ("a" * 10, "500")]


def test_an_argument_that_is_null_is_as_one_that_args_json_of_another_version_lacks(tables, tmp_path):
    one, other = write_run(tmp_path / "one", 5), write_run(tmp_path / "other", 6, seed=2, limit=None)
    (other / "args.json").write_text(json.dumps(dict(reversed(json.loads((other / "args.json").read_text()).items()))))
    assert [row["n"] for row in tables(one, other)[0]] == ["2"]


def test_the_size_of_images_that_are_always_the_same_is_no_setting(tables, tmp_path):
    """Older runs do not say it. That of pictures is one."""
    old, new = write_run(tmp_path / "old", 5), write_run(tmp_path / "new", 6, seed=2, image_size=32)
    assert [row["n"] for row in tables(old, new)[0]] == ["2"]
    sizes = [write_run(tmp_path / str(size), 5, dataset="folder", image_size=size, seed=size) for size in (32, 64)]
    assert [row["image_size"] for row in tables(*sizes)[0]] == ["32", "64"]


def test_what_was_not_given_has_no_name_of_a_value(tables, tmp_path):
    runs = [write_run(tmp_path / name, 5, compile=mode) for name, mode in [("a", None), ("b", "default")]]
    rows, _, _ = tables(*runs)
    assert [row["compile"] for row in rows] == ["not given", "default"]


def test_commits_and_digests_of_nets_are_shortened(tables, tmp_path):
    commits = ["0123456789" + "abcdef" * 5, "1123456789" + "abcdef" * 5 + "-dirty"]
    rows, numbers, _ = tables(*(write_run(tmp_path / commit[0], 5, commit=commit) for commit in commits))
    assert [row["commit"] for row in rows] == ["0123456789", "1123456789-dirty"]
    assert [row["commit"] for row in numbers] == commits
    digests = [digest({"fc.bias": torch.full((), value)}) for value in (1.0, 2.0)]
    rows, *_ = tables(*(write_run(tmp_path / name, 5, init="net.pth", init_digest=name) for name in digests))
    assert [row["init_digest"] for row in rows] == [name[:10] for name in digests]


@pytest.mark.parametrize("dataset", ["folder", "mine"])
def test_data_of_your_own_are_a_setting_by_what_is_in_them(tables, tmp_path, dataset):
    digests = [{"train": "0123456789"}, {"train": "0123456789"}, {"train": "abcdef0123"}]
    places = zip(("cats", "moved", "dogs"), (1, 2, 1), digests, strict=True)
    folders = [write_run(tmp_path / name, 5, dataset=dataset, data=name, seed=n, digests=d) for name, n, d in places]
    assert [(row["digests"], row["n"]) for row in tables(*folders)[0]] == [("train 012345", "2"), ("train abcdef", "1")]
    assert [(row["data"], row["n"]) for row in tables(folders[0], folders[2])[0]] == [("cats", "1"), ("dogs", "1")]
    edited = write_run(tmp_path / "edited", 5, dataset=dataset, data="cats", seed=1, digests={"train": "ffffffffff"})
    assert [row["digests"] for row in tables(folders[0], edited)[0]] == ["train 012345", "train ffffff"]
    assert "digests" in tables(folders[0], edited, folders[2])[0][0]
    moved = write_run(tmp_path / "faster", 5, dataset=dataset, data="moved", lr=0.2, digests=digests[0])
    assert [row["digests"] for row in tables(folders[0], moved, folders[2])[0]] == ["train 012345"] * 2 + ["train abcdef"]


def test_a_net_that_runs_began_with_is_a_setting_by_its_weights(tables, tmp_path):
    one, other = "0123456789" + "ab" * 15, "1123456789" + "ab" * 15
    begun = [("old/net.pth", 1, one), ("copy.pth", 2, one), ("old/net.pth", 3, other), ("other.pth", 1, other)]
    runs = [write_run(tmp_path / str(n), 5, init=path, seed=seed, init_digest=d) for n, (path, seed, d) in enumerate(begun)]
    assert [(row["init_digest"], row["n"]) for row in tables(*runs)[0]] == [(one[:10], "2"), (other[:10], "2")]
    scratch = write_run(tmp_path / "scratch", 5, init=None, init_digest=None)
    rows = tables(runs[0], runs[3], scratch)[0]
    assert [row["init"] for row in rows] == ["old/net.pth", "other.pth", "not given"]
    assert "init_digest" not in rows[0]


def test_what_a_run_may_change_when_it_is_resumed_is_no_setting():
    assert run_folder.MAY_CHANGE - {"epochs"} | {"classes", "digests", "train_images"} == runs.STARTED | runs.MACHINE


def test_latex_is_escaped_and_needs_no_package(call_main, tmp_path):
    folders = [write_run(tmp_path / name, 5, init=name) for name in ("a_b&c%d#e$f{g}h", "x~y^z\\")]
    folders += [write_run(tmp_path / "two", 6, seed=2, init="x~y^z\\")]
    assert call_main(compare, *folders, "--latex", tmp_path / "table.tex")[0] == 0
    assert (tmp_path / "table.tex").read_text().splitlines() == [
        r"\begin{tabular}{lllll}",
        r"\hline",
        r"init & epochs & n & test error, \% & images/s \\",
        r"\hline",
        r"a\_b\&c\%d\#e\$f\{g\}h & 2 & 1 & 5.00 & - \\",
        r"x\textasciitilde{}y\textasciicircum{}z\textbackslash{} & 2 & 2 & 5.50 $\pm$ 0.71 (5.00 to 6.00) & - \\",
        r"\hline",
        r"\end{tabular}",
    ]


def test_a_line_in_a_cell_ends_no_cell_of_markdown(call_main, tmp_path):
    folders = [write_run(tmp_path / name, 5, init=name) for name in ("a|b", "c")]
    assert call_main(compare, *folders, "--markdown", tmp_path / "table.md")[0] == 0
    assert (tmp_path / "table.md").read_text().splitlines()[2] == r"| a\|b | 2 | 1 | 5.00 | - |"


def test_a_damaged_row_is_told_of_and_the_others_count(tables, tmp_path):
    run = write_run(tmp_path / "run", 5)
    lines = (run / "test.csv").read_text().splitlines()
    (run / "test.csv").write_text("\n".join([lines[0], "1,x,3", lines[2], ""]))
    shown, _, out = tables(run)
    assert shown[0]["test error, %"] == "5.00"
    assert f"{run / 'test.csv'}: line 2 ('1,x,3') is left out: damaged" in out


def no_run(run):
    for path in run.iterdir():
        path.unlink()


def a_file(run):
    shutil.rmtree(run)
    run.touch()


def no_arguments(run):
    (run / "args.json").unlink()


def half_the_arguments(run):
    (run / "args.json").write_text((run / "args.json").read_text()[:50])


def no_rows(run):
    (run / "test.csv").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_arguments, "args.json does not exist: put it back, or name a run that has it"),
        (half_the_arguments, "args.json is damaged"),
    ],
)
def test_what_is_no_run_is_one_sentence_and_status_2(call_main, tmp_path, spoil, message):
    run = write_run(tmp_path / "run", 5)
    spoil(run)
    status, out, errors = call_main(compare, run, write_run(tmp_path / "other", 5, seed=2), "--csv", tmp_path / "table.csv")
    assert (status, out, len(errors.splitlines())) == (2, "", 2)
    assert message in errors
    assert not (tmp_path / "table.csv").exists()


@pytest.mark.parametrize("spoil", [no_run, no_rows, a_file])
def test_a_run_that_has_not_begun_is_told_of_and_left_out(call_main, tables, tmp_path, spoil):
    run, other = write_run(tmp_path / "run", 5), write_run(tmp_path / "other", 5, seed=2)
    spoil(run)
    shown, _, out = tables(run, other)
    assert ([row["n"] for row in shown], f"{run} holds no run (no test.csv) and is left out\n" in out) == (["1"], True)
    status, _, errors = call_main(compare, run)
    assert (status, "does not exist: put it back, or name a run that has it" in errors) == (2, True)


def test_a_run_named_twice_and_one_with_the_seed_of_another(call_main, tmp_path):
    run, twin = write_run(tmp_path / "run", 5), write_run(tmp_path / "twin", 5)
    assert f"{run} is named twice: name each run once" in call_main(compare, run, tmp_path / "twin" / ".." / "run")[2]
    status, _, errors = call_main(compare, run, twin)
    assert (status, f"{run} and {twin} have the same arguments and the same seed: name one of them" in errors) == (2, True)


def test_what_a_setting_has_is_told_also_where_it_was_not_asked_for_to_tell_it_from_others(tables, tmp_path):
    """The commit tells the twins apart; the third run has one, too, and those of a fourth setting have several."""
    folders = [write_run(tmp_path / commit, 5, commit=commit) for commit in ("12", "34")]
    folders += [write_run(tmp_path / "third", 5, commit="56", opt="adam")]
    folders += [write_run(tmp_path / str(seed), 5, commit=str(seed), opt="rmsprop", seed=seed) for seed in (1, 2)]
    shown, _, _ = tables(*folders)
    assert [row["commit"] for row in shown] == ["12", "34", "56", "various"]
    assert [row["opt"] for row in shown] == ["sgd", "sgd", "adam", "rmsprop"]


def test_a_table_that_cannot_be_written(call_main, tmp_path):
    run = write_run(tmp_path / "run", 5)
    before = contents(run)
    for kind in ("--csv", "--markdown", "--latex"):
        status, _, errors = call_main(compare, run, kind, run / "test.csv")
        assert (status, f"{run / 'test.csv'} exists already: name another file, or remove it" in errors) == (2, True)
    status, _, errors = call_main(compare, run, "--csv", run / "test.csv" / "table.csv")
    told = f"{run / 'test.csv'} is not a writable folder: name another for table.csv"
    assert (status, told in errors) == (2, True)
    status, _, errors = call_main(compare, run, "--csv", tmp_path / "x", "--latex", run / "test.csv" / "table.tex")
    assert (status, "name another for table.tex" in errors) == (2, True)
    status, _, errors = call_main(compare, run, "--csv", tmp_path / "x", "--latex", tmp_path / "x")
    assert (status, f"{tmp_path / 'x'} is named for two files: name another for one of them" in errors) == (2, True)
    assert contents(run) == before
    assert not (tmp_path / "x").exists()


def test_a_disk_that_is_full_is_one_sentence(call_main, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    status, _, errors = call_main(compare, write_run(tmp_path / "run", 5), "--csv", "/dev/full")
    assert (status, errors) == (1, "compare.py: /dev/full: No space left on device: make room there, or name another place\n")


def test_a_run_of_train_py(run_script, tiny_run):
    done = run_script("compare.py", tiny_run)
    assert (done.returncode, done.stderr) == (0, "")
    _, row = done.stdout.splitlines()
    assert row.split()[:2] == ["2", "1"]
    with (tiny_run / "test.csv").open() as file:
        assert row.split()[2] == f"{float([*csv.DictReader(file)][-1]['error']):.2f}"


def test_an_error_is_that_of_the_last_epoch_and_not_of_the_best(tables, tmp_path):
    run = write_run(tmp_path / "run", 5.5, val=10)
    (run / "test.csv").write_text("epoch,loss,error,val_loss,val_error\n1,1,4,1,6\n2,1.5,5.5,1,7\n")
    assert [(row["test error, %"], row["val error, %"]) for row in tables(run)[0]] == [("5.50", "7.00")]


def test_a_run_that_does_not_say_its_processes_had_one(tables, tmp_path):
    old, new = (write_run(tmp_path / name, 5, seed=seed) for seed, name in enumerate(("old", "new")))
    facts = json.loads((old / "args.json").read_text())
    del facts["processes"]
    (old / "args.json").write_text(json.dumps(facts))
    assert [row["n"] for row in tables(old, new)[0]] == ["2"]


def test_another_number_of_processes_is_another_setting(tables, tmp_path):
    rows, _, _ = tables(write_run(tmp_path / "one", 5), write_run(tmp_path / "two", 6, processes=2))
    assert [row["processes"] for row in rows] == ["1", "2"]
