"""Attention of packed class names by PyTorch's attention of sequences of several lengths, varlen_attn.

It takes no keys that sequences share, so prompts are put into buffers in front of each class's rows.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from upt_fast.engine.backends import packages
from upt_fast.engine.layout import PackedLayout, buffer_ends

OPS = frozenset({"buffer_attention"})
DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)
# kinds of devices it runs on; tests add "cpu" and replace `attend`
devices: tuple[str, ...] = ("cuda",)


def refusals(device: str, dtype: torch.dtype | None = None, dropout: float = 0.0) -> list[str]:
    """See upt_fast.engine.backends.dispatch.refusals."""
    reasons = packages.other_dtype(dtype, DTYPES)
    if device not in devices:
        reasons.append(f"{device} (runs on {', '.join(devices)})")
    if torch.compiler.is_compiling():  # the model's constructor has looked
        return reasons
    return [*reasons, *packages.older_card(device, CAPABILITY), *filter(None, [_missing()])]


@functools.cache
def _missing() -> str:
    """Why this PyTorch's function would not do; torch 2.10 scales scores by itself."""
    try:
        wanted = {"scale", "window_size"} - set(inspect.signature(_function()).parameters)
    except (ImportError, AttributeError):
        wanted = {"varlen_attn"}
    return f"torch {torch.__version__} has no {' and no '.join(sorted(wanted))}" if wanted else ""


def _function() -> Any:
    from torch.nn.attention import varlen

    return varlen.varlen_attn


def attend(q: Tensor, k: Tensor, v: Tensor, *ends: Any) -> Tensor:
    """varlen_attn of q (N, H, K), already scaled, over k and v (M, H, K), causal and aligned at the last key."""
    return _function()(q, k, v, *ends, scale=1.0, window_size=(-1, 0))


def buffer_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, prefix: int) -> Tensor:
    """See upt_fast.engine.ops.buffer_attention."""
    return attend(q, k, v, *buffer_ends(layout, prefix, q.shape[0] != layout.num_rows, str(q.device)))
