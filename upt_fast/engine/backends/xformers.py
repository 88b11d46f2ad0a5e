"""Attention by xformers' memory-efficient attention (Rabe and Staats 2021, arXiv 2112.05682).

It takes no keys that sequences share, so beside it prompts are put into rows and buffers of their own. xformers is
imported at the first call: it is optional, and its import takes long and logs on machines without a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from upt_fast.engine.backends import packages
from upt_fast.engine.layout import PackedLayout

OPS = frozenset({"stream_attention", "buffer_attention"})
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# kinds of devices it runs on; testing.xformers_on_cpu adds "cpu" and replaces `call` by an exact stand-in
devices: tuple[str, ...] = ("cuda",)


def refusals(device: str, dtype: torch.dtype | None = None, dropout: float = 0.0) -> list[str]:
    """See upt_fast.engine.backends.dispatch.refusals."""
    reasons = packages.other_dtype(dtype, DTYPES)
    if device not in devices:
        reasons.append(f"{device} (runs on {', '.join(devices)})")
    return packages.with_missing("xformers", "xformers.ops", reasons)


def call(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
    """xformers' attention of q (B, Q, H, K), already scaled, k and v (B, L, H, K) under a bias object or None.

    Raises:
        ValueError: none of xformers' operators takes this input; with their reasons.
    """
    try:
        return operations().memory_efficient_attention(q, k, v, attn_bias=bias, scale=1.0)
    except NotImplementedError as error:
        raise ValueError(
            f"no backend for attention: xformers refuses; name 'torch' or 'triton' instead\n{error}"
        ) from error


def stream_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See upt_fast.engine.ops.stream_attention."""
    return call(q, k, v, None)


def buffer_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, prefix: int) -> Tensor:
    """See upt_fast.engine.ops.buffer_attention."""
    num_queries = None if q.shape[0] == layout.num_rows else 1
    return call(q[None], k[None], v[None], _causal_bias(layout, prefix, num_queries, str(q.device)))[0]


@functools.lru_cache(maxsize=64)
def _causal_bias(layout: PackedLayout, prefix: int, num_queries: int | None, device: str) -> Any:
    """Each class's queries over its own block of keys, causal and aligned at the last key."""
    lengths = [length for runs in layout.sets for count, length in runs for _ in range(count)]
    bias = operations().fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
        [num_queries or length for length in lengths], [prefix + length for length in lengths]
    )
    return bias.to(device)


@functools.cache
def operations() -> Any:
    """xformers.ops, where its operators that are PyTorch's own run whatever CUDA xformers was built for.

    Its last wheel's extension asks for CUDA 12's runtime; beside a PyTorch for CUDA 13 it does not load. Its dispatcher
    then refuses every input ("xFormers wasn't build with CUDA support"), also for cutlassF-pt, fa2F-pt and their
    backward, which are in PyTorch and not in the extension. Those that are in it are still known to be missing.
    """
    with packages.quiet_import():
        import xformers.ops
        from xformers.ops.fmha import common
    if torch.version.cuda is not None:
        common._built_with_cuda = True
    return xformers.ops
