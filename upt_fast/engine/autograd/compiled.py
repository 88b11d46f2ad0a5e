"""Functions around single compiled CPU operations: a product with a packed weight, attention of packed class names."""

from __future__ import annotations

import torch

from upt_fast.engine.autograd.composing import fast_backward
from upt_fast.engine.autograd.products import moments, rows_of
from upt_fast.engine.workspace import Workspace


class NormLinear(torch.autograd.Function):
    """norm(x) W^T + b of rows (..., D) in parts of equal width, W a PackedProduct."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, parts):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        rows = rows_of(x)
        outs = [rows.new_empty(*x.shape[:-1], len(weight.plain) // parts) for _ in range(parts)]
        mean, rstd = moments(Workspace(1), "", 0, rows)
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
        d = torch.cat([rows.new_zeros(len(rows), width) if d is None else rows_of(d) for d in douts], dim=1)
        dx = torch.empty_like(rows)
        torch.ops.upt_fast_cpu.linear_norm_backward(d, *ctx.weight.backward, rows, mean, rstd, None, dx)
        return dx.view(ctx.shape), None, None, None, None


class LinearResidual(torch.autograd.Function):
    """See upt_fast.engine.ops.linear_residual; W a PackedProduct."""

    @staticmethod
    def forward(ctx, x, y, weight, bias):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.weight, ctx.shape = weight, y.shape
        rows = rows_of(x)
        return weight.added(rows_of(y), bias, rows, torch.empty_like(rows)).view(x.shape)

    @staticmethod
    @fast_backward
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        dy = None
        if ctx.needs_input_grad[1]:
            rows = rows_of(dout)
            dy = ctx.weight.times(rows, rows.new_empty(len(rows), ctx.shape[-1])).view(ctx.shape)
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
