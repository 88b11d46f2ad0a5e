"""The engine's operations, one public function each, in plain PyTorch arranged for speed.

Each has a twin of the same name in reference/ops.py that is written for reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from upt_fast.layout import PackedLayout


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


def linear_residual(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x + y W^T + b for a frozen linear, the sum done by the matrix product.

    Args:
        x: (..., D) residual stream.
        y: (..., M).
        weight: (D, M).
        bias: (D,).
    """
    if x.dtype.itemsize < 4:  # in half precision a second rounding of the large sum would cost accuracy
        return x + F.linear(y, weight, bias).view(x.shape)
    rows = torch.addmm(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), weight.t())
    return rows.add_(bias).view(x.shape)


class Workspace:
    """Memory of one forward pass through a tower and its backward, in few large blocks.

    Long-lived and short-lived tensors that alternate leave holes in the allocator's heap: on a CPU a quarter of the
    peak. So the largest of both kinds live here. A workspace belongs to one call of a tower: models and threads never
    share one.

    Args:
        num_layers: layers that will ask for kept memory of one shape.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._first_layer: dict[str, int] = {}
        self._scratch: Tensor | None = None
        self._kept: dict[str, Tensor] = {}

    def scratch(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor in like's dtype and device, for one op: the next call reuses its memory."""
        size = math.prod(shape)
        block = self._scratch
        if block is None or block.numel() < size or block.dtype != like.dtype or block.device != like.device:
            self._scratch = block = like.new_empty(size)
        return block[:size].view(shape)

    def kept(self, name: str, layer: int, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor in like's dtype and device, one per name and layer, that backward will read."""
        block = self._kept.get(name)
        if block is None or block.shape[1:] != shape or layer - self._first_layer[name] >= len(block):
            self._first_layer[name] = layer
            self._kept[name] = like.new_empty(max(1, self._num_layers - layer), *shape)
        row = self._kept[name][layer - self._first_layer[name]]
        # not a view: with a version counter of its own, so that writing the next layer's does not invalidate this one
        return like.new_empty(0).set_(row.untyped_storage(), row.storage_offset(), row.size(), row.stride())

    def end_forward(self) -> None:
        """Let go of the memory: from here on autograd's saved tensors hold it, and release it as backward goes.

        A loss that outlives its backward, as in most training loops, keeps its graph and with it this object alive.
        """
        self._kept.clear()
        self._scratch = None


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
        h, mean, rstd = torch.native_layer_norm(rows, rows.shape[-1:], None, None, eps)
        shape = (len(rows), len(fc_weight))
        keep = ctx.needs_input_grad[0] and not recompute
        u = workspace.kept("u", layer, x, *shape) if keep else x.new_empty(shape)
        torch.addmm(fc_bias, h, fc_weight.t(), out=u)
        ctx.save_for_backward(rows, mean, rstd, None if recompute else u, fc_weight, fc_bias, proj_weight)
        ctx.kind, ctx.eps, ctx.workspace = kind, eps, workspace
        a = _activation_into(workspace.scratch(u, *u.shape), u, kind)
        if not ctx.needs_input_grad[0] or x.dtype.itemsize < 4:
            return linear_residual(x, a, proj_weight, proj_bias)
        y = workspace.kept("y", layer, x, *rows.shape)
        return torch.addmm(rows, a, proj_weight.t(), out=y).add_(proj_bias).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, mean, rstd, u, fc_weight, fc_bias, proj_weight = ctx.saved_tensors
        if u is None:
            u = F.linear(layer_norm(x, ctx.eps), fc_weight, fc_bias)
        shape, dy = dy.shape, dy.reshape(-1, dy.shape[-1])
        du = torch.mm(dy, proj_weight, out=ctx.workspace.scratch(dy, len(dy), proj_weight.shape[1]))
        if ctx.kind == "quick_gelu":
            torch.ops.aten.silu_backward.grad_input(du, u, grad_input=du)
        else:
            approximate = "tanh" if ctx.kind == "gelu_tanh" else "none"
            torch.ops.aten.gelu_backward.grad_input(du, u, approximate=approximate, grad_input=du)
        dx = torch.ops.aten.native_layer_norm_backward(
            du @ fc_weight, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
        return dx.add_(dy).view(shape), *[None] * 9


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
    q = F.linear(h if h_q is None else h_q, weight[:width], q_bias)
    k, v = F.linear(h, weight[width:]).chunk(2, dim=-1)
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

        h, mean, rstd = torch.native_layer_norm(rows, (width,), None, None, eps)
        q = torch.addmm(q_bias, h, qkv_weight[:width].t(), out=new("q", *rows.shape))
        kv = torch.mm(h, qkv_weight[width:].t(), out=workspace.scratch(x, len(rows), 2 * width))
        k, v = (new(name, batch, prefix + length, width) for name in ("k", "v"))
        for buffer, own, shared in ((k, kv[:, :width], prefix_k), (v, kv[:, width:], prefix_v)):
            buffer[:, prefix:] = own.view(batch, length, width)
            if prefix:
                buffer[:, :prefix] = (shared if set_index is None else shared[set_index]).flatten(2)
        heads = [_split_heads(t, batch, num_heads) for t in (q, k, v)]
        attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, scale=1.0)
        ctx.save_for_backward(rows, mean, rstd, q, k, v, attended, lse, qkv_weight, out_weight, set_index)
        ctx.prefix, ctx.sets, ctx.workspace, ctx.num_heads = (
            prefix,
            len(prefix_k) if prefix else 0,
            workspace,
            num_heads,
        )
        y = torch.addmm(rows, attended.transpose(1, 2).reshape(rows.shape), out_weight.t(), out=new("x", *rows.shape))
        return y.add_(out_bias).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        rows, mean, rstd, q, k, v, attended, lse, qkv_weight, out_weight, set_index = ctx.saved_tensors
        batch, length, width = dy.shape
        dy = dy.reshape(rows.shape)
        dout = _split_heads(dy @ out_weight, batch, ctx.num_heads)
        heads = [_split_heads(t, batch, ctx.num_heads) for t in (q, k, v)]
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, *heads, attended, lse, 0.0, False, scale=1.0
        )
        dprefix: list[Tensor | None] = [None, None]
        for i, d in enumerate((dk, dv)):
            if ctx.needs_input_grad[1 + i]:
                dprefix[i] = _sum_by_set(d[:, :, : ctx.prefix].transpose(1, 2), set_index, ctx.sets)
        dx = None
        if ctx.needs_input_grad[0]:
            dqkv = ctx.workspace.scratch(dy, batch, length, 3, ctx.num_heads, width // ctx.num_heads)
            for i, d in enumerate((dq, dk[:, :, ctx.prefix :], dv[:, :, ctx.prefix :])):
                dqkv[:, :, i] = d.transpose(1, 2)
            dh = dqkv.view(len(rows), 3 * width) @ qkv_weight
            dx = torch.ops.aten.native_layer_norm_backward(
                dh, rows, (width,), mean, rstd, None, None, [True, False, False]
            )[0]
            dx = dx.add_(dy).view(batch, length, width)
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
