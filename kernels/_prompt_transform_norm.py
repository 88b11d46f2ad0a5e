"""The product of the prompt transform that follows its LayerNorm, and backward's behind the same LayerNorm.

Whole rows are read first, for their statistics; the loop over the product's sums then makes the numbers that it
multiplies, and each program stores what there is of its own columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import launch
from upt_fast.kernels._prompt_transform_common import Sizes, precision, split_sums, tile, weight_tile

CHUNK = tl.constexpr(128)  # numbers of a row that backward reads at once


@triton.jit
def vector(ptr, places, N):
    return tl.load(ptr + places, places < N, other=0.0).to(tl.float32)


@triton.jit
def statistics(x, mask, D, eps):
    """Mean and 1 / std of rows, the columns of x (BLOCK_D, BLOCK_M)."""
    mean = tl.sum(tl.where(mask, x, 0.0), axis=0) / D
    centred = tl.where(mask, x - mean[None, :], 0.0)
    return mean, 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)


@triton.jit
def slope(dy, h, gain, rstd, mean_g, mean_gh):
    """LayerNorm's gradient: (g - mean(g) - h mean(g h)) / std with g = gain dy."""
    return rstd * (gain * dy - mean_g - h * mean_gh)


@triton.jit
def _prompt_norm_fwd_kernel(
    s_ptr,  # (D, LD)
    norm1_w_ptr,  # (D,)
    norm1_b_ptr,  # (D,)
    norm2_w_ptr,  # (D,)
    norm2_b_ptr,  # (D,)
    w1_ptr,  # (D, D)
    b1_ptr,  # (D,)
    h1_ptr,  # (D, LD): s normalised, in the released form only
    h2_ptr,  # (D, LD): what LN2 takes, normalised
    relu_ptr,  # (D, LD)
    rstd_ptr,  # (2, M) fp32
    M,
    D,
    LD,
    eps1,
    eps2,
    RELEASED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """relu(x2 W_1^T + b_1) with x2 = LN2(s), or LN2(LN1(s)) in the released form."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    writes = (rows < M) & (tl.program_id(1) == 0)

    places = tl.arange(0, BLOCK_D)
    whole = (places < D)[:, None]
    x = tl.load(s_ptr + places[:, None] * LD + rows[None, :], whole, other=0.0).to(tl.float32)
    if RELEASED:
        mean1, rstd1 = statistics(x, whole, D, eps1)
        gain, shift = vector(norm1_w_ptr, places, D)[:, None], vector(norm1_b_ptr, places, D)[:, None]
        x = (x - mean1[None, :]) * rstd1[None, :] * gain + shift
        tl.store(rstd_ptr + rows, rstd1, writes)
    mean2, rstd2 = statistics(x, whole, D, eps2)
    tl.store(rstd_ptr + M + rows, rstd2, writes)

    sums = tl.zeros((SPLIT, BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, SPLIT * BLOCK_K):
        ks = split_sums(k, SPLIT, BLOCK_K)
        s = tl.load(s_ptr + rows[None, :, None] + ks[:, None, :] * LD, (ks < D)[:, None, :], other=0.0)
        w = weight_tile(w1_ptr, cols, ks, D, D, D, 1)
        x2 = s.to(tl.float32)
        if RELEASED:
            x2 = (x2 - mean1[None, :, None]) * rstd1[None, :, None]
            x2 = x2 * vector(norm1_w_ptr, ks, D)[:, None, :] + vector(norm1_b_ptr, ks, D)[:, None, :]
        x2 = (x2 - mean2[None, :, None]) * rstd2[None, :, None]
        x2 = x2 * vector(norm2_w_ptr, ks, D)[:, None, :] + vector(norm2_b_ptr, ks, D)[:, None, :]
        sums = tl.dot(x2.to(s.dtype), w, sums, input_precision=PRECISION)
    y = tl.sum(sums, axis=0) + vector(b1_ptr, cols, D)[None, :]

    own, mask = rows[:, None] + cols[None, :] * LD, (rows < M)[:, None] & (cols < D)[None, :]
    tl.store(relu_ptr + own, tl.where(y < 0, 0.0, y), mask)  # NaN stays
    x = tl.load(s_ptr + own, mask, other=0.0).to(tl.float32)
    if RELEASED:
        x = (x - mean1[:, None]) * rstd1[:, None]
        tl.store(h1_ptr + own, x, mask)
        x = x * vector(norm1_w_ptr, cols, D)[None, :] + vector(norm1_b_ptr, cols, D)[None, :]
    tl.store(h2_ptr + own, (x - mean2[:, None]) * rstd2[:, None], mask)


@triton.jit
def _prompt_norm_bwd_kernel(
    dx2_ptr,  # (D, LD)
    h2_ptr,  # (D, LD)
    dy_ptr,  # (D, LD): in the released form, as h1 and dx1
    h1_ptr,  # (D, LD)
    norm1_w_ptr,  # (D,)
    norm2_w_ptr,  # (D,)
    rstd_ptr,  # (2, M) fp32
    out_w_ptr,  # (D, D)
    dx1_ptr,  # (D, LD)
    ds_ptr,  # (D, LD)
    out_ptr,  # (M, D), or (D, LD) in the released form
    M,
    D,
    LD,
    RELEASED: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """ds, the gradient before LN2 or, in the released form, before LN1, dx1 being between the two; and ds W_o."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = tl.minimum(rows, M - 1)  # rows beyond the last repeat its statistics
    rstd1, rstd2 = tl.load(rstd_ptr + known), tl.load(rstd_ptr + M + known)

    g, gh = tl.zeros((CHUNK, BLOCK_M), tl.float32), tl.zeros((CHUNK, BLOCK_M), tl.float32)
    for k in range(0, D, CHUNK):
        places = k + tl.arange(0, CHUNK)
        own, mask = places[:, None] * LD + rows[None, :], (places < D)[:, None]
        dx2 = tl.load(dx2_ptr + own, mask, other=0.0).to(tl.float32) * vector(norm2_w_ptr, places, D)[:, None]
        g += dx2
        gh += dx2 * tl.load(h2_ptr + own, mask, other=0.0).to(tl.float32)
    g2, gh2 = tl.sum(g, axis=0) / D, tl.sum(gh, axis=0) / D
    if RELEASED:
        g, gh = tl.zeros((CHUNK, BLOCK_M), tl.float32), tl.zeros((CHUNK, BLOCK_M), tl.float32)
        for k in range(0, D, CHUNK):
            places = k + tl.arange(0, CHUNK)
            own, mask = places[:, None] * LD + rows[None, :], (places < D)[:, None]
            dx2 = tl.load(dx2_ptr + own, mask, other=0.0).to(tl.float32)
            h2 = tl.load(h2_ptr + own, mask, other=0.0).to(tl.float32)
            dx1 = slope(
                dx2, h2, vector(norm2_w_ptr, places, D)[:, None], rstd2[None, :], g2[None, :], gh2[None, :]
            ) + tl.load(dy_ptr + own, mask, other=0.0).to(tl.float32)
            dx1 = tl.where(mask, dx1, 0.0) * vector(norm1_w_ptr, places, D)[:, None]
            g += dx1
            gh += dx1 * tl.load(h1_ptr + own, mask, other=0.0).to(tl.float32)
        g1, gh1 = tl.sum(g, axis=0) / D, tl.sum(gh, axis=0) / D

    sums = tl.zeros((SPLIT, BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, SPLIT * BLOCK_K):
        ks = split_sums(k, SPLIT, BLOCK_K)
        at, inside = rows[None, :, None] + ks[:, None, :] * LD, (ks < D)[:, None, :]
        dx2 = tl.load(dx2_ptr + at, inside, other=0.0)
        h2 = tl.load(h2_ptr + at, inside, other=0.0).to(tl.float32)
        w = weight_tile(out_w_ptr, cols, ks, D, D, 1, D)
        gain = vector(norm2_w_ptr, ks, D)[:, None, :]
        ds = slope(dx2.to(tl.float32), h2, gain, rstd2[None, :, None], g2[None, :, None], gh2[None, :, None])
        if RELEASED:
            ds += tl.load(dy_ptr + at, inside, other=0.0).to(tl.float32)
            h1 = tl.load(h1_ptr + at, inside, other=0.0).to(tl.float32)
            gain = vector(norm1_w_ptr, ks, D)[:, None, :]
            ds = slope(ds, h1, gain, rstd1[None, :, None], g1[None, :, None], gh1[None, :, None])
        # beyond D the weights are zero, and what they meet must be finite
        ds = tl.where(inside, ds, 0.0)
        sums = tl.dot(ds.to(dx2.dtype), w, sums, input_precision=PRECISION)

    own, mask = rows[:, None] + cols[None, :] * LD, (rows < M)[:, None] & (cols < D)[None, :]
    at_rows = rows[:, None] * D + cols[None, :]
    tl.store(out_ptr + (own if RELEASED else at_rows), tl.sum(sums, axis=0), mask)
    dx2 = tl.load(dx2_ptr + own, mask, other=0.0).to(tl.float32)
    h2 = tl.load(h2_ptr + own, mask, other=0.0).to(tl.float32)
    ds = slope(dx2, h2, vector(norm2_w_ptr, cols, D)[None, :], rstd2[:, None], g2[:, None], gh2[:, None])
    if RELEASED:
        ds += tl.load(dy_ptr + own, mask, other=0.0).to(tl.float32)
        tl.store(dx1_ptr + own, ds, mask)
        h1 = tl.load(h1_ptr + own, mask, other=0.0).to(tl.float32)
        ds = slope(ds, h1, vector(norm1_w_ptr, cols, D)[None, :], rstd1[:, None], g1[:, None], gh1[:, None])
    tl.store(ds_ptr + own, ds, mask)


def norm_product(
    sizes: Sizes,
    s: Tensor,
    norms: list[Tensor],
    w1: Tensor,
    b1: Tensor,
    h1: Tensor,
    h2: Tensor,
    relu: Tensor,
    rstd: Tensor,
    eps: tuple[float, float],
    released: bool,
) -> None:
    """Launch forward's: s, the norms' weights and biases, W_1 and b_1; then what it writes."""
    m, d = sizes.rows, sizes.d
    settings = tile(s, m, d, whole_rows=True)
    launch(
        _prompt_norm_fwd_kernel,
        (triton.cdiv(m, settings["BLOCK_M"]), triton.cdiv(d, settings["BLOCK_N"])),
        s_ptr=s,
        **dict(zip(("norm1_w_ptr", "norm1_b_ptr", "norm2_w_ptr", "norm2_b_ptr"), norms, strict=True)),
        w1_ptr=w1,
        b1_ptr=b1,
        h1_ptr=h1,
        h2_ptr=h2,
        relu_ptr=relu,
        rstd_ptr=rstd,
        M=m,
        D=d,
        LD=sizes.ld,
        eps1=eps[0],
        eps2=eps[1],
        RELEASED=released,
        PRECISION=precision(s),
        BLOCK_D=triton.next_power_of_2(d),
        **settings,
    )


def norm_product_bwd(
    sizes: Sizes,
    grads: dict[str, Tensor],
    h1: Tensor,
    h2: Tensor,
    norm1_w: Tensor,
    norm2_w: Tensor,
    rstd: Tensor,
    out_w: Tensor,
    out: Tensor,
    released: bool,
) -> None:
    """Launch backward's: of grads it reads dx2 and dy and writes dx1 and ds; out takes ds W_o."""
    m, d = sizes.rows, sizes.d
    settings = tile(out, m, d, whole_rows=True, narrow=released)  # which reads four matrices
    launch(
        _prompt_norm_bwd_kernel,
        (triton.cdiv(m, settings["BLOCK_M"]), triton.cdiv(d, settings["BLOCK_N"])),
        **{f"{name}_ptr": grads[name] for name in ("dx2", "dy", "dx1", "ds")},
        h2_ptr=h2,
        h1_ptr=h1,
        norm1_w_ptr=norm1_w,
        norm2_w_ptr=norm2_w,
        rstd_ptr=rstd,
        out_w_ptr=out_w,
        out_ptr=out,
        M=m,
        D=d,
        LD=sizes.ld,
        RELEASED=released,
        PRECISION=precision(out),
        **settings,
    )
