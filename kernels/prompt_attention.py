"""Attention of each image's queries over [prompts of its set ; its own rows], prompts' keys and values read in place.

    out_i = sum_j softmax_j(q_i . k_j) v_j  over the P keys of the image's set and the L of its own, q already scaled

Elsewhere the prompts are copied in front of each image's keys and values: per layer 2 (P + L) D numbers written and
read again. Here no program copies: block n of the keys [prompts ; own rows] takes rows below P from the set and the
others from the image, so that prompts fill up a block that the last few rows would leave nearly empty. Softmax is
online (Dao, arXiv 2307.08691). Powers are those of 2, the largest score subtracted before the factor log2(e): after it
the rounding of large scores doubles the gradients' error. Forward keeps the output and each query's log-sum-exp, in two
parts: as one number it would lose digits that the gradients of float32 inputs need.

Backward has a program per block of queries, for their gradient and delta_i = dout_i . out_i, and one per block of keys,
which goes through all queries. Only gradients that are needed are computed: where the rows are constants, as in the
first layer, only blocks with prompts run. The prompts' gradients come as one fp32 sum per image, which a last kernel
adds over the images of each set, in order: no atomics, equal runs give equal bits.

The same kernels take packed classes, causal, whose rows stand one behind the other (packed_attention.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._attention import (
    LOG2E,
    MAX_HEAD_DIM,
    describe,
    dot_settings,
    empty_gradients,
    load_keys,
    load_rows,
    needed_gradients,
    rows_of_heads,
    store_rows,
    sum_by_set,
)
from upt_fast.kernels._launch import DTYPES, Workload, launch

# (BLOCK_M, BLOCK_N, num_warps, num_stages) by precision and BLOCK_K > 64: of those tried the largest without spills on
# any target of kernels/report.py; of a program in which the queries stay, forward and backward, and of one in which the
# keys stay
FORWARD_TILES = {
    ("half", False): (64, 64, 4, 2),
    ("half", True): (64, 32, 4, 2),
    ("tf32", False): (32, 32, 8, 2),
    ("tf32", True): (64, 16, 4, 1),
    ("ieee", False): (32, 32, 8, 1),
    ("ieee", True): (16, 16, 8, 1),
}
QUERY_TILES = {
    ("half", False): (64, 32, 4, 2),
    ("half", True): (64, 32, 4, 1),
    ("tf32", False): (16, 32, 4, 1),
    ("tf32", True): (32, 16, 4, 1),
    ("ieee", False): (16, 32, 8, 1),
    ("ieee", True): (16, 16, 8, 1),
}
KEY_TILES = {
    ("half", False): (64, 64, 4, 2),
    ("half", True): (32, 32, 4, 1),
    ("tf32", False): (32, 32, 4, 1),
    ("tf32", True): (16, 64, 8, 1),
    ("ieee", False): (16, 16, 8, 1),
    ("ieee", True): (16, 16, 8, 1),
}


@triton.jit
def _sequence(classes_ptr, number, Q, L, PACKED: tl.constexpr, LAST_ONLY: tl.constexpr):
    """First query, first own row, and how many queries and own rows, of a sequence."""
    query, row = number * Q, number * L
    if PACKED:
        row = tl.load(classes_ptr + number * 5).to(tl.int64)
        L = tl.load(classes_ptr + number * 5 + 1) - row.to(tl.int32)
        query = number if LAST_ONLY else row
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
    first_query, first_row, Q, L = _sequence(classes_ptr, number, Q, L, PACKED, LAST_ONLY)
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
            s = tl.where(_visible(rows, keys, P, Q, L, PACKED), s, float("-inf"))
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
    first_query, first_row, Q, L = _sequence(classes_ptr, number, Q, L, PACKED, LAST_ONLY)
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
                ds = tl.where(_visible(rows, keys, P, Q, L, PACKED), p * (dp - delta[:, None]), 0.0)
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
    first_query, first_row, Q, L = _sequence(classes_ptr, number, Q, L, PACKED, LAST_ONLY)
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
            p = tl.where(tl.trans(_visible(rows, keys, P, Q, L, True)), p, 0.0)
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


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None,
    classes: Tensor | None,
    longest: int,
) -> tuple[int, dict[str, Any]]:
    """How many sequences there are, and the kernels' common arguments."""
    H, K = q.shape[-2:]
    last_only = classes is not None and len(q) != len(k)
    if classes is None:
        sequences, Q, L = len(q), q.shape[1], k.shape[1]
    else:
        sequences, Q, L = len(classes), 1 if last_only else longest, longest
    return sequences, {
        # without prompts no program reads them
        **rows_of_heads(q=q, k=k, v=v, prefix_k=k if prefix_k is None else prefix_k),
        **rows_of_heads(prefix_v=v if prefix_v is None else prefix_v),
        "set_ptr": set_index,
        "classes_ptr": classes,
        "stride_set": 0 if set_index is None else set_index.stride(0),
        "M": q.shape[:-2].numel(),
        "Q": Q,
        "L": L,
        "P": 0 if prefix_k is None else prefix_k.shape[1],
        "H": H,
        "K": K,
        "PACKED": classes is not None,
        "LAST_ONLY": last_only,
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
    sequences, common = _arguments(q, k, v, prefix_k, prefix_v, set_index, classes, longest)
    tile = _tile(FORWARD_TILES, q, common, BLOCK_M=common["Q"] <= 16)
    grid = (triton.cdiv(common["Q"], tile["BLOCK_M"]) * sequences * q.shape[-2],)
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
    classes: Tensor | None,
    out: Tensor,
    softmax: Tensor,
    longest: int,
    needs_q: bool,
    needs_own: bool,
    needs_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, of k and v, and of both prefixes (2, S, P, H, K); empty where they are not needed."""
    sequences, common = _arguments(q, k, v, prefix_k, prefix_v, set_index, classes, longest)
    (dq, dk, dv), delta = empty_gradients(q, k, needs_q, needs_own), torch.empty_like(softmax[0])
    common |= {**rows_of_heads(dout=dout), "softmax_ptr": softmax, "delta_ptr": delta}
    programs = sequences * q.shape[-2]
    tile = _tile(QUERY_TILES, q, common, BLOCK_M=common["Q"] <= 16 or not needs_q)
    grid = (triton.cdiv(common["Q"], tile["BLOCK_M"]) * programs,)
    queries = {"out_ptr": out, "dq_ptr": dq, "NEEDS_Q": needs_q}
    launch(_prefix_attention_bwd_queries_kernel, grid, **common, **queries, **tile)

    P = common["P"] * needs_prefix
    partial = q.new_empty(2, sequences, P, *q.shape[-2:], dtype=torch.float32)
    rows = P + common["L"] * needs_own
    tile = _tile(KEY_TILES, q, common, BLOCK_N=rows <= 16)
    grid = (triton.cdiv(rows, tile["BLOCK_N"]) * programs,)
    keys = {"dk_ptr": dk, "dv_ptr": dv, "partial_ptr": partial, "B": sequences}
    needs = {"NEEDS_OWN": needs_own, "NEEDS_PREFIX": needs_prefix}
    launch(_prefix_attention_bwd_keys_kernel, grid, **common, **keys, **needs, **tile)
    if not needs_prefix or prefix_k is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, sum_by_set(partial, set_index, prefix_k)


# as functions they are called on meta tensors too, see workloads()
attend = torch.library.custom_op("upt_fast::prefix_attention_fwd", prefix_attention_fwd, mutates_args=())
_bwd = torch.library.custom_op("upt_fast::prefix_attention_bwd", prefix_attention_bwd, mutates_args=())


@attend.register_fake
def _(q, *_):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(2, q.shape[-2], q.shape[:-2].numel(), dtype=torch.float32)


@_bwd.register_fake
def _(_, q, k, v, prefix_k, *others):  # type: ignore[no-untyped-def]
    needs_q, needs_own, needs_prefix = others[-3:]
    dprefix = (2, *prefix_k.shape) if needs_prefix and prefix_k is not None else (0,)
    return *empty_gradients(q, k, needs_q, needs_own), q.new_empty(dprefix)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.longest = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, dout, _):  # type: ignore[no-untyped-def]
    if dout is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    compute = functools.partial(_bwd, dout, *saved, ctx.longest)
    return *needed_gradients(ctx.needs_input_grad[:5], compute), *[None] * 3


attend.register_autograd(_backward, setup_context=_setup_context)


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
        q: (B, Q, H, K) queries, already scaled; K at most 128.
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
    return attend(q, k, v, prefix_k, prefix_v, None if prefix_k is None else set_index, None, 0)[0]


def workloads() -> Iterator[Workload]:
    """ViT-B/16 at batch 32 with four prompts, the pooled row alone, heads of other widths; text of long classes.

    Numbers of rows come to the kernels as arguments, so that 257, 577 and 785 tokens are compiled as 197 are.
    """
    sets = torch.empty(32, dtype=torch.int64, device="meta")
    for name, Q, L, H, K in (
        ("B/16", 197, 197, 12, 64),
        ("pooled", 1, 197, 12, 64),
        ("H/14", 257, 257, 16, 80),
        ("heads of 32", 785, 785, 12, 32),
        ("heads of 48", 197, 197, 4, 48),
        ("heads of 128", 577, 577, 16, 128),
    ):
        yield from _workloads(name, (32, Q, H, K), (32, L, H, K), sets)
    classes = torch.empty(7, 5, dtype=torch.int32, device="meta")
    for K in (64, 80):
        yield from _workloads(f"long text of heads of {K}", (490, 8, K), (490, 8, K), classes[:, 4], classes, 70, 1)


def _workloads(
    name: str,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    sets: Tensor,
    classes: Tensor | None = None,
    longest: int = 0,
    prompts: int = 4,
) -> Iterator[Workload]:
    for dtype, precision in ((torch.float32, "highest"), (torch.float32, "high"), (torch.bfloat16, "highest")):
        label = f"{name} {'tf32' if precision == 'high' else str(dtype).removeprefix('torch.')}"
        q = torch.empty(queries, dtype=dtype, device="meta")
        _, k, v = torch.empty(*keys[:-2], 3, *keys[-2:], dtype=dtype, device="meta").unbind(-3)
        prefixes = torch.empty(2, prompts, 2, *keys[-2:], dtype=dtype, device="meta").unbind(2)
        inputs = q, k, v, *prefixes, sets, classes
        softmax = torch.empty(2, queries[-2], q.shape[:-2].numel(), device="meta")
        yield f"forward {label}", functools.partial(_with_precision, precision, prefix_attention_fwd, *inputs, longest)
        backward = functools.partial(_with_precision, precision, prefix_attention_bwd, q, *inputs, q, softmax, longest)
        yield f"backward all {label}", functools.partial(backward, True, True, True)
        yield f"backward prompts {label}", functools.partial(backward, False, False, True)


def _with_precision(precision: str, run: Callable[..., object], *arguments: Any) -> object:
    """run(*arguments) under torch.set_float32_matmul_precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return run(*arguments)
    finally:
        torch.set_float32_matmul_precision(before)
