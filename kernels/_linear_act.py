"""Forward's fused product of linear_gelu.py: a = act(x W^T + b), and what the activation was given."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import rows_of
from upt_fast.kernels._linear_product import check, corner, halves, multiply, outputs_of, places, run_product
from upt_fast.kernels._linear_tiles import Tile, precision_of
from upt_fast.kernels.activation import activate


@triton.jit
def _store_activation(
    product,
    b_ptr,
    u_ptr,
    a_ptr,
    row,
    col,
    M,
    N,
    KIND: tl.constexpr,
    HAS_U: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
):
    if PIECES > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves(product, BLOCK_M, BLOCK_N)
        _store_activation(left, b_ptr, u_ptr, a_ptr, row, col, M, N, KIND, HAS_U, EVEN_N, BLOCK_M, HALF, PIECES // 2)
        _store_activation(
            right, b_ptr, u_ptr, a_ptr, row, col + HALF, M, N, KIND, HAS_U, EVEN_N, BLOCK_M, HALF, PIECES // 2
        )
    else:
        rows, cols, mask = places(row, col, M, N, EVEN_N, BLOCK_M, BLOCK_N)
        b = tl.load(b_ptr + cols) if EVEN_N else tl.load(b_ptr + cols, cols < N, other=0.0)
        z = product + b.to(tl.float32)
        if HAS_U:
            tl.store(u_ptr + rows * N + cols, z, mask)
        tl.store(a_ptr + rows * N + cols, activate(z, KIND), mask)


@triton.jit
def _linear_act_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    b_ptr,  # (N,)
    u_ptr,  # (M, N) or None
    a_ptr,  # (M, N)
    stride_x_row,
    stride_w_n,
    stride_w_k,
    M,
    N,
    K,
    KIND: tl.constexpr,
    HAS_U: tl.constexpr,
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
        product = multiply(
            x_ptr, w_ptr, row, col, stride_x_row, stride_w_n, stride_w_k, M, N, K,
            UPCAST, PRECISION, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _store_activation(product, b_ptr, u_ptr, a_ptr, row, col, M, N, KIND, HAS_U, EVEN_N, BLOCK_M, BLOCK_N, PIECES)


def linear_act(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    kind: str,
    keep: bool = True,
    tile: Tile | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """act(u) and u = x W^T + b, which stays empty, (0,), unless it is to be kept.

    Args:
        x: (..., K).
        w: (N, K), any strides.
        b: (N,).
        kind: a name of ACTIVATIONS.
        keep: write u.
        tile: None: the fastest.
        precision: a key of TILES; None: as PyTorch's products.
    Returns:
        a and u, (..., N) in x's dtype.
    """
    N = outputs_of(w, 0)
    check(x, {"weight": (w, (N, x.shape[-1])), "bias": (b, (N,))}, kind)
    rows = rows_of(x)
    shape = (*x.shape[:-1], N)
    a, u = x.new_empty(shape), x.new_empty(shape if keep else 0)
    run_product(
        _linear_act_kernel,
        "linear_act" if keep else "linear_act without u",
        rows,
        N,
        tile,
        precision or precision_of(x.dtype),
        x_ptr=rows,
        w_ptr=w,
        b_ptr=b.contiguous(),
        u_ptr=u if keep else None,
        a_ptr=a,
        stride_x_row=rows.stride(0),
        stride_w_n=w.stride(0),
        stride_w_k=w.stride(1),
        KIND=kind,
        HAS_U=keep,
    )
    return a, u
