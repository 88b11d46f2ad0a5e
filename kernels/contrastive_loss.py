"""Cross-entropy of each image's scaled cosines with the classes of its own range, without the matrix of logits.

    z_bc = scale (I_b . T_c) / (|I_b| |T_c|);  loss_b = log sum_c exp z_bc - z_b,label;  |x| = max(||x||, eps)

(CLIP, Radford et al. 2021, arXiv 2103.00020; eps as in F.normalize.) Ranges let several prompt sets share a batch.
PyTorch writes both normalised features and four (B, C) matrices, six where ranges mask the logits, and multiplies every
image with every set's classes: 2 B C e FLOPs forward, 4 B C e backward. Here 2 B + C numbers are kept, log-sum-exps and
norms, and tiles outside the ranges are skipped: with S sets an S-th of the products is left. In return backward takes
2 B C e (ceil(e / BLOCK_E) + 1) FLOPs for either gradient, because each BLOCK_E columns compute the logits anew, and a
few MiB of partial sums where it has few rows. So it saves with many sets or B > e; a small batch of one set has small
logits, and nothing to save.

With dz = dloss (softmax(z) - onehot), i = I / |I| and t = T / |T|, the gradient through the normalisation is

    dI_b = (g_b - (g_b . i_b) i_b) / |I_b|,  g_b = scale sum_c dz_bc t_c,  g_b . i_b = sum_c dz_bc z_bc

and that of T the same with the roles exchanged. The last sum needs no row of g, so any columns of it can be finished
alone. Where |x| is eps, it is a constant and the second term falls away.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from upt_fast.kernels._launch import DTYPES, INTERPRETED, Workload, launch, rows_of

EPS = 1e-12
# a sum is cut into at most so many parts, added up later, while its grid has fewer programs than a large GPU runs
MAX_SPLITS, PROGRAMS = 32, 128


@triton.jit
def _targets(labels_ptr, ranges_ptr, images, B, C, HAS_RANGES: tl.constexpr):
    """First and end class of each image, within [0, C], and the class of its label; -1 where there is none."""
    mask = images < B
    label = tl.load(labels_ptr + images, mask, other=-1)
    start = tl.zeros_like(label)
    end = start + C
    if HAS_RANGES:
        start = tl.load(ranges_ptr + 2 * images, mask, other=0)
        end = tl.load(ranges_ptr + 2 * images + 1, mask, other=0)
    good = (start >= 0) & (end <= C) & (label >= 0) & (label < end - start)
    target = tl.where(good, start + label, -1)
    start = tl.where(mask, tl.minimum(tl.maximum(start, 0), C), C)
    end = tl.where(mask, tl.minimum(tl.maximum(end, 0), C), 0)
    return start.to(tl.int32), end.to(tl.int32), target.to(tl.int32)


@triton.jit
def _dots(
    x_rows,  # (BLOCK_R,) pointers
    y_rows,  # (BLOCK_Q,) pointers
    E,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Dot products of rows of x and rows of y, E long: (BLOCK_R, BLOCK_Q) fp32."""
    dots = tl.zeros((BLOCK_R, BLOCK_Q), tl.float32)
    for k in range(0, E, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_rows[:, None] + cols, None if EVEN_K else cols < E, other=None if EVEN_K else 0.0)
        y = tl.load(y_rows[:, None] + cols, None if EVEN_K else cols < E, other=None if EVEN_K else 0.0)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        dots = tl.dot(x, tl.trans(y), dots, input_precision="ieee")
    return dots


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
    start, end, target = _targets(labels_ptr, ranges_ptr, images, B, C, HAS_RANGES)
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
        dots = _dots(image_rows, text_ptr + near * stride_text_row, E, UPCAST, EVEN_K, BLOCK_B, BLOCK_C, BLOCK_K)
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
        start, end, target = _targets(labels_ptr, ranges_ptr, images, B, C, HAS_RANGES)
        if (tl.min(classes, axis=0) < tl.max(end, axis=0)) & (tl.max(classes, axis=0) >= tl.min(start, axis=0)):
            near = tl.minimum(columns, Q - 1)
            y_rows = y_ptr + near * stride_y_row
            y_inverse = 1 / tl.load(y_norm_ptr + near)
            dots = _dots(x_rows, y_rows, E, UPCAST, EVEN_K, BLOCK_R, BLOCK_Q, BLOCK_K)
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


def _norm(x: Tensor) -> Tensor:
    """max(|x|, EPS) of rows x (M, N): (M,) float32."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).clamp_min(EPS)


def _split(programs: int, columns: int, block: int) -> tuple[int, int]:
    """Parts that a sum over columns is cut into, and the columns of each, in a grid of so many programs."""
    tiles = max(1, triton.cdiv(columns, block))
    chunk = triton.cdiv(tiles, max(1, min(tiles, MAX_SPLITS, PROGRAMS // max(1, programs)))) * block
    return max(1, triton.cdiv(columns, chunk)), chunk


def _dot_settings(dtype: torch.dtype, E: int, block_k: int) -> dict[str, int]:
    # masked loads take more registers; the interpreter cannot multiply bfloat16
    block_k = block_k if E % block_k == 0 else max(16, block_k // 2)
    return {"UPCAST": INTERPRETED and dtype == torch.bfloat16, "EVEN_K": E % block_k == 0, "BLOCK_K": block_k}


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
    splits, chunk = _split(triton.cdiv(B, block_b), C, block_c)
    lse, label_logit = (images.new_empty(splits, B, dtype=torch.float32) for _ in range(2))
    image_norm, text_norm = _norm(images), _norm(texts)
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
        **_dot_settings(images.dtype, E, 16 if images.dtype == torch.float32 else 64),
    )
    lse = lse.logsumexp(0)
    return lse - label_logit.sum(0), lse, image_norm, text_norm


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
    splits, chunk = _split(grid[0] * grid[1], Q, block_q)
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
        **_dot_settings(x.dtype, E, block_k),
    )
    if splits == 1:
        return g[0]
    along = torch.where(x_norm > EPS, along.sum(0), 0.0)
    return ((g.sum(0) - (along / x_norm)[:, None] * x) / x_norm[:, None]).to(x.dtype)


_fwd = torch.library.custom_op("upt_fast::contrastive_loss_fwd", contrastive_loss_fwd, mutates_args=())
_bwd = torch.library.custom_op("upt_fast::contrastive_loss_bwd", contrastive_loss_bwd, mutates_args=())


@_fwd.register_fake
def _(image_features, text_features, scale, labels, class_ranges):  # type: ignore[no-untyped-def]
    rows = len(image_features), len(image_features), len(image_features), len(text_features)
    return tuple(image_features.new_empty(n, dtype=torch.float32) for n in rows)


@_bwd.register_fake
def _(dloss, image_features, text_features, scale, labels, class_ranges, lse, image_norm, text_norm, of_text):  # type: ignore[no-untyped-def]
    return image_features.new_empty((text_features if of_text else image_features).shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx, dloss, *_):  # type: ignore[no-untyped-def]
    wanted = (needed and dloss is not None for needed in ctx.needs_input_grad[:2])
    saved = ctx.saved_tensors
    gradients = (_bwd(dloss, *saved, of_text) if w else None for w, of_text in zip(wanted, (False, True), strict=True))
    return *gradients, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor,
    class_ranges: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each image over the classes of its range, from features that are not normalised.

    A logit_bias, the same for every logit, would change nothing and is no argument.

    Args:
        image_features: (B, e), float32, float16 or bfloat16.
        text_features: (C, e), image_features' dtype.
        logit_scale: what cosines are multiplied by, a constant: one number, no logarithm.
        labels: (B,) int64, counted from the start of the image's range. On a GPU, where looking would cost a
            synchronisation, a label outside the range makes that image's loss NaN.
        class_ranges: (B, 2) int64, first class and end of each image's range; None: all C classes.
    Returns:
        (B,) float32.
    Raises:
        ValueError: a shape, dtype or device differs; on the CPU, a label or range that is out of bounds.
    """
    given = {"image_features": image_features, "text_features": text_features, "labels": labels}
    if class_ranges is not None:
        given["class_ranges"] = class_ranges
    fits = (
        image_features.ndim == text_features.ndim == 2
        and image_features.shape[1] == text_features.shape[1]
        and image_features.dtype == text_features.dtype
        and image_features.dtype in DTYPES
        and labels.shape == image_features.shape[:1]
        and labels.dtype == torch.int64
        and (class_ranges is None or (class_ranges.shape == (len(labels), 2) and class_ranges.dtype == torch.int64))
        and len({t.device for t in given.values()}) == 1
    )
    if not fits:
        got = "; ".join(f"{name} {tuple(t.shape)} {t.dtype} {t.device}" for name, t in given.items())
        raise ValueError(
            f"{got}; wanted features (B, e) and (C, e) of one dtype (float32, float16 or bfloat16), "
            "labels (B,) and class_ranges (B, 2) int64, all on one device"
        )
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1:
            raise ValueError(f"logit_scale {tuple(logit_scale.shape)}; wanted one number")
        scale = logit_scale.detach().reshape(()).to(image_features.device, torch.float32)
    else:
        scale = torch.full((), logit_scale, dtype=torch.float32, device=image_features.device)
    return _fwd(image_features, text_features, scale, labels, class_ranges)[0]


def workloads() -> Iterator[Workload]:
    """A few-shot batch of B/16 on ImageNet's classes, and many images of L/14's width with ranges of their own."""
    for B, C, E, sets in ((32, 1000, 512, False), (512, 1000, 768, True)):
        for dtype in (torch.float32, torch.bfloat16):
            images, texts = (torch.empty(n, E, dtype=dtype, device="meta") for n in (B, C))
            scale, lse, text_norm = (torch.empty(n, device="meta") for n in ((), B, C))
            labels = torch.empty(B, dtype=torch.int64, device="meta")
            inputs = images, texts, scale, labels, labels.new_empty(B, 2) if sets else None
            gradient = lse, *inputs, lse, lse, text_norm
            label = f"{B} images {str(dtype).removeprefix('torch.')}"
            yield f"forward {label}", lambda a=inputs: contrastive_loss_fwd(*a)
            yield f"backward of images {label}", lambda a=gradient: contrastive_loss_bwd(*a, False)
            yield f"backward of texts {label}", lambda a=gradient: contrastive_loss_bwd(*a, True)
