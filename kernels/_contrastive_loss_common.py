"""What both directions of contrastive_loss.py share: classes and labels of images, dot products, parts of a sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from upt_fast.kernels._launch import INTERPRETED

EPS = 1e-12  # as in F.normalize
# a sum is cut into at most so many parts, added up later, while its grid has fewer programs than a large GPU runs
MAX_SPLITS, PROGRAMS = 32, 128


@triton.jit
def targets_of(labels_ptr, ranges_ptr, images, B, C, HAS_RANGES: tl.constexpr):
    """First and end class of each image, within [0, C], and the class of its label; -1 where there is none."""
    mask = images < B
    label = tl.load(labels_ptr + images, mask, other=-1)
    start = tl.zeros_like(label)
    end = start + C
    if HAS_RANGES:
        start = tl.load(ranges_ptr + 2 * images, mask, other=0)
        end = tl.load(ranges_ptr + 2 * images + 1, mask, other=0)
    good = (start >= 0) & (end <= C) & (label >= 0) & (label < end - start)
    target = tl.where(good, start + label, -1)
    start = tl.where(mask, tl.minimum(tl.maximum(start, 0), C), C)
    end = tl.where(mask, tl.minimum(tl.maximum(end, 0), C), 0)
    return start.to(tl.int32), end.to(tl.int32), target.to(tl.int32)


@triton.jit
def dots_of(
    x_rows,  # (BLOCK_R,) pointers
    y_rows,  # (BLOCK_Q,) pointers
    E,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Dot products of rows of x and rows of y, E long: (BLOCK_R, BLOCK_Q) fp32."""
    dots = tl.zeros((BLOCK_R, BLOCK_Q), tl.float32)
    for k in range(0, E, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_rows[:, None] + cols, None if EVEN_K else cols < E, other=None if EVEN_K else 0.0)
        y = tl.load(y_rows[:, None] + cols, None if EVEN_K else cols < E, other=None if EVEN_K else 0.0)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        dots = tl.dot(x, tl.trans(y), dots, input_precision="ieee")
    return dots


def split_sum(programs: int, columns: int, block: int) -> tuple[int, int]:
    """Parts that a sum over columns is cut into, and the columns of each, in a grid of so many programs."""
    tiles = max(1, triton.cdiv(columns, block))
    chunk = triton.cdiv(tiles, max(1, min(tiles, MAX_SPLITS, PROGRAMS // max(1, programs)))) * block
    return max(1, triton.cdiv(columns, chunk)), chunk


def dot_settings(dtype: torch.dtype, E: int, block_k: int) -> dict[str, int]:
    # masked loads take more registers; the interpreter cannot multiply bfloat16
    block_k = block_k if E % block_k == 0 else max(16, block_k // 2)
    return {"UPCAST": INTERPRETED and dtype == torch.bfloat16, "EVEN_K": E % block_k == 0, "BLOCK_K": block_k}
