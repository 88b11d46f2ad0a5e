"""Forward of prompt_transform.py: its launches, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from upt_fast.kernels._prompt_transform_attention import attention
from upt_fast.kernels._prompt_transform_common import NAMES, Sizes, columns
from upt_fast.kernels._prompt_transform_norm import norm_product
from upt_fast.kernels._prompt_transform_product import product

STEPS = ("attended", "h1", "h2", "relu", "y")  # kept by columns; in the released form v stands for the first


def outputs_of(u: Tensor, params: list[Tensor], n_text: int, num_heads: int, released: bool) -> tuple[Tensor, ...]:
    """Text, visual; steps (5, D, LD), qkv (M, 3 D), attention's probabilities (I, H, N, N), 1 / std (2, I, N)."""
    (layers, n, d), width = u.shape, len(params[-1])
    sizes, fp32 = Sizes(layers, n, n_text, d, width), dict(dtype=torch.float32)
    return (
        u.new_empty(layers, n_text, d),
        u.new_empty(layers, n - n_text, width),
        columns(u, sizes, len(STEPS), kept=True),
        u.new_empty(0 if released else sizes.rows, 3 * d),
        u.new_empty(0 if released else layers, num_heads, n, n, **fp32),
        u.new_empty(2, layers, n, **fp32),
    )


def prompt_transform_fwd(
    u: Tensor, params: list[Tensor], n_text: int, num_heads: int, eps1: float, eps2: float, released: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Text rows, projected visual rows; then for backward what outputs_of says."""
    layers, n, d = u.shape
    text, visual, kept, qkv, p, rstd = outputs_of(u, params, n_text, num_heads, released)
    sizes = Sizes(layers, n, n_text, d, visual.shape[2])
    u, weights = u.contiguous(), {name: t.contiguous() for name, t in zip(NAMES, params, strict=True)}
    attended, h1, h2, relu, y = kept
    (s,) = columns(u, sizes)
    in_w, in_b, out_w, out_b = (weights[name] for name in NAMES[:4])
    norms = [weights[name] for name in NAMES[4:8]]
    if released:
        product(sizes, u, in_w[2 * d :], attended, A="prompts", bias_ptr=in_b[2 * d :])
        product(sizes, attended, out_w, s, ADD="prompts", bias_ptr=out_b, add_ptr=u)
        residual = dict(add_ptr=h1, gain_ptr=norms[0], shift_ptr=norms[1])  # x1 = LN1(s)
    else:
        product(sizes, u, in_w, qkv, A="prompts", OUT="rows", bias_ptr=in_b)
        attention(sizes, u, qkv, p, attended, h1, rstd[0], eps1)
        product(sizes, attended, out_w, s, bias_ptr=out_b, add_ptr=h1, gain_ptr=norms[0], shift_ptr=norms[1])
        residual = dict(add_ptr=h2, gain_ptr=norms[2], shift_ptr=norms[3])  # x2 = LN2(s)
    norm_product(sizes, s, norms, weights["w1"], weights["b1"], h1, h2, relu, rstd, (eps1, eps2), released)
    product(sizes, relu, weights["w2"], y, bias_ptr=weights["b2"], text_ptr=text, **residual)
    product(sizes, y, weights["mlp_w"], visual, rows=sizes.visual, OUT="rows", bias_ptr=weights["mlp_b"])
    return text, visual, kept, qkv, p, rstd
