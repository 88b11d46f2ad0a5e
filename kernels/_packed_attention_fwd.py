"""Forward of packed_attention.py: a program takes a tile of whole classes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._attention import store_rows
from upt_fast.kernels._launch import launch
from upt_fast.kernels._packed_attention_common import arguments_of, load_tile, softmax


@triton.jit
def _packed_attention_fwd_kernel(
    q_ptr,  # (N, H, K), or (C, H, K) if LAST_ONLY
    k_ptr,  # (N, H, K)
    v_ptr,  # (N, H, K)
    prefix_k_ptr,  # (S, P, H, K)
    prefix_v_ptr,  # (S, P, H, K)
    tiles_ptr,  # (T, 5) int32: first row, end row, first class, end class, set
    classes_ptr,  # (C, 5) int32, the same with a class each
    first_rows_ptr,  # (N,) int32
    out_ptr,  # like q
    stride_q_row,
    stride_k_row,
    stride_v_row,
    stride_prefix_k_row,
    stride_prefix_v_row,
    P,
    H,
    K: tl.constexpr,
    LAST_ONLY: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    queries, mask, _, _, sees, q, k, v, poison = load_tile(
        q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, tiles_ptr, classes_ptr, first_rows_ptr,
        stride_q_row, stride_k_row, stride_v_row, stride_prefix_k_row, stride_prefix_v_row,
        P, K, LAST_ONLY, UPCAST, EVEN_K, BLOCK, BLOCK_K,
    )  # fmt: skip
    out = tl.dot(softmax(q, k, poison, sees).to(v.dtype), v, input_precision="ieee")
    store_rows(out_ptr + tl.program_id(1) * K, H * K, queries, mask, out, K, BLOCK_K)


def packed_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    tiles: Tensor,
    classes: Tensor,
    first_rows: Tensor,
) -> Tensor:
    """:func:`packed_attention` where whole classes fit in tiles, which are those of PackedTiles."""
    out = q.new_empty(q.shape)
    arguments = arguments_of(q, k, v, prefix_k, prefix_v, tiles, classes, first_rows)
    num_warps = 8 if q.dtype == torch.float32 else 4
    launch(_packed_attention_fwd_kernel, (len(tiles), q.shape[1]), out_ptr=out, **arguments, num_warps=num_warps)
    return out
