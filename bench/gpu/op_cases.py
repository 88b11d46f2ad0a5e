"""Inputs of each public op at the shapes of training, and how far results on them are off."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu.machine import set_precision
from gpu.models import NAME_LENGTHS
from torch import Tensor

from upt_fast import testing_ops
from upt_fast.clip.frozen import ACTIVATIONS
from upt_fast.common.closeness import excesses, relative_rms
from upt_fast.engine.layout import PackedLayout
from upt_fast.testing_ops import Case, Numbers, case

PREFIX = 5  # rows in front of each class: the start token and four prompts


class Bound:
    """A case's operation on inputs of one device and dtype, ready to run again and again."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.case, self.numbers = case, Numbers(dtype, device, seed)
        self.arguments = case.make(self.numbers)
        self.weights: list[Tensor] = []  # of the outputs, in the loss whose gradients are taken

    def copied(self, dtype: torch.dtype) -> Bound:
        """The same operation on the same numbers in another dtype."""
        other = copy.copy(self)
        other.arguments, other.weights = testing_ops.copied(self.arguments, dtype), list(self.weights)
        return other

    def forward(self, backend: str) -> tuple[Tensor, ...]:
        return testing_ops.call(self.case.op, self.arguments, backend)

    def run(self, forward: Callable[[], tuple[Tensor, ...]]) -> list[Tensor]:
        """Outputs and the gradients of the leaves."""
        outputs = forward()
        if not self.weights:
            self.weights = [self.numbers(*out.shape) for out in outputs]
        weights = [w.to(out.dtype) for w, out in zip(self.weights, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, testing_ops.leaves(self.arguments), weights)]

    def least_bytes(self) -> int:
        """Read: inputs and the outputs' gradients; written: outputs and the inputs' gradients; each once."""
        tensors = (*testing_ops.leaves(self.arguments), *self.weights)
        return 2 * sum(t.numel() * t.element_size() for t in tensors)


def errors(bound: Bound, forward: Callable[[], tuple[Tensor, ...]]) -> dict[str, Any]:
    """Relative RMS against float64, of outputs and gradients in turn, beside that of PyTorch's own operations.

    An error is allowed that is at most 1.5 times PyTorch's and half a unit in the last place; or, where few numbers or
    sums that cancel make PyTorch's own a matter of luck, that rounding explains (upt_fast/common/closeness.py).

    Args:
        bound: the op on its inputs, which has not run yet.
        forward: runs it.
    Returns:
        error: the largest ratio to what is allowed; errors and torch_errors; status: "failed" where error is above 1.
    """
    set_precision("fp32")
    dtype = bound.numbers.dtype
    exact, plain = bound.copied(torch.float64), bound.copied(dtype)  # before it runs, which may change its inputs
    results = bound.run(forward)
    exact.weights = plain.weights = bound.weights
    wanted = exact.run(partial(exact.forward, "torch"))
    own = [relative_rms(a, b) for a, b in zip(plain.run(partial(plain.forward, "torch")), wanted, strict=True)]
    got = [relative_rms(a, b) for a, b in zip(results, wanted, strict=True)]
    allowed = torch.finfo(dtype).eps / 2
    ratios = [g / (1.5 * o + allowed) for g, o in zip(got, own, strict=True)]
    if max(ratios) > 1:
        explained = excesses(results, partial(exact.run, partial(exact.forward, "torch")), dtype)
        ratios = [min(pair) for pair in zip(ratios, explained, strict=True)]
    worst = max(ratios)
    status = {} if worst <= 1 else {"status": "failed", "message": f"{worst:.2f} times the error that is allowed"}
    return {"error": worst, "errors": got, "torch_errors": own} | status


def packed_layout(classes: int) -> PackedLayout:
    """The rows of as many classes as the benchmarks have: name, full stop, end token."""
    return PackedLayout((tuple((count, tokens + 2) for tokens, count in NAME_LENGTHS[classes].items()),))


def training_cases() -> Iterator[Case]:
    """The shapes of training, ViT-B/16 and L/14 at batch 32, up to 1000 classes."""
    half = torch.bfloat16, torch.float32
    towers = (("ViT-B/16", 201, 768, 512, 12), ("ViT-L/14", 261, 1024, 768, 16))
    for model, tokens, width, text_width, heads in towers:
        stream = (32, tokens, width)
        for op in ("layer_norm", "add_layer_norm"):
            yield case(op, f"{model} {stream}", half, *stream)
        yield case("prompt_insert", f"{model} {stream}", half, 32, tokens, 4, width)
        rows = 32 * tokens, 4 * width
        for kind in ACTIVATIONS:
            yield case("activation", f"{kind} {model} {rows}", half, *rows, kind=kind)
        # the image tower's rows, and the text tower's of a hundred and of a thousand classes
        shapes = [(32 * tokens, width), *((packed_layout(classes).num_rows, text_width) for classes in (100, 1000))]
        for (count, features), again in itertools.product(shapes, (False, True)):
            name = f"{model} {(count, features, 4 * features)}{' recompute' * again}"
            sizes = {"width": features, "hidden": 4 * features}
            yield case("linear_gelu", name, half, count, **sizes, kind="quick_gelu", recompute=again)
        for pooled in (False, True):
            name, queries = f"{model} {(32, tokens, heads, 64)}{' one query' * pooled}", 1 if pooled else None
            yield case("stream_attention", name, half, 32, tokens, heads, 64, queries)
            rows = tokens - 4  # the prompts are no rows here
            name = f"{model} {(32, rows, heads, 64)} behind 4{' one query' * pooled}"
            yield case("prefix_attention", name, half, 32, queries, rows, 4, heads, 64)
        for classes in (100, 1000):
            layout, text_heads = packed_layout(classes), text_width // 64
            name = f"{model} C={classes} {(layout.num_rows, text_heads, 64)}"
            yield case("insert_shared", name, half, layout, PREFIX, text_heads, 64)
            for pooled in (False, True):
                last = f"{name}{' one query' * pooled}"
                yield case("buffer_attention", last, half, layout, PREFIX, text_heads, 64, pooled)
                yield case("packed_attention", last, half, layout, PREFIX, text_heads, 64, pooled)
        for preset in ("paper", "released"):
            name = f"{preset} {model} {(12, 8, text_width)}"
            yield case("prompt_transform", name, half[1:], 12, text_width, width, preset, 1)
        for batch, ranges in ((32, False), (512, True)):
            name = f"{model} {batch} images, 1000 classes{', two ranges' * ranges}"
            yield case("contrastive_loss", name, half, batch, 1000, text_width, ranges)
