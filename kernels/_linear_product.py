"""A persistent matrix product to whose tiles an epilogue is added: what _linear_act.py and _linear_dact.py share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import DTYPES, INTERPRETED, launch, shared_limit
from upt_fast.kernels._linear_tiles import Tile, default_tile, tiles_that_fit
from upt_fast.kernels._tuning import tile_table
from upt_fast.kernels.activation import check_kind

INTERPRETER_TILE, INTERPRETER_PROGRAMS = Tile(64, 128, 64, 4, 1), 3
GROUP_ROWS = 8  # tiles


@triton.jit
def corner(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile: down a group of GROUP_M tiles, then to the next column of tiles."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    size = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    tile %= GROUP_M * tiles_n
    return (first + tile % size) * BLOCK_M, tile // size * BLOCK_N


@triton.jit
def multiply(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K) by its strides
    row,
    col,
    stride_x_row,
    stride_w_n,
    stride_w_k,
    M,
    N,
    K,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of x W^T: (BLOCK_M, BLOCK_N) fp32."""
    # rows beyond the last repeat it and are not stored: loads need no mask of rows
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)[:, None]
    cols = (col + tl.arange(0, BLOCK_N))[None, :]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + rows * stride_x_row + ks[None, :]
        w_ptrs = w_ptr + cols.to(tl.int64) * stride_w_n + ks[:, None].to(tl.int64) * stride_w_k
        x = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, ks[None, :] < K, other=0.0)
        w = tl.load(w_ptrs) if EVEN_K and EVEN_N else tl.load(w_ptrs, (ks[:, None] < K) & (cols < N), other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        product = tl.dot(x, w, product, input_precision=PRECISION)
    return product


@triton.jit
def halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def places(row, col, M, N, EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows, columns and mask of a tile."""
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    cols = (col + tl.arange(0, BLOCK_N))[None, :]
    return rows, cols, (rows < M) if EVEN_N else (rows < M) & (cols < N)


def _milliseconds(run: Callable[[], None]) -> float:
    try:
        return float(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median"))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # this GPU's compiler or driver refuses the tile, in one of many ways
        return float("inf")


@functools.cache
def _gpu(device: torch.device) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def _pieces(tile: Tile, backward: bool) -> int:
    """Pieces of the epilogue: of 32 numbers a thread, or 16 where backward's sums leave few registers."""
    numbers = tile.block_m * tile.block_n // (32 * tile.num_warps)
    return max(1, numbers // (16 if backward and numbers > 64 else 32))


def run_product(
    kernel: Any,
    name: str,
    rows: Tensor,
    N: int,
    tile: Tile | None,
    precision: str,
    backward: bool = False,
    **arguments: Any,
) -> None:
    """Launch a kernel on rows (M, K), with tile or the one that is best for the shape."""
    M, K = rows.shape
    multiprocessors = INTERPRETER_PROGRAMS if INTERPRETED else 132
    if rows.is_cuda:
        _, multiprocessors = _gpu(rows.device)

    def run(tile: Tile) -> None:
        # four warps leave room for a second program
        programs = multiprocessors * max(1, 8 // tile.num_warps)
        launch(
            kernel,
            (min(triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n), programs),),
            **arguments,
            M=M,
            N=N,
            K=K,
            UPCAST=INTERPRETED and rows.dtype == torch.bfloat16,  # the interpreter cannot multiply it
            PRECISION="tf32" if precision == "tf32" else "ieee",
            EVEN_N=N % tile.block_n == 0,
            EVEN_K=K % tile.block_k == 0,
            PIECES=_pieces(tile, backward),
            GROUP_M=GROUP_ROWS,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    if tile is None:
        tile = INTERPRETER_TILE if INTERPRETED else _best_tile(name, rows, N, precision, multiprocessors, run)
    run(tile)


def _best_tile(
    name: str, rows: Tensor, N: int, precision: str, multiprocessors: int, run: Callable[[Tile], None]
) -> Tile:
    """The fastest tile for rows (M, K), measured if need be; where nothing may be measured, the default one."""
    M, K = rows.shape
    tiles = tiles_that_fit(precision, shared_limit(rows.device))
    default = default_tile(tiles, M, N, multiprocessors)
    fixed = torch.are_deterministic_algorithms_enabled() or not rows.is_cuda or M == 0
    if fixed or torch.cuda.is_current_stream_capturing():
        return default
    gpu, _ = _gpu(rows.device)
    dtype = "tf32" if precision == "tf32" else str(rows.dtype).removeprefix("torch.")
    key = f"{name} {dtype} {max(64, triton.next_power_of_2(M))}x{N}x{K}"
    try:
        with torch.cuda.device_of(rows):
            return tile_table(gpu).fastest(key, tiles, lambda tile: _milliseconds(functools.partial(run, tile)))
    except torch.OutOfMemoryError:  # the measurement's own buffer
        return default


def check(x: Tensor, others: dict[str, tuple[Tensor, tuple[int, ...]]], kind: str) -> None:
    """Refuse tensors that differ from x (..., K) in dtype or device, or have not the shape that was wanted."""
    if x.dtype not in DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{str(x.dtype).removeprefix('torch.')} rows; wanted one of {wanted}")
    for name, (t, shape) in others.items():
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} {tuple(t.shape)} for rows {tuple(x.shape)}; wanted {shape}")
        if t.dtype != x.dtype or t.device != x.device:
            raise ValueError(f"{name} is {t.dtype} on {t.device}; wanted the rows' {x.dtype} on {x.device}")
    check_kind(kind)


def outputs_of(w: Tensor, dim: int) -> int:
    """A weight's number of outputs, in its dimension dim."""
    if w.dim() != 2:
        raise ValueError(f"a weight {tuple(w.shape)}; wanted two dimensions")
    return w.shape[dim]
