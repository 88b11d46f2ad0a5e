"""Operations of the engine on random inputs, held to their plain twins: what the kernels' tests and bench/ share.

Arguments of an operation stand in a list, in its order; those that require gradients get them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from upt_fast.clip.frozen import ACTIVATIONS
from upt_fast.common.closeness import assert_rounded
from upt_fast.engine import ops
from upt_fast.engine.layout import BufferPlaces, PackedLayout
from upt_fast.methods.upt import UPTConfig
from upt_fast.prompts import LearnerSetting
from upt_fast.prompts.upt import UnifiedPromptLearner
from upt_fast.reference import ops as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5


class Numbers:
    """Random numbers, of a seed the same in all dtypes up to rounding.

    Args:
        dtype: to which they are rounded.
        device: where they are.
        seed: None: from PyTorch's own generator.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = DEVICE, seed: int | None = None) -> None:
        self.dtype, self.device = dtype, device
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, grad: bool = False, scale: float = 1.0) -> Tensor:
        """Normal numbers of deviation scale."""
        x = scale * torch.randn(shape, generator=self.generator, device=self.device)
        return x.to(self.dtype).requires_grad_(grad)

    def parts(self, *shape: int, dim: int) -> tuple[Tensor, ...]:
        """Slices of one tensor, as the product that makes queries, keys and values leaves them; they need gradients."""
        return tuple(t.detach().requires_grad_() for t in self(*shape).unbind(dim))

    def integers(self, high: int, *shape: int) -> Tensor:
        """0 ... high - 1."""
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False, scale: float = 1.0) -> Tensor:
    """Numbers of PyTorch's own generator."""
    return Numbers(dtype)(*shape, grad=grad, scale=scale)


def integers(values: Any) -> Tensor:
    """int64 on DEVICE."""
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def dtype_name(dtype: torch.dtype) -> str:
    """As in "float16"."""
    return str(dtype).removeprefix("torch.")


def layer_norm(numbers: Numbers, *shape: int) -> list[Any]:
    """x (..., D), eps."""
    return [numbers(*shape, grad=True), EPS]


def add_layer_norm(numbers: Numbers, *shape: int) -> list[Any]:
    """x and y (..., D), eps."""
    return [numbers(*shape, grad=True), numbers(*shape, grad=True), EPS]


def activation(numbers: Numbers, *shape: int, kind: str, bias: bool = True, scale: float = 1.0) -> list[Any]:
    """u (..., N) of deviation scale, its kind, and a bias (N,) or none."""
    return [numbers(*shape, grad=True, scale=scale), kind, numbers(shape[-1], scale=scale) if bias else None]


def frozen_mlp(numbers: Numbers, width: int, hidden: int, out: int) -> list[Tensor]:
    """W_1, b_1, W_2, b_2 such that hidden features have deviation 2 and outputs 1."""
    fc, proj = numbers(hidden, width, scale=2 * width**-0.5), numbers(out, hidden, scale=max(hidden, 1) ** -0.5)
    return [fc, numbers(hidden), proj, numbers(out)]


def linear_gelu(
    numbers: Numbers,
    *batch: int,
    width: int,
    hidden: int,
    out: int | None = None,
    kind: str = "gelu",
    recompute: bool = False,
) -> list[Any]:
    """h (*batch, width), the weights, the activation, and whether backward computes its input again."""
    weights = frozen_mlp(numbers, width, hidden, width if out is None else out)
    return [numbers(*batch, width, grad=True), *weights, kind, recompute]


def prompt_insert(
    numbers: Numbers, B: int, T: int, P: int, D: int, sets: Sequence[int] | None = None, residual: bool = True
) -> list[Any]:
    """x and y (B, T, D), reserved rows of NaN, prompts (S, P, D), each image's set of 1 + max(sets), and eps."""
    x, y = numbers(B, T, D), numbers(B, T, D) if residual else None
    for t in (x, y):
        if t is not None:
            t[:, :P] = float("nan")
    prompts = numbers(1 if sets is None else 1 + max(sets, default=0), P, D, grad=True)
    # x is changed in place, which a leaf must not be
    return [x, None if y is None else y.requires_grad_(), prompts, _set_index(numbers, sets), EPS]


def insert_shared(numbers: Numbers, layout: PackedLayout, P: int, *features: int) -> list[Any]:
    """own (N, *features) and shared (S, P, *features), and the places of both."""
    own, shared = numbers(layout.num_rows, *features, grad=True), numbers(len(layout.sets), P, *features, grad=True)
    return [own, shared, BufferPlaces(*(t.to(numbers.device) for t in BufferPlaces.of(layout, P)))]


def stream_attention(numbers: Numbers, B: int, L: int, H: int, K: int, Q: int | None = None) -> list[Any]:
    """q (B, Q, H, K), scaled, k and v (B, L, H, K): slices of a product; Q of None is L."""
    q, k, v = numbers.parts(B, L, 3, H, K, dim=2)
    if Q is not None:
        q = q[:, :Q] if Q <= L else numbers(B, Q, H, K)
    return [(q * K**-0.5).detach().requires_grad_(), k, v]


def buffer_attention(
    numbers: Numbers, layout: PackedLayout, P: int, H: int, K: int, last_only: bool = False
) -> list[Any]:
    """q of all rows or of each class's last, k and v with P rows in front of each class, the layout, P."""
    keys = layout.num_rows + P * layout.num_classes
    rows = (layout.num_classes if last_only else layout.num_rows, keys, keys)
    return [*(numbers(n, H, K, grad=True) for n in rows), layout, P]


def prefix_attention(
    numbers: Numbers,
    B: int = 2,
    Q: int | None = None,
    L: int = 5,
    P: int = 3,
    H: int = 2,
    K: int = 16,
    sets: Sequence[int] | None = None,
) -> list[Any]:
    """q, k and v as stream_attention's, prefixes (S, P, H, K), and each image's set of 1 + max(sets)."""
    prefixes = numbers.parts(1 if sets is None else 1 + max(sets), P, 2, H, K, dim=2)
    return [*stream_attention(numbers, B, L, H, K, Q), *prefixes, _set_index(numbers, sets)]


def packed_attention(
    numbers: Numbers, layout: PackedLayout, P: int = 3, H: int = 2, K: int = 16, last_only: bool = False
) -> list[Any]:
    """q of all rows or of each class's last, scaled, k and v (N, H, K), prefixes (S, P, H, K), and the layout."""
    q, k, v = numbers.parts(layout.num_rows, 3, H, K, dim=1)
    q = (q * K**-0.5)[: layout.num_classes if last_only else None].detach().requires_grad_()
    return [q, k, v, *numbers.parts(len(layout.sets), P, 2, H, K, dim=2), layout]


def contrastive_loss(numbers: Numbers, B: int, C: int, e: int, ranges: bool = False) -> list[Any]:
    """Features (B, e) and (C, e), scale, labels, and for each image either half of the classes, or all."""
    features, half = [numbers(n, e, grad=True) for n in (B, C)], C // 2
    labels, class_ranges = numbers.integers(half, B), None
    if ranges:
        first = half * numbers.integers(2, B)
        class_ranges = torch.stack([first, first + half], dim=1)
    return [*features, 14.3, labels, class_ranges]


def prompt_transform(
    numbers: Numbers, layers: int, width: int, vision_width: int, preset: str, heads: int
) -> list[Any]:
    """The parameters of UPT's learner, and the learner."""
    config = UPTConfig(preset=preset, attention_heads=heads, dropout=0.0)
    depth = layers if preset == "paper" else 1
    learner = UnifiedPromptLearner(config, LearnerSetting(depth, width, depth, vision_width))
    learner.to(numbers.device, numbers.dtype)
    with torch.no_grad():
        for parameter in learner.parameters():
            deviation = 1.0 if parameter is learner.uni_ctx else 0.1 if parameter.ndim == 1 else width**-0.5
            parameter.copy_(numbers(*parameter.shape, scale=deviation))
        for norm in (learner.norm1, learner.norm2):
            norm.weight.add_(1)
    return [*learner.parameters(), learner]


def _set_index(numbers: Numbers, sets: Sequence[int] | None) -> Tensor | None:
    return None if sets is None else torch.tensor(sets, dtype=torch.int64, device=numbers.device)


@dataclass(frozen=True)
class Operation:
    """What tests and benchmarks need to know of an operation; engine/backends/dispatch.py has its backends.

    Attributes:
        arguments: makes them from Numbers and sizes.
        kernel: the file in kernels/ that has it; "" where none does.
        upcast: its kernels multiply bfloat16 as float32 in Triton's interpreter, which else cuts off where it should
            round.
    """

    arguments: Callable[..., list[Any]]
    kernel: str = ""
    upcast: bool = False


OPERATIONS = {
    "layer_norm": Operation(layer_norm, "layer_norm"),
    "add_layer_norm": Operation(add_layer_norm, "layer_norm"),
    "activation": Operation(activation, "activation"),
    "linear_gelu": Operation(linear_gelu, "linear_gelu"),
    "prompt_insert": Operation(prompt_insert, "prompt_insert"),
    "insert_shared": Operation(insert_shared, "insert_shared"),
    "stream_attention": Operation(stream_attention),
    "buffer_attention": Operation(buffer_attention),
    "prefix_attention": Operation(prefix_attention, "prefix_attention", upcast=True),
    "packed_attention": Operation(packed_attention, "packed_attention", upcast=True),
    "contrastive_loss": Operation(contrastive_loss, "contrastive_loss", upcast=True),
    "prompt_transform": Operation(prompt_transform, "prompt_transform"),
}


def precisions(op: str) -> tuple[torch.dtype, ...]:
    """The dtypes in which an operation's kernels can be held to their twin here."""
    return DTYPES if DEVICE == "cuda" or OPERATIONS[op].upcast else DTYPES[:2]


def call(op: str, arguments: Sequence[Any], backend: str, **options: Any) -> tuple[Tensor, ...]:
    """What an operation returns."""
    if op == "prompt_transform":
        *parameters, learner = arguments
        learner.backend = backend
        names = [name for name, _ in learner.named_parameters()]
        return tuple(functional_call(learner, dict(zip(names, parameters, strict=True)), ()))
    if op == "prompt_insert":  # which changes x in place; outside of the call x stays a constant
        arguments = [arguments[0].detach(), *arguments[1:]]
    return as_tuple(getattr(ops, op)(*arguments, backend=backend, **options))


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One output or several, as several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def leaves(arguments: Sequence[Any]) -> list[Tensor]:
    """Those arguments that need gradients."""
    return [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]


def copied(arguments: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """The arguments with all floating-point tensors copied in another dtype; they need what the others need."""
    return [
        t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
        if isinstance(t, Tensor) and t.is_floating_point()
        else t
        for t in arguments
    ]


def gradients(
    outputs: Sequence[Tensor], arguments: Sequence[Any], weights: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Of those arguments that need some, by the outputs that have a weight in the loss."""
    used = [(y, w.to(y.dtype)) for y, w in zip(outputs, weights, strict=True) if w is not None]
    losses, factors = [y for y, _ in used], [w for _, w in used]
    return torch.autograd.grad(losses, leaves(arguments), factors, materialize_grads=True)


def evaluate(function: Callable[..., Any], arguments: Sequence[Any], weights: Sequence[Tensor | None]) -> list[Tensor]:
    """Outputs of function(*arguments), and gradients as :func:`gradients` gives them."""
    outputs = as_tuple(function(*arguments))
    return [*outputs, *gradients(outputs, arguments, weights)]


def compare(
    function: Callable[..., Any],
    twin: Callable[..., Any],
    arguments: Sequence[Any],
    weights: Sequence[Tensor | None] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Assert that outputs and gradients are those of a twin in float64 on the same numbers, up to rounding.

    Also that outputs are contiguous, that results have the dtypes that they should, and that no argument changes.

    Args:
        function: what is tested.
        twin: takes the same arguments.
        arguments: of both.
        weights: of the outputs in the loss, None for one that is not used; None: random ones.
        dtype: of the outputs; None: that of the first tensor.
    """
    floats = [t for t in arguments if isinstance(t, Tensor) and t.is_floating_point()]
    before, exact = [t.detach().clone() for t in floats], copied(arguments, torch.float64)
    dtype = floats[0].dtype if dtype is None else dtype
    outputs = as_tuple(function(*arguments))
    weights = [torch.randn_like(y) for y in outputs] if weights is None else weights
    found = gradients(outputs, arguments, weights)
    assert {y.dtype for y in outputs} == {dtype}
    assert all(y.is_contiguous() for y in outputs)
    assert [g.dtype for g in found] == [t.dtype for t in leaves(arguments)]
    lowest = min((t.dtype for t in floats), key=lambda dtype: dtype.itemsize)
    assert_rounded([*outputs, *found], lambda: evaluate(twin, exact, weights), lowest)
    for t, old in zip(floats, before, strict=True):
        assert torch.equal(t.nan_to_num(7.0), old.nan_to_num(7.0))


def compare_op(op: str, arguments: Sequence[Any], weights: Sequence[Tensor | None] | None = None) -> None:
    """:func:`compare` of an operation by its Triton kernels with its twin in upt_fast/reference/ops.py."""
    compare(functools.partial(getattr(ops, op), backend="triton"), getattr(reference, op), arguments, weights)


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        op: its name in OPERATIONS.
        name: of the shape.
        make: makes its arguments from Numbers.
        dtypes: to run it in.
    """

    op: str
    name: str
    make: Callable[[Numbers], list[Any]]
    dtypes: tuple[torch.dtype, ...]


def case(op: str, name: str, dtypes: tuple[torch.dtype, ...], *sizes: Any, **options: Any) -> Case:
    """The case of an operation whose arguments have some sizes."""
    return Case(op, name, lambda numbers: OPERATIONS[op].arguments(numbers, *sizes, **options), dtypes)


def small_cases() -> Iterator[Case]:
    """Odd sizes, of which blocks are never full, and every form of each operation; quick in an interpreter."""
    for shape in ((3, 5, 33), (2, 768)):
        yield case("layer_norm", f"{shape}", DTYPES, *shape)
        yield case("add_layer_norm", f"{shape}", DTYPES, *shape)
    for kind in ACTIVATIONS:
        yield case("activation", f"{kind} (7, 67)", DTYPES, 7, 67, kind=kind)
    for kind, again in itertools.product(ACTIVATIONS, (False, True)):
        name = f"{kind} (7, 33, 67) recompute={again}"
        yield case("linear_gelu", name, DTYPES, 7, width=33, hidden=67, kind=kind, recompute=again)
    for sets in (None, (1, 0, 1)):
        yield case("prompt_insert", f"(3, 7, 40) sets={sets}", DTYPES, 3, 7, 2, 40, sets)
    short, long = PackedLayout((((3, 2), (1, 4)), ((2, 3),))), PackedLayout((((2, 3), (1, 40)), ((1, 5),)))
    yield case("insert_shared", f"2 sets ({short.num_rows}, 2, 8)", DTYPES, short, 5, 2, 8)
    for last in (False, True):
        name, queries = f"one query {last}", 1 if last else None
        yield case("stream_attention", name, DTYPES, 2, 7, 2, 8, queries)
        yield case("buffer_attention", name, DTYPES, short, 5, 2, 8, last)
        for sets in (None, (1, 0, 1)):
            yield case("prefix_attention", f"(3, 7, 2, 8) sets={sets} {name}", DTYPES, 3, queries, 7, 2, 2, 8, sets)
        for kind, layout in (("short", short), ("long", long)):
            yield case("packed_attention", f"{kind} {name}", DTYPES, layout, 5, 2, 8, last)
    for ranges in (False, True):
        yield case("contrastive_loss", f"(5, 8, 19) ranges={ranges}", DTYPES, 5, 8, 19, ranges)
    for preset, heads in itertools.product(("paper", "released"), (1, 2)):
        yield case("prompt_transform", f"{preset} {heads} heads", DTYPES[:1], 2, 24, 20, preset, heads)
