"""Which backend computes the ops, and why another would not.

``auto`` takes the first backend without a reason against it, a named one never falls back. The name comes from the
argument, else from the environment variable UPT_FAST_BACKEND, else it is ``auto``.
"""

from __future__ import annotations

import os
from collections.abc import Callable

AUTO = "auto"
OPS = (
    "layer_norm",
    "activation",
    "linear",
    "linear_residual",
    "mlp",
    "attention",
    "prefix_attention",
    "packed_attention",
)

# backend -> reasons why it cannot run here (none: it can), in order of preference
BACKENDS: dict[str, Callable[[], list[str]]] = {
    "triton": lambda: ["this version has no Triton kernels yet"],
    "xformers": lambda: ["this version does not call xformers yet"],
    "torch": lambda: [],
}


def resolve(backend: str = AUTO) -> str:
    """The backend that will run.

    Args:
        backend: "auto" or a backend's name.
    Raises:
        ValueError: no such backend, or it cannot run here; with the reasons.
    """
    source = "backend"
    if backend == AUTO and os.environ.get("UPT_FAST_BACKEND"):
        backend, source = os.environ["UPT_FAST_BACKEND"], "UPT_FAST_BACKEND"
    if backend == AUTO:
        return next(name for name, reasons in BACKENDS.items() if not reasons())
    if backend not in BACKENDS:
        raise ValueError(f"{source}={backend!r}; wanted {AUTO!r} or one of {', '.join(map(repr, BACKENDS))}")
    reasons = BACKENDS[backend]()
    if reasons:
        raise ValueError(f"{source}={backend!r} cannot run here: {'; '.join(reasons)}")
    return backend
