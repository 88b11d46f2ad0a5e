"""Backward of prompt_transform.py: the rows' gradients step by step, then those of all parameters in one launch."""

from __future__ import annotations

from torch import Tensor
from upt_fast.kernels._prompt_transform_attention import attention_bwd
from upt_fast.kernels._prompt_transform_common import NAMES, WEIGHTS, Sizes, columns
from upt_fast.kernels._prompt_transform_fwd import STEPS
from upt_fast.kernels._prompt_transform_norm import norm_product_bwd
from upt_fast.kernels._prompt_transform_product import product
from upt_fast.kernels._prompt_transform_weights import weight_gradients

GRADS = ("dy", "da", "dx2", "dx1", "ds")


def gradients_of(u: Tensor, w: int, released: bool) -> list[Tensor]:
    """u's and the parameters', in the order of NAMES."""
    d, whole = u.shape[2], u.new_zeros if released else u.new_empty  # W_q and W_k then have zero gradients
    attention, mlp = [whole(3 * d, d), whole(3 * d), u.new_empty(d, d), u.new_empty(d)], [(w, d), (w,)]
    norms, ffn = [(d,)] * 4, [(d, d), (d,)] * 2
    return [u.new_empty(u.shape), *attention, *(u.new_empty(shape) for shape in norms + ffn + mlp)]


def prompt_transform_bwd(
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
    """Gradients of u and of all parameters."""
    layers, n, d = u.shape
    sizes = Sizes(layers, n, dtext.shape[1], d, dvisual.shape[2])
    dtext, dvisual, u = dtext.contiguous(), dvisual.contiguous(), u.contiguous()
    weight = {name: t.contiguous() for name, t in zip(WEIGHTS, weights, strict=True)}
    steps = dict(zip(STEPS, kept, strict=True))
    grads = dict(zip(GRADS, columns(u, sizes, len(GRADS)), strict=True))
    dy, da, dx2, dx1, ds = grads.values()
    found = gradients_of(u, sizes.w, released)
    du, dparams = found[0], dict(zip(NAMES, found[1:], strict=True))

    backward = dict(transposed=True)
    product(sizes, dvisual, weight["mlp_w"], dy, A="visual", ADD="text", add_ptr=dtext, **backward)
    product(sizes, dy, weight["w2"], da, gate_ptr=steps["relu"], **backward)
    product(sizes, da, weight["w1"], dx2, add_ptr=None if released else dy, **backward)
    dqkv = columns(u, sizes, 1 if released else 3)
    between = dqkv if released else u.new_empty(sizes.rows, d)
    norms = (steps["h1"], steps["h2"], weight["norm1_w"], weight["norm2_w"], rstd)
    norm_product_bwd(sizes, grads, *norms, weight["out_w"], between, released)
    to_u = dict(OUT="prompts", **backward)
    if released:
        product(sizes, dqkv, weight["in_w"][2 * d :], du, add_ptr=ds, **to_u)
    else:
        dh = dx1  # LN1's output is a summand of s: its gradient is ds, and this place is free
        attention_bwd(sizes, between, qkv, p, ds, steps["h1"], weight["norm1_w"], rstd[0], dqkv, dh)
        product(sizes, dqkv, weight["in_w"], du, add_ptr=dh, **to_u)
        grads["dx1"] = ds
    weight_gradients(
        sizes,
        {"u": u, "dvisual": dvisual, "dqkv": dqkv, **steps, **grads},
        (weight["norm2_w"], weight["norm2_b"]),
        dparams,
        released,
    )
    if not layers:
        for t in found:
            t.zero_()
    return found
