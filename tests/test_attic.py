"""The proofs of attic/ hold, and they would have noticed the bug that pytorch/pytorch#708 fixed: it is planted here."""

import collections
import concurrent.futures
import copy
import functools
import importlib.util
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torchvision

import data
import densenet
import run_folder
from attic.comparison import random_batch, randomize, relative_error, relative_errors, training_pass, worst
from attic.planted_bug import computed_by_onednn, planted_bug
from attic.torchvision_weights import from_torchvision, to_torchvision, torchvision_net
from densenet import DenseNet

ATTIC = Path(densenet.__file__).with_name("attic")
BC = dict(depth=16, growth_rate=4)
PLAIN = dict(depth=10, growth_rate=4, bottleneck=False)


@functools.cache
def script(name):
    """The script of that name as a module; the dashes keep `import` from finding it."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), ATTIC / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_net(arguments):
    torch.manual_seed(0)
    return randomize(DenseNet(**arguments), seed=0)


# ------------------------------------------------------------------------------------------------ the scripts as programs


@pytest.mark.parametrize("path", sorted({*ATTIC.glob("*-*.py"), ATTIC / "planted_bug.py"}), ids=lambda path: path.name)
def test_a_script_says_how_to_run_it_and_can_be_run_so(path, call_main):
    assert os.access(path, os.X_OK)
    status, out, _ = call_main(script(path.stem), "--help")
    assert status == 0
    assert f"\n    attic/{path.name}" in out


def test_the_official_implementation_computed_the_same(run_script):
    done = run_script("attic/compare-with-torch7-grads.py")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\S+\.weight) +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE)
    assert len(rows) == 40
    assert (rows[0][0], rows[-1][0]) == ("conv1.weight", "fc.weight")
    assert all(float(official) == pytest.approx(float(ours), rel=1e-9) for _, official, ours in rows)
    assert done.stdout.endswith("official implementation and ours are the same (bound 1e-09)\n")


def test_a_vgg_is_trained_and_goes_on_by_the_functions_of_train(run_script, tmp_path):
    flags = ["--dataset", "digits", "--limit", 64, "--epochs", 1, "--no-plot", "--device", "cpu", "--save", tmp_path / "run"]
    done = run_script("attic/train-vgg.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "the verdict is for the whole of cifar10 only" in done.stdout
    assert len((tmp_path / "run" / "test.csv").read_text().splitlines()) == 2
    done = run_script("attic/train-vgg.py", *flags, "--resume")
    assert (done.returncode, f"{tmp_path / 'run'} is complete" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize(("place", "begun"), [("data.load", False), ("step.TrainingStep.__call__", True)])
def test_a_bug_is_a_traceback(call_main, monkeypatch, tmp_path, place, begun):
    def planted(*arguments, **options):
        raise ValueError("planted")

    monkeypatch.setattr(place, planted)
    flags = ["--dataset", "digits", "--limit", 8, "--epochs", 1, "--device", "cpu", "--no-plot", "--save", tmp_path / "run"]
    with pytest.raises(ValueError, match="planted") as caught:
        call_main(script("train-vgg"), *flags)
    (note,) = caught.value.__notes__
    assert note.startswith("train-vgg.py: this is a bug")
    assert ("this continues the run: " in note) == begun


@pytest.mark.parametrize(("error", "status"), [(11.99, 0), (12.0, 1)])
def test_the_verdict_on_the_training_code(error, status, tmp_path):
    vgg = script("train-vgg")
    args = vgg.flags.parse_args(vgg.build_parser(), ["--save", str(tmp_path)])
    (tmp_path / "test.csv").write_text(f"epoch,loss,error\n1,0.5,5\n2,0.4,{error}\n")
    assert vgg.print_verdict(args) == status


def test_kernels_of_this_machine(call_main):
    status, out, errors = call_main(script("check-kernels"), "--device", "cpu", "--no-compile", "--drop-rate", 0.5)
    assert status == 0, out + errors
    assert out.count("not available here") == 4
    assert out.count("right, worst") == 2 + 2 * torch.backends.mkldnn.is_available()


@pytest.mark.parametrize(
    ("flags", "message"), [(["--depth", 11], "the nearest are 10 and 16"), (["--efficient"], "cannot see them: leave it out")]
)
def test_kernels_of_a_net_that_cannot_be_checked(call_main, flags, message):
    status, _, errors = call_main(script("check-kernels"), *flags)
    assert (status, errors.splitlines()[-1].endswith(message)) == (2, True)


COMPILED = ["--growth-rate", 12, "--capability", 90, "--types", "bf16"]


def launches(out):
    """The lines of the table of compile-kernels.py, each {column: cell}."""
    header, _, *rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_the_kernels_of_the_dense_block_are_compiled_without_a_gpu(run_script, tmp_path):
    """For an H100: none spills, and those that multiply matrices do so on its Tensor Cores."""
    pytest.importorskip("triton", reason="Triton is not there")
    done = run_script("attic/compile-kernels.py", *COMPILED, env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    products = collections.defaultdict(set)
    for launch in launches(done.stdout):
        assert (launch["spilled"], launch["verdict"], launch["loads"] != "") == ("0", "right", True)
        products[launch["kernel"]].update(launch["products"].split())
    multiply = {"first_convolution", "second_convolution", "first_backward", "second_backward"}
    assert products.keys() == {*script("compile-kernels").kernel_names()} > multiply
    assert {name for name, instructions in products.items() if "wgmma.mma_async" in instructions} == multiply


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "right"),
        ({"spilled": 8}, "WRONG: spills"),
        ({"products": ""}, "WRONG: no matrix instructions"),
        ({"shared": 228 * 1024}, "WRONG: too much shared memory"),
    ],
)
def test_a_kernel_that_is_compiled_badly_is_found(call_main, monkeypatch, changed, verdict):
    pytest.importorskip("triton", reason="Triton is not there")
    compile_kernels = script("compile-kernels")

    def machine_code(capability, launch):
        good = dict(registers=100, spilled=0, shared=227 * 1024, products="wgmma.mma_async", loads={128: 4})
        return compile_kernels.Code(**good | (changed if launch.name == "first_backward" else {}))

    monkeypatch.setattr(compile_kernels, "machine_code", machine_code)
    threads = concurrent.futures.ThreadPoolExecutor()
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", lambda processes, mp_context: threads)
    status, out, errors = call_main(compile_kernels, *COMPILED, "--depth", 10)
    assert status == (verdict != "right"), errors
    verdicts = {launch["kernel"]: launch["verdict"] for launch in launches(out)}
    assert verdicts.pop("first_backward") == verdict
    assert set(verdicts.values()) == {"right"}


def test_kernels_are_not_compiled_without_triton(call_main, monkeypatch):
    compile_kernels = script("compile-kernels")
    monkeypatch.setattr(compile_kernels, "triton", None)
    status, out, errors = call_main(compile_kernels)
    assert (status, out) == (2, "")
    assert errors.splitlines()[-1].endswith("pip install triton")


# ---------------------------------------------------------------------------------------------- comparison of the speed


def test_the_rivals_are_measured_in_processes_of_their_own(run_script, tmp_path):
    sizes = ["--depth", 10, "--batch-size", 2, "--image-size", 8, "--rounds", 1, "--steps", 1, "--device", "cpu"]
    which = ["--only", "torchvision-checkpointed", "--json", tmp_path / "report.json"]
    done = run_script("attic/compare-speed.py", *sizes, *which)
    assert done.returncode == 0, done.stderr
    assert "\n| torchvision-checkpointed | " in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["depths"]["10"]["variants"]["torchvision-checkpointed"]["peak_mb_per_image"] > 0


def test_a_table_for_each_depth_with_counted_bytes(call_main, monkeypatch, tmp_path):
    compare = script("compare-speed")

    def measure(factories, args, device):
        for factory in factories.values():
            factory()()  # here, for it takes seconds to start a process
        return {name: {"ms_per_step": [args.depth], "memory_gb": 1.0} for name in factories}

    monkeypatch.setattr(compare.bench, "measure", measure)
    flags = ["--depths", 10, 16, "--growth-rate", 2, "--batch-size", 2, "--image-size", 8, "--device", "cpu"]
    status, out, errors = call_main(compare, *flags, "--json", tmp_path / "report.json")
    assert status == 0, errors
    names = [name for name in compare.VARIANTS if not name.endswith(compare.ON_GPUS)]
    assert re.findall(r"^\| (\S+) \| 1[06]\.0 \|", out, re.MULTILINE) == 2 * names
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["conditions"].startswith("fp32, batch 2, 5 x 2 steps, cpu")
    variants = report["depths"]["16"]["variants"]
    assert variants["torchvision-checkpointed"]["peak_mb_per_image"] < variants["plain"]["peak_mb_per_image"]
    args = compare.flags.parse_args(compare.build_parser(), [*map(str, flags[3:]), "--depth", "16"])
    peak = compare.peak_bytes(compare.step_on(torch.device("cpu"), "plain", args)[0])
    assert variants["plain"]["peak_mb_per_image"] == pytest.approx(peak / 2 / 1e6)
    assert variants["torchvision"]["peak_mb_per_image"] == pytest.approx(variants["plain"]["peak_mb_per_image"], rel=0.2)


def test_every_depth_is_looked_at_before_the_first_is_measured(call_main, monkeypatch):
    compare = script("compare-speed")
    monkeypatch.setattr(compare.bench, "measure", None)
    status, out, errors = call_main(compare, "--depths", 10, 11)
    assert (status, out, "depth 11 does not fit" in errors) == (2, "", True)


def test_the_pipeline_against_the_usual_one(run_script, cifar):
    """In a process of its own: a DataLoader forks, which JAX, imported here by other tests, may not survive."""
    flags = ["--data", cifar, "--device", "cpu", "--batch-size", 70, "--rounds", 1, "--steps", 2]
    done = run_script("attic/compare-speed.py", *flags)
    assert done.returncode == 0, done.stderr
    names = [line.split(" | ")[0] for line in done.stdout.splitlines()[4:]]
    assert names == ["| data.py", "| DataLoader, 1 worker", "| DataLoader, 2 workers"]


# --------------------------------------------------------------------------------------------- comparison with the official


@functools.cache
def reference():
    compare = script("compare-with-torch7-grads")
    return compare.load_reference(compare.REFERENCE)


def errors_against_official(change=lambda net: None):
    compare = script("compare-with-torch7-grads")
    net = compare.build_net(reference())
    change(net)
    return relative_errors(compare.same_pass(net, reference()), compare.expected(reference()))


def other_epsilon(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1.1e-5


def other_momentum(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.09


def new_maps_first(net):
    layer = net.dense1[0]
    layer.register_forward_hook(lambda module, inputs, output: output.roll(12, dims=1))


@pytest.mark.parametrize(
    ("fault", "group"), [(other_epsilon, "logits"), (other_momentum, "buffer/"), (new_maps_first, "hidden_")]
)
def test_the_comparison_finds_faults(fault, group):
    assert worst(errors_against_official(fault), group)[1] > 1e-7


def test_a_difference_from_the_official_code_is_status_1(call_main, monkeypatch):
    compare = script("compare-with-torch7-grads")
    net = compare.build_net(reference())
    other_epsilon(net)
    monkeypatch.setattr(compare, "build_net", lambda reference: net)
    status, out, _ = call_main(compare)
    assert (status, out.splitlines()[-1]) == (1, "official implementation and ours are DIFFERENT (bound 1e-09)")


# --------------------------------------------------------------------------------- comparison with other implementations


@functools.cache
def jax_case(bottleneck):
    """A net in float64, its batch, and what JAX computes of them; JAX takes a second to compile each layer."""
    net = small_net(dict(depth=10 if bottleneck else 7, growth_rate=4, bottleneck=bottleneck)).double()
    images, labels = random_batch(3, num_classes=10, seed=1)
    with mock.patch.dict(os.environ, XLA_FLAGS="--xla_backend_optimization_level=0"):
        return net, images.double(), labels, script("compare-implementations").jax_pass(net, images.double(), labels)


def errors_against_jax(bottleneck):
    net, images, labels, theirs = jax_case(bottleneck)
    return relative_errors(training_pass(net, images, labels), theirs)


def errors_against_torchvision(bottleneck, depth=16):
    net = small_net(dict(depth=depth, growth_rate=4, bottleneck=bottleneck)).double()
    images, labels = random_batch(3, num_classes=10, seed=1)
    theirs = script("compare-implementations").torchvision_pass(net, images.double(), labels)
    ours = training_pass(net, images.double(), labels)
    return relative_errors(ours, {name: theirs[name] for name in ours})


# JAX is imported by one process, and compiles without the optimisation that takes longest.
OTHERS = pytest.mark.parametrize(
    "errors", [pytest.param(errors_against_jax, marks=pytest.mark.xdist_group("jax")), errors_against_torchvision]
)


@pytest.mark.parametrize("bottleneck", [True, False])
@OTHERS
def test_other_implementations_agree(errors, bottleneck):
    assert max(errors(bottleneck).values()) < 1e-9


def test_the_table_of_implementations_and_its_verdict(call_main, monkeypatch):
    compare = script("compare-implementations")
    monkeypatch.setattr(compare, "NETS", {"one": BC, "two": PLAIN})
    monkeypatch.setattr(compare, "jax_pass", lambda net, images, labels: training_pass(copy.deepcopy(net), images, labels))
    status, out, _ = call_main(compare)
    assert (status, out.splitlines()[-1]) == (0, "the three implementations are the same (bound 1e-09)")
    with planted_bug():
        status, out, _ = call_main(compare)
    assert (status, out.splitlines()[-1]) == (1, "the three implementations are DIFFERENT (bound 1e-09)")


@pytest.mark.parametrize("other", ["torchvision_pass", "jax_pass"])
def test_each_of_the_other_implementations_counts(call_main, monkeypatch, other):
    """A single gradient of one of them is off by 1e-8."""
    compare = script("compare-implementations")

    def right(net, images, labels):
        return training_pass(copy.deepcopy(net), images, labels)

    def wrong(net, images, labels):
        results = right(net, images, labels)
        return results | {"grad/fc.bias": (1 + 1e-8) * results["grad/fc.bias"]}

    monkeypatch.setattr(compare, "NETS", {"one": BC})
    for name in ("torchvision_pass", "jax_pass"):
        monkeypatch.setattr(compare, name, wrong if name == other else right)
    status, out, _ = call_main(compare)
    assert (status, out.splitlines()[-1]) == (1, "the three implementations are DIFFERENT (bound 1e-09)")


# -------------------------------------------------------------------------------------------------------- weight exchange


@pytest.mark.parametrize(
    "arguments",
    [BC, PLAIN, {**BC, "reduction": 1.0, "num_classes": 100}, {**PLAIN, "reduction": 0.3, "init_channels": 7}, dict(depth=100)],
)
def test_weights_survive_the_way_to_torchvision_and_back(arguments):
    net = small_net(arguments)
    net(random_batch(4, num_classes=10, seed=2, size=8)[0])  # running statistics of its own
    twin = torchvision_net(net)
    twin.load_state_dict(to_torchvision(net.state_dict()))
    back = from_torchvision(twin.state_dict())
    assert list(back) == list(net.state_dict())
    assert all(torch.equal(back[name], values) for name, values in net.state_dict().items())
    images, _ = random_batch(2, num_classes=10, seed=3, size=16)
    assert relative_error(twin.eval()(images), net.eval()(images)) < 1e-4


@pytest.mark.parametrize("arguments", [BC, PLAIN])
def test_weights_of_torchvision_become_ours(arguments):
    net = DenseNet(**arguments)
    twin = torchvision_net(net)
    net.load_state_dict(from_torchvision(twin.state_dict()))
    images, _ = random_batch(2, num_classes=10, seed=3)
    assert relative_error(net.eval()(images), twin.eval()(images)) < 1e-4


def test_weights_of_an_imagenet_net_are_refused():
    with torch.device("meta"):
        state = torchvision.models.densenet121().state_dict()
    with pytest.raises(ValueError, match=r"features\.norm0\.weight has no place"):
        from_torchvision(state)


# -------------------------------------------------------------------------------------------------------- numeric checks

TINY = dict(growth_rate=1, num_classes=2, init_channels=2)
TINY_NETS = {"DenseNet-BC": dict(depth=10, **TINY), "plain DenseNet": dict(depth=7, bottleneck=False, **TINY)}


def numeric_verdict(title):
    """Whether numcheck-grads.py finds the gradients of a row of its table right, or those of a tiny net."""
    numcheck = script("numcheck-grads")
    if title in TINY_NETS:
        net = small_net(TINY_NETS[title]).double()
        return numcheck.against_gradcheck(net, random_batch(4, num_classes=2, seed=1, size=4)[0].double())[1]
    return next(check(module, images)[1] for row, check, module, images in numcheck.checks() if row == title)


NUMERIC_CHECKS = [
    # title, and whether the planted bug leaves it as it is
    ("concatenation, fully connected", True),
    ("concatenation, convolutions", False),
    ("Bottleneck", False),
    ("SingleLayer", False),
    ("Transition", True),
    ("DenseNet-BC", False),
    ("plain DenseNet", False),
]


@pytest.mark.parametrize("title", [title for title, _ in NUMERIC_CHECKS])
def test_numeric_differentiation_agrees(title):
    assert numeric_verdict(title)


class SlightlyWrong(torch.autograd.Function):
    """The identity; its gradient is off by 1e-4."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.0001 * gradient


class SlightlyWrongWeight(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, SlightlyWrong.apply(self.weight), self.bias)


@pytest.mark.parametrize("name", ["against_numdifftools", "against_gradcheck"])
def test_numeric_differentiation_notices_a_small_fault_of_a_single_gradient(name):
    torch.manual_seed(0)
    for kind in (nn.Linear, SlightlyWrongWeight):
        _, right, remark = getattr(script("numcheck-grads"), name)(kind(2, 2).double(), torch.randn(2, 2).double())
        assert right == (kind is nn.Linear), remark


def test_one_check_that_finds_gradients_wrong_is_status_1(call_main, monkeypatch):
    numcheck = script("numcheck-grads")
    rows = [row for row in numcheck.checks() if row[0] in ("Bottleneck", "Transition")]
    monkeypatch.setattr(numcheck, "checks", lambda: rows)
    status, out, _ = call_main(numcheck)
    assert (status, out.splitlines()[-1]) == (0, "2 of 2 checks find the gradients right")
    with planted_bug():
        status, out, _ = call_main(numcheck)
    assert (status, out.splitlines()[-1]) == (1, "1 of 2 checks find the gradients right")


# ------------------------------------------------------------------------------------------------------- the planted bug


@pytest.mark.parametrize(("title", "stays_green"), NUMERIC_CHECKS)
def test_numeric_differentiation_notices_the_bug_where_a_convolution_is_concatenated(title, stays_green):
    with planted_bug():
        assert numeric_verdict(title) == stays_green


def test_the_comparison_with_the_official_code_notices_the_bug_by_the_gradients_alone():
    with planted_bug():
        errors = errors_against_official()
    assert worst(errors, "grad/")[1] > 1
    assert max(error for name, error in errors.items() if not name.startswith("grad/")) < 1e-9


@pytest.mark.parametrize("bottleneck", [True, False])
@OTHERS
def test_other_implementations_notice_the_bug(errors, bottleneck):
    with planted_bug():
        assert worst(errors(bottleneck), "grad/")[1] > 1


def test_an_implementation_on_the_same_kernels_can_share_the_bug():
    """With one layer in each block torchvision concatenates as we do, and is wrong as we are."""
    with planted_bug():
        assert max(errors_against_torchvision(True, depth=10).values()) < 1e-9


@pytest.mark.parametrize("flags", [[], ["--no-bottleneck"]])
def test_the_check_of_kernels_notices_the_bug_and_names_the_switch(call_main, flags):
    with planted_bug(computed_by_onednn):
        status, out, _ = call_main(script("check-kernels"), "--device", "cpu", "--no-compile", *flags)
    assert status == 1
    verdicts = dict(re.findall(r"^(\S+(?: \S+)?) .*  (right|WRONG), worst", out, re.MULTILINE))
    assert verdicts == {"oneDNN on": "WRONG", "oneDNN off": "right", "channels_last": "WRONG", "bf16 autocast": "WRONG"}


def test_a_program_is_run_with_the_bug(call_main, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, torch, run_folder; print(sys.argv[1:], torch.nn.Conv2d.forward.__name__, run_folder.git_commit())"
    )
    status, out, errors = call_main(script("planted_bug"), program, "--flag", "value")
    commit = f"{run_folder.git_commit()} with a planted bug"
    assert (status, out) == (0, f"['--flag', 'value'] broken_forward {commit}\n"), errors
    assert nn.Conv2d.forward.__name__ == "forward"
    status, _, errors = call_main(script("planted_bug"), tmp_path / "gone.py")
    assert (status, f"argument script: {tmp_path / 'gone.py'} is not a file: name a program" in errors) == (2, True)


@pytest.mark.parametrize(("num_images", "hidden"), [(1, True), (2, False)])
def test_a_batch_of_one_image_hides_the_bug(num_images, hidden):
    net, batch = small_net(BC), random_batch(num_images, num_classes=10, seed=1)
    clean = training_pass(net, *batch)
    with planted_bug():
        assert all(torch.equal(values, clean[name]) for name, values in training_pass(net, *batch).items()) == hidden


def test_the_control_experiment_is_untouched_by_the_bug():
    vgg = script("train-vgg")
    torch.manual_seed(0)
    net = vgg.vgg([4, "pool", 8, 8, "pool", 16], num_classes=10)
    net.to(memory_format=torch.channels_last)
    batch = random_batch(4, num_classes=10, seed=1)
    clean = training_pass(net, *batch)
    with planted_bug():
        assert all(torch.equal(values, clean[name]) for name, values in training_pass(net, *batch).items())


@pytest.mark.parametrize("more", [["--limit", "9"], ["--dataset", "digits"]])
def test_no_verdict_on_less(more, tmp_path):
    vgg = script("train-vgg")
    args = vgg.flags.parse_args(vgg.build_parser(), ["--save", str(tmp_path), *more])
    (tmp_path / "test.csv").write_text("epoch,loss,error\n1,0.5,50\n2,0.4,50\n")
    assert vgg.print_verdict(args) == 0


def test_one_number_of_many_is_not_averaged_away():
    right, wrong = torch.full((10**6,), 2.0), torch.full((10**6,), 2.0)
    wrong[7] += 1
    assert relative_error(wrong, right) == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_infinitely_wrong(value):
    finite, other = torch.ones(2), torch.tensor([1.0, value])
    assert relative_error(other, finite) == relative_error(finite, other) == float("inf")


def test_what_cannot_be_compared_is_an_error():
    one = {"logits": torch.ones(2, 1)}
    with pytest.raises(ValueError, match=r"only one of the two sides has \['loss'\]"):
        relative_errors(one | {"loss": torch.ones(())}, one)
    with pytest.raises(ValueError, match=r"the shapes \(1, 2\) and \(2, 1\) differ"):
        relative_errors({"logits": torch.ones(1, 2)}, one)


def test_no_factor_of_a_net_that_is_compared_is_1_and_nothing_that_it_adds_is_0():
    for name, parameter in small_net(BC).named_parameters():
        assert (parameter != (1 if name.endswith("weight") else 0)).all(), name


@pytest.mark.parametrize("wrong", ["logits", "loss", "grad/fc.weight"])
def test_a_kernel_is_wrong_by_its_logits_too(monkeypatch, wrong):
    check = script("check-kernels")
    errors = dict.fromkeys(["logits", "loss", "grad/fc.weight"], 1e-6)
    for more, right in [({}, True), ({wrong: 0.01}, False)]:
        monkeypatch.setattr(check, "measure", lambda *_, more=more: (errors | more, 0))
        assert check.check(check.Row("cuDNN on", "fp32", True), None, None, None, None) == right


SWITCHED = {  # by each row of check-kernels.py, of what else is as in NOT_SWITCHED
    "cuDNN on": {},
    "cuDNN off": {"cudnn": False},
    "TF32 on": {"tf32": [True, True]},
    "TF32 off": {},
    "oneDNN on": {},
    "oneDNN off": {"onednn": False},
    "channels_last": {"channels_last": True},
    "bf16 autocast": {"dtype": torch.bfloat16},
    "torch.compile": {"compiled": True},
}
NOT_SWITCHED = dict(cudnn=True, tf32=[False, False], onednn=True, channels_last=False, dtype=torch.float32, compiled=False)


def test_each_row_of_the_check_of_kernels_switches_what_it_names(monkeypatch):
    """As the first convolution finds it; with any other switch, a row would be right without having been tried."""
    check, found, compiled = script("check-kernels"), {}, []
    monkeypatch.setattr(nn.Module, "compile", lambda net: compiled.append(net))
    backends, batch = torch.backends, random_batch(2, num_classes=10, seed=1, size=8)

    def look(module, inputs, output):
        found[row.switch] = {
            "cudnn": backends.cudnn.enabled,
            "tf32": [backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32],
            "onednn": backends.mkldnn.enabled,
            "channels_last": module.weight.is_contiguous(memory_format=torch.channels_last),
            "dtype": output.dtype,
            "compiled": net in compiled,
        }

    for row in check.rows(torch.device("cpu"), with_compile=True):
        net = small_net(dict(depth=10, growth_rate=2))
        net.conv1.register_forward_hook(look)
        check.device_pass(row, net, *batch, torch.device("cpu"))
    assert found == {name: NOT_SWITCHED | switched for name, switched in SWITCHED.items()}


@pytest.mark.parametrize(
    ("capability", "growth_rate", "wrong"), [(80, 12, True), (80, 24, False), (90, 12, True), (90, 24, True)]
)
def test_which_kernels_may_spill(capability, growth_rate, wrong):
    pytest.importorskip("triton", reason="Triton is not there")
    compile_kernels = script("compile-kernels")
    code = compile_kernels.Code(registers=255, spilled=8, shared=0, products="mma.sync", loads={})
    found = compile_kernels.faults(growth_rate, capability, SimpleNamespace(name="first_backward"), code)
    assert found == "spills" * wrong


def test_the_usual_pipeline_normalises_and_the_ratio_is_to_its_one_worker(monkeypatch, capsys, cifar):
    compare, moments = script("compare-speed"), torch.tensor(data.SOURCES["cifar10"][1]).view(2, 3, 1, 1)
    dataset = data.load("digits", ".")._replace(mean=moments[0], std=moments[1])
    loader = compare.data_loader(SimpleNamespace(data=cifar, batch_size=500), dataset, num_workers=0)
    middle = next(iter(loader))[0][:, :, 8:24, 8:24]
    torch.testing.assert_close(middle.mean(dim=(0, 2, 3)), torch.zeros(3), atol=0.15, rtol=0)
    torch.testing.assert_close(middle.std(dim=(0, 2, 3)), torch.ones(3), atol=0.15, rtol=0)
    rates = {"data.py": [80, 90], "DataLoader, 1 worker": [10, 7, 12]}
    monkeypatch.setattr(compare, "pipeline_rates", lambda *_: rates)
    monkeypatch.setattr(compare.data, "load", lambda *_: dataset)
    compare.measure_pipeline(SimpleNamespace(data="x", batch_size=1, rounds=3, steps=1), torch.device("cpu"))
    assert [line.split(" | ")[2] for line in capsys.readouterr().out.splitlines()[4:]] == ["8.5 |", "1.0 |"]


def test_the_rivals_optimiser_is_that_of_train(monkeypatch):
    compare, taken, sgd = script("compare-speed"), [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda p, **options: [taken.append(options), sgd(p, **options)][1])
    compare.step_of_pytorch(torch.nn.Linear(2, 2), SimpleNamespace(precision="fp32"), torch.device("cpu"))
    assert taken == [dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)]


@pytest.mark.parametrize(("precision", "dtype", "tf32"), [("fp32", torch.float32, False), ("bf16", torch.bfloat16, True)])
def test_the_rivals_step_has_the_precision_of_the_others(monkeypatch, put_back, precision, dtype, tf32):
    compare, types = script("compare-speed"), []
    batch = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 1.0
    monkeypatch.setattr(compare.bench, "random_batches", lambda *_: iter([batch]))
    net = nn.Linear(3, 4)
    net.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    compare.step_of_pytorch(net, SimpleNamespace(precision=precision), torch.device("cpu"))()
    assert (types, torch.backends.cudnn.allow_tf32) == ([dtype], tf32)
