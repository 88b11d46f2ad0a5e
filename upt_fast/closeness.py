"""How far results are from what is wanted."""

from __future__ import annotations

from torch import Tensor


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
