"""Backward's fused product of linear_gelu.py: du = (dy W) act'(u)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import rows_of
from upt_fast.kernels._linear_product import check, corner, halves, multiply, outputs_of, places, run_product
from upt_fast.kernels._linear_tiles import Tile, precision_of
from upt_fast.kernels.activation import activation_slope


@triton.jit
def _store_slope(
    product,
    u_ptr,
    du_ptr,
    row,
    col,
    stride_u_row,
    M,
    N,
    KIND: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
):
    if PIECES > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves(product, BLOCK_M, BLOCK_N)
        _store_slope(left, u_ptr, du_ptr, row, col, stride_u_row, M, N, KIND, EVEN_N, BLOCK_M, HALF, PIECES // 2)
        _store_slope(
            right, u_ptr, du_ptr, row, col + HALF, stride_u_row, M, N, KIND, EVEN_N, BLOCK_M, HALF, PIECES // 2
        )
    else:
        rows, cols, mask = places(row, col, M, N, EVEN_N, BLOCK_M, BLOCK_N)
        z = tl.load(u_ptr + rows * stride_u_row + cols, mask, other=0.0).to(tl.float32)
        tl.store(du_ptr + rows * N + cols, product * activation_slope(z, KIND), mask)


@triton.jit
def _linear_dact_kernel(
    dy_ptr,  # (M, K)
    w_ptr,  # (K, N), by its strides (N, K)
    u_ptr,  # (M, N)
    du_ptr,  # (M, N)
    stride_dy_row,
    stride_w_n,
    stride_w_k,
    stride_u_row,
    M,
    N,
    K,
    KIND: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        row, col = corner(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        da = multiply(
            dy_ptr, w_ptr, row, col, stride_dy_row, stride_w_n, stride_w_k, M, N, K,
            UPCAST, PRECISION, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _store_slope(da, u_ptr, du_ptr, row, col, stride_u_row, M, N, KIND, EVEN_N, BLOCK_M, BLOCK_N, PIECES)


def linear_dact(
    dy: Tensor, w: Tensor, u: Tensor, kind: str, tile: Tile | None = None, precision: str | None = None
) -> Tensor:
    """du = (dy W) act'(u).

    Args:
        dy: (..., K), the gradient behind the linear that follows the activation.
        w: (K, N), that linear's weight, any strides.
        u: (..., N), the activation's input.
        kind: a name of ACTIVATIONS.
        tile: None: the fastest.
        precision: a key of TILES; None: as PyTorch's products.
    Returns:
        (..., N) in dy's dtype.
    """
    N = outputs_of(w, 1)
    shape = (*dy.shape[:-1], N)
    check(dy, {"weight": (w, (dy.shape[-1], N)), "u": (u, shape)}, kind)
    dy_rows, u_rows = rows_of(dy), rows_of(u)
    du = dy.new_empty(shape)
    run_product(
        _linear_dact_kernel,
        "linear_dact",
        dy_rows,
        N,
        tile,
        precision or precision_of(dy.dtype),
        backward=True,
        dy_ptr=dy_rows,
        w_ptr=w,
        u_ptr=u_rows,
        du_ptr=du,
        stride_dy_row=dy_rows.stride(0),
        stride_w_n=w.stride(1),
        stride_w_k=w.stride(0),
        stride_u_row=u_rows.stride(0),
        KIND=kind,
    )
    return du
