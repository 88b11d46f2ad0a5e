"""Backward of packed_attention.py: a program gives every gradient of a tile, and its share of the prefix's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._attention import empty_gradients, load_rows, rows_of_heads, store_rows, sum_by_set
from upt_fast.kernels._launch import launch
from upt_fast.kernels._packed_attention_common import arguments_of, finite, load_tile, softmax


@triton.jit
def _packed_attention_bwd_kernel(
    q_ptr,  # (N, H, K), or (C, H, K) if LAST_ONLY
    k_ptr,  # (N, H, K)
    v_ptr,  # (N, H, K)
    prefix_k_ptr,  # (S, P, H, K)
    prefix_v_ptr,  # (S, P, H, K)
    tiles_ptr,  # (T, 5) int32: first row, end row, first class, end class, set
    classes_ptr,  # (C, 5) int32, the same with a class each
    first_rows_ptr,  # (N,) int32
    dout_ptr,  # like q
    dq_ptr,  # like q, written if NEEDS_Q
    dk_ptr,  # (N, H, K), written if NEEDS_OWN
    dv_ptr,  # (N, H, K), written if NEEDS_OWN
    partial_ptr,  # (2, T, P, H, K) fp32, written if NEEDS_PREFIX
    stride_q_row,
    stride_k_row,
    stride_v_row,
    stride_prefix_k_row,
    stride_prefix_v_row,
    stride_dout_row,
    P,
    H,
    K: tl.constexpr,
    NEEDS_Q: tl.constexpr,
    NEEDS_OWN: tl.constexpr,
    NEEDS_PREFIX: tl.constexpr,
    LAST_ONLY: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1)
    queries, mask, first, end, sees, q, k, v, poison = load_tile(
        q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, tiles_ptr, classes_ptr, first_rows_ptr,
        stride_q_row, stride_k_row, stride_v_row, stride_prefix_k_row, stride_prefix_v_row,
        P, K, LAST_ONLY, UPCAST, EVEN_K, BLOCK, BLOCK_K,
    )  # fmt: skip
    dout = load_rows(dout_ptr + head * K, stride_dout_row, queries, mask, K, UPCAST, EVEN_K, BLOCK_K)
    dout, poison_dout = finite(dout)
    p = softmax(q, k, poison + poison_dout[:, None], sees)
    places = tl.arange(0, BLOCK)
    own = (places >= P) & (first + places - P < end)
    at = (tl.program_id(0).to(tl.int64) * P * H + head) * K
    if NEEDS_OWN or NEEDS_PREFIX:
        dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, input_precision="ieee")
        if NEEDS_OWN:
            store_rows(dv_ptr + head * K, H * K, first + places - P, own, dv, K, BLOCK_K)
        if NEEDS_PREFIX:
            values = partial_ptr + at + tl.num_programs(0).to(tl.int64) * P * H * K
            store_rows(values, H * K, places, places < P, dv, K, BLOCK_K)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    ds = tl.where(sees, p * (dp - tl.sum(p * dp, axis=1)[:, None]), 0.0).to(k.dtype)
    if NEEDS_Q:
        store_rows(dq_ptr + head * K, H * K, queries, mask, tl.dot(ds, k, input_precision="ieee"), K, BLOCK_K)
    if NEEDS_OWN or NEEDS_PREFIX:
        dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
        if NEEDS_OWN:
            store_rows(dk_ptr + head * K, H * K, first + places - P, own, dk, K, BLOCK_K)
        if NEEDS_PREFIX:
            store_rows(partial_ptr + at, H * K, places, places < P, dk, K, BLOCK_K)


def packed_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    tiles: Tensor,
    classes: Tensor,
    first_rows: Tensor,
    needs_q: bool,
    needs_own: bool,
    needs_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, of k and v, and of both prefixes (2, S, P, H, K); empty where they are not needed."""
    arguments = arguments_of(q, k, v, prefix_k, prefix_v, tiles, classes, first_rows) | rows_of_heads(dout=dout)
    dq, dk, dv = empty_gradients(q, k, needs_q, needs_own)
    P = prefix_k.shape[1] * needs_prefix
    partial = q.new_empty(2, len(tiles), P, *q.shape[1:], dtype=torch.float32)
    arguments |= {"dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv, "partial_ptr": partial}
    needs = {"NEEDS_Q": needs_q, "NEEDS_OWN": needs_own, "NEEDS_PREFIX": needs_prefix}
    launch(_packed_attention_bwd_kernel, (len(tiles), q.shape[1]), **arguments, **needs, num_warps=8)
    if not needs_prefix:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, sum_by_set(partial, sets_of(prefix_k, tiles), prefix_k)


def sets_of(prefix_k: Tensor, tiles: Tensor) -> Tensor | None:
    return tiles[:, 4] if len(prefix_k) > 1 else None
