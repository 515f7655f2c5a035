"""Real processes, connected by gloo on this machine's loopback address."""

import contextlib
import os
import re
import shutil
import signal
import socket
import sys
from datetime import timedelta
from functools import partial

import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY

import data
import distributed
import flags
import step
import train
from checkpoint import build_net, load_checkpoint
from densenet import DenseNet
from distributed import World
from endings import Refused
from flags import fill_in, parse_args
from metrics import loss_and_error_sums, predict
from step import TrainingStep

FLAGS = [*TINY, "--no-plot"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ----------------------------------------------------------------------------------------------------------- gradients


def gradients(world, *flags):
    """Gradients and running statistics of three ragged batches on the trainer's own path, in float64."""
    device = torch.device("cpu")
    torch.manual_seed(0)
    args = parse_args(train.build_parser(), [*TINY, "--batch-size", "20", "--lr", "0", *flags])
    fill_in(args, device)
    net = DenseNet(depth=16, growth_rate=4, efficient=args.efficient).double()
    dataset = data.load("digits", ".", limit=47)
    dataset = dataset._replace(mean=dataset.mean.double(), std=dataset.std.double())
    step = TrainingStep(net, args, device, world)
    step.begin_epoch(0)
    result = []
    for batch in train.epoch_batches(dataset, 0, args, world):
        result += [distributed.sum_over_ranks(step(*batch), world), *(p.grad.clone() for p in net.parameters())]
    return result + [buffer.clone() for buffer in net.buffers()]


def run_ranks(forked, *command):
    """Runs `python COMMAND` as each of two ranks, as torchrun does, and without it; returns the completed processes."""
    return run_different_ranks(forked, [(command, ROOT), (command, ROOT)])


def run_different_ranks(forked, commands):
    """As run_ranks; each rank has its own command, and the folder in which it runs."""
    world = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [world | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    running = [forked(command, cwd=folder, env=env) for (command, folder), env in zip(commands, ranks, strict=True)]
    return [each.wait(timeout=200) for each in running]


def one_rank(folder):
    rank = int(os.environ["RANK"])
    world = distributed.read_world(os.environ)
    with distributed.process_group(world, torch.device("cpu"), None):
        for flag in ("--sync-bn", "--efficient", "--no-efficient"):
            torch.save(gradients(world, flag), folder / f"{flag}{rank}.pth")
        norm = torch.nn.BatchNorm2d(3)
        norm.running_mean += 1 + rank
        norm.weight.data += 1 + rank
        distributed.broadcast_buffers(norm, world)
        torch.save(norm.state_dict(), folder / f"buffers{rank}.pth")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, forked):
    """The folder of what one_rank saves."""
    folder = tmp_path_factory.mktemp("ranks")
    code = "import pathlib; from test_distributed import one_rank"
    for done in run_ranks(forked, "-c", f"{code}; one_rank(pathlib.Path({str(folder)!r}))"):
        assert done.returncode == 0, done.stderr
    return folder


def assert_close(some, others):
    for ours, theirs in zip(some, others, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.xdist_group("two_ranks")
def test_two_ranks_with_sync_bn_give_the_gradients_of_one_process(two_ranks):
    expected = gradients(World(), "--sync-bn")
    for rank in range(2):
        assert_close(torch.load(two_ranks / f"--sync-bn{rank}.pth"), expected)


@pytest.mark.xdist_group("two_ranks")
@pytest.mark.parametrize("rank", [0, 1])
def test_on_two_ranks_the_efficient_blocks_equal_the_plain_ones(two_ranks, rank):
    assert_close(torch.load(two_ranks / f"--efficient{rank}.pth"), torch.load(two_ranks / f"--no-efficient{rank}.pth"))


@pytest.mark.xdist_group("two_ranks")
@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_get_the_running_statistics_of_rank_0_and_nothing_else(two_ranks, rank):
    state = torch.load(two_ranks / f"buffers{rank}.pth")
    assert (state["running_mean"].tolist(), state["weight"].tolist()) == ([1.0] * 3, [2.0 + rank] * 3)


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def two_rank_run(tmp_path_factory, forked):
    """A run of 95 images in batches of 40 on two ranks: the last batch has 15 images, 8 and 7."""
    save = tmp_path_factory.mktemp("runs") / "two"
    flags = [*FLAGS, "--limit", 95, "--batch-size", 40, "--epochs", 2, "--val", 51, "--save", save]
    for done in run_ranks(forked, "train.py", *flags):
        assert done.returncode == 0, done.stderr
    return save


@pytest.mark.xdist_group("two_rank_run")
def test_no_image_is_lost_or_counted_twice(two_rank_run):
    train_rows, test_rows = (pd.read_csv(two_rank_run / f"{part}.csv") for part in ("train", "test"))
    assert train_rows["epoch"].tolist() == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], abs=1e-6)
    for errors, sizes in [
        (train_rows["error"], [40, 40, 15] * 2),
        (test_rows["error"], [360] * 2),
        (test_rows["val_error"], [51] * 2),
    ]:
        wrong = [error * size / 100 for error, size in zip(errors, sizes, strict=True)]
        assert wrong == pytest.approx([round(count) for count in wrong], abs=1e-3)


@pytest.mark.xdist_group("two_rank_run")
def test_test_error_of_two_ranks_is_that_of_the_saved_net(two_rank_run):
    checkpoint = load_checkpoint(two_rank_run / "latest.pth")
    dataset = data.load("digits", ".")
    logits = predict(build_net(checkpoint), dataset.test.images, dataset.mean, dataset.std)
    loss, wrong = (loss_and_error_sums(logits, dataset.test.labels) / 360).tolist()
    last = pd.read_csv(two_rank_run / "test.csv").iloc[-1]
    assert last["loss"] == pytest.approx(loss, rel=1e-5)
    assert last["error"] == pytest.approx(100 * wrong, rel=1e-5)


TORCHRUN = "from torch.distributed.run import main; main()"


def test_two_machines_train_as_one(forked, relay, call_main, tmp_path):
    """Two nodes of one process each, both on the loopback address, give the figures of one process."""
    flags = [*FLAGS, "--growth-rate", 4, "--epochs", 1, "--batch-size", 40, "--sync-bn", "--drop-rate", 0, "--save"]
    nodes = ["--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", free_port()]
    rank = ["--no-python", *relay, "train.py", *flags, tmp_path / "two"]
    nodes = [forked(["-c", TORCHRUN, *nodes, "--node-rank", node, *rank]) for node in range(2)]
    for done in [process.wait(timeout=200) for process in nodes]:
        assert done.returncode == 0, done.stderr
    status, _, errors = call_main(train, *flags, tmp_path / "one")
    assert status == 0, errors
    for name in ("train.csv", "test.csv"):
        ours, theirs = (pd.read_csv(tmp_path / folder / name).assign(seconds=0) for folder in ("two", "one"))
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-3)


THREADS_AT_THE_END = """
import os, sys, __main__, train
__main__.leave = sys.exit  # in forked.py: Python itself ends this process
class Last:
    def __del__(self, tasks="/proc/self/task", listdir=os.listdir, open=os.open, read=os.read, write=os.write):
        names = [read(open(f"{tasks}/{task}/comm", 0), 99).strip() for task in listdir(tasks)]
        write(1, b"threads: " + b" ".join(names))
sys.last = Last()  # freed when Python has ended its other threads
train.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the names of threads")
@pytest.mark.parametrize(("more", "status"), [([], 0), (["--lr", 1e9], 1)])
def test_no_thread_of_gloo_outlives_the_run(forked, tmp_path, more, status):
    """One that does can abort the process at its end, rarely, and the other ranks then wait for it."""
    for done in run_ranks(forked, "-c", THREADS_AT_THE_END, *FLAGS, "--epochs", 1, *more, "--save", tmp_path / "run"):
        assert done.returncode == status, done.stderr
        (threads,) = [line for line in done.stdout.splitlines() if line.startswith("threads:")]
        assert "gloo" not in threads


# ---------------------------------------------------------------------------------------------------- bad environments


def test_batches_that_do_not_fit_the_world():
    check = partial(distributed.check_batches, World(0, 0, 4))
    check(64, 50_000)
    check(64, 68)  # a last batch of 4 is shared, too
    with pytest.raises(Refused, match="--batch-size 62, the whole batch, must be a multiple of the 4 processes"):
        check(62, 50_000)
    with pytest.raises(Refused, match="the last batch has 2 images for 4 processes"):
        check(64, 130)


def one_more(root):
    shutil.copy(root / "test" / "red" / "0.jpg", root / "train" / "red" / "6.jpg")


def another_name(root):
    for part in ("train", "test"):
        (root / part / "blue").rename(root / part / "cyan")  # the labels stay


@pytest.mark.parametrize(
    ("change", "more", "what"),
    [
        (one_more, [], "the images or classes in --data ."),
        (another_name, [], "the images"),
        (None, ["--lr", "1"], "the command"),
    ],
)
def test_ranks_that_differ_are_refused(forked, pictures, tmp_path_factory, change, more, what):
    """Each machine has its own copy of the data."""
    copy = shutil.copytree(pictures, tmp_path_factory.mktemp("another") / "copy")
    if change:
        change(copy)
    words = [*FLAGS[2:], "--dataset", "folder", "--data", ".", "--limit", 8, "--batch-size", 4, "--save", "run"]
    commands = [([ROOT / "train.py", *words], pictures), ([ROOT / "train.py", *words, *more], copy)]
    for done in run_different_ranks(forked, commands):
        assert done.returncode == 2
        assert f"train.py: error: {what}" in done.stderr
        assert "are not the same for all processes, rank 1 differs from rank 0: make them the same" in done.stderr
    assert not (pictures / "run" / "args.json").exists()


@pytest.fixture
def unconnected(monkeypatch):
    """Functions of one rank run without the others."""
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "check_equal", lambda value, world, what: None)


def test_the_last_batch_that_counts_is_one_of_the_training_images(unconnected):
    args = parse_args(train.build_parser(), [*TINY[:2], "--limit", "41", "--batch-size", "40"])
    with pytest.raises(Refused, match="the last batch has 1 images for 2 processes"):  # of the 360 test images it has 40
        train.load_data(args, torch.device("cpu"), World(0, 0, 2))
    args.limit, args.val, args.batch_size = None, 1386, 50  # 51 are left, and all 1,437 would have a last batch of 37
    with pytest.raises(Refused, match="the last batch has 1 images for 2 processes"):
        train.load_data(args, torch.device("cpu"), World(0, 0, 2))


@pytest.mark.parametrize(("rank", "order"), [(0, ["load", "barrier"]), (1, ["barrier", "load"])])
def test_one_process_reads_the_data_first(monkeypatch, unconnected, rank, order):
    """Which may be a download."""
    events, load = [], data.load
    monkeypatch.setattr(distributed, "barrier", lambda: events.append("barrier"))
    monkeypatch.setattr(data, "load", lambda *arguments, **more: events.append("load") or load(*arguments, **more))
    args = parse_args(train.build_parser(), [*TINY[:2], "--limit", "80", "--batch-size", "40"])
    train.load_data(args, torch.device("cpu"), World(rank, rank, 2))
    assert events == order


def test_a_run_of_two_ranks_is_not_continued_by_one(forked, call_main, tmp_path):
    words = [*FLAGS, "--limit", 8, "--batch-size", 8, "--epochs", 1, "--save", tmp_path / "run"]
    for done in run_ranks(forked, "train.py", *words):
        assert done.returncode == 0, done.stderr
    status, _, errors = call_main(train, *words, "--resume")
    assert (status, "the run was begun with processes 2, not 1" in errors) == (2, True), errors


@pytest.mark.parametrize(("asked", "result"), [([], "capture False, efficient False"), (["--capture"], "a single process")])
def test_on_several_gpus_nothing_is_captured(call_main, monkeypatch, unconnected, tmp_path, asked, result):
    """Neither unasked nor asked for. The GPU is not looked at before the data are loaded."""

    def stop(args, device, world):
        raise Refused(f"capture {args.capture}, efficient {args.efficient}")

    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    monkeypatch.setattr(distributed, "read_world", lambda environment: World(0, 0, 2))
    monkeypatch.setattr(distributed, "process_group", lambda *_: contextlib.nullcontext(torch.device("cuda")))
    monkeypatch.setattr(distributed, "broadcast_object", lambda value, world: value)
    monkeypatch.setattr(train, "load_data", stop)
    status, _, errors = call_main(train, *TINY[:6], *asked, "--save", tmp_path / "run")
    assert (status, result in errors) == (2, True), errors


def test_a_world_that_does_not_divide_the_batch_is_a_sentence(forked, tmp_path):
    for done in run_ranks(forked, "train.py", *FLAGS, "--batch-size", 41, "--save", tmp_path / "run"):
        assert done.returncode == 2
        assert "train.py: error: --batch-size 41, the whole batch, must be a multiple of the 2 processes" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def be_rank_0_of_2(monkeypatch):
    """Gives this process the environment of torchrun, with more of it."""

    def be_rank_0_of_2(**more):
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", **more}.items():
            monkeypatch.setenv(name, str(value))

    return be_rank_0_of_2


def test_a_port_that_is_taken_is_a_sentence(call_main, be_rank_0_of_2, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        be_rank_0_of_2(MASTER_PORT=listener.getsockname()[1])
        status, _, errors = call_main(train, *FLAGS, "--save", tmp_path / "run")
    assert status == 2
    assert "train.py: error: rank 0 cannot reach the others" in errors
    assert "check --master-addr and --master-port" in errors


def test_ranks_that_do_not_come_are_a_sentence_after_the_time_out(call_main, monkeypatch, be_rank_0_of_2, tmp_path):
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))
    be_rank_0_of_2(MASTER_PORT=free_port())
    status, _, errors = call_main(train, *FLAGS, "--save", tmp_path / "run")
    assert (status, "rank 0 cannot reach the others" in errors) == (2, True)


def test_a_rank_that_can_start_no_thread_blames_no_address(call_main, monkeypatch, be_rank_0_of_2, tmp_path):
    def rendezvous(*arguments, **options):
        raise RuntimeError("Resource temporarily unavailable")

    monkeypatch.setattr(torch.distributed, "rendezvous", rendezvous)
    be_rank_0_of_2()
    status, _, errors = call_main(train, *FLAGS, "--save", tmp_path / "run")
    assert (status, "train.py: no further thread or process can be started here" in errors) == (1, True), errors


def test_a_run_that_torchrun_may_restart_is_not_begun_anew_each_time(call_main, be_rank_0_of_2, tmp_path):
    be_rank_0_of_2(TORCHELASTIC_MAX_RESTARTS=3)
    status, _, errors = call_main(train, *FLAGS, "--save", tmp_path / "run", "--force")
    told = "--force would start the run over after each restart by torchrun: remove the old run and choose --resume"
    assert (status, told in errors) == (2, True), errors


def test_half_an_environment_is_a_sentence():
    assert distributed.read_world({}) == distributed.read_world({"WORLD_SIZE": ""}) == World(0, 0, 1)
    second_attempt = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert distributed.read_world(second_attempt) == World(3, 1, 4, attempt=1)
    assert distributed.read_world(second_attempt | {"TORCHELASTIC_MAX_RESTARTS": "2"}) == World(3, 1, 4, 1, max_restarts=2)
    for wrong in ({"RANK": ""}, {"LOCAL_RANK": "x"}, {"WORLD_SIZE": "-2"}, {"RANK": "4"}, {"TORCHELASTIC_RESTART_COUNT": "?"}):
        (told,) = (f"{name}={value}" for name, value in wrong.items())
        with pytest.raises(Refused, match=rf"the environment describes no process of torchrun \(.*{re.escape(told)}.*\): use"):
            distributed.read_world(second_attempt | wrong)
    for name in ("RANK", "LOCAL_RANK"):
        with pytest.raises(Refused, match=f"describes no process of torchrun .*{name}=[,)]"):
            distributed.read_world({other: value for other, value in second_attempt.items() if other != name})


SIGNALLED = """
import os, signal, sys, step, train
sys.argv[0] = train.__file__
taken = []
def take(*arguments, real=step.TrainingStep.__call__):
    taken.append(1)
    if len(taken) == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    return real(*arguments)
step.TrainingStep.__call__ = take
train.main()
"""


def test_a_signal_to_one_rank_ends_all_of_them_at_the_same_step(forked, tmp_path):
    """In the fifth of six steps, of three an epoch; the ranks hear of it when they write its row."""
    flags = [*FLAGS, "--batch-size", 40, "--epochs", 2, "--save", tmp_path / "run"]
    first, second = run_ranks(forked, "-c", SIGNALLED, *flags)
    assert (first.returncode, second.returncode) == (128 + signal.SIGTERM, 128 + signal.SIGUSR1), first.stderr + second.stderr
    assert "stopped by SIGTERM; this continues the run: the same torchrun command with --resume" in first.stderr
    assert second.stdout == second.stderr == ""
    assert len(pd.read_csv(tmp_path / "run" / "train.csv")) == 5
    assert load_checkpoint(tmp_path / "run" / "latest.pth")["epoch"] == 1
    for done in run_ranks(forked, "train.py", *flags, "--resume"):  # both go on behind the first epoch
        assert done.returncode == 0, done.stderr
    assert pd.read_csv(tmp_path / "run" / "test.csv")["epoch"].tolist() == [1, 2]


def test_a_sum_over_the_ranks_leaves_what_is_summed(monkeypatch):
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    mine = torch.ones(3)
    assert distributed.AllReduce.apply(mine).tolist() == [2] * 3
    assert mine.tolist() == [1] * 3


def test_every_batch_norm_is_synchronised():
    net = DenseNet(depth=10, growth_rate=1, init_channels=1)
    distributed.synchronise_batch_norm(net, torch.device("cpu"))
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert [type(norm) for norm in norms] == [distributed.SyncBatchNorm] * 9  # six in bottlenecks, two in transitions, the last


def test_statistics_of_maps_in_bf16_are_float32(monkeypatch):
    """Of a world of one, whose sums over the ranks are its own; the mean is large against the deviation."""
    torch.manual_seed(0)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor: None)
    norms = torch.nn.BatchNorm2d(3), distributed.SyncBatchNorm(3)
    maps = (10 + torch.randn(8, 3, 16, 16)).bfloat16()
    plain, ours = norms[0](maps.float()), norms[1](maps)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), plain, rtol=0, atol=0.02)
    for name, values in norms[0].state_dict().items():
        torch.testing.assert_close(norms[1].state_dict()[name], values, rtol=1e-5, atol=1e-6)


ON_GPUS = """
import argparse, torch, distributed, endings
distributed.own_device = lambda world, device: torch.device("cuda")
distributed.connect = lambda world, device: None
distributed.free = lambda group: print("freed")
distributed.dist.destroy_process_group = lambda: print("destroyed")
parser = argparse.ArgumentParser(prog="program", usage="of it")
with endings.handle_errors(parser, "", "") as ending:
    with distributed.process_group(distributed.World(size=2), torch.device("cuda"), ending):
        print("said")
        {}
"""


@pytest.mark.parametrize(
    ("ending", "status", "out", "told"),
    [
        ("raise endings.Refused('no')", 2, "said\n", "program: error: no"),
        ("raise endings.Refused('no', status=1)", 1, "said\n", "program: no"),
        ("raise endings.Stopped(15)", 128 + 15, "said\n", "program: stopped by SIGTERM"),
        ("raise ValueError('bug')", 1, "said\n", "program: this is a bug"),
        ("raise KeyboardInterrupt", 128 + 2, "said\n", "program: stopped"),
        ("raise BrokenPipeError", 128 + 13, "said\n", "program: its output was closed"),
        ("open('no/x')", 2, "said\n", "program: error: no/x: No such file or directory: fix this, or name another place"),
        ("parser.error('a wrong flag')", 2, "said\n", "program: error: a wrong flag"),
        ("pass", 0, "said\ndestroyed\nfreed\n", ""),
    ],
)
def test_a_rank_that_fails_does_not_wait_for_nccl(forked, ending, status, out, told):
    """Whose group ends on all ranks together; the others may be waiting for this one."""
    done = forked(["-c", ON_GPUS.format(ending)]).wait()
    assert (done.returncode, done.stdout, done.stderr.split("\n")[-2:-1]) == (status, out, [told] * bool(told))


@pytest.mark.parametrize(
    ("world", "order"),
    [
        (World(0, 0, 4), ["inside", "barrier"]),
        (World(1, 1, 4), ["barrier", "inside"]),
        (World(2, 0, 4), ["inside", "barrier"]),
        (World(3, 1, 4), ["barrier", "inside"]),
        (World(), ["inside"]),
    ],
)
def test_on_each_machine_one_process_is_first(monkeypatch, world, order):
    """Two machines of two processes each."""
    events = []
    monkeypatch.setattr(distributed, "barrier", lambda: events.append("barrier"))
    with distributed.first_rank_first(world):
        events.append("inside")
    assert events == order


def test_whole_batches_of_a_rank_go_through_the_compiled_net(monkeypatch):
    """Of two ranks, each has 4 of a batch's 8 images; a smaller batch goes through the net itself."""
    words = ["--depth", "10", "--growth-rate", "2", "--batch-size", "8", "--compile", "--precision", "fp32"]
    args = flags.parse_args(train.build_parser(), words)
    net, sizes = flags.make_net(args), []

    def noting(model, mode, device):
        return lambda images: [sizes.append(len(images)), model(images)][1]

    monkeypatch.setattr(distributed, "wrap", lambda net, world, device: net)
    monkeypatch.setattr(step, "compiled", noting)
    taken = step.TrainingStep(net, args, torch.device("cpu"), World(size=2))
    taken.begin_epoch(0.1)
    for number in (4, 3):
        taken(torch.randn(number, 3, 8, 8), torch.zeros(number, dtype=torch.int64), 0.5)
    assert sizes == [4]


def test_a_first_process_that_fails_lets_the_others_go_on(monkeypatch):
    """They fail by themselves, and do not wait for half an hour."""
    events = []
    monkeypatch.setattr(distributed, "barrier", lambda: events.append("barrier"))
    with pytest.raises(Refused), distributed.first_rank_first(World(0, 0, 2)):
        raise Refused("no data")
    assert events == ["barrier"]


def test_after_a_restart_the_ranks_meet_by_new_keys(monkeypatch):
    """The old ones hold the addresses of processes that are gone."""
    common, stores, waits = distributed.dist.HashStore(), [], set()
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *_, **__: iter([(common, 0, 2)]))

    def init_process_group(backend, store, timeout, **_):
        stores.append(store)
        waits.add(timeout)

    monkeypatch.setattr(distributed.dist, "init_process_group", init_process_group)
    for attempt in (0, 1, 1):
        distributed.connect(World(0, 0, 2, attempt), torch.device("cpu"))
    stores[1].set("address", "of this attempt")
    assert [store.check(["address"]) for store in stores] == [False, True, True]
    assert waits == {timedelta(minutes=30)}  # a rank may be downloading


def test_one_rank_tells_what_is_read_and_what_is_not(unconnected, capsys, pictures):
    (pictures / "train" / "red" / "notes.txt").touch()
    words = ["--dataset", "folder", "--data", str(pictures), "--batch-size", "4"]
    args, told = parse_args(train.build_parser(), words), []
    for rank in range(2):
        train.load_data(args, torch.device("cpu"), World(rank, rank, 2))
        told.append(capsys.readouterr().out.count("\n"))
    assert told == [3, 0]  # what is not read, and the titles of both parts


def test_one_rank_draws_shows_a_bar_and_writes_the_first_checkpoint_of_a_run_of_init(call_main, monkeypatch, tmp_path):
    """call_main puts the handlers of signals back."""
    told = []

    def progress(shown, **options):
        told.append(shown)
        raise InterruptedError

    monkeypatch.setattr(distributed, "wrap", lambda net, world, device: net)
    monkeypatch.setattr(train.run_folder, "Plots", lambda save, enabled: told.append(enabled))
    monkeypatch.setattr(train, "progress", progress)
    args = parse_args(train.build_parser(), [*TINY, "--init", "net.pth", "--save", str(tmp_path)])
    fill_in(args, torch.device("cpu"), 2)
    dataset = data.load("digits", ".", limit=8)
    for rank in range(2):
        with pytest.raises(InterruptedError):
            train.fit(flags.make_net(args), dataset, args, World(rank, rank, 2), None, contextlib.nullcontext)
        told.append((tmp_path / "latest.pth").exists())
        (tmp_path / "latest.pth").unlink(missing_ok=True)
    assert told == [True] * 3 + [False] * 3
