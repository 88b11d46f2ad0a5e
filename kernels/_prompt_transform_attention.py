"""Attention of the prompt transform, of one layer's prompts among themselves, and the LayerNorm beside it.

A program has a head of a layer, or, as one head more, the layer's LayerNorm of u: both need the layer's whole rows.
Rows of q, k and v, and of the gradient of what attention gives, lie by rows (M, .); all else by columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels import _launch
from upt_fast.kernels._launch import launch
from upt_fast.kernels._prompt_transform_common import Sizes, precision, rows_of_layer, split_sums
from upt_fast.kernels._prompt_transform_norm import slope, vector

LN_ROWS = tl.constexpr(8)  # that are normalised at once


@triton.jit
def dot_rows(
    a_ptr,
    b_ptr,
    rows,
    mask,
    stride_a,
    stride_b,
    K,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A B^T of a layer's rows, K numbers each: (BLOCK, BLOCK) fp32."""
    sums = tl.zeros((SPLIT, BLOCK, BLOCK), tl.float32)
    for k in range(0, K, SPLIT * BLOCK_K):
        ks = split_sums(k, SPLIT, BLOCK_K)
        inside = ks < K
        a = tl.load(
            a_ptr + rows[None, :, None] * stride_a + ks[:, None, :], mask[None, :, None] & inside[:, None, :], other=0.0
        )
        b = tl.load(
            b_ptr + rows[None, None, :] * stride_b + ks[:, :, None], mask[None, None, :] & inside[:, :, None], other=0.0
        )
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return tl.sum(sums, axis=0)


@triton.jit
def _prompt_attention_fwd_kernel(
    u_ptr,  # (I, N, D)
    qkv_ptr,  # (M, 3 D)
    p_ptr,  # (I, H, N, N) fp32
    attended_ptr,  # (D, LD)
    h1_ptr,  # (D, LD): u normalised
    rstd_ptr,  # (M,) fp32
    D,
    K,
    LAYER,
    n_text,
    V,
    LD,
    eps,
    scale,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    layer, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1) - 1
    if head == heads:
        places = tl.arange(0, BLOCK_D)[None, :]
        for first in range(0, LAYER, LN_ROWS):
            tokens = first + tl.arange(0, LN_ROWS)
            rows = rows_of_layer(layer, tokens, LAYER, n_text, V)
            mask = (tokens < LAYER)[:, None] & (places < D)
            at = (layer * LAYER + tokens)[:, None] * D + places
            u = tl.load(u_ptr + at, mask, other=0.0).to(tl.float32)
            centred = tl.where(mask, u - (tl.sum(u, axis=1) / D)[:, None], 0.0)
            rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
            tl.store(h1_ptr + places * LD + rows[:, None], centred * rstd[:, None], mask)
            tl.store(rstd_ptr + rows, rstd, tokens < LAYER)
    else:
        tokens, at = tl.arange(0, BLOCK), head * K
        rows, mask = rows_of_layer(layer, tokens, LAYER, n_text, V), tokens < LAYER
        q_ptr, stride = qkv_ptr + at, 3 * D
        s = scale * dot_rows(q_ptr, q_ptr + D, rows, mask, stride, stride, K, PRECISION, SPLIT, BLOCK, BLOCK_K)
        s = tl.where(mask[None, :], s, float("-inf"))
        p = tl.exp(s - tl.max(s, axis=1)[:, None])
        p = p / tl.sum(p, axis=1)[:, None]
        square = mask[:, None] & mask[None, :]
        p_at = ((layer * heads + head) * LAYER + tokens[:, None]) * LAYER + tokens[None, :]
        tl.store(p_ptr + p_at, p, square)
        for c in range(0, K, BLOCK_C):
            cs = c + tl.arange(0, BLOCK_C)
            both = mask[:, None] & (cs < K)[None, :]
            v = tl.load(q_ptr + 2 * D + rows[:, None] * stride + cs[None, :], both, other=0.0)
            y = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            tl.store(attended_ptr + (at + cs)[None, :] * LD + rows[:, None], y, both)


@triton.jit
def _prompt_attention_bwd_kernel(
    dout_ptr,  # (M, D)
    qkv_ptr,  # (M, 3 D)
    p_ptr,  # (I, H, N, N) fp32
    ds_ptr,  # (D, LD): the gradient behind LN1
    h1_ptr,  # (D, LD)
    norm1_w_ptr,  # (D,)
    rstd_ptr,  # (M,) fp32
    dqkv_ptr,  # (3 D, LD)
    du_ptr,  # (D, LD): LN1's share of u's gradient
    D,
    K,
    LAYER,
    n_text,
    V,
    LD,
    scale,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    layer, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1) - 1
    if head == heads:
        places = tl.arange(0, BLOCK_D)
        gain = vector(norm1_w_ptr, places, D)[None, :]
        for first in range(0, LAYER, LN_ROWS):
            tokens = first + tl.arange(0, LN_ROWS)
            rows = rows_of_layer(layer, tokens, LAYER, n_text, V)
            at, mask = places[None, :] * LD + rows[:, None], (tokens < LAYER)[:, None] & (places < D)[None, :]
            dy = tl.load(ds_ptr + at, mask, other=0.0).to(tl.float32)
            h = tl.load(h1_ptr + at, mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + rows, tokens < LAYER, other=0.0)
            g = tl.sum(gain * dy, axis=1) / D
            gh = tl.sum(gain * dy * h, axis=1) / D
            tl.store(du_ptr + at, slope(dy, h, gain, rstd[:, None], g[:, None], gh[:, None]), mask)
    else:
        tokens, at = tl.arange(0, BLOCK), head * K
        rows, mask = rows_of_layer(layer, tokens, LAYER, n_text, V), tokens < LAYER
        q_ptr, stride = qkv_ptr + at, 3 * D
        dp = dot_rows(dout_ptr + at, q_ptr + 2 * D, rows, mask, D, stride, K, PRECISION, SPLIT, BLOCK, BLOCK_K)
        p_at = ((layer * heads + head) * LAYER + tokens[:, None]) * LAYER + tokens[None, :]
        p = tl.load(p_ptr + p_at, mask[:, None] & mask[None, :], other=0.0)
        ds = scale * p * (dp - tl.sum(p * dp, axis=1)[:, None])
        for c in range(0, K, BLOCK_C):
            cs = c + tl.arange(0, BLOCK_C)
            both = mask[:, None] & (cs < K)[None, :]
            from_row = rows[:, None] * stride + cs[None, :]
            q = tl.load(q_ptr + from_row, both, other=0.0)
            k = tl.load(q_ptr + D + from_row, both, other=0.0)
            dout = tl.load(dout_ptr + at + rows[:, None] * D + cs[None, :], both, other=0.0)
            dq = tl.dot(ds.to(q.dtype), k, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds).to(q.dtype), q, input_precision=PRECISION)
            dv = tl.dot(tl.trans(p).to(q.dtype), dout, input_precision=PRECISION)
            to = dqkv_ptr + (at + cs)[None, :] * LD + rows[:, None]
            tl.store(to, dq, both)
            tl.store(to + D * LD, dk, both)
            tl.store(to + 2 * D * LD, dv, both)


def _settings(sizes: Sizes, heads: int) -> dict[str, int | float]:
    block = max(16, triton.next_power_of_2(sizes.n))
    interpreted = _launch.INTERPRETED
    return {
        "D": sizes.d,
        "K": sizes.d // heads,
        **sizes.places,
        "scale": (sizes.d // heads) ** -0.5,
        "BLOCK_D": triton.next_power_of_2(sizes.d),
        "SPLIT": 2 if interpreted else max(1, min(8, 2048 // block**2)),
        "BLOCK": block,
        "BLOCK_K": 32 if interpreted else 16,
        "BLOCK_C": 64 if block <= 16 else 32,
        "num_warps": 8,
        "num_stages": 3,
    }


def attention(
    sizes: Sizes, u: Tensor, qkv: Tensor, p: Tensor, attended: Tensor, h1: Tensor, rstd: Tensor, eps: float
) -> None:
    """Launch forward's: from u and qkv to the softmax's p, what it attends to, u normalised and 1 / std."""
    heads = p.shape[1]
    launch(
        _prompt_attention_fwd_kernel,
        (sizes.layers, heads + 1),
        u_ptr=u,
        qkv_ptr=qkv,
        p_ptr=p,
        attended_ptr=attended,
        h1_ptr=h1,
        rstd_ptr=rstd,
        eps=eps,
        PRECISION=precision(u),
        **_settings(sizes, heads),
    )


def attention_bwd(
    sizes: Sizes,
    dout: Tensor,
    qkv: Tensor,
    p: Tensor,
    ds: Tensor,
    h1: Tensor,
    norm1_w: Tensor,
    rstd: Tensor,
    dqkv: Tensor,
    du: Tensor,
) -> None:
    """Launch backward's: dqkv from the gradient of what attention gives, du from that behind LN1."""
    heads = p.shape[1]
    launch(
        _prompt_attention_bwd_kernel,
        (sizes.layers, heads + 1),
        dout_ptr=dout,
        qkv_ptr=qkv,
        p_ptr=p,
        ds_ptr=ds,
        h1_ptr=h1,
        norm1_w_ptr=norm1_w,
        rstd_ptr=rstd,
        dqkv_ptr=dqkv,
        du_ptr=du,
        PRECISION=precision(dout),
        **_settings(sizes, heads),
    )
