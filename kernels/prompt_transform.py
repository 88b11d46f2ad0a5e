"""UPT's prompt transform with the projection of the visual rows, as few launches over the rows of all layers.

    paper:     s = SA(u) + LN1(u);  x2 = LN2(s);  y = FFN(x2) + x2
    released:  s = u + W_o (W_v u + b_v) + b_o;  x1 = LN1(s);  y = FFN(LN2(x1)) + x1
    FFN(x) = W_2 relu(W_1 x + b_1) + b_2;  text rows are y's first n_text, visual rows W_m y + b_m of the rest

(Zang et al. 2022, arXiv 2210.07225; "released" is its published code, whose attention runs over sequences of length
one, so that W_q and W_k get zero gradients.) The prompts of all layers are about a hundred rows: what bounds a step is
not arithmetic but how many multiprocessors share in reading its weight. So each product is a launch whose columns and
rows go to 96 or more programs, and what lies between two products goes into one of them: bias, relu, residual, and
LN2, for which a program reads its few rows whole. Attention, which needs all columns of q and k, is a launch by layer
and head, with LN1 beside it. Forward: 6 launches, released 5; backward: 7, released 6, the last of which has the
gradients of all parameters. A launch inside a CUDA graph costs 1 to 1.5 us, about what a barrier between the programs
of one cooperative launch costs; and those could not be tested in the interpreter, which runs programs in turn.

The sums of a product are split over the eight warps of a program: an eighth of the rounds that one loop would take.
Products are multiplied in the parameters' dtype, float32 as PyTorch's setting has it, as the learner's own modules do:
the learner is float32 also beside half-precision towers, and no copy of its weights is rounded. Nothing is added
atomically.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from upt_fast.kernels._launch import Workload, with_precision
from upt_fast.kernels._prompt_transform_bwd import gradients_of, prompt_transform_bwd
from upt_fast.kernels._prompt_transform_common import NAMES, WEIGHTS
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
    dtext: Tensor,
    dvisual: Tensor,
    u: Tensor,
    weights: list[Tensor],
    kept: Tensor,
    qkv: Tensor,
    p: Tensor,
    rstd: Tensor,
    released: bool,
) -> list[Tensor]:
    return gradients_of(u, dvisual.shape[2], released)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    u, params, _, _, _, _, ctx.released = inputs
    weights = [t for name, t in zip(NAMES, params, strict=True) if name in WEIGHTS]
    ctx.save_for_backward(*output[2:], u, *weights)


def _backward(ctx, dtext, dvisual, *_):  # type: ignore[no-untyped-def]
    kept, qkv, p, rstd, u, *weights = ctx.saved_tensors
    du, *dparams = _bwd(dtext, dvisual, u, weights, kept, qkv, p, rstd, ctx.released)
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
    params, dtype = [*attention, *norms, *ffn, *mlp], u.dtype
    if any(t.dtype != dtype for t in params):
        u, *params = (t.float() for t in (u, *params))
    text, visual, *_ = _fwd(u, params, n_text, num_heads, eps1, eps2, released)
    return text.to(dtype), visual.to(dtype)


def workloads() -> Iterator[Workload]:
    """Eight prompts for each of twelve layers of ViT-B/16 and L/14; one layer, and many prompts, take other tiles."""
    every = ("highest", torch.float32), ("high", torch.float32), ("highest", torch.bfloat16)
    for name, (layers, n, d, w), forms, precisions in (
        ("B/16", (12, 8, 512, 768), (False, True), every),
        ("L/14", (12, 8, 768, 1024), (False,), every[::2]),
        ("B/16 one layer", (1, 8, 512, 768), (True,), every[:1]),
        ("B/16 32 prompts", (12, 32, 512, 768), (False,), every[::2]),
    ):
        shapes = [(3 * d, d), (3 * d,), (d, d), *[(d,)] * 5, (d, d), (d,), (d, d), (d,), (w, d), (w,)]
        for released, (precision, dtype) in itertools.product(forms, precisions):
            u, *params = (torch.empty(shape, dtype=dtype, device="meta") for shape in [(layers, n, d), *shapes])
            weights = [t for key, t in zip(NAMES, params, strict=True) if key in WEIGHTS]
            number = "tf32" if precision == "high" else str(dtype).removeprefix("torch.")
            label = f"{'released' if released else 'paper'} {name} {number}"
            fwd = (u, params, n // 2, 1, 1e-5, 1e-5, released)
            text, visual, *kept = outputs_of(*fwd[:4], released)
            bwd = (text, visual, u, weights, *kept, released)
            yield f"forward {label}", functools.partial(with_precision, precision, prompt_transform_fwd, *fwd)
            yield f"backward {label}", functools.partial(with_precision, precision, prompt_transform_bwd, *bwd)
