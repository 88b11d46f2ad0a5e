"""One residual block with frozen weights as one autograd function, and its MLP alone, on a CPU.

    x' = x + W_o attention(W_qkv norm(x)) + b_o,    y = x' + W_2 act(W_1 norm(x') + b_1) + b_2

There are no weight gradients and nothing is saved for them. What backward reads of a row of width D lies in memory of
the workspace, by memory level:

fast        x, q, k, v, attention's output, x', and W_1's result or act' of it (4 D): 10 D
balanced    W_1's result is computed again: 6 D
lean        all but x is computed again: D

Every product and what stands around it is one operation of kernels/cpu/linear.cpp where those run; otherwise it is
PyTorch's, piece by piece.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upt_fast.engine.autograd.composing import fast_backward
from upt_fast.engine.autograd.functions import product, sum_by_set
from upt_fast.engine.cpu import library
from upt_fast.engine.cpu.library import FrozenWeight
from upt_fast.engine.workspace import Workspace, pieces


class MLPWeights(NamedTuple):
    """The folded MLP of a block of width D, with M hidden features."""

    fc: FrozenWeight  # (M, D)
    fc_bias: Tensor
    proj: FrozenWeight  # (D, M)
    proj_bias: Tensor
    eps: float
    activation: str  # "quick_gelu", "gelu" or "gelu_tanh"


class BlockWeights(NamedTuple):
    """A folded block (towers/blocks.py) of width D and H heads."""

    qkv: FrozenWeight  # (3D, D)
    qkv_bias: Tensor  # (3D,), zero for k and v
    out: FrozenWeight  # (D, D)
    out_bias: Tensor
    eps: float
    num_heads: int
    mlp: MLPWeights
    fill: bool = False  # attention's compiled products in bfloat16 take whole tiles


class Attended(NamedTuple):
    """What the attention half leaves for backward."""

    mean: Tensor
    rstd: Tensor
    q: Tensor  # (B L, D)
    k: Tensor  # (B, P + L, D)
    v: Tensor
    out: Tensor  # (B L, D)
    lse: Tensor  # (B, H, L)


def normalized_product(
    space: Workspace,
    label: str,
    layer: int,
    x: Tensor,
    eps: float,
    weight: FrozenWeight,
    bias: Tensor | None,
    out: Tensor,
    activation: str | None = None,
    pre: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out = act(norm(x) W^T + b) of rows x (N, D); returns mean and 1 / standard deviation.

    pre, where it is given, gets what backward needs of the activation: its derivative from the compiled operations,
    which have the exponential at hand; from PyTorch's what goes into it.
    """
    if weight.forward is not None:
        mean, rstd = _moments(space, label, layer, x)
        kind = library.ACTIVATIONS[activation or "none"]
        places = [0], [0], [0]
        torch.ops.upt_fast_cpu.norm_linear(x, eps, *weight.forward, bias, kind, pre, [out], *places, mean, rstd)
        return mean, rstd
    h, mean, rstd = space.normalize(label, layer, x, eps)
    product(h, weight.plain, bias, out=out if pre is None else pre)
    if activation is not None:
        _activate(out, out if pre is None else pre, activation)
    return mean, rstd


def residual_product(
    a: Tensor, weight: FrozenWeight, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> Tensor:
    """out = residual + a W^T + b."""
    if weight.forward is None and a.dtype.itemsize < 4 and residual is not None:
        # rounded once more than the large sum: a second rounding of that would cost accuracy
        return torch.add(residual, F.linear(a, weight.plain, bias), out=out)
    if weight.forward is None:
        return product(a, weight.plain, bias, residual, out=out)
    torch.ops.upt_fast_cpu.linear_residual(a, *weight.forward, bias, residual, out)
    return out


def _rows(x: Tensor) -> Tensor:
    """(..., D) -> (N, D), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _moments(space: Workspace, label: str, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    like = x.new_empty(0, dtype=torch.float32)
    mean, rstd = (space.kept(f"{label} {kind}", layer, like, len(x), 1) for kind in ("mean", "rstd"))
    return mean, rstd


def _activate(out: Tensor, u: Tensor, kind: str) -> None:
    if kind == "quick_gelu":
        torch.ops.aten.silu.out(u, out=out)
    else:
        torch.ops.aten.gelu.out(u, approximate="tanh" if kind == "gelu_tanh" else "none", out=out)


def _norm_backward(
    space: Workspace, d: Tensor, weight: FrozenWeight, x: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, spare: Tensor
) -> Tensor:
    """dy plus the gradient of x, d (N, M) being that of norm(x) W^T; spare (N, D) may be overwritten."""
    if weight.backward is None:
        return space.normalize_backward(product(d, weight.plain.t(), out=spare), x, mean, rstd, dy)
    dx = space.scratch("grad", x, *x.shape)
    torch.ops.upt_fast_cpu.linear_norm_backward(d, *weight.backward, x, mean, rstd, dy, dx)
    return dx


def _mlp_forward(
    x: Tensor, w: MLPWeights, space: Workspace, layer: int, u: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """out = x + MLP(norm(x)) of rows (N, D), u (N, M) or None where the pre-activation goes; returns the moments."""
    a = space.scratch("wide", x, len(x), len(w.fc_bias))
    moments = normalized_product(space, "mlp", layer, x, w.eps, w.fc, w.fc_bias, a, w.activation, u)
    residual_product(a, w.proj, w.proj_bias, x, out)
    return moments


def _again(x: Tensor, w: MLPWeights, space: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """What backward needs of W_1's result, computed once more from rows x (N, D), and the moments of x."""
    u = space.scratch("u", x, len(x), len(w.fc_bias))
    if w.fc.forward is None:
        return u, *normalized_product(Workspace(1), "", 0, x, w.eps, w.fc, w.fc_bias, u)
    a = space.scratch("wide", x, *u.shape)
    return u, *normalized_product(Workspace(1), "", 0, x, w.eps, w.fc, w.fc_bias, a, w.activation, u)


def _mlp_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, u: Tensor | None, w: MLPWeights, space: Workspace
) -> Tensor:
    """Gradient of rows x (N, D), given that of the MLP's output with its residual."""
    if u is None:
        u = _again(x, w, space)[0]
    du = space.scratch("wide", dy, *u.shape)
    if w.proj.backward is not None:
        torch.ops.upt_fast_cpu.linear_times(dy, *w.proj.backward, u, du)
    else:
        product(dy, w.proj.plain.t(), out=du)
        if w.activation == "quick_gelu":
            torch.ops.aten.silu_backward.grad_input(du, u, grad_input=du)
        else:
            approximate = "tanh" if w.activation == "gelu_tanh" else "none"
            torch.ops.aten.gelu_backward.grad_input(du, u, approximate=approximate, grad_input=du)
    return _norm_backward(space, du, w.fc, x, mean, rstd, dy, space.scratch("row", dy, *dy.shape))


def _attention_forward(
    x: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None,
    w: BlockWeights,
    space: Workspace,
    layer: int,
    keep: bool,
) -> tuple[Tensor, Attended]:
    """x' (B L, D) of x (B, L, D), and what backward needs, in kept or passing memory."""
    batch, length, width = x.shape
    prefix = 0 if prefix_k is None else prefix_k.shape[1]
    rows = _rows(x)

    def new(name: str, like: Tensor, *shape: int) -> Tensor:
        return space.kept(name, layer, like, *shape) if keep else space.scratch(name, like, *shape)

    q = new("q", x, *rows.shape)
    k, v = (new(name, x, batch, prefix + length, width) for name in ("k", "v"))
    if w.qkv.forward is not None:
        mean, rstd = _moments(space, "attention", layer, rows) if keep else _moments(Workspace(1), "", 0, rows)
        places = [0, length, length], [0, prefix + length, prefix + length], [0, prefix, prefix]
        torch.ops.upt_fast_cpu.norm_linear(
            rows, w.eps, *w.qkv.forward, w.qkv_bias, 0, None, [q, k, v], *places, mean, rstd
        )
    else:
        h, mean, rstd = (space if keep else Workspace(1)).normalize("attention", layer if keep else 0, rows, w.eps)
        product(h, w.qkv.plain[:width], w.qkv_bias[:width], out=q)
        kv = product(h, w.qkv.plain[width:], out=space.scratch("wide", x, len(rows), 2 * width))
        for buffer, own in ((k, kv[:, :width]), (v, kv[:, width:])):
            buffer[:, prefix:] = own.view(batch, length, width)
    if prefix_k is not None and prefix_v is not None:
        for buffer, shared in ((k, prefix_k), (v, prefix_v)):
            buffer[:, :prefix] = (shared if set_index is None else shared[set_index]).flatten(2)
    out = new("attended", x, *rows.shape)
    lse = new("lse", mean, batch, w.num_heads, length)
    if w.qkv.forward is not None:
        torch.ops.upt_fast_cpu.attention(q, k, v, w.num_heads, w.fill, out, lse)
    else:
        for i in pieces(x):
            heads = [_split_heads(t, batch, w.num_heads)[i] for t in (q, k, v)]
            result, lse[i] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, scale=1.0)
            _split_heads(out, batch, w.num_heads)[i] = result
    after = residual_product(out, w.out, w.out_bias, rows, new("x", x, *rows.shape))
    return after, Attended(mean, rstd, q, k, v, out, lse)


def _split_heads(x: Tensor, batch: int, num_heads: int) -> Tensor:
    """(B * L, D) or (B, L, D) -> (B, H, L, K), a view."""
    return x.view(batch, -1, num_heads, x.shape[-1] // num_heads).transpose(1, 2)


def _flash_backward(
    dout: Tensor,
    saved: Attended,
    prefix: int,
    num_heads: int,
    dqkv: Tensor | None,
    dk_prefix: Tensor,
    dv_prefix: Tensor,
) -> None:
    """PyTorch's backward of attention, image by image, into dqkv (B, L, 3, H, K) where that is wanted."""
    batch = len(saved.k)
    tensors = [_split_heads(t, batch, num_heads) for t in (dout, saved.q, saved.k, saved.v, saved.out)]
    for i in pieces(saved.q.view(batch, -1)):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(t[i] for t in tensors), saved.lse[i], 0.0, False, scale=1.0
        )
        dq, dk, dv = (d.transpose(1, 2) for d in grads)
        if dqkv is not None:
            for own, d in zip(dqkv[i].unbind(2), (dq, dk[:, prefix:], dv[:, prefix:]), strict=True):
                own.copy_(d)
        dk_prefix[i], dv_prefix[i] = dk[:, :prefix], dv[:, :prefix]


def _attention_backward(
    dy: Tensor, x: Tensor | None, saved: Attended, prefix: int, w: BlockWeights, space: Workspace
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x (B L, D), or None where x is None, and of the prefix's keys and values (B, P, H, K) by image."""
    batch, total, width = saved.k.shape
    length = total - prefix
    dout = space.scratch("row", dy, *dy.shape)
    if w.out.backward is not None:
        torch.ops.upt_fast_cpu.linear_residual(dy, *w.out.backward, None, None, dout)
    else:
        product(dy, w.out.plain.t(), out=dout)
    dqkv = space.scratch("wide", dy, batch, length, 3, w.num_heads, width // w.num_heads)
    dk_prefix, dv_prefix = (dy.new_empty(batch, prefix, *dqkv.shape[3:]) for _ in range(2))
    if w.qkv.backward is not None:
        torch.ops.upt_fast_cpu.attention_backward(
            dout, *saved[2:5], w.num_heads, w.fill, saved.out, saved.lse, dqkv, dk_prefix, dv_prefix
        )
    else:
        _flash_backward(dout, saved, prefix, w.num_heads, dqkv if x is not None else None, dk_prefix, dv_prefix)
    if x is None:
        return None, dk_prefix, dv_prefix
    dx = _norm_backward(space, dqkv.view(len(dy), 3 * width), w.qkv, x, saved.mean, saved.rstd, dy, dout)
    return dx, dk_prefix, dv_prefix


class NormLinear(torch.autograd.Function):
    """norm(x) W^T + b of rows (..., D) in parts of equal width, with packed weights."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, parts):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        rows = _rows(x)
        outs = [rows.new_empty(*x.shape[:-1], len(weight.plain) // parts) for _ in range(parts)]
        mean, rstd = _moments(Workspace(1), "", 0, rows)
        places = [[0] * parts] * 3
        torch.ops.upt_fast_cpu.norm_linear(rows, eps, *weight.forward, bias, 0, None, outs, *places, mean, rstd)
        ctx.save_for_backward(rows, mean, rstd)
        ctx.weight, ctx.shape = weight, x.shape
        return tuple(outs)

    @staticmethod
    @fast_backward
    def backward(ctx, *douts):  # type: ignore[no-untyped-def]
        rows, mean, rstd = ctx.saved_tensors
        width = len(ctx.weight.plain) // len(douts)
        d = torch.cat([rows.new_zeros(len(rows), width) if d is None else _rows(d) for d in douts], dim=1)
        dx = torch.empty_like(rows)
        torch.ops.upt_fast_cpu.linear_norm_backward(d, *ctx.weight.backward, rows, mean, rstd, None, dx)
        return dx.view(ctx.shape), None, None, None, None


class LinearResidual(torch.autograd.Function):
    """See upt_fast.engine.ops.linear_residual; with packed weights."""

    @staticmethod
    def forward(ctx, x, y, weight, bias):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.weight, ctx.shape = weight, y.shape
        rows = _rows(x)
        return residual_product(_rows(y), weight, bias, rows, torch.empty_like(rows)).view(x.shape)

    @staticmethod
    @fast_backward
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        dy = None
        if ctx.needs_input_grad[1]:
            rows = _rows(dout)
            dy = rows.new_empty(len(rows), ctx.shape[-1])
            torch.ops.upt_fast_cpu.linear_residual(rows, *ctx.weight.backward, None, None, dy)
            dy = dy.view(ctx.shape)
        return dout if ctx.needs_input_grad[0] else None, dy, None, None


class PackedAttention(torch.autograd.Function):
    """See upt_fast.engine.ops.packed_attention; the compiled operation, which keeps no probabilities."""

    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, layout):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        tensors = [t.contiguous() for t in (q, k, v, prefix_k, prefix_v)]
        ctx.save_for_backward(*tensors)
        ctx.rest = *layout.bounds, q.shape[0] != k.shape[0]
        out = torch.empty_like(tensors[0])
        torch.ops.upt_fast_cpu.packed_attention(*tensors, *ctx.rest, out)
        return out

    @staticmethod
    @fast_backward
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        tensors = ctx.saved_tensors
        grads = [
            torch.empty_like(t) if need else None for t, need in zip(tensors[:3], ctx.needs_input_grad, strict=False)
        ]
        prefix_grads = [torch.empty_like(t) for t in tensors[3:]]
        torch.ops.upt_fast_cpu.packed_attention_backward(dout.contiguous(), *tensors, *ctx.rest, *grads, *prefix_grads)
        return *grads, *prefix_grads, None


class MLP(torch.autograd.Function):
    """See upt_fast.engine.ops.mlp."""

    @staticmethod
    def forward(ctx, x, weights, recompute, given, layer):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        space, rows = given or Workspace(1), _rows(x)
        needed = ctx.needs_input_grad[0]
        keep = needed and not recompute
        shape = len(rows), len(weights.fc_bias)
        u = space.kept("u", layer, x, *shape) if keep else None
        y = space.kept("y", layer, x, *rows.shape) if needed else space.scratch("y", x, *rows.shape)
        mean, rstd = _mlp_forward(rows, weights, space, layer, u, y)
        ctx.save_for_backward(rows, mean, rstd, u)
        ctx.weights, ctx.space = weights, given  # memory of the op's own must not live on in a graph
        return y.view(x.shape)

    @staticmethod
    @fast_backward
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        rows, mean, rstd, u = ctx.saved_tensors
        dx = _mlp_backward(_rows(dy), rows, mean, rstd, u, ctx.weights, ctx.space or Workspace(1))
        return dx.view(dy.shape), None, None, None, None


class Block(torch.autograd.Function):
    """See upt_fast.engine.ops.block."""

    @staticmethod
    def forward(ctx, x, prefix_k, prefix_v, set_index, weights, memory, given, layer):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        space, rows = given or Workspace(1), _rows(x)
        needed = any(ctx.needs_input_grad[:3])
        keep = needed and memory != "lean"
        after, attended = _attention_forward(x, prefix_k, prefix_v, set_index, weights, space, layer, keep)
        u = space.kept("u", layer, x, len(rows), len(weights.mlp.fc_bias)) if keep and memory == "fast" else None
        y = space.kept("y", layer, x, *rows.shape) if needed else space.scratch("y", x, *rows.shape)
        mlp_space = space if keep else Workspace(1)
        mlp_mean, mlp_rstd = _mlp_forward(after, weights.mlp, mlp_space, layer if keep else 0, u, y)
        ctx.weights, ctx.space, ctx.memory, ctx.shape = weights, given, memory, x.shape
        ctx.prefix, ctx.sets = (0, 0) if prefix_k is None else (prefix_k.shape[1], len(prefix_k))
        if not needed:
            return y.view(x.shape)
        if not keep:
            ctx.save_for_backward(rows, prefix_k, prefix_v, set_index)
            return y.view(x.shape)
        saved_rows = rows if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(saved_rows, set_index, after, mlp_mean, mlp_rstd, u, *attended)
        return y.view(x.shape)

    @staticmethod
    @fast_backward
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        weights, space = ctx.weights, ctx.space or Workspace(1)
        if ctx.memory == "lean":
            rows, prefix_k, prefix_v, set_index = ctx.saved_tensors
            x = rows.view(ctx.shape)
            after, attended = _attention_forward(x, prefix_k, prefix_v, set_index, weights, space, 0, keep=False)
            u, mean, rstd = _again(after, weights.mlp, space)
            rows = rows if ctx.needs_input_grad[0] else None
        else:
            rows, set_index, after, mean, rstd, u, *rest = ctx.saved_tensors
            attended = Attended(*rest)
        dy = _mlp_backward(_rows(dy), after, mean, rstd, u, weights.mlp, space)
        dx, dk, dv = _attention_backward(dy, rows, attended, ctx.prefix, weights, space)
        dx = None if dx is None else dx.view(ctx.shape)
        prefix_grads = [
            sum_by_set(d, set_index, ctx.sets) if need else None
            for d, need in zip((dk, dv), ctx.needs_input_grad[1:3], strict=True)
        ]
        return dx, *prefix_grads, *[None] * 5
