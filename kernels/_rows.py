"""Whole rows in and out of a kernel: tiles of rows (BLOCK_M,) and columns (BLOCK_N,), a stride from row to row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, stride_row, rows, cols, mask):
    """(BLOCK_M, BLOCK_N) fp32, zero outside the mask."""
    return tl.load(ptr + rows[:, None] * stride_row + cols[None, :], mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, stride_row, rows, cols, x, mask):
    """x (BLOCK_M, BLOCK_N) where the mask is, rounded to the memory's dtype."""
    tl.store(ptr + rows[:, None] * stride_row + cols[None, :], x, mask)
