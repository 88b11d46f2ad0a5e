"""What both attention kernels share: loads and stores of one head's rows, the sum over sets, settings, autograd.

Tensors (..., H, K) are taken as rows of D = H K numbers, one stride from row to row: a view for what products leave, a
copy of others. Keys are [prefix of the set ; own rows], read from two places and never copied together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import INTERPRETED, launch, rows_of

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
def load_keys(
    own_ptr,
    prefix_ptr,
    stride_row,
    stride_prefix_row,
    keys,
    P,
    L,
    K,
    MIXED: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Some of the P + L rows [prefix ; own]; none of the prefix unless MIXED."""
    own = (keys >= P) & (keys < P + L) if MIXED else keys < P + L
    x = load_rows(own_ptr, stride_row, keys - P, own, K, UPCAST, EVEN_K, BLOCK_K)
    if MIXED:
        x += load_rows(prefix_ptr, stride_prefix_row, keys, keys < P, K, UPCAST, EVEN_K, BLOCK_K)
    return x


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


def sum_by_set(partial: Tensor, set_index: Tensor | None, prefix: Tensor) -> Tensor:
    """Gradients of two prefixes like `prefix`, from what each member of a set adds to them.

    Args:
        partial: (2, B, P, H, K) float32.
        set_index: (B,) integers, each member's set; None where S is 1.
        prefix: (S, P, H, K).
    Returns:
        (2, S, P, H, K) in the prefix's dtype: sums over the members of each set, in their order.
    """
    out = prefix.new_empty(2, *prefix.shape)
    columns = prefix[0].numel()
    launch(
        _sum_by_set_kernel,
        (2 * len(prefix), triton.cdiv(columns, 128)),
        partial_ptr=partial,
        set_ptr=set_index,
        out_ptr=out,
        stride_set=0 if set_index is None else set_index.stride(0),
        B=partial.shape[1],
        S=len(prefix),
        N=columns,
        HAS_SETS=set_index is not None,
        BLOCK_B=32,
        BLOCK_N=128,
        num_warps=4,
    )
    return out


def rows_of_heads(**tensors: Tensor) -> dict[str, Any]:
    """Kernel arguments `<name>_ptr` and `stride_<name>_row` of tensors (..., H, K), by name."""
    rows = {name: rows_of(t.flatten(-2)) for name, t in tensors.items()}
    strides = {f"stride_{name}_row": t.stride(0) for name, t in rows.items()}
    return {f"{name}_ptr": t for name, t in rows.items()} | strides


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


def needed_gradients(
    needs: tuple[bool, ...], compute: Callable[[bool, bool, bool], tuple[Tensor, ...]]
) -> list[Tensor | None]:
    """Gradients of (q, k, v, prefix_k, prefix_v): compute(q, own rows, prefixes) tells those that are needed."""
    dq, dk, dv, dprefix = compute(needs[0], needs[1] or needs[2], needs[3] or needs[4])
    both = dprefix.unbind() if needs[3] or needs[4] else (None, None)
    return [d if need else None for d, need in zip((dq, dk, dv, *both), needs, strict=True)]


def empty_gradients(q: Tensor, k: Tensor, needs_q: bool, needs_own: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for those of q, k and v that are needed, like them; the others have no numbers."""
    shapes = [tuple(t.shape) if need else (0,) for t, need in ((q, needs_q), (k, needs_own), (k, needs_own))]
    dq, dk, dv = (q.new_empty(shape) for shape in shapes)
    return dq, dk, dv


def describe(**tensors: Tensor | None) -> str:
    """Shapes, dtypes and devices, for errors."""
    return ", ".join(f"{n} {tuple(t.shape)} {t.dtype} {t.device}" for n, t in tensors.items() if t is not None)
