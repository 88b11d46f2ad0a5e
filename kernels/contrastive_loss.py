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
from torch import Tensor
from upt_fast.kernels._contrastive_loss_bwd import contrastive_loss_bwd
from upt_fast.kernels._contrastive_loss_fwd import contrastive_loss_fwd
from upt_fast.kernels._launch import DTYPES, Workload

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
