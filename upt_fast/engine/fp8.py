"""Products with frozen weights in float8_e4m3fn, forward and for the gradient of their input: ``dtype="fp8"``.

    y = (s_x * X8) (s_w * W8)^T + b,    dx = (s_dy * DY8) (s_v * V8)

X8 and DY8 are rows of activations and gradients, quantised when they come; W8 and V8 are two copies of the frozen
weight W (N, K), one scaled by its rows, one by its columns, so that scales stand outside of both sums and both products
are torch._scaled_mm with a scale for each row of either factor; on a CPU it has none, and they follow. Sums are in
float32, results in bfloat16. A scale is its row's largest magnitude over 448, the largest number of e4m3, so nothing
saturates; a row with inf or NaN becomes NaN.

e4m3 has three bits behind the leading one: rounding is off by at most 2^-4 of a number, and by a uniformly distributed
error of standard deviation 2^-3 / sqrt(12) of the power of two below it: 2.4 to 2.7 % of the numbers' root mean square,
3.7 % for a product of two rounded factors. Scales do not add to it: each is a float32. Numbers below 2^-15 of their
row's largest lose further bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPE = torch.float8_e4m3fn
ROWS = torch.bfloat16  # of everything but the products' factors
LARGEST = torch.finfo(DTYPE).max
MULTIPLE = 16  # of both sizes of a weight, as CUDA's products want; held on every device, so that all compute the same
CAPABILITY = (8, 9)


class Fp8Weight(NamedTuple):
    """A frozen weight W (N, K), quantised for y = x W^T and for dx = dy W."""

    forward: Tensor  # (N, K) of W
    forward_scale: Tensor  # (1, N) float32
    backward: Tensor  # (K, N) of W^T
    backward_scale: Tensor  # (1, K) float32

    @classmethod
    def quantize(cls, weight: Tensor) -> Fp8Weight:
        """Both copies of a weight (N, K).

        Raises:
            ValueError: a size is no multiple of 16.
        """
        if any(size % MULTIPLE for size in weight.shape):
            raise ValueError(
                f"fp8 cannot take a weight of shape {tuple(weight.shape)}; wanted multiples of {MULTIPLE}: "
                "use dtype='bf16' (--precision bf16)"
            )
        by_row, row_scale = quantize_rows(weight)
        by_column, column_scale = quantize_rows(weight.t())
        return cls(by_row, row_scale.t().contiguous(), by_column, column_scale.t().contiguous())

    def unpacked(self) -> Fp8Weight:
        """It has no plain form."""
        return self

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b in bfloat16, with a gradient for x alone.

        Args:
            x: (..., K).
            bias: (N,) in bfloat16, or None.
        Returns:
            (..., N); against the exact product off by about 3.7 % of what random signs would give, |x| |w| for each
            entry.
        """
        return Linear.apply(x, *self, bias)

    def residual(self, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        """x + y W^T + b, of x (..., N) and y (..., K)."""
        return x + self.linear(y, bias)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) as e4m3, and the float32 scales (M, 1) that each row is to be multiplied by.

    A row of zeros stays zero; one with inf or NaN becomes NaN.
    """
    x = x.float()
    largest = x.abs().amax(dim=1, keepdim=True)
    # the smallest normal number: no division by zero, and no scale that a device may flush to zero
    scale = (largest / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    return (x / scale).to(DTYPE, memory_format=torch.contiguous_format), scale


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K) times the transpose of a weight (N, K) in e4m3 with scales (1, N), plus bias (N,); without autograd."""
    if len(x) == 0:
        return x.new_empty(0, len(weight), dtype=ROWS)
    rows, row_scale = quantize_rows(x)
    multiply = _multiply_by_one_scale if x.device.type == "cpu" else _multiply_by_rows
    return multiply(rows, weight, row_scale, scale, bias)


def _multiply_by_rows(rows: Tensor, weight: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return torch._scaled_mm(rows, weight.t(), scale_a=row_scale, scale_b=scale, bias=bias, out_dtype=ROWS)


def _multiply_by_one_scale(
    rows: Tensor, weight: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """The same, scaled afterwards: on a CPU torch 2.10 and 2.11, and oneDNN, take one scale for a whole matrix only."""
    one = rows.new_ones((), dtype=torch.float32)
    y = torch._scaled_mm(rows, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    # the weight's first: the other, of rows near the end of the range, would overflow
    y.mul_(scale).mul_(row_scale)
    return (y if bias is None else y.add_(bias)).to(ROWS)


class Linear(torch.autograd.Function):
    """See :meth:`Fp8Weight.linear`. Nothing is saved of x."""

    @staticmethod
    def forward(ctx, x, forward, forward_scale, backward, backward_scale, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(backward, backward_scale)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        y = product(x.reshape(-1, x.shape[-1]), forward, forward_scale, bias)
        return y.view(*x.shape[:-1], len(forward))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        weight, scale = ctx.saved_tensors
        dx = product(dy.reshape(-1, dy.shape[-1]), weight, scale)
        return dx.view(ctx.shape).to(ctx.dtype), None, None, None, None, None


def refusal(device: torch.device) -> str:
    """Why fp8 would not run on a device; empty: it would."""
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY:
            return "compute capability {}.{} (wanted {}.{} or newer)".format(*capability, *CAPABILITY)
    return _try(device)


@functools.cache
def _try(device: torch.device) -> str:
    """What keeps the smallest product from running; what each version of PyTorch takes is not written anywhere."""
    ones = torch.ones(MULTIPLE, MULTIPLE, device=device)
    try:
        y = Fp8Weight.quantize(ones).linear(ones, ones[0].to(ROWS))
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        return f"torch {torch.__version__}: {_in_words(error)}"
    return "" if bool((y == MULTIPLE + 1).all()) else f"torch {torch.__version__}: its products are wrong"


def _in_words(error: Exception) -> str:
    """An error's first line; of an internal assertion of PyTorch's what it says behind condition, file and line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.rpartition("please report a bug to PyTorch.")[2].strip() or line


def require(device: torch.device) -> None:
    """Raise a ValueError unless fp8 runs on a device."""
    if reason := refusal(device):
        raise ValueError(f"fp8 cannot run on {device}: {reason}; use dtype='bf16' (--precision bf16) or the CPU")


def check_apply(fn: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """Check what nn.Module.to() is about to do to quantised weights: a move they allow, a cast would ruin them.

    Args:
        fn: what nn.Module._apply got.
        device: where the weights are.
    Raises:
        ValueError: a cast, or a move to a device without fp8.
    """
    probe = fn(torch.empty(0, dtype=DTYPE, device=device))
    if probe.dtype != DTYPE:
        raise ValueError(
            f"a model in fp8 cannot be cast to {str(probe.dtype).removeprefix('torch.')}: its weights are quantised; "
            "move it by .to(device), or build it anew with another dtype"
        )
    if probe.device != device and probe.device.type != "meta":
        require(probe.device)
