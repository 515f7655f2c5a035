"""What a person with a GPU runs first: make test-gpu. make test runs on the CPU what is cheap there and proven nowhere else.

torch.cuda is also the name of AMD's GPUs in PyTorch.
"""

import contextlib
import copy
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import ROOT
from test_kernels import counted
from test_run_folder import assert_same_run

import bench
import data
import train
from attic.comparison import random_batch, randomize, relative_errors, training_pass
from attic.counting import peak_bytes
from checkpoint import build_net, load_checkpoint, normalization
from dense_block import load_kernels
from densenet import DenseNet
from distributed import World
from flags import fill_in, make_net, parse_args
from machine import DTYPES, set_determinism, set_precision
from metrics import loss_and_error_sums, predict
from step import TrainingStep

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
BOTH = pytest.mark.parametrize("device", ["cpu", CUDA])
GPU = pytest.mark.parametrize("device", [CUDA])


def on_gpu(*values):
    """("cuda", value) for each value, as parameters of a test."""
    return [pytest.param("cuda", value, marks=pytest.mark.gpu) for value in values]


DIGITS = ["--dataset", "digits", "--depth", 10, "--growth-rate", 8, "--batch-size", 32, "--drop-rate", 0, "--no-plot"]
ON_DEVICE = ["--dataset", "digits", "--depth", 10, "--growth-rate", 4, "--limit", 96, "--batch-size", 32]
ON_DEVICE += ["--drop-rate", 0.2, "--augment", "--no-plot"]


@pytest.fixture
def run_script(request):
    """Runs a script of the project in a process of its own, which for a GPU must not be forked."""

    def run(name, *arguments):
        if not request.node.get_closest_marker("gpu"):
            return request.getfixturevalue("forked")([ROOT / name, *arguments]).wait()
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def run(run_script):
    """Runs a script that is to succeed; returns what it printed."""

    def succeed(name, *arguments):
        done = run_script(name, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return succeed


# ----------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("device", "arguments"), on_gpu(dict(depth=16), dict(depth=13, bottleneck=False), dict(depth=100, growth_rate=4))
)
@pytest.mark.parametrize("efficient", [False, True])
def test_outputs_statistics_and_gradients_are_those_of_the_plain_net_on_the_cpu(device, efficient, arguments):
    torch.manual_seed(0)
    plain = randomize(DenseNet(**arguments), seed=0).double()
    net = DenseNet(**arguments, efficient=efficient).double().to(device, memory_format=torch.channels_last)
    net.load_state_dict(plain.state_dict())
    images, labels = random_batch(4, num_classes=10, seed=1)
    expected = training_pass(plain, images.double(), labels) | floating_buffers(plain)
    result = training_pass(net, images.double().to(device), labels.to(device)) | floating_buffers(net)
    assert max(relative_errors(result, expected).values()) < 1e-10


def floating_buffers(net):
    return {name: buffer for name, buffer in net.named_buffers() if buffer.is_floating_point()}


@GPU
def test_every_kernel_is_right(device, run):
    assert "every kernel tried is right" in run("attic/check-kernels.py", "--device", device)


@pytest.mark.parametrize(("device", "precision"), on_gpu("fp32", "tf32", "bf16"))
def test_kernels_predict_what_the_plain_modules_predict(device, precision, put_back):
    """To the rounding of the precision, relative to the largest logit; both by the running statistics of a step of training."""
    net = randomize(DenseNet(depth=40), seed=0).to(device, memory_format=torch.channels_last)
    images, labels = (tensor.to(device) for tensor in random_batch(300, num_classes=10, seed=0))
    training_pass(net, images, labels)
    logits = []
    set_precision(precision)
    with counted(load_kernels()) as calls, torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        for efficient in (False, True):
            for block in (net.dense1, net.dense2, net.dense3):
                block.efficient = efficient
            logits.append(net.eval()(images).double())
    assert (calls["infer"], calls["transition_forward"]) == (3, 2)
    bound = {"fp32": 1e-5, "tf32": 5e-3, "bf16": 3e-2}[precision]
    assert (logits[0] - logits[1]).abs().max() < bound * logits[0].abs().max()


@pytest.mark.parametrize(("device", "flags"), on_gpu([], ["--no-capture"], ["--drop-rate", "0"]))
def test_no_step_waits_for_the_device(device, flags):
    """From the data set to the optimiser; PyTorch itself raises where the host would wait."""
    dataset = data.load("digits", ".").to(torch.device(device))
    args = arguments("--augment", "--batch-size", "32", *flags, device=device)
    step = new_step(args, device)
    batches = train.epoch_batches(dataset, 0, args, World())
    for _ in range(4 if args.capture else 0):  # the capture itself waits
        step(*next(batches))
    with waiting_is_an_error():
        results = [step(*next(batches)) for _ in range(20)]
    assert torch.stack(results).isfinite().all()


def arguments(*flags, device):
    args = parse_args(
        train.build_parser(), ["--dataset", "digits", "--depth", "10", "--drop-rate", "0.2", "--device", device, *flags]
    )
    fill_in(args, torch.device(device))
    return args


def new_step(args, device, change=lambda net: net):
    """The step of a net that is drawn from the seed and then changed; an epoch with it has begun."""
    torch.manual_seed(args.seed)
    net = change(make_net(args)).to(device, memory_format=torch.channels_last)
    step = TrainingStep(net, args, torch.device(device), World())
    step.begin_epoch(args.lr)
    return step


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BOTH
def test_efficient_blocks_need_little_memory(device):
    plain, efficient = (peak_of_a_step(device, efficient) for efficient in (False, True))
    assert efficient <= (0.25 if device == "cuda" else 0.3) * plain


def peak_of_a_step(device, efficient):
    """Bytes at L=100: measured on a GPU, counted on a CPU."""
    batch_size = 64 if device == "cuda" else 2
    net = DenseNet(depth=100, efficient=efficient).to(device, memory_format=torch.channels_last)
    images, labels = (tensor.to(device) for tensor in random_batch(batch_size, num_classes=10, seed=0))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def step():
        training_pass(net, images, labels)
        optimizer.step()

    if device == "cpu":
        return peak_bytes(step)
    step()  # compiles and chooses kernels
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


# ------------------------------------------------------------------------------------------------------ the captured step


@pytest.fixture
def repeatable():
    """Only kernels that give the same bits every time, until the end of the test."""
    benchmark = torch.backends.cudnn.benchmark
    set_determinism(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize(
    ("device", "flags"),
    on_gpu(
        [],
        ["--no-bottleneck"],
        ["--drop-rate", "0"],
        ["--efficient"],
        ["--drop-rate", "0", "--efficient"],
        ["--opt", "adam"],
        ["--opt", "rmsprop"],
        ["--precision", "fp32"],
        ["--precision", "bf16"],
        ["--precision", "fp16"],
        ["--precision", "bf16", "--drop-rate", "0", "--efficient"],
        ["--precision", "fp16", "--drop-rate", "0", "--efficient"],
        ["--precision", "fp16", "--opt", "adam"],
    ),
)
def test_captured_steps_are_the_eager_ones_bit_for_bit(repeatable, device, flags):
    """Two epochs of five whole batches and a smaller one, each with a dropout of its own; the fourth step is captured."""
    args = vars(arguments("--batch-size", "32", *flags, device=device))
    eager, captured = (two_epochs(SimpleNamespace(**args | {"capture": way})) for way in (False, True))  # nothing else differs
    assert torch.stack(captured.results).isfinite().all()
    assert torch.equal(torch.stack(eager.results), torch.stack(captured.results))
    assert all(torch.equal(eager.net[name], captured.net[name]) for name in eager.net)
    ours, theirs = (torch.utils._pytree.tree_leaves(each.optimizer) for each in (captured, eager))
    assert all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(ours, theirs, strict=True))
    assert captured.step.forward_backward.graph is not None


def two_epochs(args):
    dataset = data.load("digits", ".", limit=5 * 32 + 5).to(torch.device(args.device))
    step, results = new_step(args, args.device), []
    for epoch in range(2):
        step.begin_epoch(0.1 if args.opt == "sgd" else None)
        results += [step(*batch) for batch in train.epoch_batches(dataset, epoch, args, World())]
    state = {name: value.clone() for name, value in step.model.state_dict().items()}
    return SimpleNamespace(step=step, results=results, net=state, optimizer=step.optimizer.state_dict()["state"])


def with_frozen_stem(net):
    net.conv1.weight.requires_grad_(False)
    return net


def with_exact_means(net):
    """Batch norms that average over all batches: each asks the device how many there were."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    return net


@pytest.mark.parametrize(("device", "change"), on_gpu(with_frozen_stem, with_exact_means))
def test_a_net_that_waits_for_the_device_is_trained_eagerly_and_says_so_once(device, change, capsys):
    """Its dropout, too, goes on; a frozen layer is no hindrance, and stays as it is."""
    dataset = data.load("digits", ".").to(torch.device(device))
    args = arguments("--batch-size", "32", "--capture", device=device)
    step = new_step(args, device, change)
    before = step.model.conv1.weight.clone()
    batches = train.epoch_batches(dataset, 0, args, World())
    results = [step(*next(batches)) for _ in range(8)]
    assert torch.stack(results).isfinite().all()
    assert torch.equal(before, step.model.conv1.weight) == (change is with_frozen_stem)
    assert step.model.bn1.num_batches_tracked == 8
    told = capsys.readouterr().out.count("steps run eagerly, not captured: each waits for the device")
    assert (told, step.forward_backward.graph is None) == ((1, True) if change is with_exact_means else (0, False))


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(("device", "more"), on_gpu(["--no-capture"], ["--limit", 100], ["--limit", 100, "--drop-rate", 0]))
def test_runs_are_repeated_and_resumed_byte_for_byte(device, more, run, tmp_path):
    """When captured, each process takes its first three steps eagerly, and the last batch of an epoch, which is of four."""
    flags = [*ON_DEVICE, *more, "--device", device, "--deterministic", "--epochs", 4]
    for name in ("one", "two"):
        run("train.py", *flags, "--save", tmp_path / name)
    kill_after_an_epoch([*flags, "--save", tmp_path / "three"], tmp_path / "three" / "test.csv")
    assert "continuing after epoch" in run("train.py", *flags, "--save", tmp_path / "three", "--resume")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "three")


def kill_after_an_epoch(flags, test_csv):
    """kill -9 as soon as the line of the second epoch is printed: its checkpoint is written by then."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert any("epoch 2/" in line for line in process.stdout)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(pd.read_csv(test_csv)) >= 2


WAYS = [  # device, flags, epochs, bound of the test error in %
    ("cpu", ["--growth-rate", 4], 3, 70),  # 42 to 56 with three seeds; of chance, 90
    *[
        pytest.param("cuda", ["--precision", each, *more], 8, 25, marks=pytest.mark.gpu)
        for each in DTYPES
        for more in ([], ["--no-capture", "--no-efficient"])
    ],
    *[
        pytest.param("cuda", ["--compile", mode, *more], 8, 25, marks=pytest.mark.gpu)  # 3 to 10 with ten seeds
        for mode, more in [("default", ["--efficient"]), ("reduce-overhead", []), ("reduce-overhead", ["--precision", "bf16"])]
    ],
]


@pytest.mark.parametrize(("device", "flags", "epochs", "bound"), WAYS)
def test_the_digits_are_learned_and_the_net_answers_the_same_on_cpu_and_gpu(device, flags, epochs, bound, run, tmp_path):
    """1,437 images in batches of 32: the last one of an epoch has 29."""
    run("train.py", *DIGITS, "--device", device, *flags, "--epochs", epochs, "--save", tmp_path)
    trained = load_checkpoint(tmp_path / "latest.pth")
    here, there = (answers(trained, torch.device(name)) for name in ("cpu", device))
    assert pd.read_csv(tmp_path / "test.csv")["error"].iloc[-1] < bound
    assert (here - there).abs().max() / here.abs().max() < 0.02  # the convolutions of a GPU may use TF32
    labels = data.load("digits", ".").test.labels
    wrong_here, wrong_there = (loss_and_error_sums(logits, labels)[1] for logits in (here, there))
    assert abs(wrong_here - wrong_there) <= 2
    assert pd.read_csv(tmp_path / "test.csv")["error"].iloc[-1] == pytest.approx(100 * wrong_there.item() / 360, abs=0.6)


def answers(trained, device):
    net = build_net(copy.deepcopy(trained)).to(device, memory_format=torch.channels_last)
    images = data.load("digits", ".").test.images.to(device)
    return predict(net, images, *normalization(trained, device))


@GPU
def test_memory_that_ran_out_is_a_sentence(device, run_script, tmp_path, monkeypatch):
    """Of a tenth of the GPU: with all of it gone, cuDNN would choose other algorithms in the tests beside this one."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "per_process_memory_fraction:0.1")
    flags = ["--dataset", "digits", "--device", device, "--depth", 250, "--growth-rate", 24, "--batch-size", 1437]
    done = run_script("train.py", *flags, "--no-plot", "--save", tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "--batch-size" in done.stderr.splitlines()[-1]


def torchrun(number, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number), "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *map(str, flags)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@GPU
def test_torchrun_with_one_process(device, tmp_path):
    done = torchrun(1, *ON_DEVICE, "--device", device, "--epochs", 1, "--save", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(tmp_path / "train.csv")) == 3


@GPU
def test_torchrun_with_more_processes_than_gpus(device, tmp_path):
    number = torch.cuda.device_count()
    flags = [*ON_DEVICE, "--device", device, "--batch-size", 8 * (number + 1), "--save", tmp_path / "run"]
    done = torchrun(number + 1, *flags)
    assert done.returncode != 0
    assert f"no GPU is left for process {number}: --nproc-per-node {number} at most" in done.stderr
    assert not (tmp_path / "run").exists()


@GPU
def test_the_bench_measures_all_variants(device, run):
    lines = run("bench.py", "--device", device, "--depth", 10, "--batch-size", 4, "--rounds", 2).splitlines()
    assert [line.split()[1] for line in lines[4:]] == list(bench.VARIANTS)


@GPU
def test_the_rivals_are_timed(device, run):
    lines = run("attic/compare-speed.py", "--device", device, "--depth", 10, "--only", "torchvision", "plain").splitlines()
    assert [line.split()[1] for line in lines[4:6]] == ["torchvision", "plain"]
