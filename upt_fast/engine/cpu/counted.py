"""FLOPs of CPU operations that torch.utils.flop_counter does not know: oneDNN's product, the compiled operations.

Counted as in engine/flops.py: matrix products, and attention's over whole classes, without what backward computes
again. A counter takes the formulas that there are when it is made, so they are registered as towers are built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def register(operation: Any, formula: Callable[..., int]) -> None:
    """Let every counter made from now on count an operation; once, and not where PyTorch does so already."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula  # brings triton

    if operation not in flop_registry:
        register_flop_formula(operation, get_raw=True)(formula)


def register_onednn() -> None:
    """The product that ways.py chooses for float32 rows, where this build of PyTorch has it."""
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        register(torch.ops.mkldnn._linear_pointwise, _onednn)


def register_compiled() -> None:
    """Those of the library, once it is loaded."""
    lib = torch.ops.upt_fast_cpu
    register(lib.norm_linear, _norm_linear)
    for name in ("linear_residual", "linear_times", "linear_norm_backward"):
        register(getattr(lib, name), _linear)
    register(lib.attention, _attention)
    register(lib.attention_backward, _attention_backward)
    register(lib.packed_attention, _packed_attention)
    register(lib.packed_attention_backward, _packed_attention_backward)


def _onednn(x: Tensor, weight: Tensor, *_: Any, out_val: Any = None) -> int:
    return 2 * x.numel() * len(weight)


def _norm_linear(
    x: Tensor, eps: float, factor: Tensor, panel: int, bias: Any, act: int, slope: Any, outs: Sequence[Tensor], *_: Any,
    out_val: Any = None,
) -> int:  # fmt: skip
    return 2 * x.numel() * sum(out.shape[-1] for out in outs)


def _linear(rows: Tensor, factor: Tensor, panel: int, *others: Any, out_val: Any = None) -> int:
    return 2 * rows.numel() * others[-1].shape[-1]  # the last is the output


def _attention(q: Tensor, k: Tensor, *_: Any, out_val: Any = None) -> int:
    return 4 * q.numel() * k.shape[1]


def _attention_backward(dout: Tensor, q: Tensor, k: Tensor, *_: Any, out_val: Any = None) -> int:
    return 2 * _attention(q, k)


def _pairs(q: Tensor, prefix_k: Tensor, first: Tensor, last_only: bool) -> tuple[int, int]:
    """Pairs of a query with a prompt, and with a row of its class."""
    lengths = first.diff()
    return len(q) * prefix_k.shape[1], int((lengths * (1 if last_only else lengths)).sum())


def _packed_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, first: Tensor, sets: Tensor, last_only: bool,
    *_: Any, out_val: Any = None,
) -> int:  # fmt: skip
    return 4 * q[0].numel() * sum(_pairs(q, prefix_k, first, last_only))


def _packed_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, first: Tensor, sets: Tensor,
    last_only: bool, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, *_: Any, out_val: Any = None,
) -> int:  # fmt: skip
    before, own = _pairs(q, prefix_k, first, last_only)
    products = 3 * before + own  # of the probabilities, of the prompts' keys and values
    if dq is not None:
        products += before + own
    products += own * ((dk is not None) + (dv is not None))
    return 2 * q[0].numel() * products
