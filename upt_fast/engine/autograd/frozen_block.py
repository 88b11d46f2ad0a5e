"""One residual block with frozen weights as one autograd function, and its MLP alone.

    x' = x + W_o attention(W_qkv norm(x)) + b_o,    y = x' + W_2 act(W_1 norm(x') + b_1) + b_2

There are no weight gradients and nothing is saved for them. What backward reads of a row of width D, on a CPU in memory
of the workspace, by memory level:

fast        x, q, k, v, attention's output, x', and W_1's result or act' of it (4 D): 10 D
balanced    W_1's result is computed again: 6 D
lean        all but x is computed again: D

Beside these there are two moments of each LayerNorm and, for each head, the logarithm of a softmax's sum.

How a product is done, with what stands around it, its weight knows (products.py); how attention is, attention.py and
gpu_attention.py. Nothing here waits for a GPU, so a step with it can be captured.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from upt_fast.engine.autograd.attention import Attended, Attention, ChoosesAttention
from upt_fast.engine.autograd.composing import fast_backward
from upt_fast.engine.autograd.functions import sum_by_set
from upt_fast.engine.autograd.products import Product, rows_of
from upt_fast.engine.workspace import Workspace


class MLPParts(NamedTuple):
    """The folded MLP of a block of width D, with M hidden features."""

    fc: Product  # (M, D)
    fc_bias: Tensor
    proj: Product  # (D, M)
    proj_bias: Tensor
    eps: float
    activation: str  # "quick_gelu", "gelu" or "gelu_tanh"


class BlockParts(Protocol):
    """A folded block of width D and H heads; weights.py has it."""

    qkv: Product  # (3D, D)
    qkv_bias: Tensor  # (3D,), zero for k and v
    out: Product  # (D, D)
    out_bias: Tensor
    eps: float
    num_heads: int
    mlp: MLPParts
    attention: ChoosesAttention


def _mlp_forward(
    x: Tensor, w: MLPParts, space: Workspace, layer: int, u: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """out = x + MLP(norm(x)) of rows (N, D), u (N, M) or None where the pre-activation goes; returns the moments."""
    a = space.scratch("wide", x, len(x), len(w.fc_bias))
    moments = w.fc.normed(space, "mlp", layer, x, w.eps, w.fc_bias, a, w.activation, u)
    w.proj.added(a, w.proj_bias, x, out)
    return moments


def _slope(x: Tensor, w: MLPParts, space: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """What backward needs of W_1's result, computed once more from rows x (N, D), and the moments of x."""
    u = space.scratch("u", x, len(x), len(w.fc_bias))
    return u, *w.fc.slope(space, x, w.eps, w.fc_bias, w.activation, u)


def _mlp_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, u: Tensor | None, w: MLPParts, space: Workspace
) -> Tensor:
    """Gradient of rows x (N, D), given that of the MLP's output with its residual."""
    if u is None:
        u = _slope(x, w, space)[0]
    du = space.scratch("wide", dy, *u.shape)
    w.proj.times_slope(dy, u, w.activation, du)
    return w.fc.norm_backward(space, du, x, mean, rstd, dy, space.scratch("row", dy, *dy.shape))


def _attention_forward(
    x: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None,
    w: BlockParts,
    space: Workspace,
    layer: int,
    keep: bool,
    needed: bool,
) -> tuple[Tensor, Attended, Attention]:
    """x' (B L, D) of x (B, L, D), what backward needs, in kept or passing memory, and who attended.

    Args:
        keep: whether what backward needs is kept.
        needed: whether there will be a backward pass at all.
    """
    prefix = 0 if prefix_k is None else prefix_k.shape[1]
    rows = rows_of(x)

    def new(name: str, like: Tensor, *shape: int) -> Tensor:
        return space.kept(name, layer, like, *shape) if keep else space.scratch(name, like, *shape)

    passing = (space, space, layer) if keep else (Workspace(1), space, 0)
    projected = w.qkv.project(new, *passing, rows, w.eps, w.qkv_bias, len(x), prefix)
    q, k, v = projected[2:]
    if prefix_k is not None and prefix_v is not None:
        for buffer, shared in ((k, prefix_k), (v, prefix_v)):
            buffer[:, :prefix] = (shared if set_index is None else shared[set_index]).flatten(2)
    attention = w.attention.chosen(q, k, v, w.num_heads, needed)
    attended = Attended(*projected, *attention.forward(q, k, v, w.num_heads, new, needed))
    after = w.out.added(attended.out, w.out_bias, rows, new("x", x, *rows.shape))
    return after, attended, attention


def _attention_backward(
    dy: Tensor,
    x: Tensor | None,
    saved: Attended,
    prefix: int,
    w: BlockParts,
    attention: Attention,
    space: Workspace,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x (B L, D), or None where x is None, and of the prefix's keys and values (B, P, H, K) by image."""
    dout = w.out.times(dy, space.scratch("row", dy, *dy.shape))
    dqkv, dk_prefix, dv_prefix = attention.backward(dout, saved, w.num_heads, prefix, x is not None, space)
    if x is None or dqkv is None:
        return None, dk_prefix, dv_prefix
    dx = w.qkv.norm_backward(space, dqkv.view(len(dy), -1), x, saved.mean, saved.rstd, dy, dout)
    return dx, dk_prefix, dv_prefix


class MLP(torch.autograd.Function):
    """See upt_fast.engine.ops.mlp."""

    @staticmethod
    def forward(ctx, x, weights, recompute, given, layer):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        space, rows = given or Workspace(1), rows_of(x)
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
        dx = _mlp_backward(rows_of(dy), rows, mean, rstd, u, ctx.weights, ctx.space or Workspace(1))
        return dx.view(dy.shape), None, None, None, None


class Block(torch.autograd.Function):
    """See upt_fast.engine.ops.block."""

    @staticmethod
    def forward(ctx, x, prefix_k, prefix_v, set_index, weights, memory, given, layer):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        space, rows = given or Workspace(1), rows_of(x)
        needed = any(ctx.needs_input_grad[:3])
        keep = needed and memory != "lean"
        given_rows = x, prefix_k, prefix_v, set_index
        after, attended, attention = _attention_forward(*given_rows, weights, space, layer, keep, needed)
        u = space.kept("u", layer, x, len(rows), len(weights.mlp.fc_bias)) if keep and memory == "fast" else None
        y = space.kept("y", layer, x, *rows.shape) if needed else space.scratch("y", x, *rows.shape)
        mlp_space = space if keep else Workspace(1)
        mlp_mean, mlp_rstd = _mlp_forward(after, weights.mlp, mlp_space, layer if keep else 0, u, y)
        ctx.weights, ctx.attention, ctx.space, ctx.memory, ctx.shape = weights, attention, given, memory, x.shape
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
            again = weights._replace(attention=ctx.attention)
            given_rows = x, prefix_k, prefix_v, set_index
            after, attended, _ = _attention_forward(*given_rows, again, space, 0, keep=False, needed=True)
            u, mean, rstd = _slope(after, weights.mlp, space)
            rows = rows if ctx.needs_input_grad[0] else None
        else:
            rows, set_index, after, mean, rstd, u, *rest = ctx.saved_tensors
            attended = Attended(*rest)
        dy = _mlp_backward(rows_of(dy), after, mean, rstd, u, weights.mlp, space)
        del after, u  # an allocator may give their memory to what comes next
        dx, dk, dv = _attention_backward(dy, rows, attended, ctx.prefix, weights, ctx.attention, space)
        dx = None if dx is None else dx.view(ctx.shape)
        prefix_grads = [
            sum_by_set(d, set_index, ctx.sets) if need else None
            for d, need in zip((dk, dv), ctx.needs_input_grad[1:3], strict=True)
        ]
        return dx, *prefix_grads, *[None] * 5
