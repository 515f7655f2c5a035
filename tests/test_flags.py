import argparse
import importlib
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, contents

import flags
import train
from densenet import DenseNet
from endings import Refused
from flags import fill_in, memory_advice, model_arguments, parse_args, refuse_contradictions


def parse(*arguments):
    """The arguments of train.py as they are on a CPU."""
    args = parse_args(train.build_parser(), list(arguments))
    fill_in(args, torch.device("cpu"))
    return args


def test_defaults_that_depend_on_others():
    assert parse("--no-augment").drop_rate == 0.2
    assert parse("--no-augment", "--drop-rate", "0").drop_rate == 0
    assert parse().drop_rate == 0
    svhn = parse("--dataset", "svhn")
    assert (svhn.epochs, svhn.val, svhn.augment, svhn.drop_rate) == (40, 6000, False, 0.2)
    digits, folder = (parse("--dataset", name, "--no-augment") for name in ("digits", "folder"))
    assert digits.drop_rate == folder.drop_rate == 0.2
    for args, others in [(svhn, {"epochs", "val"}), (digits, set()), (folder, set())]:  # all else is as for CIFAR
        differences = {name for name, value in vars(parse()).items() if vars(args)[name] != value}
        assert differences == {"dataset", "save", "augment", "drop_rate"} | others
    assert (parse().seed, parse().limit, parse().image_size) == (1, None, 32)
    assert parse("--dataset", "svhn", "--epochs", "3", "--val", "0").epochs == 3
    plain = DenseNet(**model_arguments(parse("--no-bottleneck", "--depth", "40")))
    assert sum(p.numel() for p in plain.parameters()) == 1_019_722
    assert parse("--nEpochs", "7", "--batchSz", "8", "--no-cuda").device == "cpu"


def test_a_parser_does_not_keep_the_defaults_of_a_data_set():
    parser = train.build_parser()
    assert [parse_args(parser, words).epochs for words in (["--dataset", "svhn"], [])] == [40, 300]


def test_memory_advice_names_what_is_not_used_yet():
    def advice(*arguments, device="cuda", fresh=True):
        return memory_advice(parse(*arguments), torch.device(device), fresh)

    needs, remedy = advice("--depth", "190", "--growth-rate", "40")
    assert needs == "batches of 64 and a net of L=190, k=40"
    smaller = "a smaller net (--depth, --growth-rate) or fewer images (--limit)"
    assert remedy == f"--efficient or --precision bf16 or a smaller --batch-size or {smaller}"
    assert advice("--efficient", "--precision", "bf16", "--batch-size", "1")[1] == smaller
    assert "--efficient or --no-capture or" in advice("--capture", "--precision", "bf16")[1]
    assert advice("--capture", fresh=False)[1] == "--efficient or --no-capture or a machine with more memory"
    assert "bf16" not in advice(device="cpu")[1] + advice("--precision", "fp16")[1]
    for precision in ("fp32", "tf32"):
        assert "--precision bf16" in advice("--precision", precision)[1]


@pytest.mark.parametrize(("arguments", "device", "processes"), [([], "cpu", 1), ([], "cuda", 2), (["--compile"], "cuda", 1)])
def test_what_cannot_be_captured_is_refused(arguments, device, processes):
    with pytest.raises(Refused, match="--capture needs a CUDA GPU, a single process and no --compile: leave it out"):
        refuse_contradictions(parse("--capture", *arguments), torch.device(device), processes)
    refuse_contradictions(parse(*arguments), torch.device(device), processes)
    refuse_contradictions(parse("--no-capture", *arguments), torch.device(device), processes)
    refuse_contradictions(parse("--capture"), torch.device("cuda"))


@pytest.mark.parametrize(
    ("flag", "begun"), [(["--momentum", "0.5"], {"momentum": 0.5}), (["--no-nesterov"], {"nesterov": False})]
)
def test_flags_of_sgd_are_refused_with_another_optimiser(capsys, flag, begun):
    """But not in the args.json of a run that was begun with them."""
    parser = train.build_parser()
    for name in ("adam", "rmsprop"):
        for words, earlier in [(["--opt", name, *flag], None), (flag, {"opt": name})]:
            with pytest.raises(SystemExit, match="2"):
                parse_args(parser, words, defaults=earlier)
            told = f"error: --momentum and --no-nesterov are for sgd only: leave them out with --opt {name}\n"
            assert capsys.readouterr().err.endswith(told)
        assert parse("--opt", name).momentum == 0.9
        assert parse_args(parser, [], defaults={"opt": name} | begun).opt == name
    assert parse(*flag).opt == "sgd"


@pytest.mark.parametrize(
    ("arguments", "device", "processes", "capture", "efficient"),
    [
        ([], "cuda", 1, True, True),
        ([], "cpu", 1, False, False),
        ([], "cuda", 2, False, False),
        (["--compile"], "cuda", 1, False, False),
        (["--no-capture"], "cuda", 1, False, False),
        (["--no-efficient"], "cuda", 1, True, False),
        (["--sync-bn"], "cuda", 1, True, False),
        (["--no-bottleneck", "--depth", 40], "cuda", 1, True, False),
        (["--drop-rate", 0.2], "cuda", 1, True, False),
        (["--growth-rate", 8], "cuda", 1, True, True),
        (["--growth-rate", 13], "cuda", 1, True, False),
        (["--growth-rate", 24], "cuda", 1, True, False),
        (["--precision", "fp32"], "cuda", 1, True, False),
        (["--precision", "bf16"], "cuda", 1, True, True),
        (["--efficient"], "cpu", 1, False, True),
    ],
)
def test_what_was_faster_is_the_default_where_it_is_possible(monkeypatch, arguments, device, processes, capture, efficient):
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    monkeypatch.setattr(flags, "triton_runs", lambda device: True)
    args = parse_args(train.build_parser(), [*map(str, arguments)])
    fill_in(args, torch.device(device), processes)
    assert (args.capture, args.efficient) == (capture, efficient)


@pytest.mark.parametrize(
    ("hip", "triton", "expected"), [(None, True, (True, True)), (None, False, (True, False)), ("6.4", True, (False, False))]
)
def test_what_is_fast_on_other_machines_is_not_the_default_on_this_one(monkeypatch, hip, triton, expected):
    """A GPU of AMD, or one without what compiles the kernels."""
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(flags, "triton_runs", lambda device: triton)
    args = parse_args(train.build_parser(), [])
    fill_in(args, torch.device("cuda"))
    assert (args.capture, args.efficient) == expected


def test_statistics_of_all_processes_and_of_one_are_refused_together():
    with pytest.raises(Refused, match="--sync-bn cannot be combined with --efficient, whose statistics are of one process"):
        refuse_contradictions(parse("--sync-bn", "--efficient"), torch.device("cpu"), 2)
    for way in ("--sync-bn", "--efficient"):
        refuse_contradictions(parse(way), torch.device("cpu"), 2)


@pytest.mark.parametrize("depth", ["0", "-3", "41"])
def test_a_depth_that_does_not_fit_is_refused_before_any_data_are_read(depth):
    with pytest.raises(Refused, match=f"depth {depth} does not fit"):
        refuse_contradictions(parse(f"--depth={depth}"), torch.device("cpu"))


# ------------------------------------------------------------------------------------- every flag of every program


class Collected(Exception):
    """The parser of a program, at the moment it would read its arguments."""


def parser_of(path, monkeypatch):
    """The argparse parser of a program, flags and all, or None if it reads no arguments that way."""

    def parse_args(parser, *arguments):
        raise Collected(parser)

    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    spec.loader.exec_module(module)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    try:
        module.main()
    except Collected as collected:
        return collected.args[0]
    finally:
        monkeypatch.undo()


PROGRAMS = [
    path
    for folder in (ROOT, ROOT / "attic", ROOT / "images")
    for path in sorted(folder.glob("*.py"))
    if path.read_text().startswith("#!")
]
NET = {"depth", "growth_rate", "reduction", "drop_rate", "init_channels"}
HUGE = ["9" * 30, "-" + "9" * 30, "1e400", "1e999999", "9" * 5000]
BAD_NUMBERS = ["nan", "inf", "-inf", "-1", "", " ", "one", "0x10", *HUGE]


def verdict(action, text):
    """The value that a flag makes of a text, or the sentence that refuses it."""
    parser = argparse.ArgumentParser(prog="program", exit_on_error=False)
    parser._add_action(action)
    flag = action.option_strings[0] if action.option_strings else None
    words = [f"{flag}={text}"] if flag else ["--", text]
    try:
        value = getattr(parser.parse_args(words), action.dest)
    except argparse.ArgumentError as error:
        return str(error)
    return value[0] if isinstance(value, list) else value


def refuses(name, value):
    """Whether no net is made with a model flag of this value."""
    args = parse()
    setattr(args, name, value)
    try:
        flags.make_net(args)
    except Refused:
        return True
    return False


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_every_flag_takes_a_sensible_value_or_refuses_in_a_sentence(program, monkeypatch):
    """The parsers themselves are walked: a flag that is added later is among them."""
    parser = parser_of(program, monkeypatch)
    for action in parser._actions:
        if action.nargs == 0 or action.nargs == argparse.REMAINDER or isinstance(action, argparse._HelpAction):
            continue
        wrong = [action.dest, *action.option_strings]
        for text in BAD_NUMBERS:
            value = verdict(action, text)
            if action.dest in NET:  # what is too small, the net says
                assert isinstance(value, str) or refuses(action.dest, value), (wrong, text)
            elif isinstance(value, (int, float)):
                assert math.isfinite(value), (wrong, text)
                assert 0 <= value <= 3.5e38, (wrong, text)
                assert not isinstance(value, int) or value < 2**64, (wrong, text)
        refused = verdict(action, "")
        assert action.dest == "title" or (isinstance(refused, str) and refused.startswith("argument ")), wrong
        if action.metavar in ("FILE", "NAME"):  # that is written
            assert str(verdict(action, "folder/")).endswith("folder/ is a folder: name a file in it"), wrong


def test_the_programs_are_those_with_flags():
    names = {path.name for path in PROGRAMS}
    programs = {"train.py", "plot.py", "compare.py", "evaluate.py", "bench.py", "make_graph.py", "train-vgg.py"}
    assert programs <= names


def test_the_largest_seed_trains(call_main, tiny_run, tmp_path):
    save = shutil.copytree(tiny_run, tmp_path / "run")
    status, _, errors = call_main(train, *TINY, "--epochs", 1, "--no-plot", "--save", save, "--force", "--seed", 2**64 - 1)
    assert status == 0, errors
    assert str(2**64 - 1) in contents(save)["args.json"].decode()


def test_a_run_that_is_continued_takes_its_arguments_to_their_last_digit(tmp_path):
    begun = {"epochs": 7, "lr": 1 / 3, "weight_decay": 1e-4 / 3, "seed": 2**64 - 1, "momentum": 0.1 + 0.2, "augment": False}
    args = parse_args(train.build_parser(), ["--save", str(tmp_path), "--resume"], begun)
    assert {name: getattr(args, name) for name in begun} == begun


def test_a_run_takes_over_flags_of_kinds_that_somebody_adds():
    parser = train.build_parser()
    parser.add_argument("--mixup", action="store_true")
    parser.add_argument("--no-shuffle", dest="shuffle", action="store_false")
    parser.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.99))
    parser.add_argument("-s", dest="label_smoothing", type=float, default=0.0)
    parser.add_argument("--cosine", dest="anneal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--labels", type=Path, default=Path("labels.csv"))
    words = ["--mixup", "--no-shuffle", "--betas", "0.5", "-0.25", "-s", "0.1", "--no-cosine", "--nEpochs", "7", "--no-cuda"]
    for given in ([], words, ["--dataset", "digits", "--augment"]):
        args = parse_args(parser, given)
        begun = json.loads(json.dumps(flags.plain_arguments(args)))
        assert flags.plain_arguments(parse_args(parser, [], begun)) == begun == flags.plain_arguments(args)
    args = parse_args(parser, words)
    values = args.mixup, args.shuffle, args.betas, args.label_smoothing, args.anneal, args.epochs, args.device
    assert values == (True, False, [0.5, -0.25], 0.1, False, 7, "cpu")
    for damage in ({"mixup": "yes"}, {"betas": [1]}, {"betas": 1}, {"anneal": 3}, {"label_smoothing": True}):
        with pytest.raises(Refused, match=r"^args.json is damaged, or from another version of this program \(.+\): put back"):
            parse_args(parser, [], begun | damage, "args.json", "put back a whole one")


def test_a_run_that_was_renamed_goes_on_where_it_is():
    begun = {"save": "work/elsewhere", "epochs": 7, "resume": False, "force": True}
    args = flags.parse_args(train.build_parser(), ["--resume"], defaults=begun)
    assert (args.save, args.epochs, args.force) == (Path("work", "cifar10.base"), 7, False)


def test_a_run_is_not_continued_and_replaced_at_once(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--resume", "--force")
    assert "argument --force: not allowed with argument --resume" in capsys.readouterr().err
