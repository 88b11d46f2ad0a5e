"""Attention of each image's queries over [prompts of its set ; its own rows], prompts' keys and values read in place.

    out_i = sum_j softmax_j(q_i . k_j) v_j  over the P keys of the image's set and the L of its own, q already scaled

Elsewhere the prompts are copied in front of each image's keys and values: per layer 2 (P + L) D numbers written and
read again. Here no program copies: block n of the keys [prompts ; own rows] takes rows below P from the set and the
others from the image, so that prompts fill up a block that the last few rows would leave nearly empty. Softmax is
online (Dao, arXiv 2307.08691), its powers those of 2, the largest score subtracted before the factor log2(e): after it
the rounding of large scores doubles the gradients' error. Forward keeps the output and each query's log-sum-exp, in two
parts.

Backward has a program per block of queries, for their gradient and delta_i = dout_i . out_i, and one per block of keys,
which goes through all queries. Only gradients that are needed are computed: where the rows are constants, as in the
first layer, only blocks with prompts run. The prompts' gradients come as one fp32 sum per image, which a last kernel
adds over the images of each set, in order: no atomics, equal runs give equal bits.

The same kernels take packed sequences, causal, whose rows stand one behind the other (packed_attention.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import DTYPES, INTERPRETED, Workload, launch

LOG2E = tl.constexpr(1.4426950408889634)
MAX_HEAD_DIM = 128


@triton.jit
def load_rows(ptr, stride_row, rows, mask, K, UPCAST: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """(rows, BLOCK_K), zero where the mask (rows,) or the head dimension K ends."""
    cols = tl.arange(0, BLOCK_K)[None, :]
    at = ptr + rows[:, None] * stride_row + cols
    x = tl.load(at, mask[:, None] if EVEN_K else mask[:, None] & (cols < K), other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def store_rows(ptr, stride_row, rows, mask, x, K, BLOCK_K: tl.constexpr):
    cols = tl.arange(0, BLOCK_K)[None, :]
    tl.store(ptr + rows[:, None] * stride_row + cols, x, mask[:, None] & (cols < K))


@triton.jit
def _load_keys(
    k_ptr,
    v_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
    stride_k_row,
    stride_v_row,
    stride_prefix_k_row,
    stride_prefix_v_row,
    keys,
    P,
    L,
    K,
    MIXED: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Keys and values of the P + L rows [prefix ; own]; none of the prefix unless MIXED."""
    own = (keys >= P) & (keys < P + L) if MIXED else keys < P + L
    k = load_rows(k_ptr, stride_k_row, keys - P, own, K, UPCAST, EVEN_K, BLOCK_K)
    v = load_rows(v_ptr, stride_v_row, keys - P, own, K, UPCAST, EVEN_K, BLOCK_K)
    if MIXED:
        k += load_rows(prefix_k_ptr, stride_prefix_k_row, keys, keys < P, K, UPCAST, EVEN_K, BLOCK_K)
        v += load_rows(prefix_v_ptr, stride_prefix_v_row, keys, keys < P, K, UPCAST, EVEN_K, BLOCK_K)
    return k, v


@triton.jit
def _sequence(tiles_ptr, number, Q, L, PACKED: tl.constexpr, LAST_ONLY: tl.constexpr):
    """First query, first own row, and how many queries and own rows, of a sequence."""
    query, row = number * Q, number * L
    if PACKED:
        row = tl.load(tiles_ptr + number * 5).to(tl.int64)
        L = tl.load(tiles_ptr + number * 5 + 1) - row.to(tl.int32)
        query = tl.load(tiles_ptr + number * 5 + 2).to(tl.int64) if LAST_ONLY else row
        Q = 1 if LAST_ONLY else L
    return query, row, Q, L


@triton.jit
def _visible(rows, keys, P, Q, L, CAUSAL: tl.constexpr):
    """Which keys of [prefix ; L own rows] the last Q of them see, or all do."""
    visible = (keys < P + L)[None, :]
    if CAUSAL:
        visible &= (keys - P)[None, :] <= (rows + (L - Q))[:, None]
    return visible


@triton.jit
def _attend(q, k, v, visible, out, peak, total, PRECISION: tl.constexpr):
    """One block of keys of the online softmax."""
    s = tl.where(visible, tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, axis=1))
    p = tl.exp2((s - new_peak[:, None]) * LOG2E)
    scale = tl.exp2((peak - new_peak) * LOG2E)
    total = total * scale + tl.sum(p, axis=1)
    out = tl.dot(p.to(v.dtype), v, out * scale[:, None], input_precision=PRECISION)
    return out, new_peak, total


@triton.jit
def _prefix_attention_fwd_kernel(
    q_ptr,  # (B, Q, H, K)
    k_ptr,  # (B, L, H, K)
    v_ptr,  # (B, L, H, K)
    prefix_k_ptr,  # (S, P, H, K)
    prefix_v_ptr,  # (S, P, H, K)
    set_ptr,  # (B,) integers or None
    tiles_ptr,  # (B, 5) int32 if PACKED: first and end row, first and end sequence, set
    out_ptr,  # (B, Q, H, K)
    softmax_ptr,  # (B, H, 2, Q) fp32: largest score, sum of e^(others - it)
    stride_q_image,
    stride_q_row,
    stride_q_head,
    stride_k_image,
    stride_k_row,
    stride_k_head,
    stride_v_image,
    stride_v_row,
    stride_v_head,
    stride_prefix_k_set,
    stride_prefix_k_row,
    stride_prefix_k_head,
    stride_prefix_v_set,
    stride_prefix_v_row,
    stride_prefix_v_head,
    stride_set,
    Q,  # queries of each sequence, or of the longest if PACKED
    L,
    P,
    H,
    K,
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
    image, head = (pair // H).to(tl.int64), pair % H
    begin = tl.program_id(0) % blocks * BLOCK_M
    first_query, first_row, Q, L = _sequence(tiles_ptr, image, Q, L, PACKED, LAST_ONLY)
    if PACKED:  # noqa: SIM102
        if begin >= Q:  # of a sequence that is shorter than others
            return
    rows = begin + tl.arange(0, BLOCK_M)
    prefix_set = tl.load(set_ptr + image * stride_set).to(tl.int64) if HAS_SETS else image * 0
    q_ptr += (first_query * stride_q_row if PACKED else image * stride_q_image) + head * stride_q_head
    k_ptr += (first_row * stride_k_row if PACKED else image * stride_k_image) + head * stride_k_head
    v_ptr += (first_row * stride_v_row if PACKED else image * stride_v_image) + head * stride_v_head
    prefix_k_ptr += prefix_set * stride_prefix_k_set + head * stride_prefix_k_head
    prefix_v_ptr += prefix_set * stride_prefix_v_set + head * stride_prefix_v_head
    q = load_rows(q_ptr, stride_q_row, rows, rows < Q, K, UPCAST, EVEN_K, BLOCK_K)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for own_only in tl.static_range(2):
        for n in range(tl.cdiv(P, BLOCK_N) * BLOCK_N if own_only else 0, P + L if own_only else P, BLOCK_N):
            keys = n + tl.arange(0, BLOCK_N)
            k, v = _load_keys(
                k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr,
                stride_k_row, stride_v_row, stride_prefix_k_row, stride_prefix_v_row,
                keys, P, L, K, not own_only, UPCAST, EVEN_K, BLOCK_K,
            )  # fmt: skip
            visible = _visible(rows, keys, P, Q, L, PACKED)
            out, peak, total = _attend(q, k, v, visible, out, peak, total, PRECISION)
    store_rows(out_ptr + (first_query * H + head) * K, H * K, rows, rows < Q, out / total[:, None], K, BLOCK_K)
    statistics = 2 * (first_query * H + head * Q) + rows
    tl.store(softmax_ptr + statistics, peak, rows < Q)
    tl.store(softmax_ptr + statistics + Q, total, rows < Q)


@triton.jit
def _dscores(q, k, v, dout, peak, total, delta, visible, PRECISION: tl.constexpr):
    """Gradient of the scores of queries (axis 0) with keys (axis 1)."""
    p = tl.exp2((tl.dot(q, tl.trans(k), input_precision=PRECISION) - peak[:, None]) * LOG2E) * (1 / total)[:, None]
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    return tl.where(visible, p * (dp - delta[:, None]), 0.0)


@triton.jit
def _prefix_attention_bwd_queries_kernel(
    q_ptr,  # (B, Q, H, K)
    k_ptr,  # (B, L, H, K)
    v_ptr,  # (B, L, H, K)
    prefix_k_ptr,  # (S, P, H, K)
    prefix_v_ptr,  # (S, P, H, K)
    set_ptr,  # (B,) integers or None
    tiles_ptr,  # (B, 5) int32 if PACKED: first and end row, first and end sequence, set
    out_ptr,  # (B, Q, H, K)
    softmax_ptr,  # (B, H, 2, Q) fp32: largest score, sum of e^(others - it)
    dout_ptr,  # (B, Q, H, K)
    dq_ptr,  # (B, Q, H, K), written if NEEDS_Q
    delta_ptr,  # (B, H, Q) fp32
    stride_q_image,
    stride_q_row,
    stride_q_head,
    stride_k_image,
    stride_k_row,
    stride_k_head,
    stride_v_image,
    stride_v_row,
    stride_v_head,
    stride_prefix_k_set,
    stride_prefix_k_row,
    stride_prefix_k_head,
    stride_prefix_v_set,
    stride_prefix_v_row,
    stride_prefix_v_head,
    stride_set,
    stride_dout_image,
    stride_dout_row,
    stride_dout_head,
    Q,  # queries of each sequence, or of the longest if PACKED
    L,
    P,
    H,
    K,
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
    image, head = (pair // H).to(tl.int64), pair % H
    begin = tl.program_id(0) % blocks * BLOCK_M
    first_query, first_row, Q, L = _sequence(tiles_ptr, image, Q, L, PACKED, LAST_ONLY)
    if PACKED:  # noqa: SIM102
        if begin >= Q:  # of a sequence that is shorter than others
            return
    rows = begin + tl.arange(0, BLOCK_M)
    mask = rows < Q
    dout_ptr += (first_query * stride_dout_row if PACKED else image * stride_dout_image) + head * stride_dout_head
    dout = load_rows(dout_ptr, stride_dout_row, rows, mask, K, UPCAST, EVEN_K, BLOCK_K)
    out = load_rows(out_ptr + (first_query * H + head) * K, H * K, rows, mask, K, UPCAST, EVEN_K, BLOCK_K)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + first_query * H + head * Q + rows, delta, mask)
    if NEEDS_Q:
        prefix_set = tl.load(set_ptr + image * stride_set).to(tl.int64) if HAS_SETS else image * 0
        q_ptr += (first_query * stride_q_row if PACKED else image * stride_q_image) + head * stride_q_head
        k_ptr += (first_row * stride_k_row if PACKED else image * stride_k_image) + head * stride_k_head
        v_ptr += (first_row * stride_v_row if PACKED else image * stride_v_image) + head * stride_v_head
        prefix_k_ptr += prefix_set * stride_prefix_k_set + head * stride_prefix_k_head
        prefix_v_ptr += prefix_set * stride_prefix_v_set + head * stride_prefix_v_head
        q = load_rows(q_ptr, stride_q_row, rows, mask, K, UPCAST, EVEN_K, BLOCK_K)
        statistics = 2 * (first_query * H + head * Q) + rows
        peak = tl.load(softmax_ptr + statistics, mask, other=0.0)
        total = tl.load(softmax_ptr + statistics + Q, mask, other=1.0)
        dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for own_only in tl.static_range(2):
            for n in range(tl.cdiv(P, BLOCK_N) * BLOCK_N if own_only else 0, P + L if own_only else P, BLOCK_N):
                keys = n + tl.arange(0, BLOCK_N)
                k, v = _load_keys(
                    k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr,
                    stride_k_row, stride_v_row, stride_prefix_k_row, stride_prefix_v_row,
                    keys, P, L, K, not own_only, UPCAST, EVEN_K, BLOCK_K,
                )  # fmt: skip
                ds = _dscores(q, k, v, dout, peak, total, delta, _visible(rows, keys, P, Q, L, PACKED), PRECISION)
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        store_rows(dq_ptr + (first_query * H + head) * K, H * K, rows, mask, dq, K, BLOCK_K)


@triton.jit
def _prefix_attention_bwd_keys_kernel(
    q_ptr,  # (B, Q, H, K)
    k_ptr,  # (B, L, H, K)
    v_ptr,  # (B, L, H, K)
    prefix_k_ptr,  # (S, P, H, K)
    prefix_v_ptr,  # (S, P, H, K)
    set_ptr,  # (B,) integers or None
    tiles_ptr,  # (B, 5) int32 if PACKED: first and end row, first and end sequence, set
    softmax_ptr,  # (B, H, 2, Q) fp32: largest score, sum of e^(others - it)
    dout_ptr,  # (B, Q, H, K)
    delta_ptr,  # (B, H, Q) fp32
    dk_ptr,  # (B, L, H, K), written if NEEDS_OWN
    dv_ptr,  # (B, L, H, K), written if NEEDS_OWN
    partial_ptr,  # (2, B, P, H, K) fp32, written if NEEDS_PREFIX
    stride_q_image,
    stride_q_row,
    stride_q_head,
    stride_k_image,
    stride_k_row,
    stride_k_head,
    stride_v_image,
    stride_v_row,
    stride_v_head,
    stride_prefix_k_set,
    stride_prefix_k_row,
    stride_prefix_k_head,
    stride_prefix_v_set,
    stride_prefix_v_row,
    stride_prefix_v_head,
    stride_set,
    stride_dout_image,
    stride_dout_row,
    stride_dout_head,
    B,
    Q,  # queries of each sequence, or of the longest if PACKED
    L,
    P,
    H,
    K,
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
    image, head = (pair // H).to(tl.int64), pair % H
    begin = first + tl.program_id(0) % blocks * BLOCK_N
    first_query, first_row, Q, L = _sequence(tiles_ptr, image, Q, L, PACKED, LAST_ONLY)
    end = P + L if NEEDS_OWN else P
    if PACKED:  # noqa: SIM102
        if begin >= end:  # of a sequence that is shorter than others
            return
    keys = begin + tl.arange(0, BLOCK_N)
    own = (keys >= P) & (keys < end)
    k_ptr += (first_row * stride_k_row if PACKED else image * stride_k_image) + head * stride_k_head
    v_ptr += (first_row * stride_v_row if PACKED else image * stride_v_image) + head * stride_v_head
    k = load_rows(k_ptr, stride_k_row, keys - P, own, K, UPCAST, EVEN_K, BLOCK_K)
    v = load_rows(v_ptr, stride_v_row, keys - P, own, K, UPCAST, EVEN_K, BLOCK_K)
    if begin < P:
        prefix_set = tl.load(set_ptr + image * stride_set).to(tl.int64) if HAS_SETS else image * 0
        prefix_k_ptr += prefix_set * stride_prefix_k_set + head * stride_prefix_k_head
        prefix_v_ptr += prefix_set * stride_prefix_v_set + head * stride_prefix_v_head
        k += load_rows(prefix_k_ptr, stride_prefix_k_row, keys, keys < P, K, UPCAST, EVEN_K, BLOCK_K)
        v += load_rows(prefix_v_ptr, stride_prefix_v_row, keys, keys < P, K, UPCAST, EVEN_K, BLOCK_K)

    q_ptr += (first_query * stride_q_row if PACKED else image * stride_q_image) + head * stride_q_head
    dout_ptr += (first_query * stride_dout_row if PACKED else image * stride_dout_image) + head * stride_dout_head
    statistics = first_query * H + head * Q
    dk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in range(0, Q, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        mask = rows < Q
        q = load_rows(q_ptr, stride_q_row, rows, mask, K, UPCAST, EVEN_K, BLOCK_K)
        dout = load_rows(dout_ptr, stride_dout_row, rows, mask, K, UPCAST, EVEN_K, BLOCK_K)
        peak = tl.load(softmax_ptr + 2 * statistics + rows, mask, other=0.0)
        total = tl.load(softmax_ptr + 2 * statistics + Q + rows, mask, other=1.0)
        delta = tl.load(delta_ptr + statistics + rows, mask, other=0.0)
        p = tl.exp2((tl.dot(k, tl.trans(q), input_precision=PRECISION) - peak[None, :]) * LOG2E) * (1 / total)[None, :]
        if PACKED:
            p = tl.where(tl.trans(_visible(rows, keys, P, Q, L, True)), p, 0.0)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk, input_precision=PRECISION)
    store_rows(dk_ptr + (first_row * H + head) * K, H * K, keys - P, own, dk, K, BLOCK_K)
    store_rows(dv_ptr + (first_row * H + head) * K, H * K, keys - P, own, dv, K, BLOCK_K)
    if begin < P:
        shared = keys < P
        store_rows(partial_ptr + (image * P * H + head) * K, H * K, keys, shared, dk, K, BLOCK_K)
        store_rows(partial_ptr + ((B + image) * P * H + head) * K, H * K, keys, shared, dv, K, BLOCK_K)


@triton.jit
def _sum_by_set_kernel(
    partial_ptr,  # (2, B, N) fp32
    set_ptr,  # (B,) integers, or None
    out_ptr,  # (2, S, N)
    stride_set,
    B,
    S,
    N,
    HAS_SETS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)  # set, or S + set
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, B, BLOCK_B):
        members = first + tl.arange(0, BLOCK_B)
        chosen = members < B
        if HAS_SETS:
            chosen &= tl.load(set_ptr + members * stride_set, chosen, other=-1) == place % S
        mask = chosen[:, None] & (cols[None, :] < N)
        rows = place // S * B + members
        total += tl.sum(tl.load(partial_ptr + rows[:, None] * N + cols[None, :], mask, other=0.0), axis=0)
    tl.store(out_ptr + place * N + cols, total, cols < N)


def sum_by_set(partial: Tensor, set_index: Tensor | None, sets: int, dtype: torch.dtype) -> Tensor:
    """(2, S, ...) sums of partial (2, B, ...) over the members of each set, in their order; set_index (B,) or None."""
    out = partial.new_empty(2, sets, *partial.shape[2:], dtype=dtype)
    columns = partial[0, 0].numel() if partial.shape[1] else out[0, 0].numel()
    launch(
        _sum_by_set_kernel,
        (2 * sets, triton.cdiv(columns, 128)),
        partial_ptr=partial,
        set_ptr=set_index,
        out_ptr=out,
        stride_set=0 if set_index is None else set_index.stride(0),
        B=partial.shape[1],
        S=sets,
        N=columns,
        HAS_SETS=set_index is not None,
        BLOCK_B=32,
        BLOCK_N=128,
        num_warps=4,
    )
    return out


def strides(lead: str, **tensors: Tensor) -> dict[str, int]:
    """Stride arguments of tensors (lead, row, head, K); without a lead of (row, head, K)."""
    dims = (lead, "row", "head") if lead else ("row", "head")
    return {f"stride_{name}_{d}": t.stride(i) for name, t in tensors.items() for i, d in enumerate(dims)}


def unit_stride(x: Tensor) -> Tensor:
    """x where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dot_settings(x: Tensor) -> dict[str, Any]:
    """How rows of x (..., K) are multiplied: float32 as torch.set_float32_matmul_precision allows."""
    K = x.shape[-1]
    block_k = max(16, triton.next_power_of_2(K))
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "PRECISION": "tf32" if tf32 else "ieee",
        "UPCAST": INTERPRETED and x.dtype == torch.bfloat16,  # the interpreter cannot multiply bfloat16
        "EVEN_K": block_k == K,
        "BLOCK_K": block_k,
    }


# (BLOCK_M, BLOCK_N, num_warps, num_stages) by precision and BLOCK_K > 64: the largest without spills on any target of
# kernels/report.py; of a program in which the queries stay, forward and backward, and of one in which the keys stay
FORWARD_TILES = {
    ("half", False): (64, 64, 4, 2),
    ("half", True): (64, 32, 4, 2),
    ("tf32", False): (64, 32, 4, 2),
    ("tf32", True): (64, 16, 4, 1),
    ("ieee", False): (32, 32, 4, 1),
    ("ieee", True): (32, 16, 8, 1),
}
QUERY_TILES = {
    ("half", False): (64, 32, 4, 2),
    ("half", True): (64, 32, 4, 1),
    ("tf32", False): (32, 32, 4, 1),
    ("tf32", True): (32, 16, 4, 1),
    ("ieee", False): (16, 32, 4, 1),
    ("ieee", True): (16, 16, 8, 1),
}
KEY_TILES = {
    ("half", False): (32, 64, 4, 2),
    ("half", True): (32, 64, 4, 2),
    ("tf32", False): (32, 32, 4, 1),
    ("tf32", True): (16, 64, 8, 1),
    ("ieee", False): (16, 32, 4, 1),
    ("ieee", True): (16, 32, 4, 1),
}
# where the causal mask of packed sequences takes registers
PACKED_FORWARD_TILES = FORWARD_TILES | {("ieee", False): (32, 32, 8, 1), ("ieee", True): (16, 16, 8, 1)}
PACKED_KEY_TILES = KEY_TILES | {("half", True): (32, 32, 4, 2)}


def _tile(
    tiles: dict[tuple[str, bool], tuple[int, int, int, int]], x: Tensor, common: dict[str, Any], **few: bool
) -> dict[str, int]:
    """The tile for rows of x; few: blocks of which a program keeps no more than 16 rows."""
    kind = common["PRECISION"] if x.dtype == torch.float32 else "half"
    tile = dict(
        zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tiles[kind, common["BLOCK_K"] > 64], strict=True)
    )
    for block, is_few in few.items():
        tile |= {block: 16, "num_stages": 1} if is_few else {}
    return tile


class Packed(NamedTuple):
    """What tells packed sequences from images: rows (1, N, H, K), one behind the other."""

    tiles: Tensor  # (B, 5) int32: first row, end row, first sequence, end sequence, set; a sequence each
    longest: int  # rows of the longest
    last_only: bool  # queries (1, B, H, K) are of each sequence's last row alone


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None,
    packed: Packed | None,
) -> dict[str, Any]:
    """The kernels' common arguments."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    (_, Q, H, K), L = q.shape, k.shape[1]
    if packed is not None:
        L, Q = packed.longest, 1 if packed.last_only else packed.longest
    P = 0 if prefix_k is None else prefix_k.shape[1]
    # without prompts no program reads them
    prefix_k = k[:1] if prefix_k is None else unit_stride(prefix_k)
    prefix_v = v[:1] if prefix_v is None else unit_stride(prefix_v)
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "prefix_k_ptr": prefix_k,
        "prefix_v_ptr": prefix_v,
        "set_ptr": set_index,
        "tiles_ptr": None if packed is None else packed.tiles,
        **strides("image", q=q, k=k, v=v),
        **strides("set", prefix_k=prefix_k, prefix_v=prefix_v),
        "stride_set": 0 if set_index is None else set_index.stride(0),
        "Q": Q,
        "L": L,
        "P": P,
        "H": H,
        "K": K,
        "PACKED": packed is not None,
        "LAST_ONLY": packed is not None and packed.last_only,
        "HAS_SETS": set_index is not None,
        **dot_settings(q),
    }


def prefix_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None,
    packed: Packed | None = None,
) -> tuple[Tensor, Tensor]:
    """The output (B, Q, H, K), and of each query's scores the largest and the sum of e^(others - it).

    The last two, log-sum-exp in two parts, are (B, H, 2, Q) float32; if packed, (H, 2, Q) by sequence. As one number
    they would lose digits that the gradients of float32 inputs need.
    """
    B, Q, H, _ = q.shape
    out, softmax = q.new_empty(q.shape), q.new_empty(B, H, 2, Q, dtype=torch.float32)
    common = _inputs(q, k, v, prefix_k, prefix_v, set_index, packed)
    tiles = FORWARD_TILES if packed is None else PACKED_FORWARD_TILES
    tile = _tile(tiles, q, common, BLOCK_M=common["Q"] <= 16)
    sequences = B if packed is None else len(packed.tiles)
    grid = (triton.cdiv(common["Q"], tile["BLOCK_M"]) * sequences * H,)
    launch(_prefix_attention_fwd_kernel, grid, **common, out_ptr=out, softmax_ptr=softmax, **tile)
    return out, softmax


def prefix_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None,
    out: Tensor,
    softmax: Tensor,
    needs_q: bool,
    needs_own: bool,
    needs_prefix: bool,
    packed: Packed | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, of k and v, and of both prefixes (2, S, P, H, K); empty where they are not needed."""
    dout = unit_stride(dout)
    common = _inputs(q, k, v, prefix_k, prefix_v, set_index, packed)
    delta = torch.empty_like(softmax[:, :, 0])
    common |= {"softmax_ptr": softmax, "dout_ptr": dout, "delta_ptr": delta, **strides("image", dout=dout)}
    sequences, P, H = len(q) if packed is None else len(packed.tiles), common["P"], common["H"]
    dq = q.new_empty(q.shape if needs_q else 0)
    tile = _tile(QUERY_TILES, q, common, BLOCK_M=common["Q"] <= 16)
    grid = (triton.cdiv(common["Q"], tile["BLOCK_M"]) * sequences * H,)
    queries = {"out_ptr": out, "dq_ptr": dq, "NEEDS_Q": needs_q}
    launch(_prefix_attention_bwd_queries_kernel, grid, **common, **queries, **tile)

    dk, dv = (q.new_empty(k.shape if needs_own else 0) for _ in "kv")
    partial = q.new_empty(2, sequences, P if needs_prefix else 0, *q.shape[2:], dtype=torch.float32)
    rows = P * needs_prefix + common["L"] * needs_own
    tile = _tile(KEY_TILES if packed is None else PACKED_KEY_TILES, q, common, BLOCK_N=rows <= 16)
    launch(
        _prefix_attention_bwd_keys_kernel,
        (triton.cdiv(rows, tile["BLOCK_N"]) * sequences * H,),
        **common,
        dk_ptr=dk,
        dv_ptr=dv,
        partial_ptr=partial,
        B=sequences,
        NEEDS_OWN=needs_own,
        NEEDS_PREFIX=needs_prefix,
        **tile,
    )
    if not needs_prefix or prefix_k is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, sum_by_set(partial, set_index, len(prefix_k), q.dtype)


@torch.library.custom_op("upt_fast::prefix_attention_fwd", mutates_args=())
def _fwd(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, set_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    return prefix_attention_fwd(q, k, v, prefix_k, prefix_v, set_index)


@torch.library.custom_op("upt_fast::prefix_attention_bwd", mutates_args=())
def _bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None,
    out: Tensor,
    softmax: Tensor,
    needs_q: bool,
    needs_own: bool,
    needs_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = needs_q, needs_own, needs_prefix
    return prefix_attention_bwd(dout, q, k, v, prefix_k, prefix_v, set_index, out, softmax, *needs)


@_fwd.register_fake
def _(q, k, v, prefix_k, prefix_v, set_index):  # type: ignore[no-untyped-def]
    B, Q, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, 2, Q, dtype=torch.float32)


@_bwd.register_fake
def _(dout, q, k, v, prefix_k, prefix_v, set_index, out, softmax, needs_q, needs_own, needs_prefix):  # type: ignore[no-untyped-def]
    dprefix = (2, *prefix_k.shape) if needs_prefix and prefix_k is not None else (0,)
    own = k.shape if needs_own else (0,)
    return tuple(q.new_empty(shape) for shape in (q.shape if needs_q else (0,), own, own, dprefix))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def needed_gradients(needs: tuple[bool, ...], compute: Any) -> list[Tensor | None]:
    """Gradients of (q, k, v, prefix_k, prefix_v): compute(q, own rows, prefixes) tells those that are needed."""
    dq, dk, dv, dprefix = compute(needs[0], needs[1] or needs[2], needs[3] or needs[4])
    both = dprefix.unbind() if needs[3] or needs[4] else (None, None)
    return [d if need else None for d, need in zip((dq, dk, dv, *both), needs, strict=True)]


def _backward(ctx, dout, _):  # type: ignore[no-untyped-def]
    if dout is None:
        return (None,) * 6
    saved = ctx.saved_tensors
    return *needed_gradients(ctx.needs_input_grad[:5], lambda *needs: _bwd(dout, *saved, *needs)), None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def describe(**tensors: Tensor | None) -> str:
    """Shapes, dtypes and devices, for errors."""
    return ", ".join(f"{n} {tuple(t.shape)} {t.dtype} {t.device}" for n, t in tensors.items() if t is not None)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None = None,
) -> Tensor:
    """Attention of each image's queries over [prompts of its set ; its own rows], without mask.

    Args:
        q: (B, Q, H, K) queries, already scaled; K at most 128. Any strides, as have k, v and the prefixes.
        k: (B, L, H, K) keys of the image's own rows.
        v: (B, L, H, K) values.
        prefix_k: (S, P, H, K) keys of S prompt sets, or None.
        prefix_v: (S, P, H, K) values, or None.
        set_index: (B,) int64, each image's set, 0 ... S - 1; None where S is 1. For prompts per image: 0 ... B - 1.
    Returns:
        (B, Q, H, K) in q's dtype.
    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    given = {"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v}
    floats = [t for t in given.values() if t is not None]
    fits = (
        q.ndim == k.ndim == 4
        and q.shape[-1] <= MAX_HEAD_DIM
        and k.shape == v.shape == (q.shape[0], k.shape[1], *q.shape[2:])
        and (prefix_k is None) == (prefix_v is None)
        and all(t.dtype == q.dtype and t.device == q.device for t in floats)
        and q.dtype in DTYPES
    )
    if fits and prefix_k is not None and prefix_v is not None:
        fits = prefix_k.ndim == 4 and prefix_k.shape == prefix_v.shape and prefix_k.shape[2:] == q.shape[2:]
        sets = prefix_k.shape[:1]
        if set_index is None:
            fits &= sets == (1,)
        else:
            fits &= set_index.shape == q.shape[:1] and set_index.dtype == torch.int64 and set_index.device == q.device
    if not fits:
        raise ValueError(
            f"{describe(**given, set_index=set_index)}; wanted q (B, Q, H, K), k and v (B, L, H, K), both prefixes "
            f"(S, P, H, K) or None, of one dtype (float32, float16 or bfloat16) and device, K at most {MAX_HEAD_DIM}, "
            "and set_index (B,) int64 unless S is 1"
        )
    prompts = 0 if prefix_k is None else prefix_k.shape[1]
    if k.shape[1] + prompts == 0 and q.numel():
        raise ValueError(f"{describe(**given)}; wanted at least one key for each query")
    return _fwd(q, k, v, prefix_k, prefix_v, None if prefix_k is None else set_index)[0]


def workloads() -> Iterator[Workload]:
    """ViT-B/16 at batch 32 with four prompts, the pooled row alone, H/14's heads; text of long classes."""
    sets = torch.empty(32, dtype=torch.int64, device="meta")
    for name, Q, L, H, K in (("B/16", 197, 197, 12, 64), ("pooled", 1, 197, 12, 64), ("H/14", 257, 257, 16, 80)):
        yield from _workloads(name, (32, Q, H, K), (32, L, H, K), 4, sets, None)
    tiles = torch.empty(7, 5, dtype=torch.int32, device="meta")
    for K in (64, 80):
        shape = 1, 490, 8, K
        yield from _workloads(f"long text of heads of {K}", shape, shape, 1, tiles[:, 4], Packed(tiles, 70, False))


def _workloads(
    name: str, queries: tuple[int, ...], keys: tuple[int, ...], prompts: int, sets: Tensor, packed: Packed | None
) -> Iterator[Workload]:
    for dtype, precision in ((torch.float32, "highest"), (torch.float32, "high"), (torch.bfloat16, "highest")):
        label = f"{name} {'tf32' if precision == 'high' else str(dtype).removeprefix('torch.')}"
        q = torch.empty(queries, dtype=dtype, device="meta")
        _, k, v = torch.empty(*keys[:2], 3, *keys[2:], dtype=dtype, device="meta").unbind(2)
        prefixes = torch.empty(2, prompts, 2, *keys[2:], dtype=dtype, device="meta").unbind(2)
        inputs = q, k, v, *prefixes, sets
        saved = q, *inputs, q, torch.empty(queries[0], queries[2], 2, queries[1], device="meta")
        yield f"forward {label}", with_precision(precision, lambda a=inputs: prefix_attention_fwd(*a, packed))
        for kind, needs in (("all", (True, True, True)), ("prompts", (False, False, True))):
            run = with_precision(precision, lambda a=saved, n=needs: prefix_attention_bwd(*a, *n, packed))
            yield f"backward {kind} {label}", run


def with_precision(precision: str, run: Callable[[], object]) -> Callable[[], object]:
    """run() under torch.set_float32_matmul_precision."""

    def call() -> object:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return run()
        finally:
            torch.set_float32_matmul_precision(before)

    return call
