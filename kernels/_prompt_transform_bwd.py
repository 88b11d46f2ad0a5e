"""Backward of prompt_transform.py: gradients of one layer's rows by a program, of the weights by products over all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import launch
from upt_fast.kernels._prompt_transform_common import (
    COLUMNS,
    WEIGHTS,
    copy,
    normalise_bwd,
    product,
    settings,
    softmax_bwd,
)


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

    copy(dtext_ptr + layer * n_text * D, D, dy, S, n_text, D, BLOCK_D)
    dvisual = dvisual_ptr + layer * n_visual * W
    product(dvisual, W, 1, mlp_w_ptr, D, 1, dy + n_text * S, S, n_visual, D, W, BLOCK_M, BLOCK_N)
    product(dy, S, 1, w2_ptr, D, 1, da, S, N, D, D, BLOCK_M, BLOCK_N, gate_ptr=relu)
    if RELEASED:
        product(da, S, 1, w1_ptr, D, 1, dx2, S, N, D, D, BLOCK_M, BLOCK_N)
        normalise_bwd(dx2, h2, norm2_w_ptr, rstd2, dy, dx1, dx2_h, S, N, D, BLOCK_D)
        normalise_bwd(dx1, h1, norm1_w_ptr, rstd1, None, ds, dx1_h, S, N, D, BLOCK_D)
        product(ds, S, 1, out_w_ptr, D, 1, dv, S, N, D, D, BLOCK_M, BLOCK_N)
        product(dv, S, 1, in_w_ptr + 2 * D * D, D, 1, du, S, N, D, D, BLOCK_M, BLOCK_N, add_ptr=ds)
    else:
        product(da, S, 1, w1_ptr, D, 1, dx2, S, N, D, D, BLOCK_M, BLOCK_N, add_ptr=dy)
        normalise_bwd(dx2, h2, norm2_w_ptr, rstd2, None, ds, dx2_h, S, N, D, BLOCK_D)
        dattended = du  # dx1 is ds, so its column is free, and so is du's until the last step
        product(ds, S, 1, out_w_ptr, D, 1, dattended, S, N, D, D, BLOCK_M, BLOCK_N)
        for head in range(H):
            at = head * K
            offset = (layer * 2 * H + head) * N * N
            p, dp, dscores = scores_ptr + offset, dscores_ptr + offset, dscores_ptr + offset + H * N * N
            product(dattended + at, S, 1, v + at, 1, S, dp, N, N, N, K, BLOCK_M, BLOCK_N)
            softmax_bwd(p, dp, dscores, N, scale, BLOCK_M)
            product(dscores, N, 1, q + D + at, S, 1, dq + at, S, N, K, N, BLOCK_M, BLOCK_N)
            product(dscores, 1, N, q + at, S, 1, dk + at, S, N, K, N, BLOCK_M, BLOCK_N)
            product(p, 1, N, dattended + at, S, 1, dv + at, S, N, K, N, BLOCK_M, BLOCK_N)
        product(dq, S, 1, in_w_ptr, D, 1, dx1, S, N, D, 3 * D, BLOCK_M, BLOCK_N)
        normalise_bwd(ds, h1, norm1_w_ptr, rstd1, dx1, du, dx1_h, S, N, D, BLOCK_D)


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
        **{f"{name}_ptr": t.contiguous() for name, t in zip(WEIGHTS, weights, strict=True)},
        saved_ptr=saved,
        scores_ptr=scores,
        rstd_ptr=rstd,
        grads_ptr=grads,
        dscores_ptr=torch.empty_like(scores),
        W=width,
        n_text=n_text,
        RELEASED=released,
        **settings(n, d, max(scores.shape[2], 1)),
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
