"""What the kernels of prefix_attention.py share: where sequences are, who sees what, tiles and arguments."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._attention import dot_settings, rows_of_heads

# (BLOCK_M, BLOCK_N, num_warps, num_stages) by precision and BLOCK_K > 64
Tiles = dict[tuple[str, bool], tuple[int, int, int, int]]


@triton.jit
def sequence(classes_ptr, number, Q, L, PACKED: tl.constexpr, LAST_ONLY: tl.constexpr):
    """First query, first own row, and how many queries and own rows, of a sequence."""
    query, row = number * Q, number * L
    if PACKED:
        row = tl.load(classes_ptr + number * 5).to(tl.int64)
        L = tl.load(classes_ptr + number * 5 + 1) - row.to(tl.int32)
        query = number if LAST_ONLY else row
        Q = 1 if LAST_ONLY else L
    return query, row, Q, L


@triton.jit
def visible(rows, keys, P, Q, L, CAUSAL: tl.constexpr):
    """Which keys of [prefix ; L own rows] the last Q of them see, or all do."""
    visible = (keys < P + L)[None, :]
    if CAUSAL:
        visible &= (keys - P)[None, :] <= (rows + (L - Q))[:, None]
    return visible


def tile_of(tiles: Tiles, x: Tensor, common: dict[str, Any], **few: bool) -> dict[str, int]:
    """The tile for rows of x; few: blocks of which a program keeps no more than 16 rows."""
    kind = common["PRECISION"] if x.dtype == torch.float32 else "half"
    tile = dict(
        zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tiles[kind, common["BLOCK_K"] > 64], strict=True)
    )
    for block, is_few in few.items():
        tile |= {block: 16, "num_stages": 1} if is_few else {}
    return tile


def arguments_of(
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
