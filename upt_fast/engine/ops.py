"""The engine's operations, one public function each; engine/backends/dispatch.py tells which backend computes them.

Each has a twin of the same name in reference/ops.py that is written for reading, and implementations of the same name
in the files of engine/backends/. Products take a frozen weight as a tensor; weights.py has the packed and the quantised
ones, which act themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upt_fast.engine.autograd import composing
from upt_fast.engine.backends import dispatch, pytorch
from upt_fast.engine.backends.asked import UNASKED, Asked
from upt_fast.engine.layout import BufferPlaces, PackedLayout, PackedTiles
from upt_fast.engine.workspace import Workspace

if TYPE_CHECKING:
    from upt_fast.engine.weights import BlockWeights, Packed, Plain


def layer_norm(x: Tensor, eps: float, backend: Asked | str = UNASKED) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last dimension; the affine lives in the next linear.

    Args:
        x: (..., D); statistics in float32 for half precision.
        eps: added to the variance.
        backend: see upt_fast/engine/backends/dispatch.py.
    """
    return dispatch.find("layer_norm", backend, x).layer_norm(x, eps)


def add_layer_norm(x: Tensor, y: Tensor, eps: float, backend: Asked | str = UNASKED) -> tuple[Tensor, Tensor]:
    """x + y, and the same normalised as by :func:`layer_norm`.

    Args:
        x: (..., D) residual stream.
        y: (..., D) what the last linear adds to it, in x's shape.
        eps: added to the variance.
        backend: see upt_fast/engine/backends/dispatch.py.
    """
    return dispatch.find("add_layer_norm", backend, x).add_layer_norm(x, y, eps)


def prompt_insert(
    x: Tensor, y: Tensor | None, prompts: Tensor, set_index: Tensor | None, eps: float, backend: Asked | str = UNASKED
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
    return dispatch.find("prompt_insert", backend, x).prompt_insert(x, y, prompts, set_index, eps)


def insert_shared(own: Tensor, shared: Tensor, places: BufferPlaces, backend: Asked | str = UNASKED) -> Tensor:
    """Rows of packed sequences behind the rows that the sequences of each set share, in one buffer.

    Args:
        own: (N, ...) rows of all sequences.
        shared: (S, P, ...) rows in front of every sequence of a set.
        places: which row goes where.
        backend: see upt_fast/engine/backends/dispatch.py.
    Returns:
        (N + C P, ...)
    """
    return dispatch.find("insert_shared", backend, own).insert_shared(own, shared, places)


def stream_attention(q: Tensor, k: Tensor, v: Tensor, backend: Asked | str = UNASKED) -> Tensor:
    """Attention without mask.

    Args:
        q: (B, Q, H, K) queries, already scaled.
        k: (B, L, H, K) keys.
        v: (B, L, H, K) values.
        backend: see upt_fast/engine/backends/dispatch.py.
    Returns:
        (B, Q, H, K)
    """
    return dispatch.find("stream_attention", backend, q).stream_attention(q, k, v)


def buffer_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, prefix: int, backend: Asked | str = UNASKED
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
    return dispatch.find("buffer_attention", backend, q).buffer_attention(q, k, v, layout, prefix)


def activation(u: Tensor, kind: str, bias: Tensor | None = None, backend: Asked | str = UNASKED) -> Tensor:
    """The MLP's activation, elementwise.

    Args:
        u: (..., M). For "quick_gelu" 1.702 times the pre-activation, and the result is 1.702 times QuickGELU's
            (towers/folding.py folds both factors into the linears): one silu.
        kind: "quick_gelu", "gelu" or "gelu_tanh".
        bias: (M,) added to u first, or None; frozen: it gets no gradient.
        backend: see upt_fast/engine/backends/dispatch.py.
    """
    return dispatch.find("activation", backend, u).activation(u, kind, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for a frozen linear.

    Args:
        x: (..., D).
        weight: (M, D).
        bias: (M,) or None.
    """
    return pytorch.linear(x, weight, bias)


def norm_linear(x: Tensor, weight: Plain | Packed, bias: Tensor | None, eps: float, parts: int) -> tuple[Tensor, ...]:
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
    return weight.norm_linear(x, bias, eps, parts)


def linear_gelu(
    h: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    kind: str,
    recompute: bool = False,
    backend: Asked | str = UNASKED,
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
        backend: see upt_fast/engine/backends/dispatch.py.
    """
    weights = fc_weight, fc_bias, proj_weight, proj_bias
    return dispatch.find("linear_gelu", backend, h).linear_gelu(h, *weights, kind, recompute)


def linear_residual(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x + y W^T + b for a frozen linear, the sum done by the matrix product.

    Args:
        x: (..., D) residual stream.
        y: (..., M).
        weight: (D, M).
        bias: (D,).
    """
    return pytorch.linear_residual(x, y, weight, bias)


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
    weights = fc_weight, fc_bias, proj_weight, proj_bias
    return pytorch.mlp(x, *weights, eps, kind, recompute, workspace, layer)


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
        memory: "fast", "balanced" or "lean": what backward recomputes (autograd/frozen_block.py).
        workspace: memory to use; None: the op's own.
        layer: this layer's place in the workspace.
    """
    return weights.block(x, prefix_k, prefix_v, set_index, memory, workspace, layer)


def qkv(
    h: Tensor,
    weight: Tensor,
    q_bias: Tensor,
    num_heads: int,
    h_q: Tensor | None = None,
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
    return pytorch.qkv(h, weight, q_bias, num_heads, h_q)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None = None,
    backend: Asked | str = UNASKED,
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
    found = dispatch.find("prefix_attention", backend, q)
    return found.prefix_attention(q, k, v, prefix_k, prefix_v, set_index)


def prepend_rows(prefix: Tensor, x: Tensor, set_index: Tensor | None = None) -> Tensor:
    """Write a shared prefix and each sequence's own rows into one buffer.

    Args:
        prefix: (S, P, ...) rows of S sets.
        x: (B, L, ...) rows of each sequence.
        set_index: (B,) int64, each sequence's set; None where S is 1.
    Returns:
        (B, P + L, ...)
    """
    return pytorch.prepend_rows(prefix, x, set_index)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    layout: PackedLayout,
    backend: Asked | str = UNASKED,
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
    found = dispatch.find("packed_attention", backend, q, k, v, prefix_k, prefix_v)
    if found is pytorch and composing.autocasts(q.device.type):  # its sums are in float32
        with torch.autocast(q.device.type, enabled=False):
            return packed_attention(q, k, v, prefix_k, prefix_v, layout, backend)
    return found.packed_attention(q, k, v, prefix_k, prefix_v, layout, tiles)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor,
    class_ranges: Tensor | None = None,
    backend: Asked | str = UNASKED,
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
    found = dispatch.find("contrastive_loss", backend, image_features)
    return found.contrastive_loss(image_features, text_features, logit_scale, labels, class_ranges)
