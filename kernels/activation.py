"""The MLP's activation with the linear's bias, in one pass.

    quick_gelu:  z sigmoid(z)                                  z = u + b
    gelu:        z (1 + erf(z / sqrt 2)) / 2
    gelu_tanh:   z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2

(Hendrycks and Gimpel 2016, arXiv 1606.08415.) For quick_gelu the factors 1.702 are in the linears around it. The sum
u + b is never rounded or stored, and backward keeps u alone: QuickGELU as written in CLIP keeps the sigmoid as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import INTERPRETED, Workload, launch, rows_of

from upt_fast.clip.frozen import ACTIVATIONS


def _tile(rows: int, columns: int) -> dict[str, int]:
    numbers = 1 << 16 if INTERPRETED else 2048
    block_n = min(triton.next_power_of_2(columns), numbers if INTERPRETED else 512)
    return {
        "BLOCK_M": min(numbers // block_n, triton.next_power_of_2(max(rows, 1))),
        "BLOCK_N": block_n,
        "num_warps": 8,
    }


@triton.jit
def _load_input(u_ptr, b_ptr, rows, cols, mask, stride_u_row, N, HAS_BIAS: tl.constexpr):
    z = tl.load(u_ptr + rows * stride_u_row + cols, mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(b_ptr + cols, cols < N, other=0.0).to(tl.float32)
    return z


@triton.jit
def activate(z, KIND: tl.constexpr):
    """The activation of float32 z; KIND is a name of ACTIVATIONS."""
    if KIND == "quick_gelu":
        y = z * tl.sigmoid(z)
    elif KIND == "gelu":
        y = 0.5 * z * (1 + tl.math.erf(0.7071067811865476 * z))
    else:
        y = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return y


@triton.jit
def activation_slope(z, KIND: tl.constexpr):
    """The activation's derivative at float32 z."""
    if KIND == "quick_gelu":
        s = tl.sigmoid(z)
        slope = s * (1 + z * (1 - s))
    elif KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        slope = 0.5 * (1 + tl.math.erf(0.7071067811865476 * z)) + z * density
    else:
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        slope = s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    return slope


@triton.jit
def _activation_fwd_kernel(
    u_ptr,  # (M, N)
    b_ptr,  # (N,) or None
    y_ptr,  # (M, N)
    stride_u_row,
    M,
    N,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    cols = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (rows < M) & (cols < N)
    z = _load_input(u_ptr, b_ptr, rows, cols, mask, stride_u_row, N, HAS_BIAS)
    tl.store(y_ptr + rows * N + cols, activate(z, KIND), mask)


@triton.jit
def _activation_bwd_kernel(
    dy_ptr,  # (M, N)
    u_ptr,  # (M, N)
    b_ptr,  # (N,) or None
    du_ptr,  # (M, N)
    stride_dy_row,
    stride_u_row,
    M,
    N,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    cols = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (rows < M) & (cols < N)
    z = _load_input(u_ptr, b_ptr, rows, cols, mask, stride_u_row, N, HAS_BIAS)
    dy = tl.load(dy_ptr + rows * stride_dy_row + cols, mask, other=0.0).to(tl.float32)
    tl.store(du_ptr + rows * N + cols, dy * activation_slope(z, KIND), mask)


def activation_fwd(u: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The activation (..., N) of u plus bias; kind is a name of ACTIVATIONS."""
    rows = rows_of(u)
    y = u.new_empty(u.shape)
    tile = _tile(*rows.shape)
    launch(
        _activation_fwd_kernel,
        (triton.cdiv(rows.shape[0], tile["BLOCK_M"]), triton.cdiv(rows.shape[1], tile["BLOCK_N"])),
        u_ptr=rows,
        b_ptr=None if bias is None else bias.contiguous(),
        y_ptr=y,
        stride_u_row=rows.stride(0),
        M=rows.shape[0],
        N=rows.shape[1],
        KIND=kind,
        HAS_BIAS=bias is not None,
        **tile,
    )
    return y


def activation_bwd(dy: Tensor, u: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """du (..., N) from the gradient of the activation."""
    dy_rows, rows = rows_of(dy), rows_of(u)
    du = u.new_empty(u.shape)
    tile = _tile(*rows.shape)
    launch(
        _activation_bwd_kernel,
        (triton.cdiv(rows.shape[0], tile["BLOCK_M"]), triton.cdiv(rows.shape[1], tile["BLOCK_N"])),
        dy_ptr=dy_rows,
        u_ptr=rows,
        b_ptr=None if bias is None else bias.contiguous(),
        du_ptr=du,
        stride_dy_row=dy_rows.stride(0),
        stride_u_row=rows.stride(0),
        M=rows.shape[0],
        N=rows.shape[1],
        KIND=kind,
        HAS_BIAS=bias is not None,
        **tile,
    )
    return du


_fwd = torch.library.custom_op("upt_fast::activation_fwd", activation_fwd, mutates_args=())
_bwd = torch.library.custom_op("upt_fast::activation_bwd", activation_bwd, mutates_args=())


@_fwd.register_fake
def _(u: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return u.new_empty(u.shape)


@_bwd.register_fake
def _(dy: Tensor, u: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return u.new_empty(u.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    u, bias, ctx.kind = inputs
    ctx.save_for_backward(u, bias)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    return _bwd(dy, *ctx.saved_tensors, ctx.kind), None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def check_kind(kind: str) -> None:
    """Refuse what is no name of ACTIVATIONS."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind {kind!r}; wanted one of {', '.join(ACTIVATIONS)}")


def activation(u: Tensor, kind: str, bias: Tensor | None = None) -> Tensor:
    """The activation of u (..., N) plus the frozen bias (N,), in u's dtype; kind as in engine.ops.activation."""
    check_kind(kind)
    return _fwd(u, bias, kind)


def workloads() -> Iterator[Workload]:
    """The hidden features of ViT-B/16's and L/14's image towers at batch 32."""
    for name, rows, width in (("B/16", 32 * 201, 3072), ("L/14", 32 * 261, 4096)):
        for dtype in (torch.float32, torch.bfloat16):
            u = torch.empty(rows, width, dtype=dtype, device="meta")
            b = torch.empty(width, dtype=dtype, device="meta")
            for kind in ACTIVATIONS:
                label = f"{kind} {name} {str(dtype).removeprefix('torch.')}"
                yield f"forward {label}", lambda u=u, b=b, k=kind: activation_fwd(u, b, k)
                yield f"backward {label}", lambda u=u, b=b, k=kind: activation_bwd(u, u, b, k)
