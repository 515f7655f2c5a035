"""Counted bytes: by hand, of the paper's nets, and that those kept by --efficient grow linearly with the depth."""

import functools

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_attic import script

import flags
from attic import counting
from densenet import Bottleneck, DenseBlock, SingleLayer

DEPTHS = (10, 40, 70, 100)


def settings(*arguments):
    return flags.parse_args(script("count-bytes").build_parser(), [*map(str, arguments)])


@functools.cache
def kept(name):
    """MB/image kept for the backward pass at each of DEPTHS."""
    made = [counting.net_and_batch(counting.META, name, settings("--depth", depth, "--batch-size", 2)) for depth in DEPTHS]
    return [counting.kept_bytes(functools.partial(loss_of, *each)) / 2e6 for each in made]


def loss_of(net, images, labels):
    return F.cross_entropy(net(images), labels)


@pytest.mark.xdist_group("kept")
def test_plain_nets_keep_what_their_layers_save():
    """The known figures of the paper's BC nets with k=12, which count the parameters, too, over a batch of 8."""
    parameters = [sum(p.numel() for p in counting.net_of("plain", settings("--depth", d)).parameters()) for d in (40, 100)]
    counted = [kept("plain")[DEPTHS.index(d)] for d in (40, 100)]
    megabytes = [mb + 4 * number / 8e6 for mb, number in zip(counted, parameters, strict=True)]
    assert megabytes == pytest.approx([8.4, 35.2], rel=0.01)


@pytest.mark.xdist_group("kept")
def test_efficient_blocks_keep_little_and_grow_linearly_where_plain_ones_grow_quadratically():
    """What a layer saves grows with its number; from the exact polynomials follows what is kept at L=250."""
    plain, efficient = kept("plain"), kept("efficient")
    assert np.abs(np.diff(efficient, n=2)).max() < 1e-3
    assert np.diff(plain, n=2) == pytest.approx([4.07, 4.07], rel=0.01)
    assert efficient[-1] <= 0.22 * plain[-1]
    linear, quadratic = (np.polyfit(DEPTHS, values, degree) for values, degree in [(efficient, 1), (plain, 2)])
    assert np.polyval(quadratic, 250) == pytest.approx(172.5, rel=0.01)
    assert np.polyval(linear, 250) == pytest.approx(0.106 * 172.5, rel=0.01)


@pytest.mark.parametrize("layer", [Bottleneck, SingleLayer])
def test_a_step_in_16_bits_takes_little_more_than_half_the_memory_of_float32(layer):
    """Sums, which are taken of float32, take it of a part of the maps at a time."""
    peaks = []
    for dtype in (torch.float32, torch.bfloat16):
        block = DenseBlock(layer, 8, 24, 12, 0.0, efficient=True).to(counting.META, memory_format=torch.channels_last)
        images = torch.empty(8, 24, 32, 32, dtype=dtype, device=counting.META, requires_grad=True)
        peaks.append(counting.peak_bytes(lambda block=block, images=images: block(images).sum().backward()))
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.xdist_group("kept")
def test_checkpointed_blocks_keep_more_than_efficient_ones():
    _, forward = counting.step_on(counting.META, "torchvision-checkpointed", settings("--depth", 40, "--batch-size", 2))
    assert kept("efficient")[1] < counting.kept_bytes(forward) / 2e6 < kept("plain")[1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_kept_bytes_of_a_net_that_can_be_counted_by_hand(device):
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
    kept = counting.kept_bytes(lambda: net(torch.zeros(10, 8, device=device)).sum())
    assert kept == 4 * (10 * 8 + 10 * 16 + 1)  # the input, relu's output once, and the sum


@pytest.mark.parametrize(("layer", "values"), [(Bottleneck, 5 * 3), (SingleLayer, 3)])
def test_dropout_in_efficient_blocks_keeps_a_byte_for_each_value(layer, values):
    """Two layers, k=3, 128 pixels."""
    images = torch.zeros(2, 4, 8, 8).to(memory_format=torch.channels_last)
    blocks = [DenseBlock(layer, 2, 4, 3, drop_rate, efficient=True) for drop_rate in (0.0, 0.5)]
    without, dropped = (counting.kept_bytes(functools.partial(block, images)) for block in blocks)
    assert dropped - without == 2 * values * 128


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_bytes_counts_what_is_alive_at_once(device):
    def step():
        a = torch.zeros(1000, device=device)
        b = a + 1
        del a
        c = b * 2
        del b, c
        torch.zeros(500, device=device)

    assert counting.peak_bytes(step) == 2 * 4000


def test_traffic_that_can_be_counted_by_hand():
    a, b, c = (torch.zeros(*shape, device="meta") for shape in [(4, 5), (5, 6), (4, 6)])

    def step():
        product = a @ b  #                 reads 20 + 30, writes 24
        torch.mm(a, b, out=c)  #           the same
        c.add_(product)  #                 reads 24 + 24, writes 24
        c.copy_(product.t().t())  #        views are free; reads 24, writes 24
        (c + b[:1].expand(4, 6)).sum()  #  reads 24 + 6, writes 24; reads 24, writes 1

    flops = 2 * 4 * 5 * 6
    assert counting.traffic_of(step) == [(4 * 74, flops), (4 * 74, flops), (4 * 72, 0), (4 * 48, 0), (4 * 54, 0), (4 * 25, 0)]


# ------------------------------------------------------------------------------------------------------------ the program


def columns(out):
    """{net: the numbers of its row}."""
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    return {name: [*map(float, numbers)] for name, *numbers in rows[1:] if not name.startswith("-")}


def test_the_table_of_traffic(call_main):
    flags = ["--depth", 40, "--only", "plain", "efficient", "--traffic", "--bandwidth", 500]
    status, out, errors = call_main(script("count-bytes"), *flags)
    assert status == 0, errors
    assert "floor, ms at 500 GB/s or 20 TFLOP/s" in out
    (plain_gb, plain_launches, plain_gflop, floor), (gb, launches, gflop, _) = columns(out).values()
    assert (plain_gb, plain_launches) == pytest.approx((4.4, 339), rel=0.02)
    assert plain_gflop == gflop == pytest.approx(27.6, rel=0.01)
    assert floor > plain_gb / 500 * 1e3
    assert plain_gb < gb < 1.4 * plain_gb  # what is not kept is computed again
    assert launches < 2.7 * plain_launches


def test_a_cpu_goes_slice_by_slice_and_needs_less(call_main):
    """In deep nets: at L=40 the peak is outside the slices."""
    flags = ["--depth", 52, "--batch-size", 8, "--only", "efficient"]
    (kept, peak), (kept_on_cpu, peak_on_cpu) = (
        columns(call_main(script("count-bytes"), *flags, *more)[1])["efficient"] for more in ([], ["--on-cpu"])
    )
    assert kept == kept_on_cpu < peak_on_cpu < peak


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--depth", 11], "the nearest are 10 and 16"), (["--traffic", "--on-cpu"], "is what a GPU moves: leave out --on-cpu")],
)
def test_what_cannot_be_counted(call_main, flags, message):
    status, out, errors = call_main(script("count-bytes"), *flags)
    assert (status, out, errors.splitlines()[-1].endswith(message)) == (2, "", True)


def test_a_megabyte_is_a_million_bytes(call_main, monkeypatch):
    count = script("count-bytes")
    monkeypatch.setattr(count, "kept_bytes", lambda forward: 8_000_000)
    monkeypatch.setattr(count, "peak_bytes", lambda step: 16_400_000)
    out = call_main(count, "--depth", 10, "--batch-size", 4, "--only", "plain")[1]
    assert columns(out) == {"plain": [2.0, 4.1]}
