"""Attention by FlashAttention's own packages, where they are installed: ``flash-attn-4`` (CuTe, for Hopper and
Blackwell), else ``flash_attn`` 2 (Dao 2023, arXiv 2307.08691).

They take no keys that sequences share, so beside them prompts are put into rows and buffers of their own.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from upt_fast.engine.backends import packages
from upt_fast.engine.layout import PackedLayout, buffer_ends

OPS = frozenset({"stream_attention", "buffer_attention"})
DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)
CUTE = (9, 10, 11)  # major compute capabilities of flash-attn-4
# kinds of devices it runs on; tests add "cpu"
devices: tuple[str, ...] = ("cuda",)


def refusals(device: str, dtype: torch.dtype | None = None, dropout: float = 0.0) -> list[str]:
    """See upt_fast.engine.backends.dispatch.refusals."""
    reasons = packages.other_dtype(dtype, DTYPES)
    if device not in devices:
        reasons.append(f"{device} (runs on {', '.join(devices)})")
    if reasons or torch.compiler.is_compiling():  # a package is not imported in vain, for that is slow
        return reasons
    return packages.older_card(device, CAPABILITY) or list(found(_capability())[1])


def stream_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See upt_fast.engine.ops.stream_attention."""
    return _output(found(_capability())[0].flash_attn_func(q, k, v, softmax_scale=1.0))


def buffer_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, prefix: int) -> Tensor:
    """See upt_fast.engine.ops.buffer_attention."""
    ends = buffer_ends(layout, prefix, q.shape[0] != layout.num_rows, str(q.device))
    names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    options = dict(zip(names, ends, strict=True))
    # with fewer queries than keys both versions align the mask at the last key
    return _output(found(_capability())[0].flash_attn_varlen_func(q, k, v, **options, softmax_scale=1.0, causal=True))


def _output(found: Any) -> Tensor:
    """Version 4 gives the logarithms of the scores' sums beside it, or None."""
    return found[0] if isinstance(found, tuple) else found


def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


@functools.cache
def found(capability: tuple[int, int] | None) -> tuple[Any, tuple[str, ...]]:
    """The module for a card of this compute capability, or None and why there is none."""
    newest = capability is None or capability[0] in CUTE
    reasons = []
    for name in ("flash_attn.cute", "flash_attn") if newest else ("flash_attn",):
        try:
            with packages.quiet_import():
                module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            reasons.append(f"{name} is not installed" if name.startswith(f"{error.name}") else f"{name}: {error}")
        except Exception as error:  # a broken build raises what it likes
            reasons.append(f"{name} does not import: {(str(error) or type(error).__name__).splitlines()[0]}")
        else:
            if hasattr(module, "flash_attn_varlen_func") and hasattr(module, "flash_attn_func"):
                return module, ()
            reasons.append(f"{name} has no flash_attn_func")  # version 4 alone is a folder of that name
    return None, tuple(reasons)
