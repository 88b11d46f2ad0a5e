"""What the launches of the prompt transform share: the order of rows, tiles, and a product whose sums are split.

The M = I N rows of all layers are stacked, the visual ones first: row r < V = I (N - n_text) is a visual prompt, the
others are text prompts, so that either kind is one range. Matrices between launches lie by columns, (D, LD), LD being
M rounded up: a tile of rows is then contiguous for each of the numbers that are summed over, and Triton's products on
the ordinary units (float32 without tf32) read it from shared memory without conflicts of banks. What lies beyond row M
is never read into a sum over rows, nor stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels import _launch
from upt_fast.kernels._linear_tiles import precision_of

# the parameters as the kernels call them, in the order of prompt_transform's arguments; those that backward reads
_ATTENTION = ("in_w", "in_b", "out_w", "out_b")
_NORMS = ("norm1_w", "norm1_b", "norm2_w", "norm2_b")
NAMES = (*_ATTENTION, *_NORMS, "w1", "b1", "w2", "b2", "mlp_w", "mlp_b")
WEIGHTS = ("in_w", "out_w", "norm1_w", "norm2_w", "norm2_b", "w1", "w2", "mlp_w")

ROW_STEP = 32  # LD is a multiple of it, and each tile's rows divide it
MULTIPROCESSORS = 132  # of an H100


class Sizes(NamedTuple):
    """Of one call: layers I, prompts N of a layer, n_text of them for the text tower, widths D and W."""

    layers: int
    n: int
    n_text: int
    d: int
    w: int

    @property
    def rows(self) -> int:
        return self.layers * self.n

    @property
    def visual(self) -> int:
        return self.layers * (self.n - self.n_text)

    @property
    def ld(self) -> int:
        return triton.cdiv(max(self.rows, 1), ROW_STEP) * ROW_STEP

    @property
    def places(self) -> dict[str, int]:
        """Arguments of each kernel that has to find a row's layer."""
        return {"LAYER": self.n, "n_text": self.n_text, "V": self.visual, "LD": self.ld}


def tile(x: Tensor, rows: int, columns: int, whole_rows: bool = False, narrow: bool = False) -> dict[str, int]:
    """A program's part of a product (rows, columns) of numbers like x: few, the sums of each split over eight warps.

    Args:
        x: what is multiplied.
        rows: of the product.
        columns: of the product.
        whole_rows: at most 16 rows, for kernels that read them whole at first.
        narrow: at most 16 columns.
    """
    if _launch.INTERPRETED:  # which pays per program
        return {"SPLIT": 2, "BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1}
    block_m = 16 if whole_rows or rows <= 16 else 32
    if whole_rows:
        wide = rows > 16 and not narrow
    else:  # wide tiles read less; on the ordinary units they take so many registers that few programs run at once
        enough = triton.cdiv(rows, block_m) * triton.cdiv(columns, 32) >= MULTIPROCESSORS
        wide = enough and (x.dtype != torch.float32 or precision(x) == "tf32")
    return {
        "SPLIT": 8,
        "BLOCK_M": block_m,
        "BLOCK_N": 32 if wide else 16,
        "BLOCK_K": 16,
        "num_warps": 8,
        "num_stages": 2 if whole_rows else 3,
    }


def precision(x: Tensor) -> str:
    """How the kernels multiply numbers of x's dtype."""
    return "tf32" if precision_of(x.dtype) == "tf32" else "ieee"


def columns(like: Tensor, sizes: Sizes, count: int = 1, kept: bool = False) -> Tensor:
    """(count, D, LD), count matrices by columns; zero beyond row M where they are kept for backward.

    What an operation gives must be the same each time, also what nobody reads.
    """
    return (like.new_zeros if kept and sizes.ld > sizes.rows else like.new_empty)(count, sizes.d, sizes.ld)


@triton.jit
def prompt_of(rows, LAYER, n_text, V):
    """Where rows are in the learner's order, layer by layer with the text prompts first."""
    n_visual = LAYER - n_text
    j = rows - V
    visual = rows // tl.maximum(n_visual, 1) * LAYER + n_text + rows % tl.maximum(n_visual, 1)
    text = j // tl.maximum(n_text, 1) * LAYER + j % tl.maximum(n_text, 1)
    return tl.where(rows < V, visual, text)


@triton.jit
def rows_of_layer(layer, tokens, LAYER, n_text, V):
    """Rows of a layer's prompts, which stand in the learner's order."""
    return tl.where(tokens < n_text, V + layer * n_text + tokens, layer * (LAYER - n_text) + tokens - n_text)


@triton.jit
def split_sums(k, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr):
    """(SPLIT, BLOCK_K) places from k on: each part of a sum has a run of its own."""
    return k + tl.arange(0, SPLIT)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def weight_tile(w_ptr, cols, ks, N, K, stride_n, stride_k):
    """(SPLIT, BLOCK_K, BLOCK_N) of W^T, (N, K) by its strides; zero beyond."""
    mask = (ks < K)[:, :, None] & (cols < N)[None, None, :]
    return tl.load(w_ptr + cols[None, None, :] * stride_n + ks[:, :, None] * stride_k, mask, other=0.0)


@triton.jit
def multiply(
    a_ptr,  # its row r at r_offsets, from number to number stride_ak
    r_offsets,  # (BLOCK_M,)
    stride_ak,
    w_ptr,  # (N, K) by its strides
    cols,  # (BLOCK_N,)
    stride_wn,
    stride_wk,
    N,
    K,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of A W^T, (BLOCK_M, BLOCK_N) fp32."""
    sums = tl.zeros((SPLIT, BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, SPLIT * BLOCK_K):
        ks = split_sums(k, SPLIT, BLOCK_K)
        a = tl.load(a_ptr + r_offsets[None, :, None] + ks[:, None, :] * stride_ak, (ks < K)[:, None, :], other=0.0)
        w = weight_tile(w_ptr, cols, ks, N, K, stride_wn, stride_wk)
        sums = tl.dot(a, w, sums, input_precision=PRECISION)
    return tl.sum(sums, axis=0)
