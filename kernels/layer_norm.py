"""LayerNorm without affine, with the residual sum before it in the same pass.

    s = x + y;  h = (s - mean(s)) / sqrt(var(s) + eps)

(Ba et al. 2016, arXiv 1607.06450; the affine is folded into the next linear.) Apart, sum and normalisation read 3 D and
write 2 D numbers per row; here they read 2 D and write 2 D, and backward needs h and 1 / std only: neither s nor mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import Workload, launch, row_tile, rows_of
from upt_fast.kernels._rows import load_tile, store_tile


@triton.jit
def normalize(x, mask, N, eps):
    """h and 1 / std of the rows of a tile (BLOCK_M, BLOCK_N) that is zero outside mask."""
    centred = tl.where(mask, x - (tl.sum(x, axis=1) / N)[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / N + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def normalize_bwd(dh, h, rstd, N):
    """The gradient of the rows that :func:`normalize` took, from that of h; tiles are zero outside their mask."""
    mean_dh, mean_dh_h = tl.sum(dh, axis=1) / N, tl.sum(dh * h, axis=1) / N
    return rstd[:, None] * (dh - mean_dh[:, None] - h * mean_dh_h[:, None])


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # (M, N)
    y_ptr,  # (M, N) or None
    s_ptr,  # (M, N) or None
    h_ptr,  # (M, N)
    rstd_ptr,  # (M,) fp32
    stride_x_row,
    stride_y_row,
    M,
    N,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    s = load_tile(x_ptr, stride_x_row, rows, cols, mask)
    if HAS_RESIDUAL:
        s += load_tile(y_ptr, stride_y_row, rows, cols, mask)
        store_tile(s_ptr, N, rows, cols, s, mask)
    h, rstd = normalize(s, mask, N, eps)
    store_tile(h_ptr, N, rows, cols, h, mask)
    tl.store(rstd_ptr + rows, rstd, rows < M)


@triton.jit
def _layer_norm_bwd_kernel(
    ds_ptr,  # (M, N) or None
    dh_ptr,  # (M, N)
    h_ptr,  # (M, N)
    rstd_ptr,  # (M,) fp32
    dx_ptr,  # (M, N)
    stride_ds_row,
    stride_dh_row,
    M,
    N,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    dh = load_tile(dh_ptr, stride_dh_row, rows, cols, mask)
    h = load_tile(h_ptr, N, rows, cols, mask)
    rstd = tl.load(rstd_ptr + rows, rows < M, other=0.0)
    dx = normalize_bwd(dh, h, rstd, N)
    if HAS_RESIDUAL:
        dx += load_tile(ds_ptr, stride_ds_row, rows, cols, mask)
    store_tile(dx_ptr, N, rows, cols, dx, mask)


def layer_norm_fwd(x: Tensor, y: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """s (empty without y), h and 1 / std of rows x (..., N) plus y."""
    rows, residual = rows_of(x), None if y is None else rows_of(y)
    s = x.new_empty(0 if y is None else x.shape)
    h, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    tile = row_tile(*rows.shape)
    launch(
        _layer_norm_fwd_kernel,
        (triton.cdiv(len(rows), tile["BLOCK_M"]),),
        x_ptr=rows,
        y_ptr=residual,
        s_ptr=None if y is None else s,
        h_ptr=h,
        rstd_ptr=rstd,
        stride_x_row=rows.stride(0),
        stride_y_row=0 if residual is None else residual.stride(0),
        M=rows.shape[0],
        N=rows.shape[1],
        eps=eps,
        HAS_RESIDUAL=y is not None,
        **tile,
    )
    return s, h, rstd


def layer_norm_bwd(ds: Tensor | None, dh: Tensor, h: Tensor, rstd: Tensor) -> Tensor:
    """dx (..., N), which is dy too, from the gradients of s (or None) and h."""
    dh_rows, ds_rows = rows_of(dh), None if ds is None else rows_of(ds)
    dx = h.new_empty(h.shape)
    tile = row_tile(*dh_rows.shape)
    launch(
        _layer_norm_bwd_kernel,
        (triton.cdiv(len(dh_rows), tile["BLOCK_M"]),),
        ds_ptr=ds_rows,
        dh_ptr=dh_rows,
        h_ptr=h,
        rstd_ptr=rstd,
        dx_ptr=dx,
        stride_ds_row=0 if ds_rows is None else ds_rows.stride(0),
        stride_dh_row=dh_rows.stride(0),
        M=dh_rows.shape[0],
        N=dh_rows.shape[1],
        HAS_RESIDUAL=ds is not None,
        **tile,
    )
    return dx


_fwd = torch.library.custom_op("upt_fast::layer_norm_fwd", layer_norm_fwd, mutates_args=())
_bwd = torch.library.custom_op("upt_fast::layer_norm_bwd", layer_norm_bwd, mutates_args=())


@_fwd.register_fake
def _(x: Tensor, y: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    s = x.new_empty(0 if y is None else x.shape)
    return s, x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_bwd.register_fake
def _(ds: Tensor | None, dh: Tensor, h: Tensor, rstd: Tensor) -> Tensor:
    return h.new_empty(h.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, y, _ = inputs
    _, h, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, rstd)
    ctx.y_dtype = None if y is None else y.dtype


def _backward(ctx, ds, dh, _):  # type: ignore[no-untyped-def]
    h, rstd = ctx.saved_tensors
    dx = ds if dh is None else _bwd(None if ctx.y_dtype is None else ds, dh, h, rstd)
    return dx, None if ctx.y_dtype is None or dx is None else dx.to(ctx.y_dtype), None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """x (..., N) normalised over its last dimension, in x's dtype."""
    return _fwd(x, None, eps)[1]


def add_layer_norm(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y and the same normalised, (..., N) each, in x's dtype; y has x's shape."""
    if x.shape != y.shape:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)}; wanted one shape")
    s, h, _ = _fwd(x, y, eps)
    return s, h


def workloads() -> Iterator[Workload]:
    """Rows of ViT-B/16's and L/14's image towers at batch 32, with and without residual."""
    for name, rows, width in (("B/16", 32 * 201, 768), ("L/14", 32 * 261, 1024)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.empty(rows, width, dtype=dtype, device="meta")
            rstd = torch.empty(rows, dtype=torch.float32, device="meta")
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            yield f"forward {label}", lambda x=x: layer_norm_fwd(x, x, 1e-5)
            yield f"backward {label}", lambda x=x, rstd=rstd: layer_norm_bwd(x, x, x, rstd)
