"""Which backend computes each op, and why another would not.

A backend is a set of implementations: ``torch`` has one of every op, ``triton`` of those worth a kernel of our own,
``xformers`` of attention. Ops of which a named backend has no implementation, mostly matrix products, are PyTorch's.

``backend="auto"`` takes, per op, the fastest that was measured on the kind of device at hand. A named backend, or
several ("triton,xformers"), never falls back: an op that it has and cannot run is an error with the reason. The name
comes from the argument, else from the environment variable UPT_FAST_BACKEND, else it is "auto".
"""

from __future__ import annotations

import functools
import importlib
import os
from importlib import util

import torch
from torch import Tensor

from upt_fast.engine.backends import xformers

AUTO = "auto"
BACKENDS = ("triton", "xformers", "torch")
# op -> backends that have it
OPS: dict[str, tuple[str, ...]] = {
    "prompt_transform": ("triton", "torch"),
    "prompt_insert": ("triton", "torch"),
    "insert_shared": ("triton", "torch"),
    "layer_norm": ("triton", "torch"),
    "add_layer_norm": ("triton", "torch"),
    "activation": ("triton", "torch"),
    "linear_gelu": ("triton", "torch"),
    "stream_attention": ("xformers", "torch"),
    "buffer_attention": ("xformers", "torch"),
    "contrastive_loss": ("triton", "torch"),
    "linear": ("torch",),
    "norm_linear": ("torch",),
    "linear_residual": ("torch",),
    "mlp": ("torch",),
    "block": ("torch",),
    "prefix_attention": ("triton", "torch"),
    "packed_attention": ("triton", "torch"),
}
# (op, device type) -> the backend that was measured to be faster than torch there; see docs/kernels.md
MEASURED: dict[tuple[str, str], str] = {}
_NOT_MEASURED = "not measured to be faster than torch here; name the backend to use it"


def resolve(backend: str = AUTO) -> str:
    """The backend's name, from the environment where the argument is "auto".

    Args:
        backend: "auto", a backend's name, or several separated by commas.
    Raises:
        ValueError: no such backend, or it cannot run on any device of this machine; with the reasons.
    """
    source = "backend"
    if backend == AUTO and os.environ.get("UPT_FAST_BACKEND"):
        backend, source = os.environ["UPT_FAST_BACKEND"], "UPT_FAST_BACKEND"
    if backend == AUTO:
        return AUTO
    names = [name.strip() for name in backend.split(",")]
    if any(name not in BACKENDS for name in names):
        raise ValueError(
            f"{source}={backend!r}; wanted {AUTO!r}, one of {', '.join(map(repr, BACKENDS))}, or several with commas"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in names:
        reasons = refusals(name, device)
        if reasons:
            raise ValueError(f"{source}={backend!r} cannot run here: {name}: {'; '.join(reasons)}")
    return ",".join(names)


def uses_streams(backend: str) -> bool:
    """Whether the towers keep token streams whose last sum waits for the next LayerNorm, on which kernels work."""
    return backend != AUTO and backend != "torch"


def copies_prompts(backend: str) -> bool:
    """Whether streams have prompts in reserved rows or buffers, as xformers' attention needs them beside the others."""
    return "xformers" in backend.split(",")


def choose(op: str, backend: str, x: Tensor, dropout: float = 0.0) -> str:
    """The backend that computes op on this input.

    Args:
        op: a name of OPS.
        backend: as :func:`resolve` returned it.
        x: the op's first tensor, whose dtype and device decide.
        dropout: probability that the op must drop with.
    Raises:
        ValueError: a named backend has the op and cannot run it; shows the input and each refusal.
    """
    if backend == "torch":
        return "torch"
    if backend == AUTO:
        return MEASURED.get((op, x.device.type), "torch")
    refused = {}
    for name in backend.split(","):
        if name in OPS[op]:
            refused[name] = refusals(name, x.device.type, x.dtype, dropout)
            if not refused[name]:
                return name
    if not refused:
        return "torch"
    lines = [f"no backend for {op}", f"    x: {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} {x.device}"]
    lines += [f"    {name}: {'; '.join(reasons)}" for name, reasons in refused.items()]
    raise ValueError("\n".join(lines))


def refusals(backend: str, device: str, dtype: torch.dtype | None = None, dropout: float = 0.0) -> list[str]:
    """Why a backend would not run on this kind of input; empty: it would.

    Args:
        backend: a name of BACKENDS.
        device: "cpu", "cuda", ...
        dtype: of the input; None: any it takes.
        dropout: probability that the op must drop with.
    """
    if backend == "torch":
        return []
    reasons = []
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"{str(dtype).removeprefix('torch.')} (takes float32, float16, bfloat16)")
    if backend == "triton":
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            reasons.append("cpu (runs there with TRITON_INTERPRET=1)")
        if device not in ("cpu", "cuda"):
            reasons.append(f"{device} (runs on cuda)")
        if dropout:
            reasons.append(f"dropout {dropout:g} (takes 0)")
    elif device not in xformers.devices:
        reasons.append(f"{device} (runs on {', '.join(xformers.devices)})")
    if torch.compiler.is_compiling():  # the model's constructor has looked at the package
        return reasons
    # the import is slow: not where the answer is clear
    missing = _missing(backend, not reasons)
    if backend == "triton" and not (missing or reasons):
        from upt_fast.kernels import _launch

        missing = _launch.interpreter_refusal()
    return [missing, *reasons] if missing else reasons


def explain(op: str, device: str) -> tuple[str, dict[str, list[str]]]:
    """The backend that computes op in float32 on a kind of device, and why each of the others does not."""
    requested = resolve()
    chosen = MEASURED.get((op, device), "torch") if requested == AUTO else "torch"
    chosen = next((name for name in requested.split(",") if name in OPS[op]), chosen)
    reasons = {}
    for name in BACKENDS:
        if name == chosen:
            continue
        refused = refusals(name, device, torch.float32) if name in OPS[op] else ["has no implementation of this op"]
        reasons[name] = refused or [_NOT_MEASURED if requested == AUTO else f"the backend asked for is {requested}"]
    return chosen, reasons


@functools.cache
def _missing(package: str, try_import: bool) -> str:
    """Why a package cannot be imported; empty where it can."""
    if util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        if try_import:
            with xformers.quiet_import():
                importlib.import_module("xformers.ops" if package == "xformers" else package)
    except Exception as error:  # a broken build raises what it likes
        return f"{package} does not import: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ""
