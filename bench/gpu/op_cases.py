"""Inputs of each public op: at the shapes of training, and small ones of odd sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from gpu.machine import set_precision
from gpu.models import NAME_LENGTHS
from torch import Tensor

from upt_fast.clip.frozen import ACTIVATIONS
from upt_fast.common.closeness import excesses, relative_rms
from upt_fast.engine import ops
from upt_fast.engine.layout import BufferPlaces, PackedLayout
from upt_fast.methods.upt import UPTConfig
from upt_fast.prompts import LearnerSetting
from upt_fast.prompts.upt import UnifiedPromptLearner

EPS = 1e-5
PREFIX = 5  # rows in front of each class: the start token and four prompts


@dataclass
class Numbers:
    """Random inputs, the same for all dtypes up to rounding.

    Attributes:
        device: where they are.
        dtype: to which they are rounded.
        compute: dtype in which they come; None: dtype.
        leaves: those that need gradients, in order.
        seed: of the numbers.
    """

    device: str
    dtype: torch.dtype
    compute: torch.dtype | None = None
    leaves: list[Tensor] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def __call__(self, *shape: int, grad: bool = True) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)
        x = x.to(self.compute or self.dtype)
        if grad:
            self.leaves.append(x.requires_grad_())
        return x

    def parts(self, *shape: int, dim: int) -> tuple[Tensor, ...]:
        """Slices of one tensor, as the product that makes queries, keys and values leaves them; to be leaves."""
        return tuple(t.detach().requires_grad_() for t in self(*shape, grad=False).unbind(dim))

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


# makes inputs and returns the call: a function of the backend
Make = Callable[[Numbers], Callable[[str], Any]]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: its name in upt_fast.engine.ops.
        kernel: the file in kernels/ that has it; "" where none does.
        name: of the shape.
        make: see Make.
        dtypes: that the op meets in training.
    """

    op: str
    kernel: str
    name: str
    make: Make
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)


class Bound:
    """A case's op on inputs of one device and dtype, ready to run again and again."""

    def __init__(
        self, case: Case, device: str, dtype: torch.dtype, compute: torch.dtype | None = None, seed: int = 0
    ) -> None:
        numbers = Numbers(device, dtype, compute, seed=seed)
        self.case, self.numbers = case, numbers
        self.call, self.leaves = case.make(numbers), numbers.leaves
        self.weights: list[Tensor] = []  # of the outputs, in the loss whose gradients are taken

    def forward(self, backend: str) -> tuple[Tensor, ...]:
        outputs = self.call(backend)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def run(self, forward: Callable[[], tuple[Tensor, ...]]) -> list[Tensor]:
        """Outputs and the gradients of the leaves."""
        outputs = forward()
        if not self.weights:
            self.weights = [self.numbers(*out.shape, grad=False).to(out.dtype) for out in outputs]
        return [*outputs, *torch.autograd.grad(outputs, self.leaves, self.weights)]

    def least_bytes(self) -> int:
        """Read: inputs and the outputs' gradients; written: outputs and the inputs' gradients; each once."""
        return 2 * sum(t.numel() * t.element_size() for t in (*self.leaves, *self.weights))


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
    case, numbers = bound.case, bound.numbers
    exact = Bound(case, numbers.device, numbers.dtype, torch.float64, numbers.seed)
    plain = Bound(case, numbers.device, numbers.dtype, seed=numbers.seed)
    wanted, results = exact.run(partial(exact.forward, "torch")), bound.run(forward)
    own = [relative_rms(a, b) for a, b in zip(plain.run(partial(plain.forward, "torch")), wanted, strict=True)]
    got = [relative_rms(a, b) for a, b in zip(results, wanted, strict=True)]
    allowed = torch.finfo(numbers.dtype).eps / 2
    ratios = [g / (1.5 * o + allowed) for g, o in zip(got, own, strict=True)]
    if max(ratios) > 1:
        explained = excesses(results, partial(exact.run, partial(exact.forward, "torch")), numbers.dtype)
        ratios = [min(pair) for pair in zip(ratios, explained, strict=True)]
    worst = max(ratios)
    status = {} if worst <= 1 else {"status": "failed", "message": f"{worst:.2f} times the error that is allowed"}
    return {"error": worst, "errors": got, "torch_errors": own} | status


def _layer_norm(shape: tuple[int, ...], numbers: Numbers) -> Callable[[str], Any]:
    return partial(ops.layer_norm, numbers(*shape), EPS)


def _add_layer_norm(shape: tuple[int, ...], numbers: Numbers) -> Callable[[str], Any]:
    return partial(ops.add_layer_norm, numbers(*shape), numbers(*shape), EPS)


def _activation(rows: int, width: int, kind: str, numbers: Numbers) -> Callable[[str], Any]:
    return partial(ops.activation, numbers(rows, width), kind, numbers(width, grad=False))


def _linear_gelu(
    rows: int, width: int, hidden: int, kind: str, recompute: bool, numbers: Numbers
) -> Callable[[str], Any]:
    h = numbers(rows, width)
    fc, proj = numbers(hidden, width, grad=False) * width**-0.5, numbers(width, hidden, grad=False) * hidden**-0.5
    biases = numbers(hidden, grad=False), numbers(width, grad=False)
    return partial(ops.linear_gelu, h, fc, biases[0], proj, biases[1], kind, recompute)


def _prompt_insert(
    batch: int, tokens: int, prompts: int, width: int, sets: int, numbers: Numbers
) -> Callable[[str], Any]:
    # the stream's own gradient is that of y; as a leaf it could not be changed in place
    x, y = numbers(batch, tokens, width, grad=False), numbers(batch, tokens, width)
    p = numbers(sets, prompts, width)
    set_index = None if sets == 1 else numbers.integers(sets, batch)
    return lambda backend: ops.prompt_insert(x.detach(), y, p, set_index, EPS, backend)


def _insert_shared(layout: PackedLayout, heads: int, width: int, numbers: Numbers) -> Callable[[str], Any]:
    _, own, _ = numbers.parts(layout.num_rows, 3, heads, width, dim=1)
    shared, _ = numbers.parts(len(layout.sets), PREFIX, 2, heads, width, dim=2)
    numbers.leaves += own, shared
    places = BufferPlaces(*(t.to(numbers.device) for t in BufferPlaces.of(layout, PREFIX)))
    return partial(ops.insert_shared, own, shared, places)


def _stream_attention(
    batch: int, tokens: int, heads: int, width: int, pooled: bool, numbers: Numbers
) -> Callable[[str], Any]:
    q, k, v = numbers.parts(batch, tokens, 3, heads, width, dim=2)
    q = (q * width**-0.5)[:, : 1 if pooled else None].detach().requires_grad_()
    numbers.leaves += q, k, v
    return partial(ops.stream_attention, q, k, v)


def _buffer_attention(
    layout: PackedLayout, heads: int, width: int, pooled: bool, numbers: Numbers
) -> Callable[[str], Any]:
    queries = layout.num_classes if pooled else layout.num_rows
    keys = layout.num_rows + PREFIX * layout.num_classes
    q, k, v = (numbers(rows, heads, width) for rows in (queries, keys, keys))
    return partial(ops.buffer_attention, q, k, v, layout, PREFIX)


def _prefix_attention(
    batch: int, tokens: int, prompts: int, heads: int, width: int, sets: int, pooled: bool, numbers: Numbers
) -> Callable[[str], Any]:
    q, k, v = numbers.parts(batch, tokens, 3, heads, width, dim=2)
    q = (q * width**-0.5)[:, : 1 if pooled else None].detach().requires_grad_()
    prefixes = numbers.parts(sets, prompts, 2, heads, width, dim=2)
    numbers.leaves += q, k, v, *prefixes
    set_index = None if sets == 1 else numbers.integers(sets, batch)
    return partial(ops.prefix_attention, q, k, v, *prefixes, set_index)


def _packed_attention(
    layout: PackedLayout, heads: int, width: int, pooled: bool, numbers: Numbers
) -> Callable[[str], Any]:
    q, k, v = numbers.parts(layout.num_rows, 3, heads, width, dim=1)
    q = (q * width**-0.5)[: layout.num_classes if pooled else None].detach().requires_grad_()
    prefixes = numbers.parts(len(layout.sets), PREFIX, 2, heads, width, dim=2)
    numbers.leaves += q, k, v, *prefixes
    return partial(ops.packed_attention, q, k, v, *prefixes, layout)


def _contrastive_loss(images: int, classes: int, width: int, ranges: bool, numbers: Numbers) -> Callable[[str], Any]:
    features, half = (numbers(images, width), numbers(classes, width)), classes // 2
    labels, class_ranges = numbers.integers(half, images), None
    if ranges:  # two sets of half the classes
        first = half * numbers.integers(2, images)
        class_ranges = torch.stack([first, first + half], dim=1)
    return lambda backend: ops.contrastive_loss(*features, 14.3, labels, class_ranges, backend)


def _prompt_transform(
    layers: int, width: int, vision_width: int, preset: str, heads: int, numbers: Numbers
) -> Callable[[str], Any]:
    config = UPTConfig(preset=preset, attention_heads=heads, dropout=0.0)
    depth = layers if preset == "paper" else 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(numbers.seed)
        learner = UnifiedPromptLearner(config, LearnerSetting(depth, width, depth, vision_width))
    learner = learner.to(numbers.device, numbers.dtype).to(numbers.compute or numbers.dtype)
    with torch.no_grad():
        learner.uni_ctx.copy_(numbers(*learner.uni_ctx.shape, grad=False))
    numbers.leaves += learner.parameters()

    def call(backend: str) -> tuple[Tensor, ...]:
        learner.backend = backend
        return tuple(learner())

    return call


def packed_layout(classes: int) -> PackedLayout:
    """The rows of as many classes as the benchmarks have: name, full stop, end token."""
    return PackedLayout((tuple((count, tokens + 2) for tokens, count in NAME_LENGTHS[classes].items()),))


def training_cases() -> Iterator[Case]:
    """The shapes of training, ViT-B/16 and L/14 at batch 32, up to 1000 classes."""
    towers = (("ViT-B/16", 201, 768, 512, 12), ("ViT-L/14", 261, 1024, 768, 16))
    for model, tokens, width, text_width, heads in towers:
        stream = (32, tokens, width)
        yield Case("layer_norm", "layer_norm", f"{model} {stream}", partial(_layer_norm, stream))
        yield Case("add_layer_norm", "layer_norm", f"{model} {stream}", partial(_add_layer_norm, stream))
        insert = partial(_prompt_insert, 32, tokens, 4, width, 1)
        yield Case("prompt_insert", "prompt_insert", f"{model} {stream}", insert)
        rows = 32 * tokens, 4 * width
        for kind in ACTIVATIONS:
            yield Case("activation", "activation", f"{kind} {model} {rows}", partial(_activation, *rows, kind))
        # the image tower's rows, and the text tower's of a hundred and of a thousand classes
        shapes = [(32 * tokens, width), *((packed_layout(classes).num_rows, text_width) for classes in (100, 1000))]
        for (count, features), recompute in itertools.product(shapes, (False, True)):
            shape = (count, features, 4 * features)
            name = f"{model} {shape}{' recompute' * recompute}"
            yield Case("linear_gelu", "linear_gelu", name, partial(_linear_gelu, *shape, "quick_gelu", recompute))
        for pooled in (False, True):
            name = f"{model} {(32, tokens, heads, 64)}{' one query' * pooled}"
            yield Case("stream_attention", "", name, partial(_stream_attention, 32, tokens, heads, 64, pooled))
            rows = tokens - 4  # the prompts are no rows here
            name = f"{model} {(32, rows, heads, 64)} behind 4{' one query' * pooled}"
            prefix = partial(_prefix_attention, 32, rows, 4, heads, 64, 1, pooled)
            yield Case("prefix_attention", "prefix_attention", name, prefix)
        for classes in (100, 1000):
            layout, text_heads = packed_layout(classes), text_width // 64
            shape = (layout.num_rows, text_heads, 64)
            name = f"{model} C={classes} {shape}"
            yield Case("insert_shared", "insert_shared", name, partial(_insert_shared, layout, text_heads, 64))
            for pooled in (False, True):
                attention = partial(_buffer_attention, layout, text_heads, 64, pooled)
                yield Case("buffer_attention", "", f"{name}{' one query' * pooled}", attention)
                packed = partial(_packed_attention, layout, text_heads, 64, pooled)
                yield Case("packed_attention", "packed_attention", f"{name}{' one query' * pooled}", packed)
        for preset in ("paper", "released"):
            transform = partial(_prompt_transform, 12, text_width, width, preset, 1)
            name = f"{preset} {model} {(12, 8, text_width)}"
            yield Case("prompt_transform", "prompt_transform", name, transform, (torch.float32,))
        for batch, ranges in ((32, False), (512, True)):
            loss = partial(_contrastive_loss, batch, 1000, text_width, ranges)
            name = f"{model} {batch} images, 1000 classes{', two ranges' * ranges}"
            yield Case("contrastive_loss", "contrastive_loss", name, loss)


def small_cases() -> Iterator[Case]:
    """Odd sizes, of which blocks are never full, and every form of each op; quick in an interpreter."""
    every = (torch.float32, torch.float16, torch.bfloat16)
    layout = PackedLayout((((3, 2), (1, 4)), ((2, 3),)))
    found: list[tuple[str, str, str, Make]] = []
    for shape in ((3, 5, 33), (2, 768)):
        found.append(("layer_norm", "layer_norm", f"{shape}", partial(_layer_norm, shape)))
        found.append(("add_layer_norm", "layer_norm", f"{shape}", partial(_add_layer_norm, shape)))
    for kind in ACTIVATIONS:
        found.append(("activation", "activation", f"{kind} (7, 67)", partial(_activation, 7, 67, kind)))
    for kind, recompute in itertools.product(ACTIVATIONS, (False, True)):
        mlp = partial(_linear_gelu, 7, 33, 67, kind, recompute)
        found.append(("linear_gelu", "linear_gelu", f"{kind} (7, 33, 67) recompute={recompute}", mlp))
    for sets in (1, 2):
        insert = partial(_prompt_insert, 3, 7, 2, 40, sets)
        found.append(("prompt_insert", "prompt_insert", f"(3, 7, 40) sets={sets}", insert))
    found.append(("insert_shared", "insert_shared", "2 sets (13, 2, 8)", partial(_insert_shared, layout, 2, 8)))
    for pooled in (False, True):
        name = f"one query {pooled}"
        found.append(("stream_attention", "", name, partial(_stream_attention, 2, 7, 2, 8, pooled)))
        found.append(("buffer_attention", "", name, partial(_buffer_attention, layout, 2, 8, pooled)))
        for sets in (1, 2):
            prefix = partial(_prefix_attention, 3, 7, 2, 2, 8, sets, pooled)
            found.append(("prefix_attention", "prefix_attention", f"(3, 7, 2, 8) sets={sets} {name}", prefix))
        for kind, classes in (("short", layout), ("long", PackedLayout((((2, 3), (1, 40)), ((1, 5),))))):
            packed = partial(_packed_attention, classes, 2, 8, pooled)
            found.append(("packed_attention", "packed_attention", f"{kind} {name}", packed))
    for ranges in (False, True):
        loss = partial(_contrastive_loss, 5, 8, 19, ranges)
        found.append(("contrastive_loss", "contrastive_loss", f"(5, 8, 19) ranges={ranges}", loss))
    for preset, heads in itertools.product(("paper", "released"), (1, 2)):
        transform = partial(_prompt_transform, 2, 24, 20, preset, heads)
        found.append(("prompt_transform", "prompt_transform", f"{preset} {heads} heads", transform))
    for op, kernel, name, make in found:
        yield Case(op, kernel, name, make, every[:1] if op == "prompt_transform" else every)
