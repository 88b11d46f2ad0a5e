"""A linear with the activation in its epilogue, and the gradient of the linear after it with the derivative in its own.

    forward:   u = x W_1^T + b_1,  a = act(u)          y  = a W_2^T + b_2   (PyTorch's product)
    backward:  du = (dy W_2) act'(u)                   dx = du W_1          (PyTorch's product)

with act as in activation.py; for quick_gelu the factors 1.702 are in the weights. All weights are frozen.

Apart, forward writes u, reads it and writes a; backward writes da, reads da and u and writes du. Here forward does not
read u and, where nothing needs it (no gradients, or memory="balanced"), does not write it either; backward neither
writes nor reads da, which is not rounded.

The kernels are persistent: as many programs as the GPU holds at once walk over the tiles of the output, in groups of
rows that share what they read in the L2 cache. A tile's epilogue goes in pieces of its columns: in one piece, tiles of
128 x 256 take more registers than there are.

Which tile a shape takes is measured once per GPU, dtype and shape class (rows up to a power of two) and kept
(_tuning.py). Nothing is measured without a GPU, while a CUDA graph is being captured, or where
torch.use_deterministic_algorithms asks for equal bits in equal runs: another tile can sum in another order. Then the
first tile with enough work for every multiprocessor is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from upt_fast.kernels._launch import Workload, shared_limit
from upt_fast.kernels._linear_act import linear_act
from upt_fast.kernels._linear_dact import linear_dact
from upt_fast.kernels._linear_product import check, outputs_of
from upt_fast.kernels._linear_tiles import Tile, tiles_that_fit


def linear_gelu_fwd(
    h: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, kind: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """y = act(u) W_2^T + b_2 and u = h W_1^T + b_1, which stays empty unless it is to be kept."""
    a, u = linear_act(h, fc_weight, fc_bias, kind, keep)
    return F.linear(a, proj_weight, proj_bias), u


def linear_gelu_bwd(
    dy: Tensor,
    u: Tensor | None,
    h: Tensor | None,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    kind: str,
) -> Tensor:
    """dh from the gradient of y and u, or h of which u is computed again."""
    if u is None:
        assert h is not None
        u = F.linear(h, fc_weight, fc_bias)
    return linear_dact(dy, proj_weight, u, kind) @ fc_weight


_fwd = torch.library.custom_op("upt_fast::linear_gelu_fwd", linear_gelu_fwd, mutates_args=())
_bwd = torch.library.custom_op("upt_fast::linear_gelu_bwd", linear_gelu_bwd, mutates_args=())


@_fwd.register_fake
def _(
    h: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, kind: str, keep: bool
) -> tuple[Tensor, Tensor]:
    u = h.new_empty((*h.shape[:-1], len(fc_weight)) if keep else 0)
    return h.new_empty((*h.shape[:-1], len(proj_weight))), u


@_bwd.register_fake
def _(
    dy: Tensor,
    u: Tensor | None,
    h: Tensor | None,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    kind: str,
) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], fc_weight.shape[1]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    h, fc_weight, fc_bias, proj_weight, _, ctx.kind, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if keep else None, None if keep else h, fc_weight, fc_bias, proj_weight)


def _backward(ctx, dy, _):  # type: ignore[no-untyped-def]
    return None if dy is None else _bwd(dy, *ctx.saved_tensors, ctx.kind), *[None] * 6


_fwd.register_autograd(_backward, setup_context=_setup_context)


def linear_gelu_linear(
    h: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, kind: str, keep: bool = True
) -> Tensor:
    """act(h W_1^T + b_1) W_2^T + b_2, differentiable in h; the weights are frozen.

    Args:
        h: (..., D).
        fc_weight: (N, D), W_1.
        fc_bias: (N,).
        proj_weight: (D', N), W_2.
        proj_bias: (D',).
        kind: as in upt_fast.engine.ops.activation.
        keep: keep u (..., N) for backward; else h alone, and backward computes u again.
    Returns:
        (..., D') in h's dtype; under autocast in autocast's.
    Raises:
        ValueError: shapes do not fit, or dtypes or devices differ.
    """
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, fc_weight, fc_bias, proj_weight, proj_bias = (
            t.to(dtype) for t in (h, fc_weight, fc_bias, proj_weight, proj_bias)
        )
    hidden, out = outputs_of(fc_weight, 0), outputs_of(proj_weight, 0)
    check(
        h,
        {
            "fc_weight": (fc_weight, (hidden, h.shape[-1])),
            "fc_bias": (fc_bias, (hidden,)),
            "proj_weight": (proj_weight, (out, hidden)),
            "proj_bias": (proj_bias, (out,)),
        },
        kind,
    )
    keep = keep and torch.is_grad_enabled() and h.requires_grad
    return _fwd(h, fc_weight, fc_bias, proj_weight, proj_bias, kind, keep)[0]


def workloads() -> Iterator[Workload]:
    """ViT-B/16's image tower at batch 32: every tile with the activation that takes most registers, others at one."""

    def run(forward: bool, dtype: torch.dtype, kind: str, keep: bool, every: bool, precision: str) -> None:
        rows, width, hidden = 32 * 197, 768, 3072
        x, u, w, v, b = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((rows, width), (rows, hidden), (hidden, width), (width, hidden), (hidden,))
        )
        tiles: Sequence[Tile | None] = tiles_that_fit(precision, shared_limit(x.device)) if every else [None]
        for tile in tiles:
            if forward:
                linear_act(x, w, b, kind, keep, tile, precision)
            else:
                linear_dact(x, v, u, kind, tile, precision)

    for direction in ("forward", "backward"):
        partial = functools.partial(run, direction == "forward")
        for dtype, precision in ((torch.bfloat16, "half"), (torch.float32, "tf32"), (torch.float32, "ieee")):
            label = "bfloat16" if precision == "half" else f"float32 {precision}"
            every = functools.partial(partial, dtype, "gelu", True, True, precision)
            yield f"{direction} gelu {label}, every tile", every
        for kind in ("quick_gelu", "gelu_tanh"):
            yield (
                f"{direction} {kind} bfloat16",
                functools.partial(partial, torch.bfloat16, kind, True, False, "half"),
            )
    yield "forward gelu bfloat16 without u", lambda: run(True, torch.bfloat16, "gelu", False, False, "half")
