"""Steps of the prompt transform, what is kept of them, and what both directions' kernels are called with.

Each step takes a layer's few rows from global memory and leaves its own there, for Triton cannot slice registers. It
ends with a barrier, after which the next may read what other threads wrote.

A row of `saved` is 11 columns of D numbers: u, q, k, v, attended, h1 (u or s normalised), x1, h2, x2, relu, y.
A row of `grads`: du, dq, dk, dv, ds, d(W_1 x2 + b_1), dy, dx2, dx2 h2, dx1 (paper: scratch), dx1 h1.
"""

from __future__ import annotations

import triton
import triton.language as tl

COLUMNS = tl.constexpr(11)
# the parameters as the kernels call them, in the order of prompt_transform's arguments; those that backward reads
_ATTENTION = ("in_w", "in_b", "out_w", "out_b")
_NORMS = ("norm1_w", "norm1_b", "norm2_w", "norm2_b")
NAMES = (*_ATTENTION, *_NORMS, "w1", "b1", "w2", "b2", "mlp_w", "mlp_b")
WEIGHTS = ("in_w", "out_w", "norm1_w", "norm2_w", "w1", "w2", "mlp_w")


@triton.jit
def product(
    a_ptr,  # (M, K)
    stride_am,
    stride_ak,
    b_ptr,  # (K, N)
    stride_bk,
    stride_bn,
    c_ptr,  # (M, N)
    stride_cm,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    bias_ptr=None,  # (N,)
    add_ptr=None,  # (M, N) with c's strides
    gate_ptr=None,  # (M, N) with c's strides
    RELU: tl.constexpr = False,
):
    """c = a b + bias + add; through relu, or zero where gate is. M <= BLOCK_M."""
    BLOCK_K: tl.constexpr = 16
    rows = tl.arange(0, BLOCK_M)[:, None]
    for n in range(0, N, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)[None, :]
        mask = (rows < M) & (cols < N)
        c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            a_cols, b_rows = k + tl.arange(0, BLOCK_K)[None, :], k + tl.arange(0, BLOCK_K)[:, None]
            a = tl.load(a_ptr + rows * stride_am + a_cols * stride_ak, (rows < M) & (a_cols < K), other=0.0)
            b = tl.load(b_ptr + b_rows * stride_bk + cols * stride_bn, (b_rows < K) & (cols < N), other=0.0)
            c = tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
        if bias_ptr is not None:
            c += tl.load(bias_ptr + cols, cols < N, other=0.0).to(tl.float32)
        if add_ptr is not None:
            c += tl.load(add_ptr + rows * stride_cm + cols, mask, other=0.0)
        if RELU:
            c = tl.where(c < 0, 0.0, c)  # NaN stays
        if gate_ptr is not None:
            c = tl.where(tl.load(gate_ptr + rows * stride_cm + cols, mask, other=0.0) == 0, 0.0, c)
        tl.store(c_ptr + rows * stride_cm + cols, c, mask)
    tl.debug_barrier()


@triton.jit
def copy(x_ptr, stride_x, y_ptr, stride_y, M, N, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    for row in range(M):
        x = tl.load(x_ptr + row * stride_x + cols, cols < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * stride_y + cols, x, cols < N)
    tl.debug_barrier()


@triton.jit
def normalise(x_ptr, weight_ptr, bias_ptr, h_ptr, y_ptr, stride, rstd_ptr, M, N, eps, BLOCK_D: tl.constexpr):
    """h = (x - mean(x)) / sqrt(var(x) + eps); y = weight h + bias; rows (M, N)."""
    cols = tl.arange(0, BLOCK_D)
    mask = cols < N
    weight = tl.load(weight_ptr + cols, mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask, other=0.0).to(tl.float32)
    for row in range(M):
        x = tl.load(x_ptr + row * stride + cols, mask, other=0.0)
        centred = tl.where(mask, x - tl.sum(x, axis=0) / N, 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / N + eps)
        tl.store(h_ptr + row * stride + cols, centred * rstd, mask)
        tl.store(y_ptr + row * stride + cols, centred * rstd * weight + bias, mask)
        tl.store(rstd_ptr + row, rstd)
    tl.debug_barrier()


@triton.jit
def normalise_bwd(dy_ptr, h_ptr, weight_ptr, rstd_ptr, add_ptr, dx_ptr, dy_h_ptr, stride, M, N, BLOCK_D: tl.constexpr):
    """dx = (g - mean(g) - h mean(g h)) / std + add with g = weight dy; and dy h, whose sum is the weight's gradient."""
    cols = tl.arange(0, BLOCK_D)
    mask = cols < N
    weight = tl.load(weight_ptr + cols, mask, other=0.0).to(tl.float32)
    for row in range(M):
        dy = tl.load(dy_ptr + row * stride + cols, mask, other=0.0)
        h = tl.load(h_ptr + row * stride + cols, mask, other=0.0)
        g = dy * weight
        dx = tl.load(rstd_ptr + row) * (g - tl.sum(g, axis=0) / N - h * (tl.sum(g * h, axis=0) / N))
        if add_ptr is not None:
            dx += tl.load(add_ptr + row * stride + cols, mask, other=0.0)
        tl.store(dx_ptr + row * stride + cols, dx, mask)
        tl.store(dy_h_ptr + row * stride + cols, dy * h, mask)
    tl.debug_barrier()


@triton.jit
def softmax(s_ptr, p_ptr, N, scale, BLOCK_M: tl.constexpr):
    """p = softmax(scale s), (N, N)."""
    rows, cols = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_M)[None, :]
    mask = (rows < N) & (cols < N)
    s = tl.load(s_ptr + rows * N + cols, mask, other=0.0) * scale
    s = tl.where(cols < N, s, float("-inf"))
    p = tl.exp(s - tl.max(s, axis=1)[:, None])
    tl.store(p_ptr + rows * N + cols, p / tl.sum(p, axis=1)[:, None], mask)
    tl.debug_barrier()


@triton.jit
def softmax_bwd(p_ptr, dp_ptr, ds_ptr, N, scale, BLOCK_M: tl.constexpr):
    """ds = scale p (dp - sum(p dp)), (N, N)."""
    rows, cols = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_M)[None, :]
    mask = (rows < N) & (cols < N)
    p = tl.load(p_ptr + rows * N + cols, mask, other=0.0)
    dp = tl.load(dp_ptr + rows * N + cols, mask, other=0.0)
    tl.store(ds_ptr + rows * N + cols, scale * p * (dp - tl.sum(p * dp, axis=1)[:, None]), mask)
    tl.debug_barrier()


def settings(n: int, d: int, heads: int) -> dict[str, int | float]:
    """What both kernels take alike: tiles of 2048 sums, eight per thread."""
    block_m = max(8, triton.next_power_of_2(n))
    return {
        "N": n,
        "D": d,
        "H": heads,
        "K": d // heads,
        "scale": (d // heads) ** -0.5,
        "BLOCK_M": block_m,
        "BLOCK_N": max(32, 2048 // block_m),
        "BLOCK_D": triton.next_power_of_2(d),
        "num_warps": 8,
        "num_stages": 4,
    }
