"""Backward of contrastive_loss.py: one kernel for either side, images or texts, from the logits computed again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._contrastive_loss_common import EPS, dot_settings, dots_of, split_sum, targets_of
from upt_fast.kernels._launch import launch, rows_of


@triton.jit
def _contrastive_loss_bwd_kernel(
    x_ptr,  # (R, E), the side whose gradient this is: images, or texts if OF_TEXT
    y_ptr,  # (Q, E), the other side
    x_norm_ptr,  # (R,) fp32
    y_norm_ptr,  # (Q,) fp32
    scale_ptr,  # () fp32
    labels_ptr,  # (B,) int64
    ranges_ptr,  # (B, 2) int64 or None
    lse_ptr,  # (B,) fp32
    dloss_ptr,  # (B,)
    dx_ptr,  # (R, E); if PARTIAL (splits, R, E) fp32, of normalised x
    along_ptr,  # (splits, R) fp32, written if PARTIAL
    stride_x_row,
    stride_y_row,
    R,
    Q,
    E,
    chunk,
    eps,
    OF_TEXT: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    PARTIAL: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(2)
    scale = tl.load(scale_ptr)
    near_rows = tl.minimum(rows, R - 1)
    norm = tl.load(x_norm_ptr + near_rows)
    x_inverse = 1 / norm
    x_rows = x_ptr + near_rows * stride_x_row
    g = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    along = tl.zeros((BLOCK_R,), tl.float32)
    IMAGE_AXIS: tl.constexpr = 0 if OF_TEXT else 1  # the axis that vectors over images are broadcast along
    B = Q if OF_TEXT else R
    C = R if OF_TEXT else Q
    for q in range(split * chunk, tl.minimum(split * chunk + chunk, Q), BLOCK_Q):
        columns = q + tl.arange(0, BLOCK_Q).to(tl.int64)
        images = columns if OF_TEXT else rows
        classes = rows if OF_TEXT else columns
        start, end, target = targets_of(labels_ptr, ranges_ptr, images, B, C, HAS_RANGES)
        if (tl.min(classes, axis=0) < tl.max(end, axis=0)) & (tl.max(classes, axis=0) >= tl.min(start, axis=0)):
            near = tl.minimum(columns, Q - 1)
            y_rows = y_ptr + near * stride_y_row
            y_inverse = 1 / tl.load(y_norm_ptr + near)
            dots = dots_of(x_rows, y_rows, E, UPCAST, EVEN_K, BLOCK_R, BLOCK_Q, BLOCK_K)
            # in forward's order, for softmax - onehot to vanish where one class is certain
            z = dots * tl.expand_dims(scale * (y_inverse if OF_TEXT else x_inverse), IMAGE_AXIS)
            z *= tl.expand_dims(x_inverse if OF_TEXT else y_inverse, 1 - IMAGE_AXIS)
            near_images = near if OF_TEXT else near_rows
            lse = tl.expand_dims(tl.load(lse_ptr + near_images), IMAGE_AXIS)
            dloss = tl.expand_dims(tl.load(dloss_ptr + near_images), IMAGE_AXIS)
            c = tl.expand_dims(classes.to(tl.int32), 1 - IMAGE_AXIS)
            inside = (c >= tl.expand_dims(start, IMAGE_AXIS)) & (c < tl.expand_dims(end, IMAGE_AXIS))
            onehot = tl.where(c == tl.expand_dims(target, IMAGE_AXIS), 1.0, 0.0)
            dz = tl.where(inside, dloss * (tl.exp(z - lse) - onehot), 0.0)
            along += tl.sum(tl.where(inside, dz * z, 0.0), axis=1)
            y = tl.load(y_rows[:, None] + cols[None, :], cols[None, :] < E, other=0.0).to(tl.float32)
            # a diverged set's y must not reach the rows for which dz is 0; in its own dz is NaN already
            y *= y_inverse[:, None]
            y = tl.where(tl.abs(y) < float("inf"), y, 0.0)
            g = tl.dot(dz, y, g, input_precision="ieee")
    g *= scale
    mask = (rows[:, None] < R) & (cols[None, :] < E)
    if PARTIAL:
        tl.store(along_ptr + split * R + rows, along, (rows < R) & (tl.program_id(1) == 0))
    else:
        x = tl.load(x_rows[:, None] + cols[None, :], mask, other=0.0).to(tl.float32)
        along = tl.where(norm > eps, along, 0.0)
        g = (g - (along * x_inverse)[:, None] * x) * x_inverse[:, None]
    tl.store(dx_ptr + (split * R + rows)[:, None] * E + cols[None, :], g, mask)


def contrastive_loss_bwd(
    dloss: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    labels: Tensor,
    class_ranges: Tensor | None,
    lse: Tensor,
    image_norm: Tensor,
    text_norm: Tensor,
    of_text: bool,
) -> Tensor:
    """Gradient of text_features if of_text, otherwise of image_features, from that of the loss (B,)."""
    x, y, x_norm, y_norm = rows_of(image_features), rows_of(text_features), image_norm, text_norm
    if of_text:
        x, y, x_norm, y_norm = y, x, y_norm, x_norm
    (R, E), Q = x.shape, len(y)
    # the widest that stay in registers; 16-bit rows are multiplied by tensor cores, which a 32-bit sum cannot use
    block_r, block_q, block_k = 32, 16, 32 if x.dtype == torch.float32 else 64
    block_e = 256 if x.dtype == torch.float32 and E > 128 else 128
    grid = triton.cdiv(R, block_r), triton.cdiv(E, block_e)
    splits, chunk = split_sum(grid[0] * grid[1], Q, block_q)
    g = x.new_empty(splits, R, E, dtype=torch.float32 if splits > 1 else x.dtype)
    along = x.new_empty(splits, R, dtype=torch.float32)
    launch(
        _contrastive_loss_bwd_kernel,
        (*grid, splits),
        x_ptr=x,
        y_ptr=y,
        x_norm_ptr=x_norm,
        y_norm_ptr=y_norm,
        scale_ptr=scale,
        labels_ptr=labels.contiguous(),
        ranges_ptr=None if class_ranges is None else class_ranges.contiguous(),
        lse_ptr=lse,
        dloss_ptr=dloss.contiguous(),
        dx_ptr=g,
        along_ptr=along,
        stride_x_row=x.stride(0),
        stride_y_row=y.stride(0),
        R=R,
        Q=Q,
        E=E,
        chunk=chunk,
        eps=EPS,
        OF_TEXT=of_text,
        HAS_RANGES=class_ranges is not None,
        PARTIAL=splits > 1,
        BLOCK_R=block_r,
        BLOCK_Q=block_q,
        BLOCK_E=block_e,
        num_warps=8,
        **dot_settings(x.dtype, E, block_k),
    )
    if splits == 1:
        return g[0]
    along = torch.where(x_norm > EPS, along.sum(0), 0.0)
    return ((g.sum(0) - (along / x_norm)[:, None] * x) / x_norm[:, None]).to(x.dtype)
