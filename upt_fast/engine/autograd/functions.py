"""The frozen engine's own autograd functions: no weight gradients, few saved tensors, memory from a workspace.

Called by backends/pytorch.py; ops.py says what each computes, here is how.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from upt_fast.engine.autograd.composing import composes, fast_backward, op_by_op
from upt_fast.engine.cpu import ways
from upt_fast.engine.workspace import pieces

PRODUCT_PIECE_BYTES = 6 << 20


def takes_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies these rows, where it was measured to be faster than PyTorch's default, the MKL."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or op_by_op(x) or x.numel() == 0:
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and ways.float32_product() == "onednn"


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of (..., L, K), queries already scaled, such that PyTorch can transform it.

    PyTorch's fused attention has no second derivative. Probabilities are in float32 for half precision, as there.

    Args:
        mask: (Q, L) of what is not to be seen, or None.
    """
    scores = torch.matmul(q, k.transpose(-1, -2))
    if scores.dtype.itemsize < 4:
        scores = scores.float()
    if mask is not None:
        scores = scores.masked_fill(mask, float("-inf"))
    return torch.matmul(torch.softmax(scores, dim=-1).to(v.dtype), v)


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x W^T (+ b) (+ residual) of matrices, without autograd.

    Args:
        x: (N, K).
        weight: (M, K), any strides.
        bias: (M,).
        residual: (N, M).
        out: (N, M) where the result goes.
    """
    if takes_onednn(x):
        onednn = torch.ops.mkldnn._linear_pointwise
        if out is None and residual is None:
            return onednn(x, weight, bias, "none", [], "")
        out = x.new_empty(len(x), len(weight)) if out is None else out
        for i in pieces(out, PRODUCT_PIECE_BYTES):
            part = onednn(x[i], weight, bias, "none", [], "")
            if residual is None:
                out[i] = part
            else:
                torch.add(part, residual[i], out=out[i])
        return out
    added = bias if residual is None else residual
    if added is None:
        return torch.mm(x, weight.t(), out=out)
    y = torch.addmm(added, x, weight.t(), out=out)
    return y if bias is None or residual is None else y.add_(bias)


def linear_residual(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See upt_fast.engine.ops.linear_residual."""
    if composes(x, y):
        return x + F.linear(y, weight, bias)
    if takes_onednn(y):
        return Linear.apply(y, weight, bias, x)
    # a second rounding of the large sum would cost accuracy in half precision, and a launch on a GPU
    if x.dtype.itemsize < 4 or x.device.type != "cpu":
        return x + F.linear(y, weight, bias).view(x.shape)
    rows = torch.addmm(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), weight.t())
    return rows.add_(bias).view(x.shape)


class Linear(torch.autograd.Function):
    """See upt_fast.engine.ops.linear and linear_residual; oneDNN's product, which autograd does not know."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        ctx.shape = x.shape
        shape = (*x.shape[:-1], len(weight)) if residual is None else residual.shape
        residual = None if residual is None else residual.reshape(-1, len(weight))
        return product(x.reshape(-1, x.shape[-1]), weight, bias, residual).view(shape)

    @staticmethod
    @fast_backward
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (weight,) = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = product(dy.reshape(-1, len(weight)), weight.t()).view(ctx.shape)
        return dx, None, None, dy if ctx.needs_input_grad[3] else None


def sum_by_set(x: Tensor, set_index: Tensor | None, sets: int) -> Tensor:
    """(S, ...) sums of x (B, ...) over the sequences of each set."""
    if set_index is None:
        return x.sum(dim=0, keepdim=True)
    sums = x.new_zeros(sets, *x.shape[1:])
    if x.dtype.itemsize < 4 and x.device.type != "cpu":  # a GPU would round each sum on the way
        return sums.float().index_add_(0, set_index, x.float()).to(x.dtype)
    return sums.index_add_(0, set_index, x.contiguous())


class PrependRows(torch.autograd.Function):
    """See :func:`prepend_rows`; the prefix's gradient is summed over the sequences of each set."""

    @staticmethod
    def forward(ctx, prefix, x, set_index):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.set_index = prefix.shape, set_index
        length = prefix.shape[1]
        buffer = x.new_empty(x.shape[0], length + x.shape[1], *x.shape[2:])
        buffer[:, :length] = prefix if set_index is None else prefix[set_index]
        buffer[:, length:] = x
        return buffer

    @staticmethod
    @fast_backward
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        length = ctx.shape[1]
        prefix_grad = None
        if ctx.needs_input_grad[0]:
            prefix_grad = sum_by_set(grad[:, :length], ctx.set_index, ctx.shape[0])
        return prefix_grad, grad[:, length:] if ctx.needs_input_grad[1] else None, None


def prepend_rows(prefix: Tensor, x: Tensor, set_index: Tensor | None) -> Tensor:
    """See upt_fast.engine.ops.prepend_rows; nothing in place."""
    prefix = prefix.expand(len(x), *prefix.shape[1:]) if set_index is None else prefix[set_index]
    return torch.cat([prefix, x], dim=1)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    runs: tuple[tuple[int, int], ...],
    last_only: bool,
) -> Tensor:
    """See :class:`PackedAttention`; nothing in place."""
    dtype = q.dtype
    q, k, v, prefix_k, prefix_v = _in_float32(q, k, v, prefix_k, prefix_v)
    prefix_k, prefix_v = (t.transpose(1, 2)[:, None] for t in (prefix_k, prefix_v))  # (S, 1, H, P, K)
    length_p, outputs = prefix_k.shape[3], []
    for count, queries, length, qs, ks in _runs(runs, last_only):
        qb, kb, vb = (_per_class(t, i, count) for t, i in ((q, qs), (k, ks), (v, ks)))  # (S, c, H, l, K)
        keys, values = (
            torch.cat([p.expand(-1, count, -1, -1, -1), own], dim=3) for p, own in ((prefix_k, kb), (prefix_v, vb))
        )
        future = torch.ones(queries, length_p + length, dtype=torch.bool, device=q.device)
        out = attention(qb, keys, values, future.triu(length_p + length - queries + 1))
        outputs.append(out.transpose(2, 3).flatten(1, 2))
    return torch.cat(outputs, dim=1).to(dtype)


def _in_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, in float32 if one is in half precision: rows of class names are few, and their scores and
    probabilities stay in float32, as in fused attention."""
    return tuple(t.float() for t in tensors) if any(t.dtype.itemsize < 4 for t in tensors) else tensors


def _runs(runs: tuple[tuple[int, int], ...], last_only: bool) -> Iterator[tuple[int, int, int, slice, slice]]:
    """(classes, queries per class, rows per class, slice of the queries, slice of the rows) of each run."""
    query = row = 0
    for count, length in runs:
        queries = 1 if last_only else length
        yield count, queries, length, slice(query, query + count * queries), slice(row, row + count * length)
        query, row = query + count * queries, row + count * length


class PackedAttention(torch.autograd.Function):
    """upt_fast.engine.ops.packed_attention for S sets with the same runs: q, k, v (S, N, H, K), prefixes (S, P, H, K).

    Per run of equal lengths a small dense attention; the prefix's scores and gradients are one product per set and head
    over the rows of all classes. Probabilities are kept for backward: P + length numbers per row and head. What comes
    in half precision is kept so, and goes to float32 where it is worked with, forward and backward. Against padded
    scaled_dot_product_attention this is 2x (100 classes) to 3.7x (1000) faster forward and backward on a CPU.
    """

    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, runs, last_only):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        given = q, k, v, prefix_k, prefix_v
        q, k, v, prefix_k, prefix_v = _in_float32(*given)
        length_p = prefix_k.shape[1]
        prefix_scores = torch.matmul(q.transpose(1, 2), prefix_k.permute(0, 2, 3, 1))  # (S, H, Nq, P)
        prefix_probs = torch.empty_like(prefix_scores)
        out, probs = torch.empty_like(q, memory_format=torch.contiguous_format), []
        for count, queries, length, qs, ks in _runs(runs, last_only):
            qb, kb, vb = (_per_class(t, i, count) for t, i in ((q, qs), (k, ks), (v, ks)))  # (S, c, H, l, K)
            scores = q.new_empty(len(q), count, q.shape[2], queries, length_p + length)
            scores[..., :length_p] = _per_class_of_heads(prefix_scores, qs, count)
            own = scores[..., length_p:]
            own.copy_(torch.matmul(qb, kb.transpose(-1, -2)))
            if queries > 1:
                own.masked_fill_(torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1), float("-inf"))
            p = torch.softmax(scores, dim=-1)
            probs.append(p)
            _per_class_of_heads(prefix_probs, qs, count).copy_(p[..., :length_p])
            _per_class(out, qs, count).copy_(torch.matmul(p[..., length_p:], vb))
        out += torch.matmul(prefix_probs, prefix_v.transpose(1, 2)).transpose(1, 2)
        ctx.save_for_backward(*given, *probs)
        ctx.runs, ctx.last_only = runs, last_only
        return out.to(given[0].dtype)

    @staticmethod
    @fast_backward
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        q, k, v, prefix_k, prefix_v, *probs = ctx.saved_tensors
        q, k, v, prefix_k, prefix_v, dout = _in_float32(q, k, v, prefix_k, prefix_v, dout)
        length_p = prefix_k.shape[1]
        dout_h = dout.transpose(1, 2)  # (S, H, Nq, K)
        prefix_dprobs = torch.matmul(dout_h, prefix_v.permute(0, 2, 3, 1))  # (S, H, Nq, P)
        prefix_probs, prefix_dscores = torch.empty_like(prefix_dprobs), torch.empty_like(prefix_dprobs)
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        for (count, _, _, qs, ks), p in zip(_runs(ctx.runs, ctx.last_only), probs, strict=True):
            db, qb, kb, vb = (_per_class(t, i, count) for t, i in ((dout, qs), (q, qs), (k, ks), (v, ks)))
            dp = torch.empty_like(p)
            dp[..., :length_p] = _per_class_of_heads(prefix_dprobs, qs, count)
            dp[..., length_p:] = torch.matmul(db, vb.transpose(-1, -2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            _per_class_of_heads(prefix_dscores, qs, count).copy_(ds[..., :length_p])
            _per_class_of_heads(prefix_probs, qs, count).copy_(p[..., :length_p])
            own = ds[..., length_p:]
            if need_q:
                _per_class(dq, qs, count).copy_(torch.matmul(own, kb))
            if need_k:
                _per_class(dk, ks, count).copy_(torch.matmul(own.transpose(-1, -2), qb))
            if need_v:
                _per_class(dv, ks, count).copy_(torch.matmul(p[..., length_p:].transpose(-1, -2), db))
        if need_q:
            dq += torch.matmul(prefix_dscores, prefix_k.transpose(1, 2)).transpose(1, 2)
        dprefix_k = torch.matmul(prefix_dscores.transpose(2, 3), q.transpose(1, 2)).transpose(1, 2)
        dprefix_v = torch.matmul(prefix_probs.transpose(2, 3), dout_h).transpose(1, 2)
        own_grads = (d if need else None for d, need in zip((dq, dk, dv), (need_q, need_k, need_v), strict=True))
        return *own_grads, dprefix_k, dprefix_v, None, None


def _per_class(rows: Tensor, part: slice, count: int) -> Tensor:
    """Rows part of (S, N, H, K) as (S, count, H, l, K), a view."""
    return rows[:, part].unflatten(1, (count, -1)).transpose(2, 3)


def _per_class_of_heads(rows: Tensor, part: slice, count: int) -> Tensor:
    """Rows part of (S, H, N, P) as (S, count, H, l, P), a view."""
    return rows[:, :, part].unflatten(2, (count, -1)).transpose(1, 2)
