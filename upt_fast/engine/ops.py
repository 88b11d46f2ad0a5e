"""The engine's operations, one public function each; engine/backends/dispatch.py tells which backend computes them.

Each has a twin of the same name in reference/ops.py that is written for reading. Plain PyTorch implementations stand
here or, where they have a backward of their own, in functions.py and frozen_block.py; Triton kernels in kernels/.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from upt_fast.engine import fp8
from upt_fast.engine.autograd import composing, frozen_block, functions
from upt_fast.engine.autograd.frozen_block import BlockWeights, MLPWeights
from upt_fast.engine.backends import dispatch, xformers
from upt_fast.engine.cpu import library
from upt_fast.engine.cpu.library import FrozenWeight
from upt_fast.engine.fp8 import Fp8Weight
from upt_fast.engine.layout import BufferPlaces, PackedLayout, PackedTiles
from upt_fast.engine.workspace import Workspace


def layer_norm(x: Tensor, eps: float, backend: str = "torch") -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last dimension; the affine lives in the next linear.

    Args:
        x: (..., D); statistics in float32 for half precision.
        eps: added to the variance.
        backend: see upt_fast/engine/backends/dispatch.py.
    """
    if dispatch.choose("layer_norm", backend, x) == "triton":
        from upt_fast.kernels import layer_norm as kernel

        return kernel.layer_norm(x, eps)
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def add_layer_norm(x: Tensor, y: Tensor, eps: float, backend: str = "torch") -> tuple[Tensor, Tensor]:
    """x + y, and the same normalised as by :func:`layer_norm`.

    Args:
        x: (..., D) residual stream.
        y: (..., D) what the last linear adds to it, in x's shape.
        eps: added to the variance.
        backend: see upt_fast/engine/backends/dispatch.py.
    """
    if dispatch.choose("add_layer_norm", backend, x) == "triton":
        from upt_fast.kernels import layer_norm as kernel

        return kernel.add_layer_norm(x, y, eps)
    x = x + y
    return x, F.layer_norm(x, x.shape[-1:], eps=eps)


def prompt_insert(
    x: Tensor, y: Tensor | None, prompts: Tensor, set_index: Tensor | None, eps: float, backend: str = "torch"
) -> tuple[Tensor, Tensor]:
    """Prompts into the stream's reserved rows, the pending residual to the others, both normalised.

    Args:
        x: (B, T, D) contiguous stream; rows [:, :P] are reserved, whatever they hold is replaced. May be changed in
            place: use the one that comes back.
        y: (B, T, D) what the last linear adds to the other rows, or None.
        prompts: (S, P, D) in x's dtype.
        set_index: (B,) int64, each sequence's set; None where S is 1. Prompts per image are B sets.
        eps: added to the variance.
        backend: see upt_fast/engine/backends/dispatch.py.
    Returns:
        the stream (B, T, D), and the same normalised as by :func:`layer_norm`.
    """
    if dispatch.choose("prompt_insert", backend, x) == "triton":
        from upt_fast.kernels import prompt_insert as kernel

        return kernel.prompt_insert(x, y, prompts, set_index, eps)
    length = prompts.shape[1]
    stream = torch.empty_like(x)
    stream[:, :length] = prompts if set_index is None else prompts[set_index]
    stream[:, length:] = x[:, length:] if y is None else x[:, length:] + y[:, length:]
    return stream, F.layer_norm(stream, x.shape[-1:], eps=eps)


def insert_shared(own: Tensor, shared: Tensor, places: BufferPlaces, backend: str = "torch") -> Tensor:
    """Rows of packed sequences behind the rows that the sequences of each set share, in one buffer.

    Args:
        own: (N, ...) rows of all sequences.
        shared: (S, P, ...) rows in front of every sequence of a set.
        places: which row goes where.
        backend: see upt_fast/engine/backends/dispatch.py.
    Returns:
        (N + C P, ...)
    """
    if dispatch.choose("insert_shared", backend, own) == "triton":
        from upt_fast.kernels import insert_shared as kernel

        return kernel.insert_shared(own, shared, *places)
    buffer = own.new_empty(len(places.source), *own.shape[1:])
    buffer[places.own_rows] = own
    slots = places.first_rows[:, None] + torch.arange(shared.shape[1], device=own.device)  # (C, P)
    set_of = torch.searchsorted(places.bounds, torch.arange(len(slots), device=own.device), right=True) - 1
    buffer[slots] = shared[set_of]
    return buffer


def stream_attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "torch") -> Tensor:
    """Attention without mask.

    Args:
        q: (B, Q, H, K) queries, already scaled.
        k: (B, L, H, K) keys.
        v: (B, L, H, K) values.
        backend: see upt_fast/engine/backends/dispatch.py.
    Returns:
        (B, Q, H, K)
    """
    if dispatch.choose("stream_attention", backend, q) == "xformers":
        return xformers.attention(q, k, v)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)


def buffer_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, prefix: int, backend: str = "torch"
) -> Tensor:
    """Causal attention of packed class rows over buffers that :func:`insert_shared` filled.

    Args:
        q: (N, H, K) queries of all rows, already scaled; or (C, H, K), of each class's last row alone.
        k: (N + C P, H, K) keys: for each class P shared rows, then its own.
        v: (N + C P, H, K) values.
        layout: how the N rows divide into S sets of classes.
        prefix: P.
        backend: see upt_fast/engine/backends/dispatch.py.
    Returns:
        (N, H, K) or (C, H, K), as q.
    """
    if dispatch.choose("buffer_attention", backend, q) == "xformers":
        return xformers.buffer_attention(q, k, v, layout, prefix)
    last_only = q.shape[0] != layout.num_rows
    outputs, query, key = [], 0, 0
    for count, length in (run for runs in layout.sets for run in runs):
        queries, keys = 1 if last_only else length, prefix + length
        part = q[query : query + count * queries].unflatten(0, (count, queries)).transpose(1, 2)  # (c, H, l, K)
        block_k, block_v = (t[key : key + count * keys].unflatten(0, (count, keys)).transpose(1, 2) for t in (k, v))
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril_(keys - queries)
        attended = F.scaled_dot_product_attention(part, block_k, block_v, attn_mask=mask, scale=1.0)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
        query, key = query + count * queries, key + count * keys
    return torch.cat(outputs)


def activation(u: Tensor, kind: str, bias: Tensor | None = None, backend: str = "torch") -> Tensor:
    """The MLP's activation, elementwise.

    Args:
        u: (..., M). For "quick_gelu" 1.702 times the pre-activation, and the result is 1.702 times QuickGELU's
            (towers/blocks.py folds both factors into the linears): one silu.
        kind: "quick_gelu", "gelu" or "gelu_tanh".
        bias: (M,) added to u first, or None; frozen: it gets no gradient.
        backend: see upt_fast/engine/backends/dispatch.py.
    """
    if dispatch.choose("activation", backend, u) == "triton":
        from upt_fast.kernels import activation as kernel

        return kernel.activation(u, kind, bias)
    u = u if bias is None else u + bias
    if kind == "quick_gelu":
        return F.silu(u)
    return F.gelu(u, approximate="tanh" if kind == "gelu_tanh" else "none")


def linear(x: Tensor, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for a frozen linear.

    Args:
        x: (..., D).
        weight: (M, D); quantised: the result is bfloat16.
        bias: (M,) or None.
    """
    if isinstance(weight, Fp8Weight):
        return fp8.linear(x, weight, bias)
    if not functions.takes_onednn(x):
        return F.linear(x, weight, bias)
    return functions.Linear.apply(x, weight, bias, None)


def norm_linear(x: Tensor, weight: FrozenWeight, bias: Tensor | None, eps: float, parts: int) -> tuple[Tensor, ...]:
    """norm(x) W^T + b for a frozen linear whose result falls into parts.

    Args:
        x: (..., D) rows; normalised as by :func:`layer_norm`.
        weight: (M, D).
        bias: (M,) or None.
        eps: of the LayerNorm.
        parts: n, of equal width.
    Returns:
        n of (..., M / n).
    """
    if weight.forward is None or composing.op_by_op(x) or x.numel() == 0:
        return linear(layer_norm(x, eps), weight.plain, bias).chunk(parts, dim=-1)
    return frozen_block.NormLinear.apply(x, weight, bias, eps, parts)


def linear_gelu(
    h: Tensor,
    fc_weight: Tensor | Fp8Weight,
    fc_bias: Tensor,
    proj_weight: Tensor | Fp8Weight,
    proj_bias: Tensor,
    kind: str,
    recompute: bool = False,
    backend: str = "torch",
) -> Tensor:
    """W_2 act(W_1 h + b_1) + b_2 for frozen weights: an MLP without its LayerNorm and its residual.

    Args:
        h: (..., D).
        fc_weight: (M, D), W_1.
        fc_bias: (M,).
        proj_weight: (D, M), W_2.
        proj_bias: (D,).
        kind: the activation, see :func:`activation`.
        recompute: compute the hidden features (..., M) again in backward instead of keeping them.
        backend: see upt_fast/engine/backends/dispatch.py; with quantised weights of the activation alone.
    """
    weights = fc_weight, fc_bias, proj_weight, proj_bias
    quantized = isinstance(fc_weight, Fp8Weight)
    if not quantized and dispatch.choose("linear_gelu", backend, h) == "triton":
        from upt_fast.kernels import linear_gelu as kernel

        return kernel.linear_gelu_linear(h, *weights, kind, keep=not recompute)  # type: ignore[arg-type]
    if recompute and torch.is_grad_enabled() and not composing.composes(h):
        inputs = (h, *weights, kind, False, backend)
        return checkpoint(linear_gelu, *inputs, use_reentrant=False, preserve_rng_state=False)
    if quantized:  # whose product adds the bias before it rounds
        a = activation(linear(h, fc_weight, fc_bias), kind, None, backend)
    else:
        a = activation(linear(h, fc_weight), kind, fc_bias, backend)
    return linear(a, proj_weight, proj_bias)


def linear_residual(x: Tensor, y: Tensor, weight: Tensor | FrozenWeight | Fp8Weight, bias: Tensor) -> Tensor:
    """x + y W^T + b for a frozen linear, the sum done by the matrix product.

    Args:
        x: (..., D) residual stream.
        y: (..., M).
        weight: (D, M).
        bias: (D,).
    """
    if isinstance(weight, Fp8Weight):
        return x + fp8.linear(y, weight, bias)
    weight = weight if isinstance(weight, FrozenWeight) else FrozenWeight(weight)
    if weight.forward is not None and not composing.op_by_op(y):
        return frozen_block.LinearResidual.apply(x, y, weight, bias)
    return functions.linear_residual(x, y, weight.plain, bias)


def mlp(
    x: Tensor,
    fc_weight: Tensor | FrozenWeight | Fp8Weight,
    fc_bias: Tensor,
    proj_weight: Tensor | FrozenWeight | Fp8Weight,
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
    if isinstance(fc_weight, Fp8Weight):
        assert isinstance(proj_weight, Fp8Weight)
        return x + linear_gelu(layer_norm(x, eps), fc_weight, fc_bias, proj_weight, proj_bias, kind, recompute)
    assert not isinstance(proj_weight, Fp8Weight)
    fc, proj = (w if isinstance(w, FrozenWeight) else FrozenWeight(w) for w in (fc_weight, proj_weight))
    if composing.op_by_op(x) or x.numel() == 0:
        u = F.linear(layer_norm(x, eps), fc.plain, fc_bias)
        return linear_residual(x, activation(u, kind), proj.plain, proj_bias)
    weights = MLPWeights(fc, fc_bias, proj, proj_bias, eps, kind)
    return frozen_block.MLP.apply(x, weights, recompute, workspace, layer)


def block(
    x: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    weights: BlockWeights,
    set_index: Tensor | None = None,
    memory: str = "fast",
    workspace: Workspace | None = None,
    layer: int = 0,
) -> Tensor:
    """One frozen residual block: x' = x + attention over [shared prefix ; own rows], then x' + MLP(x').

    Args:
        x: (B, L, D) residual stream.
        prefix_k: (S, P, H, K) keys of S prompt sets, or None.
        prefix_v: (S, P, H, K) values, or None.
        weights: the block's.
        set_index: (B,) int64, each image's set; None where S is 1.
        memory: "fast", "balanced" or "lean": what backward recomputes (frozen_block.py).
        workspace: memory to use; None: the op's own.
        layer: this layer's place in the workspace.
    """
    exact = x.dtype.itemsize >= 4 or weights.qkv.forward is not None
    if x.device.type == "cpu" and x.numel() > 0 and exact and not composing.op_by_op(x):
        return frozen_block.Block.apply(x, prefix_k, prefix_v, set_index, weights, memory, workspace, layer)
    if memory == "lean" and torch.is_grad_enabled() and not composing.composes(x):
        return checkpoint(
            _block, x, prefix_k, prefix_v, weights, set_index, False, use_reentrant=False, preserve_rng_state=False
        )
    return _block(x, prefix_k, prefix_v, weights, set_index, memory == "balanced", workspace, layer)


def _block(
    x: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    weights: BlockWeights,
    set_index: Tensor | None,
    recompute: bool,
    workspace: Workspace | None = None,
    layer: int = 0,
) -> Tensor:
    """:func:`block`, operation by operation."""
    width, w = x.shape[-1], weights.mlp
    q, k, v = qkv(layer_norm(x, weights.eps), weights.qkv.plain, weights.qkv_bias[:width], weights.num_heads)
    attended = prefix_attention(q, k, v, prefix_k, prefix_v, set_index)
    x = linear_residual(x, attended.flatten(-2), weights.out.plain, weights.out_bias)
    return mlp(x, w.fc, w.fc_bias, w.proj, w.proj_bias, w.eps, w.activation, recompute, workspace, layer)


def qkv(
    h: Tensor,
    weight: Tensor | tuple[Fp8Weight, Fp8Weight],
    q_bias: Tensor,
    num_heads: int,
    h_q: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of normalised rows.

    Args:
        h: (..., D).
        weight: (3D, D); quantised: q's (D, D), and k's and v's (2D, D).
        q_bias: (D,).
        num_heads: H.
        h_q: (..., D) the rows that need queries, if not all do.
    Returns:
        three of (..., H, K).
    """
    width = h.shape[-1]
    # two products: q lives on for backward, where k and v are copied into a buffer behind the prompts'
    w_q, w_kv = (weight[:width], weight[width:]) if isinstance(weight, Tensor) else weight
    q = linear(h if h_q is None else h_q, w_q, q_bias)
    k, v = linear(h, w_kv).chunk(2, dim=-1)
    return tuple(t.unflatten(-1, (num_heads, -1)) for t in (q, k, v))  # type: ignore[return-value]


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None = None,
    backend: str = "torch",
) -> Tensor:
    """Attention of each image's queries over [shared prefix ; own rows], without mask.

    Args:
        q: (B, Q, H, K) queries, already scaled.
        k: (B, L, H, K) keys of the image's own rows.
        v: (B, L, H, K) values.
        prefix_k: (S, P, H, K) keys of S prompt sets, or None.
        prefix_v: (S, P, H, K) values, or None.
        set_index: (B,) int64, each image's set; None where S is 1.
        backend: see upt_fast/engine/backends/dispatch.py.
    Returns:
        (B, Q, H, K)
    """
    if dispatch.choose("prefix_attention", backend, q) == "triton":
        from upt_fast.kernels import prefix_attention as kernel

        return kernel.prefix_attention(*_autocast(q, k, v, prefix_k, prefix_v), set_index)
    if prefix_k is not None and prefix_v is not None:
        k = prepend_rows(prefix_k, k, set_index)
        v = prepend_rows(prefix_v, v, set_index)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if composing.composes(q, k, v):
        return functions.attention(q, k, v).transpose(1, 2)
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
    if composing.composes(prefix, x):
        return functions.prepend_rows(prefix, x, set_index)
    return functions.PrependRows.apply(prefix, x, set_index)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    layout: PackedLayout,
    backend: str = "torch",
    tiles: PackedTiles | None = None,
) -> Tensor:
    """Causal attention of packed class rows over [the set's shared prefix ; the class's own rows so far].

    Args:
        q: (N, H, K) queries of all rows, already scaled; or (C, H, K), of each class's last row alone.
        k: (N, H, K) keys of all rows.
        v: (N, H, K) values.
        prefix_k: (S, P, H, K) keys in front of every class of a set.
        prefix_v: (S, P, H, K) values.
        layout: how the N rows divide into S sets of classes.
        backend: see upt_fast/engine/backends/dispatch.py.
        tiles: the layout's for this P, on q's device; None: divided once and kept. Only "triton" looks at them.
    Returns:
        (N, H, K) or (C, H, K), as q.
    """
    if dispatch.choose("packed_attention", backend, q) == "triton":
        from upt_fast.kernels import packed_attention as kernel

        tiles = _packed_tiles(layout, prefix_k.shape[1], str(q.device)) if tiles is None else tiles
        return kernel.packed_attention(*_autocast(q, k, v, prefix_k, prefix_v), tiles)
    if _compiled_attention(q, k, v, prefix_k, prefix_v):
        return frozen_block.PackedAttention.apply(q, k, v, prefix_k, prefix_v, layout)
    last_only = q.shape[0] != k.shape[0]
    dtype = q.dtype
    if any(t.dtype.itemsize < 4 for t in (q, k, v, prefix_k, prefix_v)):
        # rows are few: scores and probabilities stay in float32, as in fused attention
        q, k, v, prefix_k, prefix_v = (t.float() for t in (q, k, v, prefix_k, prefix_v))
    if composing.autocasts(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return packed_attention(q, k, v, prefix_k, prefix_v, layout).to(dtype)
    attend = functions.packed_attention if composing.composes(q, k, v) else functions.PackedAttention.apply
    outputs, query, row, first = [], 0, 0, 0
    for runs, group in itertools.groupby(layout.sets):  # neighbouring sets with the same runs together
        sets = len(list(group))
        rows = sum(count * length for count, length in runs)
        queries = sum(count for count, _ in runs) if last_only else rows
        own_q = q[query : query + sets * queries].unflatten(0, (sets, queries))
        own_k, own_v = (t[row : row + sets * rows].unflatten(0, (sets, rows)) for t in (k, v))
        prefixes = prefix_k[first : first + sets], prefix_v[first : first + sets]
        outputs.append(attend(own_q, own_k, own_v, *prefixes, runs, last_only).flatten(0, 1))
        query, row, first = query + sets * queries, row + sets * rows, first + sets
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(dtype)


def _compiled_attention(q: Tensor, *others: Tensor) -> bool:
    """Whether kernels/cpu computes attention of rows q (N, H, K), all in its dtype."""
    if q.device.type != "cpu" or composing.op_by_op(q) or any(t.dtype != q.dtype for t in others):
        return False
    return not library.refusal(q.dtype, q.shape[-2] * q.shape[-1])


def _autocast(*tensors: Tensor | None) -> Iterator[Any]:
    """The tensors in autocast's dtype where it is on, as PyTorch's attention takes them: custom ops are not cast."""
    device = next(t.device.type for t in tensors if t is not None)
    dtype = torch.get_autocast_dtype(device) if composing.autocasts(device) else None
    return (t if t is None or dtype is None else t.to(dtype) for t in tensors)


@functools.lru_cache(maxsize=64)
def _packed_tiles(layout: PackedLayout, prefix: int, device: str) -> PackedTiles:
    with torch.inference_mode(False):  # they may be needed for gradients later
        return PackedTiles.of(layout, prefix).to(device)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor,
    class_ranges: Tensor | None = None,
    backend: str = "torch",
) -> Tensor:
    """Cross-entropy of each image over scaled cosines with the classes of its range (CLIP, arXiv 2103.00020).

    Args:
        image_features: (B, e), any norm.
        text_features: (C, e), any norm.
        logit_scale: what cosines are multiplied by, a constant.
        labels: (B,) int64, counted from the start of the image's range.
        class_ranges: (B, 2) int64, first class and end of each image's range; None: all C classes.
        backend: see upt_fast/engine/backends/dispatch.py.
    Returns:
        (B,) losses, float32 (float64 for float64 features).
    """
    if dispatch.choose("contrastive_loss", backend, image_features) == "triton":
        from upt_fast.kernels import contrastive_loss as kernel

        return kernel.contrastive_loss(image_features, text_features, logit_scale, labels, class_ranges)
    exact = torch.float64 if image_features.dtype == torch.float64 else torch.float32
    images, texts = (F.normalize(t.to(exact), dim=-1) for t in (image_features, text_features))
    logits = logit_scale * images @ texts.t()
    if class_ranges is not None:
        first, end = class_ranges[:, :1], class_ranges[:, 1:]
        classes = torch.arange(len(texts), device=labels.device)
        logits = logits.masked_fill((classes < first) | (classes >= end), float("-inf"))
        labels = labels + class_ranges[:, 0]
    return F.cross_entropy(logits, labels, reduction="none")
