"""Deep prompts into the reserved rows of token streams, in place.

A stream x (B, T, D) holds P reserved rows in front of each sequence's own. Before a layer, in one pass,

    x[b, p]  = prompts[set(b), p]    p < P         (the layer's prompts replace what the last layer left there)
    x[b, t] += y[b, t]               t >= P        (the residual that the last layer's MLP computed)
    h        = (x - mean(x)) / sqrt(var(x) + eps)  (LayerNorm, its affine folded into the next linear)

Plain PyTorch slices and concatenates the stream before every layer (UPT, arXiv 2210.07225; VPT, arXiv 2203.12119), adds
the residual and normalises in three passes over it: 8 D numbers read or written per row against 4 D here, and the
prompts' rows are never copied per image. Backward keeps h and 1 / std only, leaves zeros in the reserved rows of the
stream's gradient, and adds the prompts' gradients over the images of each set in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import Workload, launch, row_tile, rows_of
from upt_fast.kernels._rows import load_tile, store_tile
from upt_fast.kernels.layer_norm import normalize, normalize_bwd


@triton.jit
def _insert_fwd_kernel(
    x_ptr,  # (B, T, D), changed in place
    y_ptr,  # (B, T, D) or None
    prompts_ptr,  # (S, P, D)
    set_ptr,  # (B,) int64 or None
    h_ptr,  # (B, T, D)
    rstd_ptr,  # (B, T) fp32
    stride_y_row,
    M,  # B * T
    T,
    P,
    D,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    row_mask = rows < M
    mask = row_mask[:, None] & (cols[None, :] < D)
    token = rows % T
    reserved = token < P
    own_mask, prompt_mask = mask & ~reserved[:, None], mask & reserved[:, None]
    x = load_tile(x_ptr, D, rows, cols, own_mask)
    if HAS_RESIDUAL:
        x += load_tile(y_ptr, stride_y_row, rows, cols, own_mask)
    prompt_rows = token
    if HAS_SETS:
        prompt_rows += P * tl.load(set_ptr + rows // T, row_mask & reserved, other=0)
    x += load_tile(prompts_ptr, D, prompt_rows, cols, prompt_mask)
    if HAS_RESIDUAL:
        store_tile(x_ptr, D, rows, cols, x, mask)
    else:
        store_tile(x_ptr, D, rows, cols, x, prompt_mask)
    h, rstd = normalize(x, mask, D, eps)
    store_tile(h_ptr, D, rows, cols, h, mask)
    tl.store(rstd_ptr + rows, rstd, row_mask)


@triton.jit
def _insert_bwd_stream_kernel(
    dx_ptr,  # (B, T, D) or None
    dh_ptr,  # (B, T, D)
    h_ptr,  # (B, T, D)
    rstd_ptr,  # (B, T) fp32
    din_ptr,  # (B, T, D)
    stride_dx_row,
    stride_dh_row,
    M,  # B * T
    T,
    P,
    D,
    HAS_DX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows[:, None] < M) & (cols[None, :] < D)
    own = mask & ((rows % T) >= P)[:, None]
    dh = load_tile(dh_ptr, stride_dh_row, rows, cols, own)
    h = load_tile(h_ptr, D, rows, cols, own)
    din = normalize_bwd(dh, h, tl.load(rstd_ptr + rows, rows < M, other=0.0), D)
    if HAS_DX:
        din += load_tile(dx_ptr, stride_dx_row, rows, cols, own)
    store_tile(din_ptr, D, rows, cols, tl.where(own, din, 0.0), mask)


@triton.jit
def _insert_bwd_prompts_kernel(
    dx_ptr,  # (B, T, D) or None
    dh_ptr,  # (B, T, D)
    h_ptr,  # (B, T, D)
    rstd_ptr,  # (B, T) fp32
    set_ptr,  # (B,) int64 or None
    dprompts_ptr,  # (S, P, D)
    stride_dx_row,
    stride_dh_row,
    B,
    T,
    P,
    D,
    HAS_DX: tl.constexpr,
    HAS_SETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)  # set * P + prompt
    cols = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, B, BLOCK_M):
        images = first + tl.arange(0, BLOCK_M).to(tl.int64)
        member = images < B
        if HAS_SETS:
            member &= tl.load(set_ptr + images, member, other=-1) == place // P
        rows = images * T + place % P
        mask = member[:, None] & (cols[None, :] < D)
        dh = load_tile(dh_ptr, stride_dh_row, rows, cols, mask)
        h = load_tile(h_ptr, D, rows, cols, mask)
        grad = normalize_bwd(dh, h, tl.load(rstd_ptr + rows, member, other=0.0), D)
        if HAS_DX:
            grad += load_tile(dx_ptr, stride_dx_row, rows, cols, mask)
        total += tl.sum(tl.where(mask, grad, 0.0), axis=0)
    tl.store(dprompts_ptr + place * D + cols, total, cols < D)


def prompt_insert_fwd(
    x: Tensor, y: Tensor | None, prompts: Tensor, set_index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Change the contiguous stream x in place; h (B, T, D) and 1 / std (B, T)."""
    batch, length, width = x.shape
    h, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)
    residual = None if y is None else rows_of(y)
    tile = row_tile(batch * length, width)
    launch(
        _insert_fwd_kernel,
        (triton.cdiv(batch * length, tile["BLOCK_M"]),),
        x_ptr=x,
        y_ptr=residual,
        prompts_ptr=prompts.contiguous(),
        set_ptr=None if set_index is None else set_index.contiguous(),
        h_ptr=h,
        rstd_ptr=rstd,
        stride_y_row=0 if residual is None else residual.stride(0),
        M=batch * length,
        T=length,
        P=prompts.shape[1],
        D=width,
        eps=eps,
        HAS_RESIDUAL=y is not None,
        HAS_SETS=set_index is not None,
        **tile,
    )
    return h, rstd


def prompt_insert_bwd(
    dx: Tensor | None, dh: Tensor, h: Tensor, rstd: Tensor, set_index: Tensor | None, sets: int, length: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the stream before the insertion (B, T, D), which is y's too, and of the prompts (S, length, D)."""
    batch, tokens, width = h.shape
    din, dprompts = h.new_empty(h.shape), h.new_empty(sets, length, width)
    dh_rows, dx_rows = rows_of(dh), None if dx is None else rows_of(dx)
    tile = row_tile(batch * tokens, width)
    stream = {
        "dx_ptr": dx_rows,
        "dh_ptr": dh_rows,
        "h_ptr": h,
        "rstd_ptr": rstd,
        "stride_dx_row": 0 if dx_rows is None else dx_rows.stride(0),
        "stride_dh_row": dh_rows.stride(0),
        "T": tokens,
        "P": length,
        "D": width,
        "HAS_DX": dx is not None,
    }
    blocks = triton.cdiv(batch * tokens, tile["BLOCK_M"])
    sums = row_tile(batch, width)
    sums["num_warps"] = min(16, 2 * sums["num_warps"])  # beside the tile it keeps a row of sums
    launch(_insert_bwd_stream_kernel, (blocks,), **stream, din_ptr=din, M=batch * tokens, **tile)
    launch(
        _insert_bwd_prompts_kernel,
        (sets * length,),
        **stream,
        set_ptr=None if set_index is None else set_index.contiguous(),
        dprompts_ptr=dprompts,
        B=batch,
        HAS_SETS=set_index is not None,
        **sums,
    )
    return din, dprompts


_fwd = torch.library.custom_op("upt_fast::prompt_insert_", prompt_insert_fwd, mutates_args=("x",))
_bwd = torch.library.custom_op("upt_fast::prompt_insert_bwd", prompt_insert_bwd, mutates_args=())


@_fwd.register_fake
def _(x: Tensor, y: Tensor | None, prompts: Tensor, set_index: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)


@_bwd.register_fake
def _(
    dx: Tensor | None, dh: Tensor, h: Tensor, rstd: Tensor, set_index: Tensor | None, sets: int, length: int
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(sets, length, h.shape[-1])


class _PromptInsert(torch.autograd.Function):
    """A mutating custom op cannot have a gradient of its own: this carries it, and tells autograd that x changed."""

    @staticmethod
    def forward(ctx, x, y, prompts, set_index, eps):  # type: ignore[no-untyped-def]
        h, rstd = _fwd(x, y, prompts, set_index, eps)
        ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, rstd, set_index)
        ctx.prompts_shape, ctx.prompts_dtype = prompts.shape, prompts.dtype
        ctx.y_dtype = None if y is None else y.dtype
        return x, h

    @staticmethod
    def backward(ctx, dx, dh):  # type: ignore[no-untyped-def]
        h, rstd, set_index = ctx.saved_tensors
        sets, length, _ = ctx.prompts_shape
        if dx is None and dh is None:
            return None, None, None, None, None
        dh = torch.zeros_like(h) if dh is None else dh
        din, dprompts = _bwd(dx, dh, h, rstd, set_index, sets, length)
        return din, None if ctx.y_dtype is None else din.to(ctx.y_dtype), dprompts.to(ctx.prompts_dtype), None, None


def prompt_insert(
    x: Tensor, y: Tensor | None, prompts: Tensor, set_index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Put prompts into the stream's reserved rows, add the pending residual to the others, normalise.

    Args:
        x: (B, T, D) contiguous stream, rows [:, :P] reserved; changed in place.
        y: (B, T, D) residual to add to the own rows, or None.
        prompts: (S, P, D).
        set_index: (B,) int64, each image's set; None where S is 1. For prompts per image: 0 ... B - 1.
        eps: of the LayerNorm.
    Returns:
        x, and x normalised (B, T, D) in x's dtype.
    Raises:
        ValueError: x is not contiguous, or the shapes do not fit.
    """
    fits = (
        x.ndim == prompts.ndim == 3
        and x.is_contiguous()
        and (y is None or y.shape == x.shape)
        and prompts.shape[2] == x.shape[2]
        and prompts.shape[1] <= x.shape[1]
        and (len(prompts) == 1 if set_index is None else set_index.shape == x.shape[:1])
    )
    if not fits:
        shapes = {"x": x, "y": y, "prompts": prompts, "set_index": set_index}
        got = ", ".join(f"{name} {tuple(t.shape)}" for name, t in shapes.items() if t is not None)
        raise ValueError(
            f"{got}, x {'' if x.is_contiguous() else 'not '}contiguous; wanted x (B, T, D) contiguous, y like x, "
            "prompts (S, P, D) with P <= T, and set_index (B,) unless S is 1"
        )
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, prompts))):
        return x, _fwd(x, y, prompts, set_index, eps)[
            0
        ]  # torch.compile takes no mark_dirty where nothing has gradients
    return _PromptInsert.apply(x, y, prompts, set_index, eps)


def workloads() -> Iterator[Workload]:
    """The image streams of ViT-B/16 and L/14 at batch 32."""
    for name, tokens, width in (("B/16", 201, 768), ("L/14", 261, 1024)):
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            x = torch.empty(32, tokens, width, dtype=dtype, device="meta")
            rstd = torch.empty(32, tokens, dtype=torch.float32, device="meta")
            prompts = torch.empty(2, 4, width, dtype=dtype, device="meta")
            sets = torch.empty(32, dtype=torch.int64, device="meta")
            for index, kind in ((None, "shared"), (sets, "sets")):
                yield f"forward {kind} {label}", lambda x=x, p=prompts, i=index: prompt_insert_fwd(x, x, p, i, 1e-5)
                yield (
                    f"backward {kind} {label}",
                    lambda x=x, r=rstd, i=index: prompt_insert_bwd(x, x, x, r, i, 1 if i is None else 2, 4),
                )
