import argparse
import json

import pytest
import torch
import torch.nn as nn
from PIL import Image

import bench

CPU = torch.device("cpu")


def kept(depth, variant, batch_size=2):
    args = argparse.Namespace(depth=depth, growth_rate=12, batch_size=batch_size, image_size=32)
    _, forward = bench.make_step(variant, args, CPU)
    return bench.kept_bytes(forward) / batch_size


@pytest.fixture(scope="module")
def kept_bytes():
    """{(variant, L): bytes an image kept for the backward pass}."""
    return {(variant, depth): kept(depth, variant) for variant in ("plain", "efficient") for depth in (40, 100, 160, 250)}


def test_plain_nets_keep_what_their_layers_save(kept_bytes):
    """The known figures of the paper's BC nets with k=12, which count the parameters, too, over a batch of 8."""
    depths = (40, 100, 160, 250)
    parameters = [4 * sum(p.numel() for p in bench.make_net("plain", depth, 12).parameters()) for depth in depths]
    megabytes = [(kept_bytes["plain", depth] + size / 8) / 1e6 for depth, size in zip(depths, parameters, strict=True)]
    assert megabytes == pytest.approx([8.4, 35.2, 78.5, 174.3], rel=0.01)


def test_efficient_blocks_keep_little_and_grow_linearly(kept_bytes):
    plain, ours = ({depth: kept_bytes[variant, depth] for depth in (40, 100, 160, 250)} for variant in ("plain", "efficient"))
    assert ours[100] <= 0.22 * plain[100]
    assert ours[250] <= 0.12 * plain[250]
    assert ours[250] <= 2.6 * ours[100]
    slopes = [(ours[b] - ours[a]) / (b - a) for a, b in [(40, 100), (100, 160), (160, 250)]]
    assert max(slopes) < 1.05 * min(slopes)


def test_kept_bytes_of_a_net_that_can_be_counted_by_hand():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    kept = bench.kept_bytes(lambda: net(torch.zeros(10, 8)).sum())
    assert kept == 4 * (10 * 8 + 10 * 16 + 1)  # the input, relu's output once, and the sum


def test_peak_bytes_counts_what_is_alive_at_once():
    def step():
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b * 2
        del b, c
        torch.zeros(500)

    assert bench.peak_bytes(step) == 2 * 4000


def test_traffic_that_can_be_counted_by_hand():
    a, b, c = (torch.zeros(*shape, device="meta") for shape in [(4, 5), (5, 6), (4, 6)])
    traffic = bench.Traffic()
    with traffic:
        product = a @ b  #                 reads 20 + 30, writes 24
        torch.mm(a, b, out=c)  #           the same
        c.add_(product)  #                 reads 24 + 24, writes 24
        c.copy_(product.t().t())  #        views are free; reads 24, writes 24
        (c + b[:1].expand(4, 6)).sum()  #  reads 24 + 6, writes 24; reads 24, writes 1
    flops = 2 * 4 * 5 * 6
    assert traffic.launches == [(4 * 74, flops), (4 * 74, flops), (4 * 72, 0), (4 * 48, 0), (4 * 54, 0), (4 * 25, 0)]


def test_what_is_compiled_counts_as_one_launch():
    def add(x, factor, grads):
        grads.add_(x * factor)
        return x.sum(dim=0)

    traffic = bench.Traffic()
    x, factor, grads = (torch.zeros(*shape, device="meta") for shape in [(4, 5), (5,), (4, 5)])
    with traffic:
        traffic.fused(add, x)(x, factor, grads)
    assert traffic.launches == [(4 * (20 + 5 + 20 + 20 + 5), 0)]  # reads all three, writes grads and the sum


def test_counts_of_the_default_net(call_main, tmp_path):
    """The plain net's are known: 19.1 GB, 110 GFLOP and about 800 launches. The efficient one's may not grow."""
    status, out, errors = call_main(bench, "--count", "--bandwidth", 500, "--device", "cpu", "--json", tmp_path / "counts.json")
    assert status == 0, errors
    assert "500 GB/s" in out
    report = json.loads((tmp_path / "counts.json").read_text())["counts"]
    plain, efficient = report["plain"], report["efficient"]
    assert plain["gigabytes"] == pytest.approx(19.1, rel=0.01)
    assert plain["launches"] == pytest.approx(804, rel=0.02)
    assert plain["gigaflops"] == pytest.approx(110.5, rel=0.01) == efficient["gigaflops"]
    assert plain["floor_ms"] > plain["gigabytes"] / 500 * 1e3
    assert efficient["gigabytes"] <= 0.75 * plain["gigabytes"]
    assert efficient["launches"] <= 1.25 * plain["launches"]


def test_the_figure_of_memory_and_time(call_main, tmp_path):
    flags = ["--growth-rate", 2, "--batch-size", 2, "--rounds", 1, "--device", "cpu"]
    status, _, errors = call_main(bench, *flags, "--scaling", tmp_path / "memory.png", "--json", tmp_path / "memory.json")
    assert status == 0, errors
    assert Image.open(tmp_path / "memory.png").size == (1500, 630)
    depths = json.loads((tmp_path / "memory.json").read_text())["scaling"]
    plain, checkpointed, ours = (
        [depths[str(depth)]["variants"][name]["peak_mb_per_image"] for depth in bench.DEPTHS] for name in bench.SCALED
    )
    assert plain[-1] / plain[1] > 4
    assert max(checkpointed[-1] / checkpointed[1], ours[-1] / ours[1]) < 3.5


def test_the_table_and_its_json(call_main, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # in all processes; to compile would take a minute
    variants = ["torchvision", "efficient", "plain, bf16", "plain, compile"]
    flags = ["--depth", 10, "--batch-size", 2, "--rounds", 2, "--device", "cpu", "--only", *variants]
    status, out, errors = call_main(bench, *flags, "--json", tmp_path / "bench.json")
    assert status == 0, errors
    lines = out.splitlines()
    assert "torch " + torch.__version__ in lines[0]
    assert [line.split("  ")[0] for line in lines[3:]] == variants
    assert lines[-1].split()[-3:-1] == ["-", "-"]  # what a compiled net keeps cannot be counted so
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {len(figures["images_per_second"]) for figures in report["variants"].values()} == {2}
    theirs, ours, *others = (report["variants"][name] for name in variants[:-1])
    assert 0 < ours["kept_mb_per_image"] < theirs["kept_mb_per_image"]
    assert all(figures["kept_mb_per_image"] < figures["peak_mb_per_image"] for figures in (theirs, ours, *others))
    assert all(0.1 < figures["process_gb"] < 10 for figures in report["variants"].values())


def test_a_process_that_ends_is_named():
    args = argparse.Namespace(depth=10, growth_rate=2, batch_size=2, image_size=8)
    with bench.Worker("plain", args, CPU) as worker:
        assert worker.ask("counted")["kept_mb_per_image"] > 0
        assert worker.ask("step") > 0
        worker.process.kill()
        worker.process.join()
        with pytest.raises(ValueError, match="the process of plain ended: if memory ran out, name fewer variants"):
            worker.ask("step")


def test_the_pipeline_against_the_usual_one(run_script, cifar):
    """In a process of its own: a DataLoader forks, which JAX, imported here by other tests, may not survive."""
    flags = ["--batch-size", 700, "--rounds", 2]  # 80 batches, more than an epoch has
    done = run_script("bench.py", "--data", cifar, "--device", "cpu", *flags)
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[3:]] == [
        "data.py",
        "DataLoader, 1 worker",
        "DataLoader, 2 workers",
    ]


def test_bad_depth(call_main):
    status, _, errors = call_main(bench, "--depth", 41)
    assert (status, "nearest are 40 and 46" in errors) == (2, True)
