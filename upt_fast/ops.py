"""The engine's operations, one public function each, in plain PyTorch arranged for speed.

Each has a twin of the same name in reference/ops.py that is written for reading.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from upt_fast.layout import PackedLayout
from upt_fast.workspace import Workspace, pieces

PRODUCT_PIECE_BYTES = 6 << 20


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last dimension; the affine lives in the next linear.

    Args:
        x: (..., D); statistics in float32 for half precision.
    """
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def activation(u: Tensor, kind: str) -> Tensor:
    """The MLP's activation, elementwise.

    Args:
        u: (..., M). For "quick_gelu" 1.702 times the pre-activation, and the result is 1.702 times QuickGELU's
            (towers/blocks.py folds both factors into the linears): one silu.
        kind: "quick_gelu", "gelu" or "gelu_tanh".
    """
    if kind == "quick_gelu":
        return F.silu(u)
    return F.gelu(u, approximate="tanh" if kind == "gelu_tanh" else "none")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for a frozen linear.

    Args:
        x: (..., D).
        weight: (M, D).
        bias: (M,) or None.
    """
    if not _takes_onednn(x):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, None)


def linear_residual(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x + y W^T + b for a frozen linear, the sum done by the matrix product.

    Args:
        x: (..., D) residual stream.
        y: (..., M).
        weight: (D, M).
        bias: (D,).
    """
    if _takes_onednn(y):
        return _Linear.apply(y, weight, bias, x)
    if x.dtype.itemsize < 4:  # in half precision a second rounding of the large sum would cost accuracy
        return x + F.linear(y, weight, bias).view(x.shape)
    rows = torch.addmm(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), weight.t())
    return rows.add_(bias).view(x.shape)


@functools.cache
def _has_onednn() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than PyTorch's default, the MKL.

    On AMD's processors with AVX-512 MKL stays at AVX2: oneDNN was 10 to 25 % faster there. The choice hangs on the
    processor alone, not on a timing, so that equal runs give equal bits.
    """
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )


def _takes_onednn(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and _has_onednn()
        and not torch.is_autocast_enabled("cpu")
    )


def _product(
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
    if _takes_onednn(x):
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


class _Linear(torch.autograd.Function):
    """See :func:`linear` and :func:`linear_residual`."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight)
        ctx.shape = x.shape
        shape = (*x.shape[:-1], len(weight)) if residual is None else residual.shape
        residual = None if residual is None else residual.reshape(-1, len(weight))
        return _product(x.reshape(-1, x.shape[-1]), weight, bias, residual).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (weight,) = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy.reshape(-1, len(weight)), weight.t()).view(ctx.shape)
        return dx, None, None, dy if ctx.needs_input_grad[3] else None


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    eps: float,
    kind: str,
    recompute: bool = False,
    workspace: Workspace | None = None,
    layer: int = 0,
) -> Tensor:
    """x + W_2 act(W_1 norm(x) + b_1) + b_2 for frozen, folded weights.

    Args:
        x: (..., D) residual stream.
        fc_weight: (M, D), W_1.
        fc_bias: (M,).
        proj_weight: (D, M), W_2.
        proj_bias: (D,).
        eps: of the LayerNorm.
        kind: the activation, see :func:`activation`.
        recompute: compute the hidden features (..., M) again in backward instead of keeping them.
        workspace: memory to use; None: the op's own.
        layer: this layer's place in the workspace.
    """
    if torch.is_autocast_enabled(x.device.type):  # op by op, so that autocast can choose each op's dtype
        u = F.linear(layer_norm(x, eps), fc_weight, fc_bias)
        return linear_residual(x, activation(u, kind), proj_weight, proj_bias)
    workspace = Workspace(1) if workspace is None else workspace
    return _MLP.apply(x, fc_weight, fc_bias, proj_weight, proj_bias, eps, kind, recompute, workspace, layer)


def _activation_into(out: Tensor, u: Tensor, kind: str) -> Tensor:
    """:func:`activation` of u, written to out."""
    if kind == "quick_gelu":
        return torch.ops.aten.silu.out(u, out=out)
    return torch.ops.aten.gelu.out(u, approximate="tanh" if kind == "gelu_tanh" else "none", out=out)


class _MLP(torch.autograd.Function):
    """See :func:`mlp`. Backward overwrites one (N, M) buffer with both the activation's and its input's gradient."""

    @staticmethod
    def forward(ctx, x, fc_weight, fc_bias, proj_weight, proj_bias, eps, kind, recompute, workspace, layer):  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1])
        h, mean, rstd = workspace.normalize("mlp", layer, rows, eps)
        shape = (len(rows), len(fc_weight))
        keep = ctx.needs_input_grad[0] and not recompute
        u = workspace.kept("u", layer, x, *shape) if keep else x.new_empty(shape)
        _product(h, fc_weight, fc_bias, out=u)
        ctx.save_for_backward(rows, mean, rstd, None if recompute else u, fc_weight, fc_bias, proj_weight)
        ctx.kind, ctx.eps, ctx.workspace = kind, eps, workspace
        a = _activation_into(workspace.scratch("wide", u, *u.shape), u, kind)
        if not ctx.needs_input_grad[0] or x.dtype.itemsize < 4:
            return linear_residual(x, a, proj_weight, proj_bias)
        y = workspace.kept("y", layer, x, *rows.shape)
        return _product(a, proj_weight, proj_bias, rows, out=y).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, mean, rstd, u, fc_weight, fc_bias, proj_weight = ctx.saved_tensors
        if u is None:
            u = _product(layer_norm(x, ctx.eps), fc_weight, fc_bias)
        shape, dy = dy.shape, dy.reshape(-1, dy.shape[-1])
        du = ctx.workspace.scratch("wide", dy, len(dy), proj_weight.shape[1])
        _product(dy, proj_weight.t(), out=du)
        if ctx.kind == "quick_gelu":
            torch.ops.aten.silu_backward.grad_input(du, u, grad_input=du)
        else:
            approximate = "tanh" if ctx.kind == "gelu_tanh" else "none"
            torch.ops.aten.gelu_backward.grad_input(du, u, approximate=approximate, grad_input=du)
        dh = _product(du, fc_weight.t(), out=ctx.workspace.scratch("row", dy, *dy.shape))
        return ctx.workspace.normalize_backward(dh, x, mean, rstd, dy).view(shape), *[None] * 9


def attention(
    x: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    qkv_weight: Tensor,
    q_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    eps: float,
    set_index: Tensor | None = None,
    workspace: Workspace | None = None,
    layer: int = 0,
    *,
    num_heads: int,
) -> Tensor:
    """x + W_o attention(W_qkv norm(x)) + b_o over [shared prefix ; own rows], for frozen, folded weights.

    Args:
        x: (B, L, D) residual stream.
        prefix_k: (S, P, H, K) keys of S prompt sets, or None.
        prefix_v: (S, P, H, K) values, or None.
        qkv_weight: (3D, D), attention's scale in its query rows.
        q_bias: (D,).
        out_weight: (D, D), W_o.
        out_bias: (D,), b_o, with what the value biases add.
        eps: of the LayerNorm.
        set_index: (B,) int64, each image's set; None where S is 1.
        workspace: memory to use; None: the op's own.
        layer: this layer's place in the workspace.
        num_heads: H.
    """
    fused = x.device.type == "cpu" and x.numel() > 0 and x.dtype.itemsize >= 4 and not torch.is_autocast_enabled("cpu")
    if fused:
        workspace = Workspace(1) if workspace is None else workspace
        weights = (qkv_weight, q_bias, out_weight, out_bias)
        return _AttentionCPU.apply(x, prefix_k, prefix_v, *weights, eps, set_index, workspace, layer, num_heads)
    q, k, v = qkv(layer_norm(x, eps), qkv_weight, q_bias, num_heads)
    attended = prefix_attention(q, k, v, prefix_k, prefix_v, set_index)
    return linear_residual(x, attended.flatten(-2), out_weight, out_bias)


def qkv(
    h: Tensor, weight: Tensor, q_bias: Tensor, num_heads: int, h_q: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of normalised rows.

    Args:
        h: (..., D).
        weight: (3D, D).
        q_bias: (D,).
        num_heads: H.
        h_q: (..., D) the rows that need queries, if not all do.
    Returns:
        three of (..., H, K).
    """
    width = h.shape[-1]
    # two products: q lives on for backward, where k and v are copied into a buffer behind the prompts'
    q = linear(h if h_q is None else h_q, weight[:width], q_bias)
    k, v = linear(h, weight[width:]).chunk(2, dim=-1)
    return tuple(t.unflatten(-1, (num_heads, -1)) for t in (q, k, v))  # type: ignore[return-value]


class _AttentionCPU(torch.autograd.Function):
    """See :func:`attention`: what backward needs lives in the workspace; dq, dk and dv share one product."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x,
        prefix_k,
        prefix_v,
        qkv_weight,
        q_bias,
        out_weight,
        out_bias,
        eps,
        set_index,
        workspace,
        layer,
        num_heads,
    ):
        batch, length, width = x.shape
        prefix = 0 if prefix_k is None else prefix_k.shape[1]
        keep = any(ctx.needs_input_grad[:3])
        rows = x.reshape(-1, width)

        def new(name: str, *shape: int) -> Tensor:
            return workspace.kept(name, layer, x, *shape) if keep else x.new_empty(shape)

        h, mean, rstd = workspace.normalize("attention", layer, rows, eps)
        q = _product(h, qkv_weight[:width], q_bias, out=new("q", *rows.shape))
        kv = _product(h, qkv_weight[width:], out=workspace.scratch("wide", x, len(rows), 2 * width))
        k, v = (new(name, batch, prefix + length, width) for name in ("k", "v"))
        for buffer, own, shared in ((k, kv[:, :width], prefix_k), (v, kv[:, width:], prefix_v)):
            buffer[:, prefix:] = own.view(batch, length, width)
            if prefix:
                buffer[:, :prefix] = (shared if set_index is None else shared[set_index]).flatten(2)
        attended = new("attended", *rows.shape)
        lse = new("lse", batch, num_heads, length)
        for i in pieces(x):
            heads = [_split_heads(t, batch, num_heads)[i] for t in (q, k, v)]
            result, lse[i] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, scale=1.0)
            _split_heads(attended, batch, num_heads)[i] = result
        saved = (rows, mean, rstd) if ctx.needs_input_grad[0] else (None, None, None)
        ctx.save_for_backward(*saved, q, k, v, attended, lse, qkv_weight, out_weight, set_index)
        ctx.prefix, ctx.sets, ctx.workspace, ctx.num_heads = (
            prefix,
            len(prefix_k) if prefix else 0,
            workspace,
            num_heads,
        )
        return _product(attended, out_weight, out_bias, rows, out=new("x", *rows.shape)).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        rows, mean, rstd, q, k, v, attended, lse, qkv_weight, out_weight, set_index = ctx.saved_tensors
        batch, length, width = dy.shape
        dy = dy.reshape(-1, width)
        dout = _product(dy, out_weight.t(), out=ctx.workspace.scratch("row", dy, *dy.shape))
        dqkv = ctx.workspace.scratch("wide", dy, batch, length, 3, ctx.num_heads, width // ctx.num_heads)
        dprefix = [dy.new_empty(batch, ctx.prefix, *dqkv.shape[3:]) if n else None for n in ctx.needs_input_grad[1:3]]
        tensors = [_split_heads(t, batch, ctx.num_heads) for t in (dout, q, k, v, attended)]
        for i in pieces(dqkv):
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(t[i] for t in tensors), lse[i], 0.0, False, scale=1.0
            )
            dq, dk, dv = (d.transpose(1, 2) for d in grads)
            for own, d in zip(dqkv[i].unbind(2), (dq, dk[:, ctx.prefix :], dv[:, ctx.prefix :]), strict=True):
                own.copy_(d)
            for prefix, d in zip(dprefix, (dk, dv), strict=True):
                if prefix is not None:
                    prefix[i] = d[:, : ctx.prefix]
        dx = None
        if ctx.needs_input_grad[0]:
            dh = _product(dqkv.view(len(dy), 3 * width), qkv_weight.t(), out=dout)
            dx = ctx.workspace.normalize_backward(dh, rows, mean, rstd, dy).view(batch, length, width)
        dprefix = [None if d is None else _sum_by_set(d, set_index, ctx.sets) for d in dprefix]
        return dx, *dprefix, *[None] * 9


def _split_heads(x: Tensor, batch: int, num_heads: int) -> Tensor:
    """(B * L, D) or (B, L, D) -> (B, H, L, K), a view."""
    return x.view(batch, -1, num_heads, x.shape[-1] // num_heads).transpose(1, 2)


def _sum_by_set(x: Tensor, set_index: Tensor | None, sets: int) -> Tensor:
    """(S, ...) sums of x (B, ...) over the sequences of each set."""
    if set_index is None:
        return x.sum(dim=0, keepdim=True)
    return x.new_zeros(sets, *x.shape[1:]).index_add_(0, set_index, x.contiguous())


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None = None,
) -> Tensor:
    """Attention of each image's queries over [shared prefix ; own rows], without mask.

    Args:
        q: (B, Q, H, K) queries, already scaled.
        k: (B, L, H, K) keys of the image's own rows.
        v: (B, L, H, K) values.
        prefix_k: (S, P, H, K) keys of S prompt sets, or None.
        prefix_v: (S, P, H, K) values, or None.
        set_index: (B,) int64, each image's set; None where S is 1.
    Returns:
        (B, Q, H, K)
    """
    if prefix_k is not None and prefix_v is not None:
        k = prepend_rows(prefix_k, k, set_index)
        v = prepend_rows(prefix_v, v, set_index)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)


def prepend_rows(prefix: Tensor, x: Tensor, set_index: Tensor | None = None) -> Tensor:
    """Write a shared prefix and each sequence's own rows into one buffer.

    Args:
        prefix: (S, P, ...) rows of S sets.
        x: (B, L, ...) rows of each sequence.
        set_index: (B,) int64, each sequence's set; None where S is 1.
    Returns:
        (B, P + L, ...)
    """
    return _PrependRows.apply(prefix, x, set_index)


class _PrependRows(torch.autograd.Function):
    """See :func:`prepend_rows`; the prefix's gradient is summed over the sequences of each set."""

    @staticmethod
    def forward(ctx, prefix, x, set_index):  # type: ignore[no-untyped-def]
        ctx.shape, ctx.set_index = prefix.shape, set_index
        length = prefix.shape[1]
        buffer = x.new_empty(x.shape[0], length + x.shape[1], *x.shape[2:])
        buffer[:, :length] = prefix if set_index is None else prefix[set_index]
        buffer[:, length:] = x
        return buffer

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        length = ctx.shape[1]
        prefix_grad = None
        if ctx.needs_input_grad[0]:
            prefix_grad = _sum_by_set(grad[:, :length], ctx.set_index, ctx.shape[0])
        return prefix_grad, grad[:, length:] if ctx.needs_input_grad[1] else None, None


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, layout: PackedLayout
) -> Tensor:
    """Causal attention of packed class rows over [the set's shared prefix ; the class's own rows so far].

    Args:
        q: (N, H, K) queries of all rows, already scaled; or (C, H, K), of each class's last row alone.
        k: (N, H, K) keys of all rows.
        v: (N, H, K) values.
        prefix_k: (S, P, H, K) keys in front of every class of a set.
        prefix_v: (S, P, H, K) values.
        layout: how the N rows divide into S sets of classes.
    Returns:
        (N, H, K) or (C, H, K), as q.
    """
    last_only = q.shape[0] != k.shape[0]
    dtype = q.dtype
    if dtype.itemsize < 4:  # rows are few: scores and probabilities stay in float32, as in fused attention
        q, k, v, prefix_k, prefix_v = (t.float() for t in (q, k, v, prefix_k, prefix_v))
    outputs, query, row = [], 0, 0
    for s, runs in enumerate(layout.sets):
        rows = sum(count * length for count, length in runs)
        queries = sum(count for count, _ in runs) if last_only else rows
        part = (q[query : query + queries], k[row : row + rows], v[row : row + rows], prefix_k[s], prefix_v[s])
        outputs.append(_PackedAttention.apply(*part, runs, last_only))
        query, row = query + queries, row + rows
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(dtype)


def _runs(runs: tuple[tuple[int, int], ...], last_only: bool) -> Iterator[tuple[int, int, int, slice, slice]]:
    """(classes, queries per class, rows per class, slice of the queries, slice of the rows) of each run."""
    query = row = 0
    for count, length in runs:
        queries = 1 if last_only else length
        yield count, queries, length, slice(query, query + count * queries), slice(row, row + count * length)
        query, row = query + count * queries, row + count * length


class _PackedAttention(torch.autograd.Function):
    """One set of :func:`packed_attention`.

    Per run of equal lengths a small dense attention; the prefix's scores and gradients are one product per head over
    the rows of all classes. Probabilities are kept for backward: P + length numbers per row and head. Against padded
    scaled_dot_product_attention this is 2x (100 classes) to 3.7x (1000) faster forward and backward on a CPU.
    """

    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, runs, last_only):  # type: ignore[no-untyped-def]
        length_p = prefix_k.shape[0]
        prefix_scores = torch.bmm(q.transpose(0, 1), prefix_k.permute(1, 2, 0))  # (H, Nq, P)
        prefix_probs = torch.empty_like(prefix_scores)
        out, probs = torch.empty_like(q, memory_format=torch.contiguous_format), []
        for count, queries, length, qs, ks in _runs(runs, last_only):
            qb, kb, vb = (_per_class(t, count) for t in (q[qs], k[ks], v[ks]))  # (c, H, l, K)
            scores = q.new_empty(count, q.shape[1], queries, length_p + length)
            scores[..., :length_p] = prefix_scores[:, qs].unflatten(1, (count, queries)).transpose(0, 1)
            own = scores[..., length_p:]
            own.copy_(torch.matmul(qb, kb.transpose(-1, -2)))
            if queries > 1:
                own.masked_fill_(torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1), float("-inf"))
            p = torch.softmax(scores, dim=-1)
            probs.append(p)
            prefix_probs[:, qs].unflatten(1, (count, queries)).copy_(p[..., :length_p].transpose(0, 1))
            _per_class(out[qs], count).copy_(torch.matmul(p[..., length_p:], vb))
        out += torch.bmm(prefix_probs, prefix_v.transpose(0, 1)).transpose(0, 1)
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, *probs)
        ctx.runs, ctx.last_only = runs, last_only
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        q, k, v, prefix_k, prefix_v, *probs = ctx.saved_tensors
        length_p = prefix_k.shape[0]
        dout_h = dout.transpose(0, 1)  # (H, Nq, K)
        prefix_dprobs = torch.bmm(dout_h, prefix_v.permute(1, 2, 0))  # (H, Nq, P)
        prefix_probs, prefix_dscores = torch.empty_like(prefix_dprobs), torch.empty_like(prefix_dprobs)
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        for (count, queries, _, qs, ks), p in zip(_runs(ctx.runs, ctx.last_only), probs, strict=True):
            db, qb, kb, vb = (_per_class(t, count) for t in (dout[qs], q[qs], k[ks], v[ks]))
            dp = torch.empty_like(p)
            dp[..., :length_p] = prefix_dprobs[:, qs].unflatten(1, (count, queries)).transpose(0, 1)
            dp[..., length_p:] = torch.matmul(db, vb.transpose(-1, -2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            prefix_dscores[:, qs].unflatten(1, (count, queries)).copy_(ds[..., :length_p].transpose(0, 1))
            prefix_probs[:, qs].unflatten(1, (count, queries)).copy_(p[..., :length_p].transpose(0, 1))
            own = ds[..., length_p:]
            if need_q:
                _per_class(dq[qs], count).copy_(torch.matmul(own, kb))
            if need_k:
                _per_class(dk[ks], count).copy_(torch.matmul(own.transpose(-1, -2), qb))
            if need_v:
                _per_class(dv[ks], count).copy_(torch.matmul(p[..., length_p:].transpose(-1, -2), db))
        if need_q:
            dq += torch.bmm(prefix_dscores, prefix_k.transpose(0, 1)).transpose(0, 1)
        dprefix_k = torch.bmm(prefix_dscores.transpose(1, 2), q.transpose(0, 1)).transpose(0, 1)
        dprefix_v = torch.bmm(prefix_probs.transpose(1, 2), dout_h).transpose(0, 1)
        return (
            dq if need_q else None,
            dk if need_k else None,
            dv if need_v else None,
            dprefix_k,
            dprefix_v,
            None,
            None,
        )


def _per_class(rows: Tensor, count: int) -> Tensor:
    """(count * l, H, K) -> (count, H, l, K), a view."""
    return rows.unflatten(0, (count, -1)).transpose(1, 2)
