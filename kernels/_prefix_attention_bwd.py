"""Backward of prefix_attention.py: a kernel for the queries' gradient, one for those of keys, values and prompts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._attention import (
    LOG2E,
    empty_gradients,
    load_keys,
    load_rows,
    rows_of_heads,
    store_rows,
    sum_by_set,
)
from upt_fast.kernels._launch import launch
from upt_fast.kernels._prefix_attention_common import Tiles, arguments_of, sequence, tile_of, visible

# of those tried the largest without spills on any GPU of _targets.py: for a program in which the queries stay, and for
# one in which the keys do
QUERY_TILES: Tiles = {
    ("half", False): (64, 32, 4, 2),
    ("half", True): (64, 32, 4, 1),
    ("tf32", False): (16, 32, 4, 1),
    ("tf32", True): (32, 16, 4, 1),
    ("ieee", False): (16, 32, 8, 1),
    ("ieee", True): (16, 16, 8, 1),
}
KEY_TILES: Tiles = {
    ("half", False): (64, 64, 4, 2),
    ("half", True): (32, 32, 4, 1),
    ("tf32", False): (32, 32, 4, 1),
    ("tf32", True): (16, 64, 8, 1),
    ("ieee", False): (16, 16, 8, 1),
    ("ieee", True): (16, 16, 8, 1),
}


@triton.jit
def _prefix_attention_bwd_queries_kernel(
    q_ptr,  # (M, H, K): B times Q rows, or those of B classes one behind the other if PACKED
    k_ptr,  # (B, L, H, K), or (N, H, K) if PACKED
    v_ptr,  # as k
    prefix_k_ptr,  # (S, P, H, K)
    prefix_v_ptr,  # (S, P, H, K)
    set_ptr,  # (B,) integers or None
    classes_ptr,  # (B, 5) int32 if PACKED: first and end row, and more
    out_ptr,  # (M, H, K)
    softmax_ptr,  # (2, H, M) fp32: largest score, sum of e^(others - it)
    dout_ptr,  # (M, H, K)
    dq_ptr,  # (M, H, K), written if NEEDS_Q
    delta_ptr,  # (H, M) fp32
    stride_q_row,
    stride_k_row,
    stride_v_row,
    stride_prefix_k_row,
    stride_prefix_v_row,
    stride_dout_row,
    stride_set,
    M,
    Q,  # queries of each sequence, or of the longest if PACKED
    L,
    P,
    H,
    K: tl.constexpr,
    NEEDS_Q: tl.constexpr,
    PACKED: tl.constexpr,
    LAST_ONLY: tl.constexpr,
    HAS_SETS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(Q, BLOCK_M)
    pair = tl.program_id(0) // blocks
    number, head = (pair // H).to(tl.int64), pair % H
    begin = tl.program_id(0) % blocks * BLOCK_M
    first_query, first_row, Q, L = sequence(classes_ptr, number, Q, L, PACKED, LAST_ONLY)
    if PACKED:  # noqa: SIM102
        if begin >= Q:  # of a sequence that is shorter than others
            return
    rows = begin + tl.arange(0, BLOCK_M)
    mask = rows < Q
    statistics = head.to(tl.int64) * M + first_query + rows
    dout_ptr += first_query * stride_dout_row + head * K
    dout = load_rows(dout_ptr, stride_dout_row, rows, mask, K, UPCAST, EVEN_K, BLOCK_K)
    out = load_rows(out_ptr + (first_query * H + head) * K, H * K, rows, mask, K, UPCAST, EVEN_K, BLOCK_K)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + statistics, delta, mask)
    if NEEDS_Q:
        prefix_row = tl.load(set_ptr + number * stride_set).to(tl.int64) * P if HAS_SETS else number * 0
        q_ptr += first_query * stride_q_row + head * K
        k_ptr += first_row * stride_k_row + head * K
        v_ptr += first_row * stride_v_row + head * K
        prefix_k_ptr += prefix_row * stride_prefix_k_row + head * K
        prefix_v_ptr += prefix_row * stride_prefix_v_row + head * K
        q = load_rows(q_ptr, stride_q_row, rows, mask, K, UPCAST, EVEN_K, BLOCK_K)
        peak = tl.load(softmax_ptr + statistics, mask, other=0.0)
        total = tl.load(softmax_ptr + H * M + statistics, mask, other=1.0)
        dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for own_only in tl.static_range(2):
            for n in range(tl.cdiv(P, BLOCK_N) * BLOCK_N if own_only else 0, P + L if own_only else P, BLOCK_N):
                keys = n + tl.arange(0, BLOCK_N)
                k = load_keys(
                    k_ptr, prefix_k_ptr, stride_k_row, stride_prefix_k_row,
                    keys, P, L, K, not own_only, UPCAST, EVEN_K, BLOCK_K,
                )  # fmt: skip
                v = load_keys(
                    v_ptr, prefix_v_ptr, stride_v_row, stride_prefix_v_row,
                    keys, P, L, K, not own_only, UPCAST, EVEN_K, BLOCK_K,
                )  # fmt: skip
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                p = tl.exp2((s - peak[:, None]) * LOG2E) * (1 / total)[:, None]
                dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                ds = tl.where(visible(rows, keys, P, Q, L, PACKED), p * (dp - delta[:, None]), 0.0)
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        store_rows(dq_ptr + (first_query * H + head) * K, H * K, rows, mask, dq, K, BLOCK_K)


@triton.jit
def _prefix_attention_bwd_keys_kernel(
    q_ptr,  # (M, H, K): B times Q rows, or those of B classes one behind the other if PACKED
    k_ptr,  # (B, L, H, K), or (N, H, K) if PACKED
    v_ptr,  # as k
    prefix_k_ptr,  # (S, P, H, K)
    prefix_v_ptr,  # (S, P, H, K)
    set_ptr,  # (B,) integers or None
    classes_ptr,  # (B, 5) int32 if PACKED: first and end row, and more
    softmax_ptr,  # (2, H, M) fp32: largest score, sum of e^(others - it)
    dout_ptr,  # (M, H, K)
    delta_ptr,  # (H, M) fp32
    dk_ptr,  # as k, written if NEEDS_OWN
    dv_ptr,  # as k, written if NEEDS_OWN
    partial_ptr,  # (2, B, P, H, K) fp32, written if NEEDS_PREFIX
    stride_q_row,
    stride_k_row,
    stride_v_row,
    stride_prefix_k_row,
    stride_prefix_v_row,
    stride_dout_row,
    stride_set,
    B,
    M,
    Q,  # queries of each sequence, or of the longest if PACKED
    L,
    P,
    H,
    K: tl.constexpr,
    NEEDS_OWN: tl.constexpr,
    NEEDS_PREFIX: tl.constexpr,
    PACKED: tl.constexpr,
    LAST_ONLY: tl.constexpr,
    HAS_SETS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = 0 if NEEDS_PREFIX else P  # of [prefix ; own rows]; those before `end` need gradients
    blocks = tl.cdiv((P + L if NEEDS_OWN else P) - first, BLOCK_N)
    pair = tl.program_id(0) // blocks
    number, head = (pair // H).to(tl.int64), pair % H
    begin = first + tl.program_id(0) % blocks * BLOCK_N
    first_query, first_row, Q, L = sequence(classes_ptr, number, Q, L, PACKED, LAST_ONLY)
    end = P + L if NEEDS_OWN else P
    if PACKED:  # noqa: SIM102
        if begin >= end:  # of a sequence that is shorter than others
            return
    keys = begin + tl.arange(0, BLOCK_N)
    prefix_row = tl.load(set_ptr + number * stride_set).to(tl.int64) * P if HAS_SETS else number * 0
    k = load_keys(
        k_ptr + first_row * stride_k_row + head * K, prefix_k_ptr + prefix_row * stride_prefix_k_row + head * K,
        stride_k_row, stride_prefix_k_row, keys, P, end - P, K, True, UPCAST, EVEN_K, BLOCK_K,
    )  # fmt: skip
    v = load_keys(
        v_ptr + first_row * stride_v_row + head * K, prefix_v_ptr + prefix_row * stride_prefix_v_row + head * K,
        stride_v_row, stride_prefix_v_row, keys, P, end - P, K, True, UPCAST, EVEN_K, BLOCK_K,
    )  # fmt: skip
    q_ptr += first_query * stride_q_row + head * K
    dout_ptr += first_query * stride_dout_row + head * K
    statistics = head.to(tl.int64) * M + first_query
    dk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in range(0, Q, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        mask = rows < Q
        q = load_rows(q_ptr, stride_q_row, rows, mask, K, UPCAST, EVEN_K, BLOCK_K)
        dout = load_rows(dout_ptr, stride_dout_row, rows, mask, K, UPCAST, EVEN_K, BLOCK_K)
        peak = tl.load(softmax_ptr + statistics + rows, mask, other=0.0)
        total = tl.load(softmax_ptr + H * M + statistics + rows, mask, other=1.0)
        delta = tl.load(delta_ptr + statistics + rows, mask, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2((s - peak[None, :]) * LOG2E) * (1 / total)[None, :]
        if PACKED:
            p = tl.where(tl.trans(visible(rows, keys, P, Q, L, True)), p, 0.0)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk, input_precision=PRECISION)
    own = (keys >= P) & (keys < end)
    store_rows(dk_ptr + (first_row * H + head) * K, H * K, keys - P, own, dk, K, BLOCK_K)
    store_rows(dv_ptr + (first_row * H + head) * K, H * K, keys - P, own, dv, K, BLOCK_K)
    if begin < P:
        shared = keys < P
        store_rows(partial_ptr + (number * P * H + head) * K, H * K, keys, shared, dk, K, BLOCK_K)
        store_rows(partial_ptr + ((B + number) * P * H + head) * K, H * K, keys, shared, dv, K, BLOCK_K)


def prefix_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None,
    classes: Tensor | None,
    out: Tensor,
    softmax: Tensor,
    longest: int,
    needs_q: bool,
    needs_own: bool,
    needs_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, of k and v, and of both prefixes (2, S, P, H, K); empty where they are not needed."""
    sequences, common = arguments_of(q, k, v, prefix_k, prefix_v, set_index, classes, longest)
    (dq, dk, dv), delta = empty_gradients(q, k, needs_q, needs_own), torch.empty_like(softmax[0])
    common |= {**rows_of_heads(dout=dout), "softmax_ptr": softmax, "delta_ptr": delta}
    programs = sequences * q.shape[-2]
    tile = tile_of(QUERY_TILES, q, common, BLOCK_M=common["Q"] <= 16 or not needs_q)
    grid = (triton.cdiv(common["Q"], tile["BLOCK_M"]) * programs,)
    queries = {"out_ptr": out, "dq_ptr": dq, "NEEDS_Q": needs_q}
    launch(_prefix_attention_bwd_queries_kernel, grid, **common, **queries, **tile)

    P = common["P"] * needs_prefix
    partial = q.new_empty(2, sequences, P, *q.shape[-2:], dtype=torch.float32)
    rows = P + common["L"] * needs_own
    tile = tile_of(KEY_TILES, q, common, BLOCK_N=rows <= 16)
    grid = (triton.cdiv(rows, tile["BLOCK_N"]) * programs,)
    keys = {"dk_ptr": dk, "dv_ptr": dv, "partial_ptr": partial, "B": sequences}
    needs = {"NEEDS_OWN": needs_own, "NEEDS_PREFIX": needs_prefix}
    launch(_prefix_attention_bwd_keys_kernel, grid, **common, **keys, **needs, **tile)
    if not needs_prefix or prefix_k is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, sum_by_set(partial, set_index, prefix_k)
