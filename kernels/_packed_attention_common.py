"""What both directions of packed_attention.py share: a tile of whole classes, its softmax, the kernels' arguments."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._attention import LOG2E, dot_settings, load_keys, load_rows, rows_of_heads

from upt_fast.engine.layout import TILE_ROWS


@triton.jit
def finite(x):
    """x with 0 for what is not finite, and for each row NaN where it has such a number, else 0."""
    poison = tl.sum(x.to(tl.float32) * 0.0, axis=1)
    return tl.where(tl.abs(x) < float("inf"), x, 0.0).to(x.dtype), poison


@triton.jit
def load_tile(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
    tiles_ptr,
    classes_ptr,
    first_rows_ptr,
    stride_q_row,
    stride_k_row,
    stride_v_row,
    stride_prefix_k_row,
    stride_prefix_v_row,
    P,
    K,
    LAST_ONLY: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """This program's tile: queries and their mask, first and end row, who sees what; q, k, v, and who is poisoned."""
    tile = tiles_ptr + tl.program_id(0) * 5
    head = tl.program_id(1)
    first, end = tl.load(tile).to(tl.int64), tl.load(tile + 1).to(tl.int64)
    places = tl.arange(0, BLOCK)
    if LAST_ONLY:
        queries = tl.load(tile + 2).to(tl.int64) + places
        mask = queries < tl.load(tile + 3)
        rows = tl.load(classes_ptr + queries * 5 + 1, mask, other=1).to(tl.int64) - 1
    else:
        queries = first + places
        mask = queries < end
        rows = queries
    starts = tl.load(first_rows_ptr + rows, mask, other=0)
    keys = first + places - P
    sees = (places < P)[None, :] | (
        (places >= P)[None, :] & (keys[None, :] >= starts[:, None]) & (keys[None, :] <= rows[:, None])
    )
    prefix_row = tl.load(tile + 4).to(tl.int64) * P
    q, poison_q = finite(load_rows(q_ptr + head * K, stride_q_row, queries, mask, K, UPCAST, EVEN_K, BLOCK_K))
    k, poison_k = finite(
        load_keys(
            k_ptr + first * stride_k_row + head * K, prefix_k_ptr + prefix_row * stride_prefix_k_row + head * K,
            stride_k_row, stride_prefix_k_row, places, P, end - first, K, True, UPCAST, EVEN_K, BLOCK_K,
        )
    )  # fmt: skip
    v, poison_v = finite(
        load_keys(
            v_ptr + first * stride_v_row + head * K, prefix_v_ptr + prefix_row * stride_prefix_v_row + head * K,
            stride_v_row, stride_prefix_v_row, places, P, end - first, K, True, UPCAST, EVEN_K, BLOCK_K,
        )
    )  # fmt: skip
    poison = poison_q[:, None] + (poison_k + poison_v)[None, :]
    return queries, mask, first, end, sees & mask[:, None], q, k, v, poison


@triton.jit
def softmax(q, k, poison, sees):
    """Probabilities of the keys that each query sees; 0 for others."""
    s = tl.where(sees, tl.dot(q, tl.trans(k), input_precision="ieee") * LOG2E + poison, float("-inf"))
    peak = tl.max(s, axis=1)
    # rows beyond the tile's see nothing
    p = tl.exp2(s - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
    total = tl.sum(p, axis=1)
    return tl.where(sees, p / tl.where(total == 0, 1.0, total)[:, None], 0.0)


def arguments_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    tiles: Tensor,
    classes: Tensor,
    first_rows: Tensor,
) -> dict[str, Any]:
    """Arguments that both kernels take, and settings."""
    settings = dot_settings(q)
    # tf32 would win nothing on tiles so small, and its operands fill the registers
    del settings["PRECISION"]
    return {
        **rows_of_heads(q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v),
        "tiles_ptr": tiles,
        "classes_ptr": classes,
        "first_rows_ptr": first_rows,
        "P": prefix_k.shape[1],
        "H": q.shape[1],
        "K": q.shape[2],
        "LAST_ONLY": len(q) != len(k),
        **settings,
        "BLOCK": TILE_ROWS,
    }
