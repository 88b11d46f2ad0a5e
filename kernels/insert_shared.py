"""Keys or values of packed sequences behind the rows that the sequences of a set share, in one buffer.

    buffer = [shared[set(c)] ; own rows of c]  for c = 0 ... C - 1

Backward takes the own rows' gradients back and adds the shared ones' over each set's sequences, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import INTERPRETED, Workload, launch, row_tile, rows_of
from upt_fast.kernels._rows import load_tile, store_tile


@triton.jit
def _gather_rows_kernel(
    own_ptr,  # (N, D)
    shared_ptr,  # (S * P, D)
    source_ptr,  # (R,) int64: own row, or -1 - shared row
    buffer_ptr,  # (R, D)
    stride_own_row,
    stride_shared_row,
    R,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    source = tl.load(source_ptr + rows, rows < R, other=0)
    mask = (rows[:, None] < R) & (cols[None, :] < D)
    own, shared = mask & (source >= 0)[:, None], mask & (source < 0)[:, None]
    value = tl.load(own_ptr + source[:, None] * stride_own_row + cols[None, :], own, other=0.0)
    value += tl.load(shared_ptr + (-1 - source)[:, None] * stride_shared_row + cols[None, :], shared, other=0.0)
    store_tile(buffer_ptr, D, rows, cols, value, mask)


@triton.jit
def _sum_shared_kernel(
    grad_ptr,  # (R, D)
    first_ptr,  # (C,) int64: buffer row where sequence c begins
    bounds_ptr,  # (S + 1,) int64: sequences of set s are bounds[s] ... bounds[s + 1] - 1
    dshared_ptr,  # (S * P, D)
    stride_grad_row,
    P,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)  # set * P + row
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(bounds_ptr + place // P), tl.load(bounds_ptr + place // P + 1)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for c in range(begin, end, BLOCK_M):
        sequences = c + tl.arange(0, BLOCK_M)
        rows = tl.load(first_ptr + sequences, sequences < end, other=0) + place % P
        mask = (sequences < end)[:, None] & (cols[None, :] < D)
        total += tl.sum(load_tile(grad_ptr, stride_grad_row, rows, cols, mask), axis=0)
    tl.store(dshared_ptr + place * D + cols, total, cols < D)


def insert_shared_fwd(own: Tensor, shared: Tensor, source: Tensor) -> Tensor:
    """The buffer (R, ...) whose row r is own[source[r]] or, for a negative source, shared row -1 - source[r]."""
    buffer = own.new_empty(len(source), *own.shape[1:])
    own_rows, shared_rows = _flat(own, 1), _flat(shared, 2)
    tile = row_tile(*buffer.flatten(1).shape)
    launch(
        _gather_rows_kernel,
        (triton.cdiv(len(source), tile["BLOCK_M"]),),
        own_ptr=own_rows,
        shared_ptr=shared_rows,
        source_ptr=source,
        buffer_ptr=buffer,
        stride_own_row=own_rows.stride(0),
        stride_shared_row=shared_rows.stride(0),
        R=len(source),
        D=own_rows.shape[1],
        **tile,
    )
    return buffer


def insert_shared_bwd(
    grad: Tensor, own_rows: Tensor, first_rows: Tensor, bounds: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the own rows (N, ...), by index, and of the shared rows (S, length, ...), summed over sequences."""
    sets = len(bounds) - 1
    dshared = grad.new_empty(sets, length, *grad.shape[1:])
    rows = _flat(grad, 1)
    block_n = min(128, triton.next_power_of_2(rows.shape[1])) if not INTERPRETED else 1024
    launch(
        _sum_shared_kernel,
        (sets * length, triton.cdiv(rows.shape[1], block_n)),
        grad_ptr=rows,
        first_ptr=first_rows,
        bounds_ptr=bounds,
        dshared_ptr=dshared,
        stride_grad_row=rows.stride(0),
        P=length,
        D=rows.shape[1],
        BLOCK_M=32,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return grad[own_rows], dshared


def _flat(x: Tensor, lead: int) -> Tensor:
    """x with its first `lead` dimensions as rows and the rest as contiguous columns."""
    return rows_of(x.flatten(lead).flatten(0, lead - 1) if lead > 1 else x.flatten(1))


_fwd = torch.library.custom_op("upt_fast::insert_shared_fwd", insert_shared_fwd, mutates_args=())
_bwd = torch.library.custom_op("upt_fast::insert_shared_bwd", insert_shared_bwd, mutates_args=())


@_fwd.register_fake
def _(own: Tensor, shared: Tensor, source: Tensor) -> Tensor:
    return own.new_empty(source.shape[0], *own.shape[1:])


@_bwd.register_fake
def _(grad: Tensor, own_rows: Tensor, first_rows: Tensor, bounds: Tensor, length: int) -> tuple[Tensor, Tensor]:
    own = grad.new_empty(own_rows.shape[0], *grad.shape[1:])
    return own, grad.new_empty(bounds.shape[0] - 1, length, *grad.shape[1:])


class _InsertShared(torch.autograd.Function):
    """See :func:`insert_shared`."""

    @staticmethod
    def forward(ctx, own, shared, source, own_rows, first_rows, bounds):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(own_rows, first_rows, bounds)
        ctx.length = shared.shape[1]
        return _fwd(own, shared, source)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        down, dshared = _bwd(grad, *ctx.saved_tensors, ctx.length)
        return down, dshared, None, None, None, None


def insert_shared(
    own: Tensor, shared: Tensor, source: Tensor, own_rows: Tensor, first_rows: Tensor, bounds: Tensor
) -> Tensor:
    """Keys or values of packed sequences behind the rows that each set's sequences share, in one buffer.

    Args:
        own: (N, ...) rows of all sequences.
        shared: (S, P, ...).
        source: (R,) int64, R = N + P C: for each buffer row the own row, or -1 - (set * P + shared row).
        own_rows: (N,) int64: for each own row its buffer row.
        first_rows: (C,) int64: for each sequence its first buffer row.
        bounds: (S + 1,) int64: sequences bounds[s] ... bounds[s + 1] - 1 are set s's.
    Returns:
        (R, ...)
    """
    return _InsertShared.apply(own, shared, source, own_rows, first_rows, bounds)


def workloads() -> Iterator[Workload]:
    """The text towers' key buffers of ViT-B/16 and L/14 at 1000 classes."""
    for name, heads in (("B/16", 8), ("L/14", 12)):
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            own = torch.empty(4233, heads, 64, dtype=dtype, device="meta")
            shared = torch.empty(1, 5, heads, 64, dtype=dtype, device="meta")
            buffer = torch.empty(9233, heads, 64, dtype=dtype, device="meta")
            index = {n: torch.empty(n, dtype=torch.int64, device="meta") for n in (9233, 4233, 1000, 2)}
            yield f"keys forward {label}", lambda o=own, s=shared, i=index: insert_shared_fwd(o, s, i[9233])
            yield (
                f"keys backward {label}",
                lambda b=buffer, i=index: insert_shared_bwd(b, i[4233], i[1000], i[2], 5),
            )
