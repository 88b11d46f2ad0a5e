"""Forward of prefix_attention.py: a program takes a block of one sequence's queries through all keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._attention import LOG2E, load_keys, load_rows, store_rows
from upt_fast.kernels._launch import launch
from upt_fast.kernels._prefix_attention_common import Tiles, arguments_of, sequence, tile_of, visible

# of those tried the largest without spills on any GPU of _targets.py
TILES: Tiles = {
    ("half", False): (64, 64, 4, 2),
    ("half", True): (64, 32, 4, 2),
    ("tf32", False): (32, 32, 8, 2),
    ("tf32", True): (64, 16, 4, 1),
    ("ieee", False): (32, 32, 8, 1),
    ("ieee", True): (16, 16, 8, 1),
}


@triton.jit
def _prefix_attention_fwd_kernel(
    q_ptr,  # (M, H, K): B times Q rows, or those of B classes one behind the other if PACKED
    k_ptr,  # (B, L, H, K), or (N, H, K) if PACKED
    v_ptr,  # as k
    prefix_k_ptr,  # (S, P, H, K)
    prefix_v_ptr,  # (S, P, H, K)
    set_ptr,  # (B,) integers or None
    classes_ptr,  # (B, 5) int32 if PACKED: first and end row, and more
    out_ptr,  # (M, H, K)
    softmax_ptr,  # (2, H, M) fp32: largest score, sum of e^(others - it)
    stride_q_row,
    stride_k_row,
    stride_v_row,
    stride_prefix_k_row,
    stride_prefix_v_row,
    stride_set,
    M,
    Q,  # queries of each sequence, or of the longest if PACKED
    L,
    P,
    H,
    K: tl.constexpr,
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
    prefix_row = tl.load(set_ptr + number * stride_set).to(tl.int64) * P if HAS_SETS else number * 0
    q_ptr += first_query * stride_q_row + head * K
    k_ptr += first_row * stride_k_row + head * K
    v_ptr += first_row * stride_v_row + head * K
    prefix_k_ptr += prefix_row * stride_prefix_k_row + head * K
    prefix_v_ptr += prefix_row * stride_prefix_v_row + head * K
    q = load_rows(q_ptr, stride_q_row, rows, rows < Q, K, UPCAST, EVEN_K, BLOCK_K)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
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
            s = tl.where(visible(rows, keys, P, Q, L, PACKED), s, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(s, axis=1))
            p = tl.exp2((s - new_peak[:, None]) * LOG2E)
            scale = tl.exp2((peak - new_peak) * LOG2E)
            total = total * scale + tl.sum(p, axis=1)
            out = tl.dot(p.to(v.dtype), v, out * scale[:, None], input_precision=PRECISION)
            peak = new_peak
    store_rows(out_ptr + (first_query * H + head) * K, H * K, rows, rows < Q, out / total[:, None], K, BLOCK_K)
    statistics = head.to(tl.int64) * M + first_query + rows
    tl.store(softmax_ptr + statistics, peak, rows < Q)
    tl.store(softmax_ptr + H * M + statistics, total, rows < Q)


def prefix_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None,
    classes: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor]:
    """:func:`prefix_attention`, or where `classes` tells first and end row of each of packed ones, causal over these.

    Args:
        q: (B, Q, H, K); packed: (N, H, K), or (C, H, K) of each class's last row alone.
        k: (B, L, H, K); packed: (N, H, K).
        v: as k.
        prefix_k: (S, P, H, K) or None.
        prefix_v: as prefix_k.
        set_index: (B,) integers, packed (C,), or None.
        classes: (C, 5) int32 of PackedTiles (upt_fast/engine/layout.py), or None.
        longest: rows of the longest class; not looked at where classes is None.
    Returns:
        the output like q, and of each query's scores the largest and the sum of e^(others - it), (2, H, B Q) float32.
    """
    out, softmax = q.new_empty(q.shape), q.new_empty(2, q.shape[-2], q.shape[:-2].numel(), dtype=torch.float32)
    sequences, common = arguments_of(q, k, v, prefix_k, prefix_v, set_index, classes, longest)
    tile = tile_of(TILES, q, common, BLOCK_M=common["Q"] <= 16)
    grid = (triton.cdiv(common["Q"], tile["BLOCK_M"]) * sequences * q.shape[-2],)
    launch(_prefix_attention_fwd_kernel, grid, **common, out_ptr=out, softmax_ptr=softmax, **tile)
    return out, softmax
