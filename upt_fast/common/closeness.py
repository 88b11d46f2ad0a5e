"""How far results are from what is wanted, and how far rounding alone may take them.

What rounding may do to a result hangs on the arithmetic: the precision, the lengths of sums, what cancels, the
condition of a softmax. It is found by doing the arithmetic again and again in float64 with random errors in it (Monte
Carlo arithmetic, Parker 1997): each operation's result is off as rounding to the precision in question leaves it, and
what a sum adds up by as much times the root of half its length, as if it were added one by one. The spread of the
results is the error that an honest computation has, in any order and on any processor; a wrong one is off by far more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDING = 0.25  # spread of one rounding's error in units in the last place, 0.2 to 0.3 where it is spread evenly
SAMPLES = 8  # of the arithmetic with errors in it
CLEAR = 0.4  # of what is allowed: a smaller error needs no further samples
SPREADS = 6.0  # that a result may be off: one in 5e8 where errors have one common cause, and then are normal
EXACT = 2  # units in the last place that any result may be off, at no need to ask further

# operations that move numbers and make none
MOVES = frozenset(
    (
        *("_to_copy", "_unsafe_index", "_unsafe_view", "cat", "clone", "constant_pad_nd", "copy", "diagonal_backward"),
        *("embedding", "empty", "empty_like", "expand_copy", "fill", "flip", "full", "full_like", "gather", "index"),
        *("index_select", "masked_fill", "masked_select", "new_empty", "new_full", "new_ones", "new_zeros", "ones"),
        *("ones_like", "repeat", "roll", "scatter", "select_backward", "slice_backward", "stack", "tril", "triu"),
        *("where", "zeros", "zeros_like"),
    )
)
# those that add up over the last dimension of the argument of this place
PRODUCTS = {"mm": 0, "bmm": 0, "dot": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1, "addbmm": 1}
ROWS = frozenset(
    (
        *("_softmax", "_log_softmax", "logsumexp", "native_layer_norm", "linalg_vector_norm", "var", "std", "var_mean"),
        *("_softmax_backward_data", "_log_softmax_backward_data", "native_layer_norm_backward"),
    )
)
SUMS = frozenset(("sum", "mean", "nansum", "norm"))


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of got - wanted over that of wanted, in float64; inf where a shape or a NaN differs."""
    if got.shape != wanted.shape:
        return float("inf")
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    if got.numel() == 0:
        return 0.0
    error = float((got - wanted).pow(2).mean().sqrt())
    scale = float(wanted.pow(2).mean().sqrt())
    if error != error:
        return float("inf")
    return error / scale if scale else error


def max_error(got: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference over max(1, largest absolute wanted), in float64; inf on NaN or another shape."""
    if got.shape != wanted.shape:
        return float("inf")
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    if got.numel() == 0:
        return 0.0
    error = float((got - wanted).abs().max())
    return float("inf") if error != error else error / max(1.0, float(wanted.abs().max()))


class RoundingErrors(TorchDispatchMode):
    """Operations in float64 whose results are off as if they were rounded to another precision; see the module.

    Args:
        dtype: the precision in which results are rounded; sums are in float32 where it has less.
        seed: of the errors.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.unit = ROUNDING * torch.finfo(dtype).eps
        self.sum_unit = min(self.unit, ROUNDING * torch.finfo(torch.float32).eps)
        self.seed, self.generators = seed, dict[torch.device, torch.Generator]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        arithmetic = name not in MOVES and all(r.alias_info is None for r in func._schema.returns)
        if not arithmetic:
            return func(*args, **(kwargs or {}))
        length = _summed(name, args)
        if length > 1:
            error = self.sum_unit * math.sqrt(length / 2)
            args = [self.off(t, error) if isinstance(t, Tensor) else t for t in args]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, (tuple, list)):
            return type(out)(self.off(t, self.unit) if isinstance(t, Tensor) else t for t in out)
        return self.off(out, self.unit) if isinstance(out, Tensor) else out

    def off(self, t: Tensor, error: float) -> Tensor:
        """t with relative errors of this spread."""
        if t.dtype != torch.float64 or t.numel() == 0:
            return t
        if t.device not in self.generators:
            self.generators[t.device] = torch.Generator(t.device).manual_seed(self.seed)
        own = t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]  # one number, repeated
        errors = torch.randn(own.shape, dtype=t.dtype, device=t.device, generator=self.generators[t.device])
        return (own * errors.mul_(error).add_(1.0)).expand(t.shape)


def _summed(name: str, args: Sequence[Any]) -> int:
    """How many numbers an operation adds up for each of its results; 1: none."""
    if name in PRODUCTS:
        return args[PRODUCTS[name]].shape[-1]
    if name in ROWS and args[0].ndim:
        return args[0].shape[-1]
    if name in SUMS:
        dims = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) and args[1] else range(args[0].ndim)
        return math.prod(args[0].shape[d] for d in dims)
    if name.startswith("_scaled_dot_product"):
        return max(args[0].shape[-1], *(t.shape[-2] for t in args if isinstance(t, Tensor) and t.ndim > 1))
    if name.startswith("convolution"):
        return math.prod(args[1].shape[1:])
    if name in ("index_add", "index_put", "_index_put_impl_", "embedding_dense_backward"):
        return len(args[0]) if name == "embedding_dense_backward" else args[0].shape[0]
    return 1


def _mean_square(t: Tensor) -> float:
    return float(t.detach().double().square().mean()) if t.numel() else 0.0


class Explained:
    """What rounding explains of the errors of results; samples of it are drawn once for all results that are asked of.

    Args:
        run: computes the results in float64, gradients included.
        dtype: the lowest precision in which results are kept on the way.
    """

    def __init__(self, run: Callable[[], Sequence[Tensor]], dtype: torch.dtype) -> None:
        self.run, self.dtype = run, dtype
        self.wanted = [t.detach() for t in run()]
        self._sums: list[list[float]] = []  # of squared errors over the samples so far, by sample and result

    def shares(self, got: Sequence[Tensor]) -> list[float]:
        """Errors of results as shares of what rounding explains: at most 1 where they are right."""
        exact = EXACT * torch.finfo(self.dtype).eps
        shares = [relative_rms(g, w) / exact for g, w in zip(got, self.wanted, strict=True)]
        if max(shares, default=0.0) <= 1 or not all(map(math.isfinite, shares)):
            return shares
        errors = [_mean_square(g.detach().double().to(w.device) - w) for g, w in zip(got, self.wanted, strict=True)]
        floors = [exact**2 * _mean_square(w) for w in self.wanted]
        for seed in range(SAMPLES):
            spreads = self._spreads(seed)
            allowed = [max(SPREADS**2 * s / (seed + 1), floor) for s, floor in zip(spreads, floors, strict=True)]
            shares = [math.sqrt(e / a) if a else math.inf if e else 0.0 for e, a in zip(errors, allowed, strict=True)]
            if max(shares) <= CLEAR:
                break
        return shares

    def _spreads(self, seed: int) -> list[float]:
        """Sums of squares over samples 0 to seed."""
        if seed == len(self._sums):
            with RoundingErrors(self.dtype, seed):
                found = [t.detach() for t in self.run()]
            before = self._sums[-1] if self._sums else [0.0] * len(self.wanted)
            self._sums.append([s + _mean_square(f - w) for s, f, w in zip(before, found, self.wanted, strict=True)])
        return self._sums[seed]


def excesses(got: Sequence[Tensor], run: Callable[[], Sequence[Tensor]], dtype: torch.dtype) -> list[float]:
    """Errors of results as shares of what rounding explains: at most 1 where they are right.

    Args:
        got: results of a computation in dtype.
        run: computes the same in float64, gradients included.
        dtype: the lowest precision in which results are kept on the way.
    """
    return Explained(run, dtype).shares(got)


def assert_rounded(got: Sequence[Tensor], run: Callable[[], Sequence[Tensor]], dtype: torch.dtype) -> None:
    """Raise an AssertionError unless results are off by no more than rounding explains; see :func:`excesses`."""
    found = excesses(got, run, dtype)
    assert max(found, default=0.0) <= 1, f"errors as shares of what rounding to {dtype} explains: {found}"
