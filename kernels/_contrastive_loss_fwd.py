"""Forward of contrastive_loss.py: a program takes a block of images through the classes of their ranges."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._contrastive_loss_common import EPS, dot_settings, dots_of, split_sum, targets_of
from upt_fast.kernels._launch import launch, rows_of


@triton.jit
def _contrastive_loss_fwd_kernel(
    image_ptr,  # (B, E)
    text_ptr,  # (C, E)
    image_norm_ptr,  # (B,) fp32
    text_norm_ptr,  # (C,) fp32
    scale_ptr,  # () fp32
    labels_ptr,  # (B,) int64
    ranges_ptr,  # (B, 2) int64 or None
    lse_ptr,  # (splits, B) fp32
    label_logit_ptr,  # (splits, B) fp32; 0 where the label is in another split
    stride_image_row,
    stride_text_row,
    B,
    C,
    E,
    chunk,
    HAS_RANGES: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    images = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    split = tl.program_id(1)
    start, end, target = targets_of(labels_ptr, ranges_ptr, images, B, C, HAS_RANGES)
    # rows beyond the last repeat it, and are outside of every range: loads need no mask of rows
    near_images = tl.minimum(images, B - 1)
    image_rows = image_ptr + near_images * stride_image_row
    scale = tl.load(scale_ptr) * (1 / tl.load(image_norm_ptr + near_images))
    peak = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_B,), tl.float32)
    label_logit = tl.zeros((BLOCK_B,), tl.float32)
    first = tl.maximum(split * chunk, tl.min(start, axis=0) // BLOCK_C * BLOCK_C)
    last = tl.minimum(split * chunk + chunk, tl.max(end, axis=0))
    for c in range(first, last, BLOCK_C):
        classes = c + tl.arange(0, BLOCK_C)
        near = tl.minimum(classes, C - 1).to(tl.int64)
        dots = dots_of(image_rows, text_ptr + near * stride_text_row, E, UPCAST, EVEN_K, BLOCK_B, BLOCK_C, BLOCK_K)
        z = dots * scale[:, None] * (1 / tl.load(text_norm_ptr + near))[None, :]
        inside = (classes[None, :] >= start[:, None]) & (classes[None, :] < end[:, None])
        label_logit += tl.sum(tl.where(classes[None, :] == target[:, None], z, 0.0), axis=1)
        z = tl.where(inside, z, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, axis=1))
        # an image none of whose classes came so far keeps its sum at 0
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)
        peak = new_peak
    lse = peak + tl.log(tl.where(total == 0, 1.0, total))
    # of a wrong label the loss becomes NaN and, as backward starts from this sum, so do the gradients
    lse = tl.where(target >= 0, lse, float("nan"))
    tl.store(lse_ptr + split * B + images, lse, images < B)
    tl.store(label_logit_ptr + split * B + images, label_logit, images < B)


def norms_of(x: Tensor) -> Tensor:
    """max(|x|, EPS) of rows x (M, N): (M,) float32."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).clamp_min(EPS)


def _check_labels(labels: Tensor, class_ranges: Tensor | None, classes: int) -> None:
    start, end = (0, classes) if class_ranges is None else class_ranges.unbind(1)
    wrong = (labels < 0) | (labels >= end - start)
    if class_ranges is not None:
        wrong |= (start < 0) | (end > classes)
    if wrong.any():
        image = int(wrong.nonzero()[0])
        first, last = (0, classes) if class_ranges is None else class_ranges[image].tolist()
        raise ValueError(
            f"image {image}: label {int(labels[image])} in classes [{first}, {last}) of {classes}; "
            f"wanted 0 <= label < end - start within 0 <= start < end <= {classes}"
        )


def contrastive_loss_fwd(
    image_features: Tensor, text_features: Tensor, scale: Tensor, labels: Tensor, class_ranges: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and log-sum-exp (B,), norms of the images (B,) and of the texts (C,), float32."""
    if labels.device.type == "cpu":
        _check_labels(labels, class_ranges, len(text_features))
    images, texts = rows_of(image_features), rows_of(text_features)
    (B, E), C = images.shape, len(texts)
    block_b, block_c = 32, 64
    splits, chunk = split_sum(triton.cdiv(B, block_b), C, block_c)
    lse, label_logit = (images.new_empty(splits, B, dtype=torch.float32) for _ in range(2))
    image_norm, text_norm = norms_of(images), norms_of(texts)
    launch(
        _contrastive_loss_fwd_kernel,
        (triton.cdiv(B, block_b), splits),
        image_ptr=images,
        text_ptr=texts,
        image_norm_ptr=image_norm,
        text_norm_ptr=text_norm,
        scale_ptr=scale,
        labels_ptr=labels.contiguous(),
        ranges_ptr=None if class_ranges is None else class_ranges.contiguous(),
        lse_ptr=lse,
        label_logit_ptr=label_logit,
        stride_image_row=images.stride(0),
        stride_text_row=texts.stride(0),
        B=B,
        C=C,
        E=E,
        chunk=chunk,
        HAS_RANGES=class_ranges is not None,
        BLOCK_B=block_b,
        BLOCK_C=block_c,
        num_warps=4,
        **dot_settings(images.dtype, E, 16 if images.dtype == torch.float32 else 64),
    )
    lse = lse.logsumexp(0)
    return lse - label_logit.sum(0), lse, image_norm, text_norm
