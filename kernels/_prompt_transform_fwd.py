"""Forward of prompt_transform.py: a program takes one layer's prompts through all steps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import launch
from upt_fast.kernels._prompt_transform_common import COLUMNS, NAMES, copy, normalise, product, settings, softmax


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

    copy(u_ptr + layer * N * D, D, u, S, N, D, BLOCK_D)
    if RELEASED:
        product(u, S, 1, in_w_ptr + 2 * D * D, 1, D, v, S, N, D, D, BLOCK_M, BLOCK_N, bias_ptr=in_b_ptr + 2 * D)
        product(v, S, 1, out_w_ptr, 1, D, s, S, N, D, D, BLOCK_M, BLOCK_N, bias_ptr=out_b_ptr, add_ptr=u)
        normalise(s, norm1_w_ptr, norm1_b_ptr, h1, x1, S, rstd1, N, D, eps1, BLOCK_D)
        normalise(x1, norm2_w_ptr, norm2_b_ptr, h2, x2, S, rstd2, N, D, eps2, BLOCK_D)
        residual = x1
    else:
        product(u, S, 1, in_w_ptr, 1, D, q, S, N, 3 * D, D, BLOCK_M, BLOCK_N, bias_ptr=in_b_ptr)
        for head in range(H):
            at = head * K
            p = scores_ptr + (layer * 2 * H + head) * N * N
            scores = p + H * N * N
            product(q + at, S, 1, q + D + at, 1, S, scores, N, N, N, K, BLOCK_M, BLOCK_N)
            softmax(scores, p, N, scale, BLOCK_M)
            product(p, N, 1, v + at, S, 1, attended + at, S, N, K, N, BLOCK_M, BLOCK_N)
        normalise(u, norm1_w_ptr, norm1_b_ptr, h1, x1, S, rstd1, N, D, eps1, BLOCK_D)
        product(attended, S, 1, out_w_ptr, 1, D, s, S, N, D, D, BLOCK_M, BLOCK_N, bias_ptr=out_b_ptr, add_ptr=x1)
        normalise(s, norm2_w_ptr, norm2_b_ptr, h2, x2, S, rstd2, N, D, eps2, BLOCK_D)
        residual = x2
    product(x2, S, 1, w1_ptr, 1, D, relu, S, N, D, D, BLOCK_M, BLOCK_N, bias_ptr=b1_ptr, RELU=True)
    product(relu, S, 1, w2_ptr, 1, D, y, S, N, D, D, BLOCK_M, BLOCK_N, bias_ptr=b2_ptr, add_ptr=residual)
    copy(y, S, text_ptr + layer * n_text * D, D, n_text, D, BLOCK_D)
    visual = visual_ptr + layer * n_visual * W
    product(y + n_text * S, S, 1, mlp_w_ptr, 1, D, visual, W, n_visual, W, D, BLOCK_M, BLOCK_N, bias_ptr=mlp_b_ptr)


def outputs_of(u: Tensor, params: list[Tensor], n_text: int, num_heads: int, released: bool) -> tuple[Tensor, ...]:
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
    text, visual, saved, scores, rstd = outputs_of(u, params, n_text, num_heads, released)
    launch(
        _prompt_transform_fwd_kernel,
        (layers,),
        u_ptr=u.contiguous(),
        **{f"{name}_ptr": t.contiguous() for name, t in zip(NAMES, params, strict=True)},
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
        **settings(n, d, num_heads),
    )
    return text, visual, saved, scores, rstd
