"""UPT's prompt transform with the projection of the visual rows: all layers in one launch each way.

    paper:     s = SA(u) + LN1(u);  x2 = LN2(s);  y = FFN(x2) + x2
    released:  s = u + W_o (W_v u + b_v) + b_o;  x1 = LN1(s);  y = FFN(LN2(x1)) + x1
    FFN(x) = W_2 relu(W_1 x + b_1) + b_2;  text rows are y's first n_text, visual rows W_m y + b_m of the rest

(Zang et al. 2022, arXiv 2210.07225; "released" is its published code, whose attention runs over sequences of length
one, so that W_q and W_k get zero gradients.) The prompts of a layer are a few rows, and apart every step is a launch.
Here a program takes one layer through all steps, handing rows from one to the next through global memory, since Triton
cannot slice registers; backward reads those rows again. It computes the gradients of all rows the same way; a weight's
is then one library product over the stacked rows of all layers, and those of the biases one sum: nothing is added
atomically. This saves launches, not arithmetic: each layer's multiprocessor reads all weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from upt_fast.kernels._launch import Workload
from upt_fast.kernels._prompt_transform_bwd import prompt_transform_bwd
from upt_fast.kernels._prompt_transform_common import COLUMNS, NAMES, WEIGHTS
from upt_fast.kernels._prompt_transform_fwd import outputs_of, prompt_transform_fwd

_fwd = torch.library.custom_op("upt_fast::prompt_transform_fwd", prompt_transform_fwd, mutates_args=())
_bwd = torch.library.custom_op("upt_fast::prompt_transform_bwd", prompt_transform_bwd, mutates_args=())


@_fwd.register_fake
def _(
    u: Tensor, params: list[Tensor], n_text: int, num_heads: int, eps1: float, eps2: float, released: bool
) -> tuple[Tensor, ...]:
    return outputs_of(u, params, n_text, num_heads, released)


@_bwd.register_fake
def _(
    dtext: Tensor, dvisual: Tensor, weights: list[Tensor], saved: Tensor, scores: Tensor, rstd: Tensor, released: bool
) -> list[Tensor]:
    d, width = saved.shape[2] // COLUMNS.value, dvisual.shape[2]
    shapes = [saved.shape, (COLUMNS.value, d), (3 * d, d), (d, d), (d, d), (d, d), (width, d), (width,)]
    return [saved.new_empty(shape) for shape in shapes]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    u, params, _, _, _, _, released = inputs
    weights = [t for name, t in zip(NAMES, params, strict=True) if name in WEIGHTS]
    ctx.save_for_backward(*output[2:], *weights)
    ctx.dtypes, ctx.released = [t.dtype for t in (u, *params)], released


def _backward(ctx, dtext, dvisual, *_):  # type: ignore[no-untyped-def]
    saved, scores, rstd, *weights = ctx.saved_tensors
    grads, sums, din, dout, dw1, dw2, dmlp, dmlp_b = _bwd(dtext, dvisual, weights, saved, scores, rstd, ctx.released)
    du, din_b = grads[..., : sums.shape[1]], sums[1:4].flatten()
    norms = [sums[10], sums[9 if ctx.released else 4], sums[8], sums[7]]
    dparams = [din, din_b, dout, sums[4], *norms, dw1, sums[5], dw2, sums[6], dmlp, dmlp_b]
    du, *dparams = (t.to(dtype) for t, dtype in zip((du, *dparams), ctx.dtypes, strict=True))
    return du, dparams, None, None, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def prompt_transform(
    u: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    mlp_weight: Tensor,
    mlp_bias: Tensor,
    *,
    n_text: int,
    num_heads: int,
    eps1: float,
    eps2: float,
    released: bool,
) -> tuple[Tensor, Tensor]:
    """Prompts of I layers through UPT's transform, without dropout.

    Args:
        u: (I, N, d) prompts, n_text for the text tower first.
        in_proj_weight: (3 d, d), attention's; in_proj_bias (3 d,), out_weight (d, d), out_bias (d,).
        norm1_weight: (d,) as norm1_bias, norm2_weight, norm2_bias.
        w1: (d, d), of the feed-forward network, as w2; b1 and b2 (d,).
        mlp_weight: (w, d), the visual rows' projection; mlp_bias (w,).
        n_text: 0 to N.
        num_heads: of attention; divides d.
        eps1: of norm1.
        eps2: of norm2.
        released: the published code's form instead of the paper's.
    Returns:
        Text prompts (I, n_text, d) and visual prompts (I, N - n_text, w) in u's dtype.
    """
    attention, mlp = [in_proj_weight, in_proj_bias, out_weight, out_bias], [mlp_weight, mlp_bias]
    norms, ffn = [norm1_weight, norm1_bias, norm2_weight, norm2_bias], [w1, b1, w2, b2]
    text, visual, *_ = _fwd(u, [*attention, *norms, *ffn, *mlp], n_text, num_heads, eps1, eps2, released)
    return text, visual


def workloads() -> Iterator[Workload]:
    """Eight prompts for each of twelve layers of ViT-B/16 and L/14, in both forms, in the learner's float32."""
    for name, d, w in (("B/16", 512, 768), ("L/14", 768, 1024)):
        shapes = [(3 * d, d), (3 * d,), (d, d), *[(d,)] * 5, (d, d), (d,), (d, d), (d,), (w, d), (w,)]
        u, *params = (torch.empty(shape, device="meta") for shape in [(12, 8, d), *shapes])
        weights = [t for key, t in zip(NAMES, params, strict=True) if key in WEIGHTS]
        for released in (False, True):
            label = f"{'released' if released else 'paper'} {name} float32"
            fwd = (u, params, 4, 1, 1e-5, 1e-5, released)
            text, visual, *steps = outputs_of(u, params, 4, 1, released)
            bwd = (text, visual, weights, *steps, released)
            yield f"forward {label}", lambda fwd=fwd: prompt_transform_fwd(*fwd)
            yield f"backward {label}", lambda bwd=bwd: prompt_transform_bwd(*bwd)
