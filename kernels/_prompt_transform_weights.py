"""Gradients of all the prompt transform's weights, biases and LayerNorms in one launch: sums over the stacked rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels import _launch
from upt_fast.kernels._launch import launch
from upt_fast.kernels._prompt_transform_common import Sizes, precision, prompt_of


@triton.jit
def weight_gradient(
    number,
    dy_ptr,  # (O, LD), or (M, O) where DY_ROWS
    x_ptr,  # (J, LD), or (I, N, J) where X_PROMPTS
    gain_ptr,  # (J,) or None
    shift_ptr,  # (J,) or None
    dw_ptr,  # (O, J)
    db_ptr,  # (O,)
    M,
    O,
    J,
    LAYER,
    n_text,
    V,
    LD,
    DY_ROWS: tl.constexpr,
    X_PROMPTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Tile `number` of dw = dy^T x, with gain x + shift for x where there are any, and of db, the sum of dy."""
    tiles = tl.cdiv(J, BLOCK_J)
    outs = number // tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    ins = number % tiles * BLOCK_J + tl.arange(0, BLOCK_J)
    dw, db = tl.zeros((BLOCK_O, BLOCK_J), tl.float32), tl.zeros((BLOCK_O,), tl.float32)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + ins, ins < J, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(shift_ptr + ins, ins < J, other=0.0).to(tl.float32)[None, :]
    for r in range(0, M, BLOCK_R):
        rows = r + tl.arange(0, BLOCK_R)
        dy_at = rows[None, :] * O + outs[:, None] if DY_ROWS else rows[None, :] + outs[:, None] * LD
        dy = tl.load(dy_ptr + dy_at, (outs < O)[:, None] & (rows < M)[None, :], other=0.0)
        if X_PROMPTS:
            x_at = prompt_of(rows, LAYER, n_text, V)[:, None] * J + ins[None, :]
        else:
            x_at = rows[:, None] + ins[None, :] * LD
        x = tl.load(x_ptr + x_at, (rows < M)[:, None] & (ins < J)[None, :], other=0.0)
        if gain_ptr is not None:
            x = (x.to(tl.float32) * gain + shift).to(x.dtype)
        dw = tl.dot(dy, x, dw, input_precision=PRECISION)
        db += tl.sum(dy.to(tl.float32), axis=1)
    tl.store(dw_ptr + outs[:, None] * J + ins[None, :], dw, (outs < O)[:, None] & (ins < J)[None, :])
    tl.store(db_ptr + outs, db, (outs < O) & (number % tiles == 0))


@triton.jit
def norm_gradient(number, dy_ptr, h_ptr, dw_ptr, db_ptr, M, D, LD, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr):
    """Columns `number` of a LayerNorm's gradients: sums of dy h and of dy, both (D, LD)."""
    outs = number * BLOCK_O + tl.arange(0, BLOCK_O)
    dw, db = tl.zeros((BLOCK_O,), tl.float32), tl.zeros((BLOCK_O,), tl.float32)
    for r in range(0, M, BLOCK_R):
        rows = r + tl.arange(0, BLOCK_R)
        at, mask = outs[:, None] * LD + rows[None, :], (outs < D)[:, None] & (rows < M)[None, :]
        dy = tl.load(dy_ptr + at, mask, other=0.0).to(tl.float32)
        dw += tl.sum(dy * tl.load(h_ptr + at, mask, other=0.0).to(tl.float32), axis=1)
        db += tl.sum(dy, axis=1)
    tl.store(dw_ptr + outs, dw, outs < D)
    tl.store(db_ptr + outs, db, outs < D)


@triton.jit
def _prompt_weights_kernel(
    u_ptr,  # (I, N, D)
    dvisual_ptr,  # (V, W)
    attended_ptr,  # (D, LD) as all that follow; in the released form v
    h1_ptr,
    h2_ptr,
    relu_ptr,
    y_ptr,
    dqkv_ptr,  # (3 D, LD); in the released form of v, (D, LD)
    ds_ptr,
    da_ptr,
    dy_ptr,
    dx1_ptr,
    dx2_ptr,
    norm2_w_ptr,  # (D,)
    norm2_b_ptr,  # (D,)
    din_w_ptr,  # of the parameters, in their shapes
    din_b_ptr,
    dout_w_ptr,
    dout_b_ptr,
    dnorm1_w_ptr,
    dnorm1_b_ptr,
    dnorm2_w_ptr,
    dnorm2_b_ptr,
    dw1_ptr,
    db1_ptr,
    dw2_ptr,
    db2_ptr,
    dmlp_w_ptr,
    dmlp_b_ptr,
    M,
    D,
    W,
    LAYER,
    n_text,
    V,
    LD,
    RELEASED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # tiles of the weights one after the other, then of the norms
    across, blocks = tl.cdiv(D, BLOCK_J), tl.cdiv(D, BLOCK_O)
    PARTS: tl.constexpr = 1 if RELEASED else 3
    square = blocks * across
    first_out = tl.cdiv(PARTS * D, BLOCK_O) * across
    first_w1 = first_out + square
    first_w2 = first_w1 + square
    first_mlp = first_w2 + square
    first_norm1 = first_mlp + tl.cdiv(W, BLOCK_O) * across
    first_norm2 = first_norm1 + blocks
    tile = tl.program_id(0)
    if tile < first_out:
        skipped = 2 * D if RELEASED else 0
        weight_gradient(
            tile, dqkv_ptr, u_ptr, None, None, din_w_ptr + skipped * D, din_b_ptr + skipped, M, PARTS * D, D,
            LAYER, n_text, V, LD, False, True, PRECISION, BLOCK_O, BLOCK_J, BLOCK_R,
        )  # fmt: skip
    elif tile < first_w1:
        weight_gradient(
            tile - first_out, ds_ptr, attended_ptr, None, None, dout_w_ptr, dout_b_ptr, M, D, D,
            LAYER, n_text, V, LD, False, False, PRECISION, BLOCK_O, BLOCK_J, BLOCK_R,
        )  # fmt: skip
    elif tile < first_w2:
        weight_gradient(
            tile - first_w1, da_ptr, h2_ptr, norm2_w_ptr, norm2_b_ptr, dw1_ptr, db1_ptr, M, D, D,
            LAYER, n_text, V, LD, False, False, PRECISION, BLOCK_O, BLOCK_J, BLOCK_R,
        )  # fmt: skip
    elif tile < first_mlp:
        weight_gradient(
            tile - first_w2, dy_ptr, relu_ptr, None, None, dw2_ptr, db2_ptr, M, D, D,
            LAYER, n_text, V, LD, False, False, PRECISION, BLOCK_O, BLOCK_J, BLOCK_R,
        )  # fmt: skip
    elif tile < first_norm1:
        weight_gradient(
            tile - first_mlp, dvisual_ptr, y_ptr, None, None, dmlp_w_ptr, dmlp_b_ptr, V, W, D,
            LAYER, n_text, V, LD, True, False, PRECISION, BLOCK_O, BLOCK_J, BLOCK_R,
        )  # fmt: skip
    elif tile < first_norm2:
        norm_gradient(tile - first_norm1, dx1_ptr, h1_ptr, dnorm1_w_ptr, dnorm1_b_ptr, M, D, LD, BLOCK_O, BLOCK_R)
    else:
        norm_gradient(tile - first_norm2, dx2_ptr, h2_ptr, dnorm2_w_ptr, dnorm2_b_ptr, M, D, LD, BLOCK_O, BLOCK_R)


def weight_gradients(
    sizes: Sizes, steps: dict[str, Tensor], norm2: tuple[Tensor, Tensor], dparams: dict[str, Tensor], released: bool
) -> None:
    """Launch it: steps has what both directions left, by the kernel's names; dparams takes the gradients."""
    d, w = sizes.d, sizes.w
    block_o, block_j, block_r = (128, 128, 64) if _launch.INTERPRETED else (64, 32, 16)
    across, blocks = triton.cdiv(d, block_j), triton.cdiv(d, block_o)
    parts = triton.cdiv((1 if released else 3) * d, block_o) + 3 * blocks + triton.cdiv(w, block_o)
    launch(
        _prompt_weights_kernel,
        (parts * across + 2 * blocks if sizes.layers else 0,),
        **{f"{name}_ptr": t for name, t in steps.items()},
        norm2_w_ptr=norm2[0],
        norm2_b_ptr=norm2[1],
        **{f"d{name}_ptr": t for name, t in dparams.items()},
        M=sizes.rows,
        D=d,
        W=w,
        **sizes.places,
        RELEASED=released,
        PRECISION=precision(steps["u"]),
        BLOCK_O=block_o,
        BLOCK_J=block_j,
        BLOCK_R=block_r,
        num_warps=4,
        num_stages=3,
    )
