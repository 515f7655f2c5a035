"""The dense block of bottlenecks on a GPU, in Triton: what dense_block.py defines, in few passes over the maps.

Tensors have a row for each pixel. x and G of the derivation in dense_block.py are (P, S), S = 8 S8 the block's channels rounded
up, so that rows are aligned; columns after a layer's channels are loaded, which keeps loads wide, but never used. z, and db,
the gradient of bn2(z), are (P, K), K = 4k. Matrix products multiply in the dtype of x, see products(), and accumulate in
float32; batch norms and sums are float32. No atomics: each program writes a partial sum, and the next kernel adds these in a
fixed order, so that results are bitwise reproducible.

    forward     copy_maps             the block's input into x, and the statistics of each program's pixels
                first_convolution     z = conv1(relu(bn1(x))), and their statistics
                activation            b = relu(bn2(z))
                second_convolution    new maps = conv2(b), written after x, and their statistics
                join_statistics       after each kernel with statistics: mean and 1 / std
    backward    new_gradient          g = G - offset - (x - mean) rstd slope of the new maps
                second_backward       db through the ReLU after bn2; partial sums of the gradients of W2, beta2, gamma2
                first_backward        db through bn2; G += scale da; partial sums of the gradients of W1, beta1, gamma1
                join_sums             after each kernel with partial sums: their totals; offset and slope
    transition  pooled_activation     the mean of relu(bn(x)) over 2 x 2 pixels, before the 1x1 convolution; both are linear
                pooled_backward       initialises G with the transition's part; partial sums of the gradients of beta, gamma
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

ALIGNMENT = 8  # of a pixel's maps in memory: 16 bytes of 16-bit numbers

# ------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def channels_of(mean, rstd, gamma, beta, c, live):
    """Mean, scale = gamma rstd, and beta of channels c, each (1, channels); 0 where they are not live."""
    scale = tl.load(gamma + c, mask=live, other=0.0) * tl.load(rstd + c, mask=live, other=0.0)
    mean, beta = tl.load(mean + c, mask=live, other=0.0), tl.load(beta + c, mask=live, other=0.0)
    return mean[None, :], scale[None, :], beta[None, :]


@triton.jit
def activated(x, norm):
    """(x - mean, relu(scale (x - mean) + beta)) of a tile x (pixels, channels), in float32."""
    mean, scale, beta = norm
    centred = x.to(tl.float32) - mean
    return centred, relu(centred * scale + beta)


@triton.jit
def relu(x):
    """NaN stays NaN, as in PyTorch: a net that has diverged must not look healthy."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def through_relu(grad, a):
    """The gradient through a = relu(...): 0 where a is 0; where a is NaN it passes, as in PyTorch."""
    return tl.where(a <= 0, 0.0, grad)


@triton.jit
def operand(a, like, PRODUCTS: tl.constexpr):
    """A tile in the dtype of the matrix product; rounded to TF32 here, since the Tensor Cores would truncate it."""
    if PRODUCTS == "tf32" and like.dtype.element_ty == tl.float32:
        return tl.where(a == a, (a.to(tl.int32, bitcast=True) + 0x1000 & -0x2000).to(tl.float32, bitcast=True), a)
    return a.to(like.dtype.element_ty)


@triton.jit
def finite(a, rows, P, like):
    """The tile a; in float16 with zeros for pixels from P on, where a batch norm may give infinities."""
    return tl.where((rows < P)[:, None], a, 0.0) if like.dtype.element_ty == tl.float16 else a


@triton.jit
def store_statistics(part, tile, around, rows, P, columns, N):
    """Mean and sum of squared deviations of a tile's pixels before P, into this program's row of part (programs, 2, N).

    `around` has been subtracted from the tile, so that deviations keep their precision when the mean is large.
    """
    inside = (rows < P)[:, None]
    mean = tl.sum(tl.where(inside, tile, 0.0), 0) / tl.sum((rows < P).to(tl.float32), 0)
    deviations = tl.where(inside, tile - mean[None, :], 0.0)
    part += tl.program_id(0) * 2 * N + columns
    tl.store(part, around + mean, mask=columns < N)
    tl.store(part + N, tl.sum(deviations * deviations, 0), mask=columns < N)


@triton.jit(do_not_specialize=["width"])
def copy_maps(new, x, part, P, S8, width, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """x[:, :N] = new (P, N), and their statistics, N = width UNIT; grid (BM pixels, BN maps)."""
    N = width * UNIT
    rows, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (rows < P)[:, None] & (n < N)[None, :]
    tile = tl.load(new + rows[:, None] * N + n[None, :], mask=mask, other=0.0)
    tl.store(x + rows[:, None] * (8 * S8) + n[None, :], tile, mask=mask)
    around = tl.load(new + tl.program_id(0) * BM * N + n, mask=n < N, other=0.0).to(tl.float32)
    store_statistics(part, tile.to(tl.float32) - around[None, :], around, rows, P, n, N)


@triton.jit(do_not_specialize=["units"])
def first_convolution(x, mean, rstd, gamma, beta, w1, z, mean2, rstd2, gamma2, beta2, part, P, S8, units, UNIT: tl.constexpr,
                      K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, PRODUCTS: tl.constexpr,
                      TRAINING: tl.constexpr):  # fmt: skip
    """z (P, K) = relu(bn1(x[:, :C])) w1^T, w1 (K, C), C = units UNIT; one program for each BM pixels.

    If not TRAINING, z is already relu(bn2(z)), since bn2's statistics are known.
    """
    C = units * UNIT
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, KP)
    z_tile = tl.zeros((BM, KP), tl.float32)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        wide = (rows < P)[:, None] & (c < tl.cdiv(C, 8) * 8)[None, :]
        x_tile = tl.load(x + rows[:, None] * (8 * S8) + c[None, :], mask=wide, other=0.0)
        _, a = activated(x_tile, channels_of(mean, rstd, gamma, beta, c, c < C))
        a = tl.where((c < C)[None, :], a, 0.0)  # columns from C on may be NaN
        w = tl.load(w1 + k[None, :] * C + c[:, None], mask=(k < K)[None, :] & (c < C)[:, None], other=0.0)
        z_tile = tl.dot(operand(a, z, PRODUCTS), w, z_tile, input_precision=PRODUCTS)
    if not TRAINING:
        _, z_tile = activated(z_tile, channels_of(mean2, rstd2, gamma2, beta2, k, k < K))
        z_tile = operand(z_tile, z, PRODUCTS)
    z_tile = z_tile.to(z.dtype.element_ty)
    tl.store(z + rows[:, None] * K + k[None, :], z_tile, mask=(rows < P)[:, None] & (k < K)[None, :])
    if TRAINING:
        store_statistics(part, z_tile.to(tl.float32), 0.0, rows, P, k, K)


@triton.jit
def activation(z, mean, rstd, gamma, beta, b, P, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr,
               PRODUCTS: tl.constexpr):  # fmt: skip
    """b (P, K) = relu(bn2(z))."""
    rows, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, KP)
    at, mask = rows[:, None] * K + k[None, :], (rows < P)[:, None] & (k < K)[None, :]
    z_tile = tl.load(z + at, mask=mask, other=0.0)
    _, tile = activated(z_tile, channels_of(mean, rstd, gamma, beta, k, k < K))
    tl.store(b + at, operand(tile, b, PRODUCTS), mask=mask)


@triton.jit(do_not_specialize=["units"])
def second_convolution(b, w2, x, part, P, S8, units, H: tl.constexpr, W: tl.constexpr, UNIT: tl.constexpr, K: tl.constexpr,
                       N: tl.constexpr, NP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRODUCTS: tl.constexpr,
                       TRAINING: tl.constexpr):  # fmt: skip
    """x[:, C : C + N] = conv3x3(b, w2), w2 (N, 3, 3, K), C = units UNIT; one program for each BM pixels."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    top, left = rows // W % H, rows % W
    n = tl.arange(0, NP)
    chunks: tl.constexpr = (K + BK - 1) // BK
    maps = tl.zeros((BM, NP), tl.float32)
    for i in range(9 * chunks):
        tap, k = i // chunks, i % chunks * BK + tl.arange(0, BK)
        dy, dx = tap // 3 - 1, tap % 3 - 1
        inside = (rows < P) & (top + dy >= 0) & (top + dy < H) & (left + dx >= 0) & (left + dx < W)
        b_tile = tl.load(b + (rows + dy * W + dx)[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(w2 + n[None, :] * (9 * K) + (tap * K + k)[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
        maps = tl.dot(b_tile, w, maps, input_precision=PRODUCTS)
    maps = maps.to(x.dtype.element_ty)
    tl.store(x + rows[:, None] * (8 * S8) + (units * UNIT + n)[None, :], maps, mask=(rows < P)[:, None] & (n < N)[None, :])
    if TRAINING:
        store_statistics(part, maps.to(tl.float32), 0.0, rows, P, n, N)


@triton.jit(do_not_specialize=["programs", "first"])
def join_statistics(part, mean, rstd, var, programs, pixels, P, first, eps, N, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr):  # fmt: skip
    """Mean, 1 / std and unbiased variance from part (programs, 2, N), of `pixels` pixels each, written from column `first` on.

    Deviations are taken from the first program's mean, so that large means do not cancel.
    """
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    around = tl.load(part + n, mask=n < N, other=0.0)
    total, squares = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for row in range(0, programs, ROWS):
        i = row + tl.arange(0, ROWS)
        count = tl.minimum(pixels, P - i * pixels).to(tl.float32)[:, None]
        mask = (i < programs)[:, None] & (n < N)[None, :]
        means = tl.load(part + i[:, None] * (2 * N) + n[None, :], mask=mask, other=0.0)
        difference = tl.where(mask, means - around[None, :], 0.0)
        total += tl.sum(difference * count, 0)
        inner = tl.load(part + i[:, None] * (2 * N) + N + n[None, :], mask=mask, other=0.0)
        squares += tl.sum(inner + difference * difference * count, 0)
    squares -= total * total / P
    tl.store(mean + first + n, around + total / P, mask=n < N)
    tl.store(rstd + first + n, 1.0 / tl.sqrt_rn(squares / P + eps), mask=n < N)
    tl.store(var + first + n, squares / (P - 1), mask=n < N)


# ------------------------------------------------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=["units", "width"])
def new_gradient(G, x, mean, rstd, corrections, g, P, S8, units, width, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 PRODUCTS: tl.constexpr):  # fmt: skip
    """g (P, N) = G - offset - (x - mean) rstd slope of N = width UNIT maps from C = units UNIT on.

    corrections (2, S): offset and slope. Grid (BM pixels, BN maps).
    """
    N = width * UNIT
    rows, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (rows < P)[:, None] & (n < N)[None, :]
    c = units * UNIT + n
    at = rows[:, None] * (8 * S8) + c[None, :]
    offset = tl.load(corrections + c, mask=n < N, other=0.0)
    scale = tl.load(corrections + 8 * S8 + c, mask=n < N, other=0.0) * tl.load(rstd + c, mask=n < N, other=0.0)
    centred = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - tl.load(mean + c, mask=n < N, other=0.0)[None, :]
    out = tl.load(G + at, mask=mask, other=0.0).to(tl.float32) - offset[None, :] - centred * scale[None, :]
    tl.store(g + rows[:, None] * N + n[None, :], operand(out + dither(out, rows, n, g), g, PRODUCTS), mask=mask)


@triton.jit
def dither(x, rows, n, like):
    """Deterministic dither, even over pixels, within half an ulp of x (float32) in the 16-bit dtype of `like`; 0 for float32.

    G is rounded to that dtype: subtracting an offset and rounding again would move all values of one magnitude the same way.
    """
    if like.dtype.element_ty == tl.float32:
        return tl.zeros_like(x)
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    ulp = power * 2.0**-7 if like.dtype.element_ty == tl.bfloat16 else tl.maximum(power * 2.0**-10, 2.0**-24)
    multiples = rows[:, None] * -1640531535 + n[None, :] * -1847521882  # golden ratio, and plastic to the -2, in 2^-32
    return ((multiples >> 16 & 0xFFFF).to(tl.float32) * 2.0**-16 - 0.5) * ulp


@triton.jit(do_not_specialize=["turns"])
def second_backward(g, z, mean, rstd, gamma, beta, w2, db, part, P, turns, H: tl.constexpr, W: tl.constexpr,
                    K: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, BM: tl.constexpr,
                    PRODUCTS: tl.constexpr):  # fmt: skip
    """db (P, K) = the gradient of bn2(z) where its ReLU is open; this program's partial sums of the gradients.

    Grid (groups of `turns` times BM pixels, chunks of BK channels). All taps are one matrix product, see nine_gradients. part
    (groups, 9 N K + 2 K): of W2 (N, 3, 3, K), beta2, gamma2.
    """
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    j = tl.arange(0, TAPS)
    at_w = (j % N * 9 + j // N)[:, None] * K + k[None, :]
    mask_w = (j < 9 * N)[:, None] & (k < K)[None, :]
    w = tl.load(w2 + at_w, mask=mask_w, other=0.0)
    grad_w = tl.zeros((TAPS, BK), tl.float32)
    grad_beta, sum_db_centred = tl.zeros((BM, BK), tl.float32), tl.zeros((BM, BK), tl.float32)  # summed over pixels at the end
    for turn in range(turns):
        rows = (tl.program_id(0) * turns + turn) * BM + tl.arange(0, BM)
        g9 = nine_gradients(g, rows, P, j, H, W, N)
        mask = (rows < P)[:, None] & (k < K)[None, :]
        z_tile = tl.load(z + rows[:, None] * K + k[None, :], mask=mask, other=0.0)
        centred, b = activated(z_tile, channels_of(mean, rstd, gamma, beta, k, k < K))
        grad_w = tl.dot(tl.trans(g9), operand(finite(b, rows, P, db), db, PRODUCTS), grad_w, input_precision=PRODUCTS)
        db_tile = tl.dot(g9, w, input_precision=PRODUCTS)
        db_tile = through_relu(db_tile, b).to(db.dtype.element_ty)
        tl.store(db + rows[:, None] * K + k[None, :], db_tile, mask=mask)
        grad_beta += db_tile.to(tl.float32)
        sum_db_centred += db_tile.to(tl.float32) * centred
    part += tl.program_id(0).to(tl.int64) * (9 * N * K + 2 * K)
    tl.store(part + at_w, grad_w, mask=mask_w)
    store_sums(part + 9 * N * K, grad_beta, sum_db_centred, rstd, k, K)


@triton.jit
def nine_gradients(g, rows, P, j, H: tl.constexpr, W: tl.constexpr, N: tl.constexpr):
    """im2col of g (P, N): for each pixel of z, the gradients of the nine pixels that read it, in columns j = tap N + n."""
    tap, n = j // N, j % N
    dy, dx = tap // 3 - 1, tap % 3 - 1
    y, x = (rows // W % H)[:, None] - dy[None, :], (rows % W)[:, None] - dx[None, :]
    inside = (rows < P)[:, None] & (j < 9 * N)[None, :] & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    return tl.load(g + (rows[:, None] - (dy * W + dx)[None, :]) * N + n[None, :], mask=inside, other=0.0)


@triton.jit
def store_sums(part, grad_beta, sum_da_centred, rstd, c, C):
    """Sums tiles over pixels and stores the gradients of beta and gamma in part (2, C)."""
    tl.store(part + c, tl.sum(grad_beta, 0), mask=c < C)
    tl.store(part + C + c, tl.sum(sum_da_centred, 0) * tl.load(rstd + c, mask=c < C, other=0.0), mask=c < C)


@triton.jit(do_not_specialize=["units", "turns"])
def first_backward(db, z, mean2, rstd2, gamma2, sums2, x, mean, rstd, gamma, beta, w1, G, part, P, S8, units, turns,
                   UNIT: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
                   PRODUCTS: tl.constexpr):  # fmt: skip
    """G[:, :C] += scale da, C = units UNIT; this program's partial sums of the gradients. Columns from C on may hold anything.

    Grid (groups of `turns` times BM pixels, chunks of BC channels). part (groups, (K + 2) C): of W1 (K, C), beta1, gamma1.
    """
    C = units * UNIT
    k, c = tl.arange(0, KP), tl.program_id(1) * BC + tl.arange(0, BC)
    mask_w = (k < K)[:, None] & (c < C)[None, :]
    w = tl.load(w1 + k[:, None] * C + c[None, :], mask=mask_w, other=0.0)
    norm2 = norm_coefficients(mean2, rstd2, gamma2, sums2, P, k, K)
    grad_w = tl.zeros((KP, BC), tl.float32)
    grad_beta, sum_da_centred = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)  # summed over pixels at the end
    rows, end = tl.program_id(0) * turns * BM + tl.arange(0, BM), tl.minimum((tl.program_id(0) + 1) * turns * BM, P)
    ahead = load_tiles(db, z, x, G, rows, rows < end, k, c, S8, C, K)  # prefetched one turn ahead
    for _ in tl.range(turns, disable_licm=True):  # hoisting loop invariants takes too many registers
        db_tile, z_tile, x_tile, old = ahead
        ahead = load_tiles(db, z, x, G, rows + BM, rows + BM < end, k, c, S8, C, K)
        norm = channels_of(mean, rstd, gamma, beta, c, c < C)  # loaded again in each turn, to save registers
        centred, a = activated(x_tile, norm)
        grad_z = operand(through_batch_norm(db_tile, z_tile, norm2, rows < P), db, PRODUCTS)
        grad_w, da = through_convolution(grad_z, a, w, grad_w, rows, P, db, PRODUCTS)
        grad_beta, sum_da_centred = grad_beta + da, sum_da_centred + da * centred
        new = (old.to(tl.float32) + norm[1] * da).to(G.dtype.element_ty)  # unchanged from C on
        tl.store(G + rows[:, None] * (8 * S8) + c[None, :], new, mask=(rows < P)[:, None] & (c < tl.cdiv(C, 8) * 8)[None, :])
        rows += BM
    part += tl.program_id(0).to(tl.int64) * ((K + 2) * C)
    tl.store(part + k[:, None] * C + c[None, :], grad_w, mask=mask_w)
    store_sums(part + K * C, grad_beta, sum_da_centred, rstd, c, C)


@triton.jit
def through_convolution(grad_z, a, w, grad_w, rows, P, like, PRODUCTS: tl.constexpr):
    """(grad_w plus these pixels' contribution, da): gradients of a 1x1 convolution of a; da passes where the ReLU is open."""
    a_tile = operand(finite(a, rows, P, like), like, PRODUCTS)
    grad_w = tl.dot(tl.trans(grad_z), a_tile, grad_w, input_precision=PRODUCTS)
    return grad_w, through_relu(tl.dot(grad_z, w, input_precision=PRODUCTS), a)


@triton.jit
def load_tiles(db, z, x, G, rows, inside, k, c, S8, C, K: tl.constexpr):
    """Tiles of db and z (pixels, K), x and G (pixels, C); the latter two in whole groups of 8 channels."""
    mask, at = inside[:, None] & (k < K)[None, :], rows[:, None] * K + k[None, :]
    wide, at_x = inside[:, None] & (c < tl.cdiv(C, 8) * 8)[None, :], rows[:, None] * (8 * S8) + c[None, :]
    return (tl.load(db + at, mask=mask, other=0.0), tl.load(z + at, mask=mask, other=0.0),
            tl.load(x + at_x, mask=wide, other=0.0), tl.load(G + at_x, mask=wide, other=0.0))  # fmt: skip


@triton.jit
def norm_coefficients(mean, rstd, gamma, sums, P, k, K: tl.constexpr):
    """What through_batch_norm needs for channels k: mean, scale, scale dbeta / P, scale rstd dgamma / P, each (1, channels).

    sums (2, K): dbeta and dgamma, the gradients of beta and gamma.
    """
    rstd = tl.load(rstd + k, mask=k < K, other=0.0)
    mean, scale = tl.load(mean + k, mask=k < K, other=0.0), tl.load(gamma + k, mask=k < K, other=0.0) * rstd
    offset = tl.load(sums + k, mask=k < K, other=0.0) * (scale / P)
    slope = tl.load(sums + K + k, mask=k < K, other=0.0) * (rstd * scale / P)
    return mean[None, :], scale[None, :], offset[None, :], slope[None, :]


@triton.jit
def through_batch_norm(db, z, norm, inside):
    """The gradient of z (pixels, K), float32, from that of its batch norm's output; 0 outside and in channels from K on."""
    mean, scale, offset, slope = norm
    return tl.where(inside[:, None], db.to(tl.float32) * scale - ((z.to(tl.float32) - mean) * slope + offset), 0.0)


@triton.jit(do_not_specialize=["groups", "width", "weights"])
def join_sums(part, sums, gamma, rstd, corrections, groups, width, weights, P, S8, CORRECT: tl.constexpr, ROWS: tl.constexpr,
              COLUMNS: tl.constexpr):  # fmt: skip
    """sums (width,) = the sum of the rows of part (groups, width). With CORRECT, columns after the weights are the gradients of
    beta1 (C,) and gamma1 (C,), and scale / P times these is added to corrections (2, S), offset and slope.
    """
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for row in range(0, groups, ROWS):
        i = row + tl.arange(0, ROWS)
        mask = (i < groups)[:, None] & (j < width)[None, :]
        total += tl.sum(tl.load(part + i[:, None].to(tl.int64) * width + j[None, :], mask=mask, other=0.0), 0)
    tl.store(sums + j, total, mask=j < width)
    if CORRECT:
        live = (j >= weights) & (j < width)
        C = (width - weights) // 2
        c = (j - weights) % C
        scale = tl.load(gamma + c, mask=live, other=0.0) * tl.load(rstd + c, mask=live, other=0.0)
        at = corrections + (j - weights) // C * (8 * S8) + c
        tl.store(at, tl.load(at, mask=live, other=0.0) + scale * total / P, mask=live)


# ---------------------------------------------------------------------------------------------------------- transition


@triton.jit(do_not_specialize=["C", "H", "W"])
def pooled_activation(x, mean, rstd, gamma, beta, a, Q, C, S8, H, W, BM: tl.constexpr, BC: tl.constexpr,
                      PRODUCTS: tl.constexpr):  # fmt: skip
    """a (Q, S) = averages over 2 x 2 pixels of relu(bn(x[:, :C])); grid (BM of these, chunks of BC channels)."""
    rows, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    norm = channels_of(mean, rstd, gamma, beta, c, c < C)
    wide = (rows < Q)[:, None] & (c < 8 * S8)[None, :]
    average = tl.zeros((BM, BC), tl.float32)
    for i in tl.static_range(4):
        x_tile = tl.load(x + four_pixels(rows, i, H, W)[:, None] * (8 * S8) + c[None, :], mask=wide, other=0.0)
        _, tile = activated(x_tile, norm)
        average += 0.25 * tile
    tl.store(a + rows[:, None] * (8 * S8) + c[None, :], operand(average, a, PRODUCTS), mask=wide)


@triton.jit
def four_pixels(rows, i, H, W):
    """The i-th of the four pixels that each pooled pixel averages; an odd last row or column is left out."""
    y, x = rows // (W // 2) % (H // 2), rows % (W // 2)
    return rows // (W // 2 * (H // 2)) * (H * W) + (2 * y + i // 2) * W + 2 * x + i % 2


@triton.jit(do_not_specialize=["C", "H", "W", "turns"])
def pooled_backward(da, x, mean, rstd, gamma, beta, G, a, part, Q, C, S8, H, W, turns, BM: tl.constexpr, BC: tl.constexpr,
                    PRODUCTS: tl.constexpr):  # fmt: skip
    """G[:, :C] = scale da / 4 where the ReLU is open; a as in pooled_activation; this program's partial sums of the gradients.

    Grid (groups of `turns` times BM pixels of da (Q, S), chunks of BC channels). part (groups, 2 C): of beta, gamma.
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    norm = channels_of(mean, rstd, gamma, beta, c, c < C)
    grad_beta, sum_da_centred = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)  # summed over pixels at the end
    for turn in range(turns):
        rows = (tl.program_id(0) * turns + turn) * BM + tl.arange(0, BM)
        wide, at = (rows < Q)[:, None] & (c < 8 * S8)[None, :], rows[:, None] * (8 * S8) + c[None, :]
        da_tile = 0.25 * tl.load(da + at, mask=wide, other=0.0).to(tl.float32)
        average = tl.zeros((BM, BC), tl.float32)
        for i in tl.static_range(4):
            at_x = four_pixels(rows, i, H, W)[:, None] * (8 * S8) + c[None, :]
            centred, tile = activated(tl.load(x + at_x, mask=wide, other=0.0), norm)
            average += 0.25 * tile
            each = through_relu(da_tile, tile)
            grad_beta += each
            sum_da_centred += each * centred
            tl.store(G + at_x, (norm[1] * each).to(G.dtype.element_ty), mask=wide)
        tl.store(a + at, operand(average, a, PRODUCTS), mask=wide)
    store_sums(part + tl.program_id(0) * (2 * C), grad_beta, sum_da_centred, rstd, c, C)


# ------------------------------------------------------------------------------------------------------ the block's passes


def computes(x, layers):
    """Whether the kernels can compute the layers, all of them Bottlenecks, for the input x (N, C, H, W)."""
    growth_rate = layers[0].conv2.out_channels
    norms = {bn.weight.dtype for layer in layers for bn in (layer.bn1, layer.bn2)}
    types = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and norms == {torch.float32}
    widths = {(layer.conv1.out_channels, layer.conv2.out_channels) for layer in layers} == {(4 * growth_rate, growth_rate)}
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    channels = layers[-1].bn1.num_features + growth_rate  # of the block's output
    offsets = pixels * max(8 * cdiv(channels, 8), 4 * growth_rate) < 2**31  # kernels index with 32 bits
    fits = types and widths and offsets and all(map(without_dropout, layers))
    return fits and growth_rate <= (14 if exact(x) else 56)  # beyond, registers spill


def computes_transition(x, transition):
    """Whether the kernels can compute the transition after layers that they compute for the input x."""
    types = transition.bn1.weight.dtype == transition.conv1.weight.dtype == torch.float32
    rounded = exact(x) and torch.backends.cuda.matmul.fp32_precision == "tf32"  # the transition's product, by cuBLAS
    return types and without_dropout(transition) and min(x.shape[2:]) >= 2 and not rounded


def exact(x):
    """Whether matrix products are float32, not rounded to TF32."""
    return x.dtype == torch.float32 and products(x) == "tf32x3"


def without_dropout(module):
    """Whether a layer or transition drops nothing, as in evaluation mode."""
    return not module.training or module.dropout.p == 0


# For each kernel: pixels and channels of a tile, warps, pipeline stages and, in a backward kernel, turns (tiles of pixels that
# a program processes in sequence). Columns: 2^16 pixels or more, 2^14 or more, fewer, each the fastest of several dozen without
# register spills, on an H200 at L=100 with 48 channels in z; the last, for wider z or another GPU, was not timed.
TILES = {
    "bits16": {
        "first_convolution": ((256, 32, 4, 3), (64, 64, 4, 3), (32, 64, 4, 3), (32, 32, 4, 2)),
        "second_convolution": ((128, 64, 4, 3), (64, 64, 4, 3), (32, 64, 4, 3), (64, 16, 4, 3)),
        "second_backward": ((64, 32, 4, 1, 8), (64, 32, 4, 1, 2), (64, 32, 4, 1, 1), (16, 16, 8, 1, 8)),
        "first_backward": ((32, 64, 4, 1, 16), (32, 64, 4, 1, 8), (32, 64, 4, 1, 2), (16, 32, 8, 1, 8)),
    },
    "tf32": {
        "first_convolution": ((128, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3), (32, 32, 4, 2)),
        "second_convolution": ((128, 16, 4, 3), (64, 64, 4, 3), (32, 64, 4, 3), (64, 16, 4, 3)),
        "second_backward": ((32, 64, 4, 1, 8), (32, 64, 4, 1, 2), (32, 64, 4, 1, 1), (16, 16, 8, 1, 8)),
        "first_backward": ((16, 64, 4, 1, 32), (16, 64, 4, 1, 16), (16, 64, 4, 1, 4), (16, 32, 8, 1, 8)),
    },
}
TILES["ieee"] = TILES["tf32"]  # in the interpreter
TILES["tf32x3"] = {  # not timed
    "first_convolution": ((128, 32, 4, 3), (64, 32, 4, 3), (32, 32, 4, 2), (32, 32, 4, 2)),
    "second_convolution": TILES["tf32"]["second_convolution"],
    "second_backward": ((16, 16, 8, 1, 8),) * 4,
    "first_backward": ((16, 32, 4, 1, 32), (16, 32, 4, 1, 16), (16, 32, 4, 1, 4), (16, 32, 8, 1, 8)),
}


class Sizes(NamedTuple):
    """The sizes of a block. Tiles depend on shapes, dtype and GPU alone, so that runs are bitwise reproducible."""

    P: int  # pixels
    S8: int  # stride from one pixel to the next, in units of 8
    H: int
    W: int
    N: int  # new maps of a layer
    K: int  # channels of z
    UNIT: int  # divides all channel counts, so that the compiler knows what is aligned

    @classmethod
    def of(cls, maps, layers):
        n, h, w, _ = maps.shape
        growth_rate = layers[0].conv2.out_channels
        unit = math.gcd(layers[0].bn1.num_features, growth_rate, 16)
        return cls(n * h * w, maps.stride(2) // 8, h, w, growth_rate, 4 * growth_rate, unit)

    def tile(self, kernel, maps):
        """The kernel's entry in TILES."""
        kind = "bits16" if maps.element_size() == 2 else products(maps)
        many, some, few, untimed = TILES[kind][kernel]
        if self.K > 48 or not hopper(maps):
            return untimed
        return many if self.P >= 2**16 else some if self.P >= 2**14 else few


def hopper(maps):
    """Whether tiles were timed for this kind of GPU; others need more registers for them, or have less memory."""
    return maps.device.type != "cuda" or torch.cuda.get_device_capability(maps.device)[0] == 9


def products(maps):
    """How float32 is multiplied: in TF32, if PyTorch's convolutions may, or as three TF32 products, as precise as float32."""
    if maps.device.type != "cuda":
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "tf32x3"


def cdiv(n, each):
    """n / each, rounded up. triton.cdiv takes 100 times as long on the host, and there are hundreds of launches."""
    return -(-n // each)


def padded(n):
    """The width of a tile for n columns: a power of 2, and 16 at least for a matrix product."""
    return max(16, 1 << (n - 1).bit_length())


def cast(convolutions, maps):
    """The weights in the type of the maps, input channels innermost; rounded to TF32 as in operand(), except for ties."""
    weights = [conv.weight.detach().contiguous(memory_format=torch.channels_last) for conv in convolutions]
    if maps.dtype == torch.float32:
        if products(maps) != "tf32":
            return weights
        wide = torch._foreach_mul(weights, 8193.0)  # 2^13 + 1, Veltkamp's splitting: rounds off the last 13 bits
        return torch._foreach_sub(wide, torch._foreach_sub(wide, weights))
    out = [torch.empty_like(weight, dtype=maps.dtype) for weight in weights]
    torch._foreach_copy_(out, weights)  # in one launch
    return out


def write_maps(maps, mean, rstd, var, new, eps):
    """Writes the block's input (N, H, W, C) to the front of maps, and its statistics to the front of mean, rstd and var."""
    P, N = new[..., 0].numel(), new.shape[-1]
    UNIT, pixels, channels = math.gcd(N, 4), 256, 32
    part = maps.new_empty(cdiv(P, pixels), 2, N, dtype=torch.float32)
    grid = len(part), cdiv(N, channels)
    copy_maps[grid](new.contiguous(), maps, part, P, maps.stride(2) // 8, N // UNIT, UNIT, pixels, channels)
    join(part, (mean, rstd, var), P, pixels, 0, eps)


def forward(maps, mean, rstd, var, layers, weights):
    """Writes all new maps after the block's input in maps (N, H, W, C), and their statistics; updates those of the bn2.

    weights are (W1, W2) of each layer, as cast() makes them. Returns for each layer what its backward pass needs: z
    (N, H, W, K), its mean and 1 / std (K,).
    """
    size = Sizes.of(maps, layers)
    statistics = maps.new_empty(3, len(layers), size.K, dtype=torch.float32)
    b, kept = maps.new_empty(*maps.shape[:3], size.K), []
    for layer, (w1, w2), *statistics2 in zip(layers, weights, *statistics, strict=True):
        z = torch.empty_like(b)
        forward_layer(maps, (mean, rstd, var), z, b, statistics2, layer, w1, w2, size)
        kept.append((z, *statistics2[:2]))
    for name, values in [("running_mean", statistics[0]), ("running_var", statistics[2])]:
        running = [getattr(layer.bn2, name) for layer in layers]
        torch._foreach_lerp_(running, list(values), [float(layer.bn2.momentum) for layer in layers])
    return kept


def forward_layer(maps, statistics, z, b, statistics2, layer, w1, w2, size):
    """Fills z, b and the layer's new maps; statistics of z and of the maps are mean, 1 / std, unbiased variance."""
    P, K, bn2 = size.P, size.K, layer.bn2
    convolve_first(maps, *statistics[:2], layer, w1, z, statistics2, size, training=True)
    grid, warps = (cdiv(P, 32),), max(1, padded(K) // 32)
    activation[grid](z, *statistics2[:2], bn2.weight, bn2.bias, b, P, K, padded(K), 32, products(maps), num_warps=warps)
    convolve_second(maps, statistics, layer, w2, b, size, training=True)


def convolve_first(maps, mean, rstd, layer, w1, z, statistics2, size, training):
    """Fills z and its statistics; or, if not training, makes z relu(bn2(z)), by the statistics that are given."""
    bn1, bn2, K = layer.bn1, layer.bn2, size.K
    pixels, channels, warps, stages = size.tile("first_convolution", maps)
    part = maps.new_empty(cdiv(size.P, pixels), 2, K, dtype=torch.float32)
    first_convolution[(len(part),)](
        maps, mean, rstd, bn1.weight, bn1.bias, w1, z, *statistics2[:2], bn2.weight, bn2.bias, part, size.P, size.S8,
        bn1.num_features // size.UNIT, size.UNIT, K, padded(K), pixels, channels, products(maps), training,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if training:
        join(part, statistics2, size.P, pixels, 0, bn2.eps)


def convolve_second(maps, statistics, layer, w2, b, size, training):
    """Fills the layer's new maps and, if training, their statistics."""
    P, S8, H, W, N, K, UNIT = size
    bn1 = layer.bn1
    pixels, channels, warps, stages = size.tile("second_convolution", maps)
    part = maps.new_empty(cdiv(P, pixels), 2, N, dtype=torch.float32)
    second_convolution[(len(part),)](
        b, w2, maps, part, P, S8, bn1.num_features // UNIT, H, W, UNIT, K, N, padded(N), pixels, channels, products(maps),
        training, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if training:
        join(part, statistics, P, pixels, bn1.num_features, bn1.eps)


def join(part, statistics, P, pixels, first, eps):
    """Writes mean, 1 / std and variance of P pixels, from column `first` on; part (programs, 2, N), of `pixels` pixels each."""
    programs, _, N = part.shape
    rows, columns = (4, 64) if part.is_cpu else (256, 4)  # the interpreter takes long for each program
    grid = (cdiv(N, columns),)
    join_statistics[grid](part, *statistics, programs, pixels, P, first, eps, N, rows, columns)


def infer(maps, layers, weights):
    """Like forward, but with the running statistics, as in evaluation mode; stores nothing for a backward pass."""
    size = Sizes.of(maps, layers)
    b = maps.new_empty(*maps.shape[:3], size.K)
    rstds = [running_rstd([getattr(layer, name) for layer in layers]) for name in ("bn1", "bn2")]
    for layer, (w1, w2), rstd1, rstd2 in zip(layers, weights, *rstds, strict=True):
        statistics2 = layer.bn2.running_mean, rstd2
        convolve_first(maps, layer.bn1.running_mean, rstd1, layer, w1, b, statistics2, size, training=False)
        convolve_second(maps, None, layer, w2, b, size, training=False)


def running_rstd(norms):
    """1 / std of each batch norm's running statistics."""
    return torch._foreach_rsqrt(torch._foreach_add([bn.running_var for bn in norms], [bn.eps for bn in norms]))


def backward(grads, maps, mean, rstd, corrections, layers, weights, kept):
    """Updates G (N, H, W, C) and corrections (2, S), offset and slope, in place, layer by layer, to those of the block's input.

    Returns the gradients of all layers' parameters: gamma1, beta1, W1, gamma2, beta2, W2 of each.
    """
    size = Sizes.of(maps, layers)
    db = torch.empty_like(kept[0][0])
    parameter_grads = []
    for layer, (w1, w2), tensors in reversed([*zip(layers, weights, kept, strict=True)]):
        c = layer.bn1.num_features
        g = through_statistics(grads, maps, mean, rstd, corrections, slice(c, c + size.N))
        grads2 = backward_second(g, layer, w2, tensors, db, size)
        grads1 = backward_first(grads, maps, mean, rstd, corrections, layer, w1, tensors, db, grads2, size)
        parameter_grads = [*split_grads(grads1, layer.conv1), *split_grads(grads2, layer.conv2), *parameter_grads]
    return parameter_grads


def through_statistics(grads, maps, mean, rstd, corrections, channels):
    """As in dense_block.py: the gradient (N, H, W, channels) of these maps, a slice, from G."""
    P, first, N = maps[..., 0].numel(), channels.start, channels.stop - channels.start
    g = maps.new_empty(*maps.shape[:3], N)
    UNIT, grid = math.gcd(first, N, 4), (cdiv(P, 64), cdiv(N, 16))
    new_gradient[grid](
        grads, maps, mean, rstd, corrections, g, P, maps.stride(2) // 8, first // UNIT, N // UNIT, UNIT, 64, 16, products(maps)
    )  # fmt: skip
    return g


def backward_second(g, layer, w2, tensors, db, size):
    """Fills db; returns the gradients of W2, beta2, gamma2, one after the other. g: the gradient of the new maps."""
    P, S8, H, W, N, K, _ = size
    bn = layer.bn2
    z, *statistics = tensors
    pixels, channels, warps, stages, turns = size.tile("second_backward", g)
    part = g.new_empty(cdiv(P, pixels * turns), 9 * N * K + 2 * K, dtype=torch.float32)
    second_backward[(len(part), cdiv(K, channels))](
        g, z, *statistics, bn.weight, bn.bias, w2, db, part, P, turns, H, W, K, channels, N, padded(9 * N), pixels, products(g),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return added_up(part, 0, bn, *statistics, P, S8, CORRECT=False)  # the statistics are unused


def backward_first(grads, maps, mean, rstd, corrections, layer, w1, tensors, db, grads2, size):
    """Adds the layer's part to G and the corrections; returns the gradients of W1, beta1, gamma1, one after the other."""
    P, S8, _, _, _, K, UNIT = size
    bn1, bn2, C = layer.bn1, layer.bn2, layer.bn1.num_features
    z, *statistics = tensors
    pixels, channels, warps, stages, turns = size.tile("first_backward", maps)
    part = maps.new_empty(cdiv(P, pixels * turns), (K + 2) * C, dtype=torch.float32)
    first_backward[(len(part), cdiv(C, channels))](
        db, z, *statistics, bn2.weight, grads2[-2 * K :], maps, mean, rstd, bn1.weight, bn1.bias, w1, grads, part, P, S8,
        C // UNIT, turns, UNIT, K, padded(K), pixels, channels, products(maps), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return added_up(part, K * C, bn1, rstd, corrections, P, S8, CORRECT=True)


def added_up(part, weights, bn, rstd, corrections, P, S8, CORRECT):
    """The sum (width,) of the rows of part (groups, width); with CORRECT, the corrections are updated, see join_sums."""
    groups, width = part.shape
    sums = part.new_empty(width)
    rows, columns = (4, 2048) if part.is_cpu else (128, 16)  # the interpreter takes long for each program
    grid = (cdiv(width, columns),)
    join_sums[grid](part, sums, bn.weight, rstd, corrections, groups, width, weights, P, S8, CORRECT, rows, columns)
    return sums


def split_grads(sums, conv):
    """The gradients of gamma, beta, W from sums, which holds those of W (out, height, width, in), beta, gamma."""
    out, into, height, width = conv.weight.shape
    grad_w = sums[: conv.weight.numel()].view(out, height, width, into).permute(0, 3, 1, 2)
    grad_beta, grad_gamma = sums[conv.weight.numel() :].chunk(2)
    return grad_gamma, grad_beta, grad_w


# ------------------------------------------------------------------------------------------------- the transition's passes


def transition_forward(maps, mean, rstd, transition):
    """The transition's output (N, H // 2, W // 2, K) for maps (N, H, W, C) with these statistics.

    It averages before it convolves, both being linear: a quarter of the products.
    """
    n, h, w, C = maps.shape
    bn, S = transition.bn1, maps.stride(2)
    a = maps.new_empty(n * (h // 2) * (w // 2), S)
    grid = cdiv(len(a), 32), cdiv(S, 64)
    pooled_activation[grid](maps, mean, rstd, bn.weight, bn.bias, a, len(a), C, S // 8, h, w, 32, 64, products(maps))
    (weight,) = cast([transition.conv1], maps)
    out = a[:, :C] @ weight.flatten(1).t()
    return out.view(n, h // 2, w // 2, -1)


def transition_backward(grad, grads, maps, mean, rstd, corrections, transition):
    """Fills G (N, H, W, C) and adds to corrections (2, S), from the gradient (N, H // 2, W // 2, K) of the output.

    Returns the gradients of gamma, beta, W. The products are cuBLAS's, in the type of the maps.
    """
    n, h, w, C = maps.shape
    bn, S = transition.bn1, maps.stride(2)
    (weight,) = cast([transition.conv1], maps)
    if h % 2 or w % 2:
        grads.zero_()  # pooling leaves out an odd last row or column
    grad = grad.reshape(-1, len(weight))
    a, da = maps.new_empty(2, len(grad), S)
    torch.mm(grad, weight.flatten(1), out=da[:, :C])
    turns = cdiv(len(grad), 2048)
    part = maps.new_empty(cdiv(len(grad), 4 * turns), 2 * C, dtype=torch.float32)
    grid = len(part), cdiv(S, 64)
    pooled_backward[grid](
        da, maps, mean, rstd, bn.weight, bn.bias, grads, a, part, len(grad), C, S // 8, h, w, turns, 4, 64, products(maps),
        num_warps=1,
    )  # fmt: skip
    grad_beta, grad_gamma = added_up(part, 0, bn, rstd, corrections, n * h * w, S // 8, CORRECT=True).chunk(2)
    return grad_gamma, grad_beta, (grad.t() @ a[:, :C]).float().view(weight.shape)
