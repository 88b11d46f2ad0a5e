"""UPT's prompt transform with the projection of the visual rows: all layers in one launch each way.

    paper:     s = SA(u) + LN1(u);  x2 = LN2(s);  y = FFN(x2) + x2
    released:  s = u + W_o (W_v u + b_v) + b_o;  x1 = LN1(s);  y = FFN(LN2(x1)) + x1
    FFN(x) = W_2 relu(W_1 x + b_1) + b_2;  text rows are y's first n_text, visual rows W_m y + b_m of the rest

(Zang et al. 2022, arXiv 2210.07225; "released" is its published code, whose attention runs over sequences of length
one, so that W_q and W_k get zero gradients.) The prompts of a layer are a few rows, and apart every step is a launch.
Here a program takes one layer through all steps, handing rows from one to the next through global memory, since Triton
cannot slice registers; backward reads those rows again. It computes the gradients of all rows the same way; a weight's
is then one library product over the stacked rows of all layers, and those of the biases one sum: nothing is added
atomically. This saves launches, not arithmetic: each layer's multiprocessor reads all weights.

A row of `saved` is 11 columns of D numbers: u, q, k, v, attended, h1 (u or s normalised), x1, h2, x2, relu, y.
A row of `grads`: du, dq, dk, dv, ds, d(W_1 x2 + b_1), dy, dx2, dx2 h2, dx1 (paper: scratch), dx1 h1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import Workload, launch

COLUMNS = tl.constexpr(11)

# Each step below ends with a barrier, after which the next may read what other threads wrote.


@triton.jit
def _product(
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
def _copy(x_ptr, stride_x, y_ptr, stride_y, M, N, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    for row in range(M):
        x = tl.load(x_ptr + row * stride_x + cols, cols < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * stride_y + cols, x, cols < N)
    tl.debug_barrier()


@triton.jit
def _normalise(x_ptr, weight_ptr, bias_ptr, h_ptr, y_ptr, stride, rstd_ptr, M, N, eps, BLOCK_D: tl.constexpr):
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
def _normalise_bwd(dy_ptr, h_ptr, weight_ptr, rstd_ptr, add_ptr, dx_ptr, dy_h_ptr, stride, M, N, BLOCK_D: tl.constexpr):
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
def _softmax(s_ptr, p_ptr, N, scale, BLOCK_M: tl.constexpr):
    """p = softmax(scale s), (N, N)."""
    rows, cols = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_M)[None, :]
    mask = (rows < N) & (cols < N)
    s = tl.load(s_ptr + rows * N + cols, mask, other=0.0) * scale
    s = tl.where(cols < N, s, float("-inf"))
    p = tl.exp(s - tl.max(s, axis=1)[:, None])
    tl.store(p_ptr + rows * N + cols, p / tl.sum(p, axis=1)[:, None], mask)
    tl.debug_barrier()


@triton.jit
def _softmax_bwd(p_ptr, dp_ptr, ds_ptr, N, scale, BLOCK_M: tl.constexpr):
    """ds = scale p (dp - sum(p dp)), (N, N)."""
    rows, cols = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_M)[None, :]
    mask = (rows < N) & (cols < N)
    p = tl.load(p_ptr + rows * N + cols, mask, other=0.0)
    dp = tl.load(dp_ptr + rows * N + cols, mask, other=0.0)
    tl.store(ds_ptr + rows * N + cols, scale * p * (dp - tl.sum(p * dp, axis=1)[:, None]), mask)
    tl.debug_barrier()


@triton.jit
def _prompt_transform_fwd_kernel(
    u_ptr,  # (I, N, D)
    in_w_ptr,  # (3 D, D)
    in_b_ptr,  # (3 D,)
    out_w_ptr,  # (D, D)
    out_b_ptr,  # (D,)
    norm1_w_ptr,  # (D,)
    norm1_b_ptr,  # (D,)
    norm2_w_ptr,  # (D,)
    norm2_b_ptr,  # (D,)
    w1_ptr,  # (D, D)
    b1_ptr,  # (D,)
    w2_ptr,  # (D, D)
    b2_ptr,  # (D,)
    mlp_w_ptr,  # (W, D)
    mlp_b_ptr,  # (W,)
    text_ptr,  # (I, n_text, D)
    visual_ptr,  # (I, N - n_text, W)
    saved_ptr,  # (I, N, 11 D) fp32
    scores_ptr,  # (I, 2, H, N, N) fp32: probabilities and scratch; empty in the released form
    rstd_ptr,  # (I, 2, N) fp32
    N,
    D,
    W,
    H,
    K,
    n_text,
    eps1,
    eps2,
    scale,
    RELEASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    S, n_visual = COLUMNS * D, N - n_text
    u = saved_ptr + layer * N * S
    q, v, attended, h1, x1 = u + D, u + 3 * D, u + 4 * D, u + 5 * D, u + 6 * D
    h2, x2, relu, y = u + 7 * D, u + 8 * D, u + 9 * D, u + 10 * D
    rstd1, rstd2 = rstd_ptr + layer * 2 * N, rstd_ptr + layer * 2 * N + N
    s = y  # which comes after the last use of s

    _copy(u_ptr + layer * N * D, D, u, S, N, D, BLOCK_D)
    if RELEASED:
        _product(u, S, 1, in_w_ptr + 2 * D * D, 1, D, v, S, N, D, D, BLOCK_M, BLOCK_N, bias_ptr=in_b_ptr + 2 * D)
        _product(v, S, 1, out_w_ptr, 1, D, s, S, N, D, D, BLOCK_M, BLOCK_N, bias_ptr=out_b_ptr, add_ptr=u)
        _normalise(s, norm1_w_ptr, norm1_b_ptr, h1, x1, S, rstd1, N, D, eps1, BLOCK_D)
        _normalise(x1, norm2_w_ptr, norm2_b_ptr, h2, x2, S, rstd2, N, D, eps2, BLOCK_D)
        residual = x1
    else:
        _product(u, S, 1, in_w_ptr, 1, D, q, S, N, 3 * D, D, BLOCK_M, BLOCK_N, bias_ptr=in_b_ptr)
        for head in range(H):
            at = head * K
            p = scores_ptr + (layer * 2 * H + head) * N * N
            scores = p + H * N * N
            _product(q + at, S, 1, q + D + at, 1, S, scores, N, N, N, K, BLOCK_M, BLOCK_N)
            _softmax(scores, p, N, scale, BLOCK_M)
            _product(p, N, 1, v + at, S, 1, attended + at, S, N, K, N, BLOCK_M, BLOCK_N)
        _normalise(u, norm1_w_ptr, norm1_b_ptr, h1, x1, S, rstd1, N, D, eps1, BLOCK_D)
        _product(attended, S, 1, out_w_ptr, 1, D, s, S, N, D, D, BLOCK_M, BLOCK_N, bias_ptr=out_b_ptr, add_ptr=x1)
        _normalise(s, norm2_w_ptr, norm2_b_ptr, h2, x2, S, rstd2, N, D, eps2, BLOCK_D)
        residual = x2
    _product(x2, S, 1, w1_ptr, 1, D, relu, S, N, D, D, BLOCK_M, BLOCK_N, bias_ptr=b1_ptr, RELU=True)
    _product(relu, S, 1, w2_ptr, 1, D, y, S, N, D, D, BLOCK_M, BLOCK_N, bias_ptr=b2_ptr, add_ptr=residual)
    _copy(y, S, text_ptr + layer * n_text * D, D, n_text, D, BLOCK_D)
    visual = visual_ptr + layer * n_visual * W
    _product(y + n_text * S, S, 1, mlp_w_ptr, 1, D, visual, W, n_visual, W, D, BLOCK_M, BLOCK_N, bias_ptr=mlp_b_ptr)


@triton.jit
def _prompt_transform_bwd_kernel(
    dtext_ptr,  # (I, n_text, D)
    dvisual_ptr,  # (I, N - n_text, W)
    in_w_ptr,  # (3 D, D)
    out_w_ptr,  # (D, D)
    norm1_w_ptr,  # (D,)
    norm2_w_ptr,  # (D,)
    w1_ptr,  # (D, D)
    w2_ptr,  # (D, D)
    mlp_w_ptr,  # (W, D)
    saved_ptr,  # (I, N, 11 D) fp32
    scores_ptr,  # (I, 2, H, N, N) fp32
    rstd_ptr,  # (I, 2, N) fp32
    grads_ptr,  # (I, N, 11 D) fp32
    dscores_ptr,  # (I, 2, H, N, N) fp32: of the probabilities, of the scores
    N,
    D,
    W,
    H,
    K,
    n_text,
    scale,
    RELEASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    S, n_visual = COLUMNS * D, N - n_text
    u, du = saved_ptr + layer * N * S, grads_ptr + layer * N * S
    q, v, h1, h2, relu = u + D, u + 3 * D, u + 5 * D, u + 7 * D, u + 9 * D
    dq, dk, dv, ds, da = du + D, du + 2 * D, du + 3 * D, du + 4 * D, du + 5 * D
    dy, dx2, dx2_h, dx1, dx1_h = du + 6 * D, du + 7 * D, du + 8 * D, du + 9 * D, du + 10 * D
    rstd1, rstd2 = rstd_ptr + layer * 2 * N, rstd_ptr + layer * 2 * N + N

    _copy(dtext_ptr + layer * n_text * D, D, dy, S, n_text, D, BLOCK_D)
    dvisual = dvisual_ptr + layer * n_visual * W
    _product(dvisual, W, 1, mlp_w_ptr, D, 1, dy + n_text * S, S, n_visual, D, W, BLOCK_M, BLOCK_N)
    _product(dy, S, 1, w2_ptr, D, 1, da, S, N, D, D, BLOCK_M, BLOCK_N, gate_ptr=relu)
    if RELEASED:
        _product(da, S, 1, w1_ptr, D, 1, dx2, S, N, D, D, BLOCK_M, BLOCK_N)
        _normalise_bwd(dx2, h2, norm2_w_ptr, rstd2, dy, dx1, dx2_h, S, N, D, BLOCK_D)
        _normalise_bwd(dx1, h1, norm1_w_ptr, rstd1, None, ds, dx1_h, S, N, D, BLOCK_D)
        _product(ds, S, 1, out_w_ptr, D, 1, dv, S, N, D, D, BLOCK_M, BLOCK_N)
        _product(dv, S, 1, in_w_ptr + 2 * D * D, D, 1, du, S, N, D, D, BLOCK_M, BLOCK_N, add_ptr=ds)
    else:
        _product(da, S, 1, w1_ptr, D, 1, dx2, S, N, D, D, BLOCK_M, BLOCK_N, add_ptr=dy)
        _normalise_bwd(dx2, h2, norm2_w_ptr, rstd2, None, ds, dx2_h, S, N, D, BLOCK_D)
        dattended = du  # dx1 is ds, so its column is free, and so is du's until the last step
        _product(ds, S, 1, out_w_ptr, D, 1, dattended, S, N, D, D, BLOCK_M, BLOCK_N)
        for head in range(H):
            at = head * K
            offset = (layer * 2 * H + head) * N * N
            p, dp, dscores = scores_ptr + offset, dscores_ptr + offset, dscores_ptr + offset + H * N * N
            _product(dattended + at, S, 1, v + at, 1, S, dp, N, N, N, K, BLOCK_M, BLOCK_N)
            _softmax_bwd(p, dp, dscores, N, scale, BLOCK_M)
            _product(dscores, N, 1, q + D + at, S, 1, dq + at, S, N, K, N, BLOCK_M, BLOCK_N)
            _product(dscores, 1, N, q + at, S, 1, dk + at, S, N, K, N, BLOCK_M, BLOCK_N)
            _product(p, 1, N, dattended + at, S, 1, dv + at, S, N, K, N, BLOCK_M, BLOCK_N)
        _product(dq, S, 1, in_w_ptr, D, 1, dx1, S, N, D, 3 * D, BLOCK_M, BLOCK_N)
        _normalise_bwd(ds, h1, norm1_w_ptr, rstd1, dx1, du, dx1_h, S, N, D, BLOCK_D)


# the parameters as the kernels call them, in the order of prompt_transform's arguments; those that backward reads
_ATTENTION = ("in_w", "in_b", "out_w", "out_b")
_NORMS = ("norm1_w", "norm1_b", "norm2_w", "norm2_b")
_NAMES = (*_ATTENTION, *_NORMS, "w1", "b1", "w2", "b2", "mlp_w", "mlp_b")
_WEIGHTS = ("in_w", "out_w", "norm1_w", "norm2_w", "w1", "w2", "mlp_w")


def _settings(n: int, d: int, heads: int) -> dict[str, int | float]:
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


def _outputs(u: Tensor, params: list[Tensor], n_text: int, num_heads: int, released: bool) -> tuple[Tensor, ...]:
    (layers, n, d), width = u.shape, len(params[-1])
    fp32 = dict(dtype=torch.float32)
    return (
        u.new_empty(layers, n_text, d),
        u.new_empty(layers, n - n_text, width),
        # the released form leaves columns out
        (u.new_zeros if released else u.new_empty)((layers, n, COLUMNS.value * d), **fp32),
        u.new_empty(layers, 2, 0 if released else num_heads, n, n, **fp32),
        u.new_empty(layers, 2, n, **fp32),
    )


def prompt_transform_fwd(
    u: Tensor, params: list[Tensor], n_text: int, num_heads: int, eps1: float, eps2: float, released: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Text rows, projected visual rows; then for backward the rows of all steps, attention's scores, 1 / std."""
    layers, n, d = u.shape
    text, visual, saved, scores, rstd = _outputs(u, params, n_text, num_heads, released)
    launch(
        _prompt_transform_fwd_kernel,
        (layers,),
        u_ptr=u.contiguous(),
        **{f"{name}_ptr": t.contiguous() for name, t in zip(_NAMES, params, strict=True)},
        text_ptr=text,
        visual_ptr=visual,
        saved_ptr=saved,
        scores_ptr=scores,
        rstd_ptr=rstd,
        W=visual.shape[2],
        n_text=n_text,
        eps1=eps1,
        eps2=eps2,
        RELEASED=released,
        **_settings(n, d, num_heads),
    )
    return text, visual, saved, scores, rstd


def prompt_transform_bwd(
    dtext: Tensor, dvisual: Tensor, weights: list[Tensor], saved: Tensor, scores: Tensor, rstd: Tensor, released: bool
) -> list[Tensor]:
    """In fp32: grads and its sum over rows; dW of in_proj, out_proj, linear1, linear2, mlp; mlp's db."""
    layers, n, d = len(saved), saved.shape[1], saved.shape[2] // COLUMNS.value
    n_text, width = dtext.shape[1], dvisual.shape[2]
    dvisual = dvisual.contiguous()
    grads = torch.zeros_like(saved) if released else torch.empty_like(saved)  # W_q and W_k have zero gradients
    launch(
        _prompt_transform_bwd_kernel,
        (layers,),
        dtext_ptr=dtext.contiguous(),
        dvisual_ptr=dvisual,
        **{f"{name}_ptr": t.contiguous() for name, t in zip(_WEIGHTS, weights, strict=True)},
        saved_ptr=saved,
        scores_ptr=scores,
        rstd_ptr=rstd,
        grads_ptr=grads,
        dscores_ptr=torch.empty_like(scores),
        W=width,
        n_text=n_text,
        RELEASED=released,
        **_settings(n, d, max(scores.shape[2], 1)),
    )
    x, dx = saved.view(-1, COLUMNS.value, d), grads.view(-1, COLUMNS.value, d)
    dvisual = dvisual.reshape(-1, width).float()
    return [
        grads,
        dx.sum(0),
        dx[:, 1:4].flatten(1).t() @ x[:, 0],
        dx[:, 4].t() @ x[:, 3 if released else 4],
        dx[:, 5].t() @ x[:, 8],
        dx[:, 6].t() @ x[:, 9],
        dvisual.t() @ saved[:, n_text:, 10 * d :].reshape(-1, d),
        dvisual.sum(0),
    ]


_fwd = torch.library.custom_op("upt_fast::prompt_transform_fwd", prompt_transform_fwd, mutates_args=())
_bwd = torch.library.custom_op("upt_fast::prompt_transform_bwd", prompt_transform_bwd, mutates_args=())


@_fwd.register_fake
def _(
    u: Tensor, params: list[Tensor], n_text: int, num_heads: int, eps1: float, eps2: float, released: bool
) -> tuple[Tensor, ...]:
    return _outputs(u, params, n_text, num_heads, released)


@_bwd.register_fake
def _(
    dtext: Tensor, dvisual: Tensor, weights: list[Tensor], saved: Tensor, scores: Tensor, rstd: Tensor, released: bool
) -> list[Tensor]:
    d, width = saved.shape[2] // COLUMNS.value, dvisual.shape[2]
    shapes = [saved.shape, (COLUMNS.value, d), (3 * d, d), (d, d), (d, d), (d, d), (width, d), (width,)]
    return [saved.new_empty(shape) for shape in shapes]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    u, params, _, _, _, _, released = inputs
    weights = [t for name, t in zip(_NAMES, params, strict=True) if name in _WEIGHTS]
    ctx.save_for_backward(*output[2:], *weights)
    ctx.dtypes, ctx.released = [t.dtype for t in (u, *params)], released


def _backward(ctx, dtext, dvisual, *_):  # type: ignore[no-untyped-def]
    saved, scores, rstd, *weights = ctx.saved_tensors
    grads, sums, din, dout, dw1, dw2, dmlp, dmlp_b = _bwd(dtext, dvisual, weights, saved, scores, rstd, ctx.released)
    du, din_b = grads[..., : sums.shape[1]], sums[1:4].flatten()
    norms = [sums[10], sums[9 if ctx.released else 4], sums[8], sums[7]]
    dparams = [din, din_b, dout, sums[4], *norms, dw1, sums[5], dw2, sums[6], dmlp, dmlp_b]
    du, *dparams = (t.to(dtype) for t, dtype in zip((du, *dparams), ctx.dtypes, strict=True))
    return du, dparams, None, None, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def prompt_transform(
    u: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    mlp_weight: Tensor,
    mlp_bias: Tensor,
    *,
    n_text: int,
    num_heads: int,
    eps1: float,
    eps2: float,
    released: bool,
) -> tuple[Tensor, Tensor]:
    """Prompts of I layers through UPT's transform, without dropout.

    Args:
        u: (I, N, d) prompts, n_text for the text tower first.
        in_proj_weight: (3 d, d), attention's; in_proj_bias (3 d,), out_weight (d, d), out_bias (d,).
        norm1_weight: (d,) as norm1_bias, norm2_weight, norm2_bias.
        w1: (d, d), of the feed-forward network, as w2; b1 and b2 (d,).
        mlp_weight: (w, d), the visual rows' projection; mlp_bias (w,).
        n_text: 0 to N.
        num_heads: of attention; divides d.
        eps1: of norm1.
        eps2: of norm2.
        released: the published code's form instead of the paper's.
    Returns:
        Text prompts (I, n_text, d) and visual prompts (I, N - n_text, w) in u's dtype.
    """
    attention, mlp = [in_proj_weight, in_proj_bias, out_weight, out_bias], [mlp_weight, mlp_bias]
    norms, ffn = [norm1_weight, norm1_bias, norm2_weight, norm2_bias], [w1, b1, w2, b2]
    text, visual, *_ = _fwd(u, [*attention, *norms, *ffn, *mlp], n_text, num_heads, eps1, eps2, released)
    return text, visual


def workloads() -> Iterator[Workload]:
    """Eight prompts for each of twelve layers of ViT-B/16 and L/14, in both forms, in the learner's float32."""
    for name, d, w in (("B/16", 512, 768), ("L/14", 768, 1024)):
        shapes = [(3 * d, d), (3 * d,), (d, d), *[(d,)] * 5, (d, d), (d,), (d, d), (d,), (w, d), (w,)]
        u, *params = (torch.empty(shape, device="meta") for shape in [(12, 8, d), *shapes])
        weights = [t for key, t in zip(_NAMES, params, strict=True) if key in _WEIGHTS]
        for released in (False, True):
            label = f"{'released' if released else 'paper'} {name} float32"
            fwd = (u, params, 4, 1, 1e-5, 1e-5, released)
            text, visual, *steps = _outputs(u, params, 4, 1, released)
            bwd = (text, visual, weights, *steps, released)
            yield f"forward {label}", lambda fwd=fwd: prompt_transform_fwd(*fwd)
            yield f"backward {label}", lambda bwd=bwd: prompt_transform_bwd(*bwd)
