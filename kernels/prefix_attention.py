"""Attention of each image's queries over [prompts of its set ; its own rows], prompts' keys and values read in place.

    out_i = sum_j softmax_j(q_i . k_j) v_j  over the P keys of the image's set and the L of its own, q already scaled

Elsewhere the prompts are copied in front of each image's keys and values: per layer 2 (P + L) D numbers written and
read again. Here no program copies: block n of the keys [prompts ; own rows] takes rows below P from the set and the
others from the image, so that prompts fill up a block that the last few rows would leave nearly empty. Softmax is
online (Dao, arXiv 2307.08691). Powers are those of 2, the largest score subtracted before the factor log2(e): after it
the rounding of large scores doubles the gradients' error. Forward keeps the output and each query's log-sum-exp, in two
parts: as one number it would lose digits that the gradients of float32 inputs need.

Backward has a program per block of queries, for their gradient and delta_i = dout_i . out_i, and one per block of keys,
which goes through all queries. Only gradients that are needed are computed: where the rows are constants, as in the
first layer, only blocks with prompts run. The prompts' gradients come as one fp32 sum per image, which a last kernel
adds over the images of each set, in order: no atomics, equal runs give equal bits.

The same kernels take packed classes, causal, whose rows stand one behind the other (packed_attention.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from upt_fast.kernels._attention import MAX_HEAD_DIM, describe, empty_gradients, needed_gradients
from upt_fast.kernels._launch import DTYPES, Workload, with_precision
from upt_fast.kernels._prefix_attention_bwd import prefix_attention_bwd
from upt_fast.kernels._prefix_attention_fwd import prefix_attention_fwd

# as functions they are called on meta tensors too, see workloads()
attend = torch.library.custom_op("upt_fast::prefix_attention_fwd", prefix_attention_fwd, mutates_args=())
_bwd = torch.library.custom_op("upt_fast::prefix_attention_bwd", prefix_attention_bwd, mutates_args=())


@attend.register_fake
def _(q, *_):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(2, q.shape[-2], q.shape[:-2].numel(), dtype=torch.float32)


@_bwd.register_fake
def _(_, q, k, v, prefix_k, *others):  # type: ignore[no-untyped-def]
    needs_q, needs_own, needs_prefix = others[-3:]
    dprefix = (2, *prefix_k.shape) if needs_prefix and prefix_k is not None else (0,)
    return *empty_gradients(q, k, needs_q, needs_own), q.new_empty(dprefix)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.longest = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, dout, _):  # type: ignore[no-untyped-def]
    if dout is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    compute = functools.partial(_bwd, dout, *saved, ctx.longest)
    return *needed_gradients(ctx.needs_input_grad[:5], compute), *[None] * 3


attend.register_autograd(_backward, setup_context=_setup_context)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    set_index: Tensor | None = None,
) -> Tensor:
    """Attention of each image's queries over [prompts of its set ; its own rows], without mask.

    Args:
        q: (B, Q, H, K) queries, already scaled; K at most 128.
        k: (B, L, H, K) keys of the image's own rows.
        v: (B, L, H, K) values.
        prefix_k: (S, P, H, K) keys of S prompt sets, or None.
        prefix_v: (S, P, H, K) values, or None.
        set_index: (B,) int64, each image's set, 0 ... S - 1; None where S is 1. For prompts per image: 0 ... B - 1.
    Returns:
        (B, Q, H, K) in q's dtype.
    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    given = {"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v}
    floats = [t for t in given.values() if t is not None]
    fits = (
        q.ndim == k.ndim == 4
        and q.shape[-1] <= MAX_HEAD_DIM
        and k.shape == v.shape == (q.shape[0], k.shape[1], *q.shape[2:])
        and (prefix_k is None) == (prefix_v is None)
        and all(t.dtype == q.dtype and t.device == q.device for t in floats)
        and q.dtype in DTYPES
    )
    if fits and prefix_k is not None and prefix_v is not None:
        fits = prefix_k.ndim == 4 and prefix_k.shape == prefix_v.shape and prefix_k.shape[2:] == q.shape[2:]
        sets = prefix_k.shape[:1]
        if set_index is None:
            fits &= sets == (1,)
        else:
            fits &= set_index.shape == q.shape[:1] and set_index.dtype == torch.int64 and set_index.device == q.device
    if not fits:
        raise ValueError(
            f"{describe(**given, set_index=set_index)}; wanted q (B, Q, H, K), k and v (B, L, H, K), both prefixes "
            f"(S, P, H, K) or None, of one dtype (float32, float16 or bfloat16) and device, K at most {MAX_HEAD_DIM}, "
            "and set_index (B,) int64 unless S is 1"
        )
    prompts = 0 if prefix_k is None else prefix_k.shape[1]
    if k.shape[1] + prompts == 0 and q.numel():
        raise ValueError(f"{describe(**given)}; wanted at least one key for each query")
    return attend(q, k, v, prefix_k, prefix_v, None if prefix_k is None else set_index, None, 0)[0]


def workloads() -> Iterator[Workload]:
    """ViT-B/16 at batch 32 with four prompts, the pooled row alone, heads of other widths; text of long classes.

    Numbers of rows come to the kernels as arguments, so that 257, 577 and 785 tokens are compiled as 197 are.
    """
    sets = torch.empty(32, dtype=torch.int64, device="meta")
    for name, Q, L, H, K in (
        ("B/16", 197, 197, 12, 64),
        ("pooled", 1, 197, 12, 64),
        ("H/14", 257, 257, 16, 80),
        ("heads of 32", 785, 785, 12, 32),
        ("heads of 48", 197, 197, 4, 48),
        ("heads of 128", 577, 577, 16, 128),
    ):
        yield from _workloads(name, (32, Q, H, K), (32, L, H, K), sets)
    classes = torch.empty(7, 5, dtype=torch.int32, device="meta")
    for K in (64, 80):
        yield from _workloads(f"long text of heads of {K}", (490, 8, K), (490, 8, K), classes[:, 4], classes, 70, 1)


def _workloads(
    name: str,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    sets: Tensor,
    classes: Tensor | None = None,
    longest: int = 0,
    prompts: int = 4,
) -> Iterator[Workload]:
    for dtype, precision in ((torch.float32, "highest"), (torch.float32, "high"), (torch.bfloat16, "highest")):
        label = f"{name} {'tf32' if precision == 'high' else str(dtype).removeprefix('torch.')}"
        q = torch.empty(queries, dtype=dtype, device="meta")
        _, k, v = torch.empty(*keys[:-2], 3, *keys[-2:], dtype=dtype, device="meta").unbind(-3)
        prefixes = torch.empty(2, prompts, 2, *keys[-2:], dtype=dtype, device="meta").unbind(2)
        inputs = q, k, v, *prefixes, sets, classes
        softmax = torch.empty(2, queries[-2], q.shape[:-2].numel(), device="meta")
        yield f"forward {label}", functools.partial(with_precision, precision, prefix_attention_fwd, *inputs, longest)
        backward = functools.partial(with_precision, precision, prefix_attention_bwd, q, *inputs, q, softmax, longest)
        yield f"backward all {label}", functools.partial(backward, True, True, True)
        yield f"backward prompts {label}", functools.partial(backward, False, False, True)
