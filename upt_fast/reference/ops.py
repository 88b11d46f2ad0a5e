"""The engine's operations (upt_fast/engine/ops.py), each in a few lines to be read: same names, same
arguments but for what only steers memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from upt_fast.engine.layout import BufferPlaces, PackedLayout


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps)."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def add_layer_norm(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y and the same normalised."""
    return x + y, layer_norm(x + y, eps)


def prompt_insert(
    x: Tensor, y: Tensor | None, prompts: Tensor, set_index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """[prompts of the sequence's set ; other rows plus y] and the same normalised."""
    other = x if y is None else x + y
    index = torch.zeros(len(x), dtype=torch.int64, device=x.device) if set_index is None else set_index
    stream = torch.cat([prompts[index], other[:, prompts.shape[1] :]], dim=1)
    return stream, layer_norm(stream, eps)


def activation(u: Tensor, kind: str, bias: Tensor | None = None) -> Tensor:
    """silu for "quick_gelu", whose factors 1.702 are in the linears around it; GELU; tanh GELU."""
    u = u if bias is None else u + bias
    if kind == "quick_gelu":
        return u * torch.sigmoid(u)
    if kind == "gelu":
        return 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b."""
    return x @ weight.t() if bias is None else x @ weight.t() + bias


def linear_gelu(
    h: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    kind: str,
    recompute: bool = False,
) -> Tensor:
    """W_2 act(W_1 h + b_1) + b_2."""
    return linear(activation(linear(h, fc_weight, fc_bias), kind), proj_weight, proj_bias)


def linear_residual(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x + y W^T + b."""
    return x + (y @ weight.t() + bias)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    eps: float,
    kind: str,
    recompute: bool = False,
) -> Tensor:
    """x + W_2 act(W_1 norm(x) + b_1) + b_2."""
    u = layer_norm(x, eps) @ fc_weight.t() + fc_bias
    return linear_residual(x, activation(u, kind), proj_weight, proj_bias)


def prepend_rows(prefix: Tensor, x: Tensor, set_index: Tensor | None = None) -> Tensor:
    """[prefix of the sequence's set ; own rows]."""
    index = torch.zeros(len(x), dtype=torch.int64, device=x.device) if set_index is None else set_index
    return torch.cat([prefix[index], x], dim=1)


def insert_shared(own: Tensor, shared: Tensor, places: BufferPlaces) -> Tensor:
    """Row r of the buffer is own row source[r], or shared row -1 - source[r] where that is negative."""
    flat = shared.flatten(0, 1)
    return torch.stack([own[r] if r >= 0 else flat[-1 - r] for r in places.source.tolist()])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of one sequence, q already scaled: q (Q, H, K), k and v (L, H, K)."""
    return torch.einsum("hql,lhk->qhk", torch.einsum("qhk,lhk->hql", q, k).softmax(-1), v)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None = None,
) -> Tensor:
    """Each image's queries over [prefix of its set ; own rows]."""
    if prefix_k is not None and prefix_v is not None:
        k, v = prepend_rows(prefix_k, k, set_index), prepend_rows(prefix_v, v, set_index)
    return torch.stack([softmax_attention(*sequence) for sequence in zip(q, k, v, strict=True)])


def stream_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each sequence's queries over its keys, without mask."""
    return torch.stack([softmax_attention(*sequence) for sequence in zip(q, k, v, strict=True)])


def buffer_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, prefix: int) -> Tensor:
    """Each row over the prefix and the rows of its class up to itself, one row at a time."""
    last_only = len(q) != layout.num_rows
    outputs: list[Tensor] = []
    begin = 0
    for length in (length for runs in layout.sets for count, length in runs for _ in range(count)):
        for end in range(length if last_only else 1, length + 1):
            query = q[len(outputs) : len(outputs) + 1]
            outputs.append(softmax_attention(query, *(t[begin : begin + prefix + end] for t in (k, v))))
        begin += prefix + length
    return torch.cat(outputs)


def norm_linear(x: Tensor, weight: Any, bias: Tensor | None, eps: float, parts: int) -> tuple[Tensor, ...]:
    """norm(x) W^T + b, cut into parts."""
    y = layer_norm(x, eps) @ weight.plain.t()
    return (y if bias is None else y + bias).chunk(parts, dim=-1)


def qkv(
    h: Tensor, weight: Tensor, q_bias: Tensor, num_heads: int, h_q: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """W_q h_q + b_q, W_k h and W_v h, split into heads."""
    w_q, w_k, w_v = weight.chunk(3)
    q = (h if h_q is None else h_q) @ w_q.t() + q_bias
    return q.unflatten(-1, (num_heads, -1)), *((h @ w.t()).unflatten(-1, (num_heads, -1)) for w in (w_k, w_v))


def block(
    x: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    weights: Any,
    set_index: Tensor | None = None,
    memory: str = "fast",
) -> Tensor:
    """x' = x + W_o attention(W_qkv norm(x)) + b_o over [prefix of the sequence's set ; own rows], then x' + MLP(x')."""
    width, w = x.shape[-1], weights.mlp
    q, k, v = qkv(layer_norm(x, weights.eps), weights.qkv.plain, weights.qkv_bias[:width], weights.num_heads)
    attended = prefix_attention(q, k, v, prefix_k, prefix_v, set_index)
    x = linear_residual(x, attended.flatten(-2), weights.out.plain, weights.out_bias)
    return mlp(x, w.fc.plain, w.fc_bias, w.proj.plain, w.proj_bias, w.eps, w.activation)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, layout: PackedLayout
) -> Tensor:
    """Each row over [prefix of its set ; rows of its class up to itself], one row at a time."""
    last_only = len(q) != len(k)
    outputs, query, row = [], 0, 0
    for s, runs in enumerate(layout.sets):
        for length in (length for count, length in runs for _ in range(count)):
            for end in range(length if last_only else 1, length + 1):
                keys = torch.cat([prefix_k[s], k[row : row + end]])
                values = torch.cat([prefix_v[s], v[row : row + end]])
                outputs.append(softmax_attention(q[query : query + 1], keys, values))
                query += 1
            row += length
    return torch.cat(outputs)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor,
    class_ranges: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of scaled cosines over each image's own classes, labels counted from the first of them."""
    logits = logit_scale * F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).t()
    if class_ranges is not None:
        start, end = class_ranges[:, :1], class_ranges[:, 1:]
        classes = torch.arange(len(text_features), device=labels.device)
        logits = logits.masked_fill((classes < start) | (classes >= end), float("-inf"))
        labels = labels + class_ranges[:, 0]
    return F.cross_entropy(logits, labels, reduction="none")
