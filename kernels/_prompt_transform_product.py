"""A product of the prompt transform with what is done to its result: most launches of both directions."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import launch
from upt_fast.kernels._prompt_transform_common import Sizes, multiply, precision, prompt_of, tile


@triton.jit
def _prompt_product_kernel(
    a_ptr,  # rows of K numbers
    w_ptr,  # (N, K) by its strides
    bias_ptr,  # (N,) or None
    gate_ptr,  # (N, LD) or None
    add_ptr,  # as ADD says, or None
    gain_ptr,  # (N,) or None
    shift_ptr,  # (N,) or None
    out_ptr,  # as OUT says
    text_ptr,  # (M - V, N) or None: takes the rows from V on as well
    stride_wn,
    stride_wk,
    M,
    N,
    K,
    LAYER,
    n_text,
    V,
    LD,
    A: tl.constexpr,
    ADD: tl.constexpr,
    OUT: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = A W^T + bias, through relu, or zero where the gate is; + add, or + gain add + shift.

    Matrices lie by "columns", (., LD); by "rows"; or by rows of "prompts" in the learner's order. "visual" and "text"
    have only the first V rows and those from V on.
    """
    first = tl.program_id(0) * BLOCK_M
    rows, cols = first + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows beyond the last repeat it and are not stored: loads need no mask of rows
    known = tl.minimum(rows, M - 1)
    prompts = prompt_of(known, LAYER, n_text, V)
    if A == "columns":
        y = multiply(
            a_ptr, rows, LD, w_ptr, cols, stride_wn, stride_wk, N, K, PRECISION, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K
        )
    elif A == "visual":
        k = tl.where(first < V, K, 0)
        at = tl.maximum(tl.minimum(rows, V - 1), 0) * K
        y = multiply(a_ptr, at, 1, w_ptr, cols, stride_wn, stride_wk, N, k, PRECISION, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K)
        y = tl.where((rows < V)[:, None], y, 0.0)
    else:
        y = multiply(
            a_ptr, prompts * K, 1, w_ptr, cols, stride_wn, stride_wk, N, K, PRECISION, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K
        )
    inside = cols < N
    mask = (rows < M)[:, None] & inside[None, :]
    by_columns = rows[:, None] + cols[None, :] * LD
    by_prompts = prompts[:, None] * N + cols[None, :]
    of_text = (rows - V)[:, None] * N + cols[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, inside, other=0.0).to(tl.float32)[None, :]
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # NaN stays
    if gate_ptr is not None:
        y = tl.where(tl.load(gate_ptr + by_columns, mask, other=0.0) == 0, 0.0, y)
    if add_ptr is not None:
        if ADD == "columns":
            add = tl.load(add_ptr + by_columns, mask, other=0.0).to(tl.float32)
        elif ADD == "text":
            add = tl.load(add_ptr + of_text, mask & (rows >= V)[:, None], other=0.0).to(tl.float32)
        else:
            add = tl.load(add_ptr + by_prompts, mask, other=0.0).to(tl.float32)
        if gain_ptr is not None:
            add *= tl.load(gain_ptr + cols, inside, other=0.0).to(tl.float32)[None, :]
            add += tl.load(shift_ptr + cols, inside, other=0.0).to(tl.float32)[None, :]
        y += add
    if text_ptr is not None:
        tl.store(text_ptr + of_text, y, mask & (rows >= V)[:, None])
    if OUT == "columns":
        tl.store(out_ptr + by_columns, y, mask)
    elif OUT == "rows":
        tl.store(out_ptr + rows[:, None] * N + cols[None, :], y, mask)
    else:
        tl.store(out_ptr + by_prompts, y, mask)


def product(
    sizes: Sizes,
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    transposed: bool = False,
    rows: int | None = None,
    A: str = "columns",
    ADD: str = "columns",
    OUT: str = "columns",
    RELU: bool = False,
    **pointers: Any,
) -> None:
    """Launch it; pointers that are not given are None.

    Args:
        sizes: of the call.
        a: what is multiplied.
        weight: (N, K), or (K, N) where transposed; contiguous.
        out: takes the result.
        transposed: multiply by the weight instead of its transpose, as backward does.
        rows: M where it is not all rows.
        A: where a's rows are, as ADD and OUT say of add_ptr and out.
        RELU: through relu before anything is added.
        **pointers: of the kernel.
    """
    n, k = weight.shape[::-1] if transposed else weight.shape
    m = sizes.rows if rows is None else rows
    settings = tile(a, m, n)
    names = ("bias_ptr", "gate_ptr", "add_ptr", "gain_ptr", "shift_ptr", "text_ptr")
    launch(
        _prompt_product_kernel,
        (triton.cdiv(m, settings["BLOCK_M"]), triton.cdiv(n, settings["BLOCK_N"])),
        a_ptr=a,
        w_ptr=weight,
        out_ptr=out,
        **dict.fromkeys(names) | pointers,
        stride_wn=1 if transposed else k,
        stride_wk=n if transposed else 1,
        M=m,
        N=n,
        K=k,
        **sizes.places,
        A=A,
        ADD=ADD,
        OUT=OUT,
        RELU=RELU,
        PRECISION=precision(a),
        **settings,
    )
