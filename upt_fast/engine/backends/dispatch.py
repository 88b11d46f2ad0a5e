"""Which backend computes each op, and why another would not.

A backend is a file of this folder (sdpa.py has three): OPS names what it has, refusals says what it does not take, and
a function of an op's name calls it. ``torch`` has every op and is PyTorch's own operations; the others have those that
they may do better. Ops of which a named backend has no implementation, mostly matrix products, are PyTorch's.

``backend="auto"`` is the safe route: ``compiled``, the operations of kernels/cpu, where they run, else ``torch``. A
named backend, or several ("triton,xformers"), never falls back: an op that it has and cannot run is an error with the
reason. What may be asked for says asked.py; which combinations there are, towers/routes.py. It comes from the
argument, else from the environment variable UPT_FAST_BACKEND, else it is "auto".
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from upt_fast.engine.autograd import composing
from upt_fast.engine.backends import compiled, flash_attn, inductor, pytorch, sdpa, triton, varlen, xformers
from upt_fast.engine.backends.asked import AUTO, Asked, AskedOfTowers

BACKENDS: dict[str, Any] = {
    "triton": triton,
    "inductor": inductor,
    "xformers": xformers,
    "flash": sdpa.flash,
    "efficient": sdpa.efficient,
    "cudnn": sdpa.cudnn,
    "varlen": varlen,
    "flash_attn": flash_attn,
    "compiled": compiled,
    "torch": pytorch,
}
# op -> backends that have it
OPS = {op: tuple(name for name, backend in BACKENDS.items() if op in backend.OPS) for op in pytorch.OPS}
_ASK_FOR_IT = "auto takes the safe route; name the backend to use it"
_STANDS_BACK = "runs where the compiled operations do not: narrow towers, other dtypes"


def resolve(backend: AskedOfTowers | str = AUTO) -> AskedOfTowers:
    """What an argument, or where it is "auto" the environment, asks for.

    Args:
        backend: see asked.py.
    Raises:
        ValueError: it cannot be read, no such backend or op, or a backend that cannot run on any device of this
            machine; with the reasons.
    """
    source = "backend"
    if str(backend).strip() == AUTO and os.environ.get("UPT_FAST_BACKEND"):
        backend, source = os.environ["UPT_FAST_BACKEND"], "UPT_FAST_BACKEND"
    given = f"{source}={str(backend)!r}"
    try:
        asked = AskedOfTowers.of(backend)
        for part in asked:
            _check_names(part)
    except ValueError as error:
        names = ", ".join(map(repr, BACKENDS))
        raise ValueError(
            f"{given}: {error}; wanted {AUTO!r}, one of {names}, or several with commas, OP=NAME among them, "
            "and IMAGES/TEXTS where the towers take different ones"
        ) from None
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    for name in dict.fromkeys(name for part in asked for name in part.everyone):
        reasons = [refusals(name, device) for device in devices]
        if all(reasons):
            raise ValueError(f"{given} cannot run here: {name}: {'; '.join(reasons[0])}")
    return asked


def read(backend: Asked | str) -> Asked:
    """What is asked for of one tower.

    Raises:
        ValueError: it cannot be read, or no such backend or op.
    """
    if not isinstance(backend, str):
        return backend
    asked = Asked.of(backend)
    _check_names(asked)
    return asked


def _check_names(asked: Asked) -> None:
    for name in asked.everyone:
        if name not in BACKENDS:
            raise ValueError(f"no backend {name!r}")
    for op, name in asked.ops:
        if op not in OPS:
            raise ValueError(f"no op {op!r}: there are {', '.join(OPS)}")
        if name not in OPS[op]:
            raise ValueError(f"{name} has no implementation of {op}: {', '.join(OPS[op])} have")


def choose(op: str, backend: Asked | str, x: Tensor, dropout: float = 0.0) -> str:
    """The backend that computes op on this input; "torch" where "auto" was asked for.

    Args:
        op: a name of OPS.
        backend: what is asked for of a tower.
        x: the op's first tensor, whose dtype and device decide.
        dropout: probability that the op must drop with.
    Raises:
        ValueError: a named backend has the op and cannot run it; shows the input and each refusal.
    """
    refused = {}
    for name in read(backend).wanted(op):
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
    asked = read(backend)
    if not asked.wanted(op):
        return compiled if compiled.takes(op, x, *others) else pytorch
    name = choose(op, asked, x)
    # where PyTorch must see its own operations, the compiled ones give way, whoever asked for them
    return pytorch if name == "compiled" and composing.op_by_op(x) else BACKENDS[name]


def refusals(backend: str, device: str, dtype: torch.dtype | None = None, dropout: float = 0.0) -> list[str]:
    """Why a backend would not run on this kind of input; empty: it would.

    Args:
        backend: a name of BACKENDS.
        device: "cpu", "cuda", ...
        dtype: of the input; None: any it takes.
        dropout: probability that the op must drop with.
    """
    return BACKENDS[backend].refusals(device, dtype, dropout)


def safe(device: str, dtype: torch.dtype, images: tuple[int, int], texts: tuple[int, int]) -> str:
    """What "auto" is on a kind of device, as a text that names it.

    Args:
        device: "cpu", "cuda", ...
        dtype: of the towers.
        images: width and heads of the image tower.
        texts: of the text tower.
    """

    def of(width: int, num_heads: int) -> Asked:
        refused = compiled.refusals(device, dtype, width=width, num_heads=num_heads)
        return Asked(("torch" if refused else "compiled",))

    return str(AskedOfTowers(of(*images), of(*texts)))


def explain(op: str, device: str, asked: Asked) -> tuple[str, dict[str, list[str]]]:
    """The backend that computes op in float32 on a kind of device, and why each of the others does not.

    Args:
        op: a name of OPS.
        device: "cpu", "cuda", ...
        asked: of the tower that op is of.
    """
    refused = {name: refusals(name, device, torch.float32) for name in OPS[op]}
    wanted = asked.wanted(op)
    if wanted:
        chosen = next((name for name in wanted if name in OPS[op]), "torch")
    else:
        chosen = "compiled" if "compiled" in OPS[op] and not refused["compiled"] else "torch"
    reasons = {}
    for name in BACKENDS:
        if name == chosen:
            continue
        if name not in OPS[op]:
            reasons[name] = ["has no implementation of this op"]
        elif refused[name]:
            reasons[name] = refused[name]
        elif wanted:
            reasons[name] = [f"the backend asked for is {asked}"]
        else:
            reasons[name] = [_STANDS_BACK if name == "torch" else _ASK_FOR_IT]
    return chosen, reasons
