"""Tiles of the products in linear_gelu.py: which there are, which fit on a GPU, and which is taken unmeasured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """A program's part of the output, block_m by block_n, of which it sums block_k products at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# by how numbers are multiplied, the largest first; the kernel report compiles each, and none spills. In tf32 128 x 256
# does, and so does 128 x 128 by four warps.
TILES = {
    "half": (
        Tile(128, 256, 64, 8, 4),
        Tile(128, 256, 32, 8, 4),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 32, 8, 3),
        Tile(64, 128, 64, 8, 3),
        Tile(64, 64, 64, 4, 3),
    ),
    "tf32": (Tile(128, 128, 32, 8, 4), Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    "ieee": (Tile(128, 128, 16, 8, 3), Tile(64, 64, 16, 4, 3), Tile(32, 64, 16, 8, 2)),
}


def precision_of(dtype: torch.dtype) -> str:
    """A key of TILES: how numbers of this dtype are multiplied; float32 as PyTorch's own products are."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tiles_that_fit(precision: str, limit: int) -> list[Tile]:
    """The tiles of TILES[precision] whose operands fit in limit bytes of shared memory."""
    size = 2 if precision == "half" else 4
    return [t for t in TILES[precision] if t.num_stages * (t.block_m + t.block_n) * t.block_k * size <= limit]


def default_tile(tiles: Sequence[Tile], M: int, N: int, multiprocessors: int) -> Tile:
    """The first of tiles of which an (M, N) output has one for each multiprocessor; else the last."""
    counts = (triton.cdiv(M, t.block_m) * triton.cdiv(N, t.block_n) for t in tiles)
    return next((t for t, count in zip(tiles, counts, strict=True) if count >= multiprocessors), tiles[-1])
