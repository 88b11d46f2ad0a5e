"""PyTorch's own operations: every op has an implementation here, and each computes on any device in any dtype.

Those with a backward of their own stand in autograd/. Products with a frozen weight come as oneDNN's where that was
measured to be faster (cpu/ways.py).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from upt_fast.engine.autograd import composing, functions
from upt_fast.engine.autograd.frozen_block import MLP, MLPParts
from upt_fast.engine.autograd.products import PlainProduct
from upt_fast.engine.layout import BufferPlaces, PackedLayout, PackedTiles
from upt_fast.engine.workspace import Workspace

OPS = (
    "prompt_transform",  # the learner's own modules: upt_fast/prompts/upt.py
    "prompt_insert",
    "insert_shared",
    "layer_norm",
    "add_layer_norm",
    "activation",
    "linear_gelu",
    "stream_attention",
    "buffer_attention",
    "contrastive_loss",
    "linear",
    "norm_linear",
    "linear_residual",
    "mlp",
    "block",  # of the other ones: engine/weights.py
    "prefix_attention",
    "packed_attention",
)


def refusals(device: str, dtype: torch.dtype | None = None, dropout: float = 0.0) -> list[str]:
    """See upt_fast.engine.backends.dispatch.refusals: none."""
    return []


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """See upt_fast.engine.ops.layer_norm."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def add_layer_norm(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See upt_fast.engine.ops.add_layer_norm."""
    x = x + y
    return x, layer_norm(x, eps)


def prompt_insert(
    x: Tensor, y: Tensor | None, prompts: Tensor, set_index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """See upt_fast.engine.ops.prompt_insert."""
    length = prompts.shape[1]
    stream = torch.empty_like(x)
    stream[:, :length] = prompts if set_index is None else prompts[set_index]
    stream[:, length:] = x[:, length:] if y is None else x[:, length:] + y[:, length:]
    return stream, layer_norm(stream, eps)


def insert_shared(own: Tensor, shared: Tensor, places: BufferPlaces) -> Tensor:
    """See upt_fast.engine.ops.insert_shared."""
    buffer = own.new_empty(len(places.source), *own.shape[1:])
    buffer[places.own_rows] = own
    slots = places.first_rows[:, None] + torch.arange(shared.shape[1], device=own.device)  # (C, P)
    set_of = torch.searchsorted(places.bounds, torch.arange(len(slots), device=own.device), right=True) - 1
    buffer[slots] = shared[set_of].to(own.dtype)  # under autocast own rows of layer 0 are constants in another
    return buffer


def activation(u: Tensor, kind: str, bias: Tensor | None = None) -> Tensor:
    """See upt_fast.engine.ops.activation."""
    u = u if bias is None else u + bias
    if kind == "quick_gelu":
        return F.silu(u)
    return F.gelu(u, approximate="tanh" if kind == "gelu_tanh" else "none")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See upt_fast.engine.ops.linear."""
    if not functions.takes_onednn(x):
        return F.linear(x, weight, bias)
    return functions.Linear.apply(x, weight, bias, None)


def norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, parts: int) -> tuple[Tensor, ...]:
    """See upt_fast.engine.ops.norm_linear; of a plain weight (M, D)."""
    return linear(layer_norm(x, eps), weight, bias).chunk(parts, dim=-1)


def linear_residual(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See upt_fast.engine.ops.linear_residual."""
    return functions.linear_residual(x, y, weight, bias)


def linear_gelu(
    h: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    kind: str,
    recompute: bool = False,
) -> Tensor:
    """See upt_fast.engine.ops.linear_gelu."""
    if recompute and torch.is_grad_enabled() and not composing.composes(h):
        inputs = h, fc_weight, fc_bias, proj_weight, proj_bias, kind
        return checkpoint(linear_gelu, *inputs, use_reentrant=False, preserve_rng_state=False)
    return linear(activation(linear(h, fc_weight), kind, fc_bias), proj_weight, proj_bias)


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
    """See upt_fast.engine.ops.mlp."""
    if composing.op_by_op(x) or x.numel() == 0:
        u = F.linear(layer_norm(x, eps), fc_weight, fc_bias)
        return linear_residual(x, activation(u, kind), proj_weight, proj_bias)
    parts = MLPParts(PlainProduct(fc_weight), fc_bias, PlainProduct(proj_weight), proj_bias, eps, kind)
    return MLP.apply(x, parts, recompute, workspace, layer)


def qkv(
    h: Tensor, weight: Tensor, q_bias: Tensor, num_heads: int, h_q: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See upt_fast.engine.ops.qkv."""
    width = h.shape[-1]
    # two products: q lives on for backward, where k and v are copied into a buffer behind the prompts'
    q = linear(h if h_q is None else h_q, weight[:width], q_bias)
    k, v = linear(h, weight[width:]).chunk(2, dim=-1)
    return tuple(t.unflatten(-1, (num_heads, -1)) for t in (q, k, v))  # type: ignore[return-value]


def prepend_rows(prefix: Tensor, x: Tensor, set_index: Tensor | None = None) -> Tensor:
    """See upt_fast.engine.ops.prepend_rows."""
    if composing.composes(prefix, x):
        return functions.prepend_rows(prefix, x, set_index)
    return functions.PrependRows.apply(prefix, x, set_index)


def stream_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See upt_fast.engine.ops.stream_attention."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)


def buffer_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, prefix: int) -> Tensor:
    """See upt_fast.engine.ops.buffer_attention."""
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


def behind_prefix(
    k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, set_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Keys and values (B, P + L, H, K) of [shared prefix ; own rows], of what :func:`prefix_attention` takes."""
    if prefix_k is None or prefix_v is None:
        return k, v
    return prepend_rows(prefix_k, k, set_index), prepend_rows(prefix_v, v, set_index)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None = None,
) -> Tensor:
    """See upt_fast.engine.ops.prefix_attention."""
    k, v = behind_prefix(k, v, prefix_k, prefix_v, set_index)
    if composing.composes(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return functions.attention(q, k, v).transpose(1, 2)
    return stream_attention(q, k, v)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    layout: PackedLayout,
    tiles: PackedTiles | None = None,
) -> Tensor:
    """See upt_fast.engine.ops.packed_attention."""
    last_only = q.shape[0] != k.shape[0]
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
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor,
    class_ranges: Tensor | None = None,
) -> Tensor:
    """See upt_fast.engine.ops.contrastive_loss."""
    exact = torch.float64 if image_features.dtype == torch.float64 else torch.float32
    images, texts = (F.normalize(t.to(exact), dim=-1) for t in (image_features, text_features))
    logits = logit_scale * images @ texts.t()
    if class_ranges is not None:
        first, end = class_ranges[:, :1], class_ranges[:, 1:]
        classes = torch.arange(len(texts), device=labels.device)
        logits = logits.masked_fill((classes < first) | (classes >= end), float("-inf"))
        labels = labels + class_ranges[:, 0]
    return F.cross_entropy(logits, labels, reduction="none")
