"""The engine's own CPU operations (kernels/cpu), in the place of PyTorch's where a processor and a compiler allow it.

Products take weights that were packed for them (weights.py): who computes those is decided where a tower's
weights are packed. cpu/library.py compiles the operations and says where they do not run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upt_fast.engine.autograd import compiled, composing
from upt_fast.engine.autograd.products import PackedProduct
from upt_fast.engine.cpu import library
from upt_fast.engine.layout import PackedLayout, PackedTiles

OPS = frozenset(
    {
        "norm_linear",
        "linear_residual",
        "mlp",  # and block: autograd/frozen_block.py with packed weights
        "block",
        "packed_attention",
    }
)


# chosen by each call's tensors; the others where a tower's weights are packed
BY_CALL = frozenset({"packed_attention"})


def refusals(
    device: str,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    width: int | None = None,
    num_heads: int = 1,
) -> list[str]:
    """See upt_fast.engine.backends.dispatch.refusals; for rows of a width that falls into heads, where it is given."""
    if device != "cpu":
        return [f"{device} (run on cpu)"]
    reason = library.refusal(dtype or torch.float32, width, num_heads)
    return [reason] if reason else []


def norm_linear(x: Tensor, weight: PackedProduct, bias: Tensor | None, eps: float, parts: int) -> tuple[Tensor, ...]:
    """See upt_fast.engine.ops.norm_linear."""
    return compiled.NormLinear.apply(x, weight, bias, eps, parts)


def linear_residual(x: Tensor, y: Tensor, weight: PackedProduct, bias: Tensor) -> Tensor:
    """See upt_fast.engine.ops.linear_residual."""
    return compiled.LinearResidual.apply(x, y, weight, bias)


def takes(op: str, x: Tensor, *others: Tensor) -> bool:
    """Whether an op of BY_CALL is computed here: attention of rows (N, H, K), all in one dtype."""
    if op not in BY_CALL or x.device.type != "cpu" or composing.op_by_op(x):
        return False
    if any(t.dtype != x.dtype for t in others):
        return False
    return not library.refusal(x.dtype, x.shape[-2] * x.shape[-1])


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
    return compiled.PackedAttention.apply(q, k, v, prefix_k, prefix_v, layout)
