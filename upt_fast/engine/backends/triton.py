"""Kernels of our own in Triton (kernels/), one file each, imported at the first call."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from upt_fast.engine.autograd import composing
from upt_fast.engine.backends import packages
from upt_fast.engine.layout import BufferPlaces, PackedLayout, PackedTiles

OPS = frozenset(
    {
        "prompt_transform",  # upt_fast/prompts/upt.py calls it
        "prompt_insert",
        "insert_shared",
        "layer_norm",
        "add_layer_norm",
        "activation",
        "linear_gelu",
        "contrastive_loss",
        "prefix_attention",
        "packed_attention",
    }
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusals(device: str, dtype: torch.dtype | None = None, dropout: float = 0.0) -> list[str]:
    """See upt_fast.engine.backends.dispatch.refusals."""
    reasons = packages.other_dtype(dtype, DTYPES)
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append("cpu (runs there with TRITON_INTERPRET=1)")
    if device not in ("cpu", "cuda"):
        reasons.append(f"{device} (runs on cuda)")
    if dropout:
        reasons.append(f"dropout {dropout:g} (takes 0)")
    reasons = packages.with_missing("triton", "triton", reasons)
    if not reasons and not torch.compiler.is_compiling():
        from upt_fast.kernels import _launch

        reasons = [reason] if (reason := _launch.interpreter_refusal()) else []
    return reasons


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """See upt_fast.engine.ops.layer_norm."""
    from upt_fast.kernels import layer_norm as kernel

    return kernel.layer_norm(x, eps)


def add_layer_norm(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See upt_fast.engine.ops.add_layer_norm."""
    from upt_fast.kernels import layer_norm as kernel

    return kernel.add_layer_norm(x, y, eps)


def prompt_insert(
    x: Tensor, y: Tensor | None, prompts: Tensor, set_index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """See upt_fast.engine.ops.prompt_insert."""
    from upt_fast.kernels import prompt_insert as kernel

    return kernel.prompt_insert(x, y, prompts, set_index, eps)


def insert_shared(own: Tensor, shared: Tensor, places: BufferPlaces) -> Tensor:
    """See upt_fast.engine.ops.insert_shared."""
    from upt_fast.kernels import insert_shared as kernel

    return kernel.insert_shared(own, shared, *places)


def activation(u: Tensor, kind: str, bias: Tensor | None = None) -> Tensor:
    """See upt_fast.engine.ops.activation."""
    from upt_fast.kernels import activation as kernel

    return kernel.activation(u, kind, bias)


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
    from upt_fast.kernels import linear_gelu as kernel

    return kernel.linear_gelu_linear(h, fc_weight, fc_bias, proj_weight, proj_bias, kind, keep=not recompute)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None = None,
) -> Tensor:
    """See upt_fast.engine.ops.prefix_attention."""
    from upt_fast.kernels import prefix_attention as kernel

    return kernel.prefix_attention(*_autocast(q, k, v, prefix_k, prefix_v), set_index)


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
    from upt_fast.kernels import packed_attention as kernel

    tiles = _packed_tiles(layout, prefix_k.shape[1], str(q.device)) if tiles is None else tiles
    return kernel.packed_attention(*_autocast(q, k, v, prefix_k, prefix_v), tiles)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor,
    class_ranges: Tensor | None = None,
) -> Tensor:
    """See upt_fast.engine.ops.contrastive_loss."""
    from upt_fast.kernels import contrastive_loss as kernel

    return kernel.contrastive_loss(image_features, text_features, logit_scale, labels, class_ranges)


def _autocast(*tensors: Tensor | None) -> Iterator[Any]:
    """The tensors in autocast's dtype where it is on, as PyTorch's attention takes them: custom ops are not cast."""
    device = next(t.device.type for t in tensors if t is not None)
    dtype = torch.get_autocast_dtype(device) if composing.autocasts(device) else None
    return (t if t is None or dtype is None else t.to(dtype) for t in tensors)


@functools.lru_cache(maxsize=64)
def _packed_tiles(layout: PackedLayout, prefix: int, device: str) -> PackedTiles:
    with torch.inference_mode(False):  # they may be needed for gradients later
        return PackedTiles.of(layout, prefix).to(device)
