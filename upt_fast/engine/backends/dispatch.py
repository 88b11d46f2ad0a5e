"""Which backend computes each op, and why another would not.

A backend is a file of this folder: OPS names what it has, refusals says what it does not take, and a function of an
op's name calls it. ``torch`` has every op, ``triton`` those worth a kernel of our own, ``xformers`` attention,
``compiled`` those of kernels/cpu, which are no one's to name: they stand in for ``torch`` on CPUs that run them. Ops of
which a named backend has no implementation, mostly matrix products, are PyTorch's.

``backend="auto"`` takes, per op, the fastest that was measured on the kind of device at hand. A named backend, or
several ("triton,xformers"), never falls back: an op that it has and cannot run is an error with the reason. The name
comes from the argument, else from the environment variable UPT_FAST_BACKEND, else it is "auto".
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upt_fast.engine.backends import compiled, pytorch, triton, xformers

AUTO = "auto"
BACKENDS: dict[str, Any] = {"triton": triton, "xformers": xformers, "compiled": compiled, "torch": pytorch}
NAMED = tuple(name for name in BACKENDS if name != "compiled")
# op -> backends that have it
OPS = {op: tuple(name for name, backend in BACKENDS.items() if op in backend.OPS) for op in pytorch.OPS}
# (op, device type) -> the backend that was measured to be faster than torch there; see docs/kernels.md
MEASURED: dict[tuple[str, str], str] = {}
_NOT_MEASURED = "not measured to be faster than torch here; name the backend to use it"
_STANDS_BACK = "runs where the compiled operations do not: narrow towers, other dtypes"


class Asked(NamedTuple):
    """The backends that a user asked for, in their order; none: "auto"."""

    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, backend: Asked | str) -> Asked:
        """Of "auto", a backend's name, or several separated by commas."""
        if not isinstance(backend, str):
            return backend
        return cls() if backend == AUTO else cls(tuple(name.strip() for name in backend.split(",")))

    @property
    def no_kernels(self) -> bool:
        """Whether no kernels were asked for, which work on streams of rows and on plain weights."""
        return self.names in ((), ("torch",))

    def __str__(self) -> str:
        return ",".join(self.names) or AUTO


TORCH = Asked(("torch",))


def resolve(backend: Asked | str = AUTO) -> Asked:
    """The backends that an argument, or where it is "auto" the environment, asks for.

    Args:
        backend: "auto", a backend's name, or several separated by commas.
    Raises:
        ValueError: no such backend, or it cannot run on any device of this machine; with the reasons.
    """
    source, asked = "backend", Asked.of(backend)
    if not asked.names and os.environ.get("UPT_FAST_BACKEND"):
        backend, source = os.environ["UPT_FAST_BACKEND"], "UPT_FAST_BACKEND"
        asked = Asked.of(backend)
    if any(name not in NAMED for name in asked.names):
        raise ValueError(
            f"{source}={str(backend)!r}; wanted {AUTO!r}, one of {', '.join(map(repr, NAMED))}, or several with commas"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in asked.names:
        reasons = refusals(name, device)
        if reasons:
            raise ValueError(f"{source}={str(backend)!r} cannot run here: {name}: {'; '.join(reasons)}")
    return asked


def choose(op: str, backend: Asked | str, x: Tensor, dropout: float = 0.0) -> str:
    """The backend that computes op on this input.

    Args:
        op: a name of OPS.
        backend: as :func:`resolve` returned it, or its name.
        x: the op's first tensor, whose dtype and device decide.
        dropout: probability that the op must drop with.
    Raises:
        ValueError: a named backend has the op and cannot run it; shows the input and each refusal.
    """
    asked = Asked.of(backend)
    if not asked.names:
        return MEASURED.get((op, x.device.type), "torch")
    refused = {}
    for name in asked.names:
        if name in OPS[op]:
            refused[name] = refusals(name, x.device.type, x.dtype, dropout)
            if not refused[name]:
                return name
    if not refused:
        return "torch"
    lines = [f"no backend for {op}", f"    x: {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} {x.device}"]
    lines += [f"    {name}: {'; '.join(reasons)}" for name, reasons in refused.items()]
    raise ValueError("\n".join(lines))


def find(op: str, backend: Asked | str, x: Tensor, *others: Tensor) -> Any:
    """The file of the backend that computes op on tensors; see :func:`choose`."""
    name = choose(op, backend, x)
    return BACKENDS["compiled" if name == "torch" and compiled.takes(op, x, *others) else name]


def refusals(backend: str, device: str, dtype: torch.dtype | None = None, dropout: float = 0.0) -> list[str]:
    """Why a backend would not run on this kind of input; empty: it would.

    Args:
        backend: a name of BACKENDS.
        device: "cpu", "cuda", ...
        dtype: of the input; None: any it takes.
        dropout: probability that the op must drop with.
    """
    return BACKENDS[backend].refusals(device, dtype, dropout)


def explain(op: str, device: str) -> tuple[str, dict[str, list[str]]]:
    """The backend that computes op in float32 on a kind of device, and why each of the others does not."""
    asked = resolve()
    refused = {name: refusals(name, device, torch.float32) for name in OPS[op]}
    wanted = asked.names or tuple(filter(None, [MEASURED.get((op, device))]))
    chosen = next((name for name in wanted if name in OPS[op]), "torch")
    stands_in = op in compiled.BY_CALL or (op in compiled.OPS and asked.no_kernels)
    if chosen == "torch" and stands_in and not refused["compiled"]:
        chosen = "compiled"
    reasons = {}
    for name in BACKENDS:
        if name == chosen:
            continue
        if name not in OPS[op]:
            reasons[name] = ["has no implementation of this op"]
        elif refused[name]:
            reasons[name] = refused[name]
        elif name == "torch" and chosen == "compiled":
            reasons[name] = [_STANDS_BACK]
        else:
            reasons[name] = [f"the backend asked for is {asked}" if asked.names else _NOT_MEASURED]
    return chosen, reasons
