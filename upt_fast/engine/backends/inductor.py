"""Whole layers by torch.compile and its compiler, Inductor: one compiled function serves all layers of a tower.

Such a region is compiled where it is first called, in seconds, and kept for the process: towers of one geometry share
it, and a model that comes back to it waits no second time.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from upt_fast.engine.autograd.composing import fast_backward
from upt_fast.engine.backends import packages

OPS = frozenset({"block"})  # upt_fast/engine/towers/regions.py
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_count = itertools.count()


def refusals(device: str, dtype: torch.dtype | None = None, dropout: float = 0.0) -> list[str]:
    """See upt_fast.engine.backends.dispatch.refusals."""
    reasons = packages.other_dtype(dtype, DTYPES)
    if device not in ("cpu", "cuda"):
        reasons.append(f"{device} (runs on cpu, cuda)")
    if torch.compiler.is_compiling():  # of the whole model, by someone who has what it takes
        return reasons
    reasons += [reason for reason in (_no_dynamo(), _no_compiler() if device == "cpu" else "") if reason]
    return packages.with_missing("triton", "triton", reasons) if device == "cuda" else reasons


def _no_dynamo() -> str:
    """Why functions would run as they are, which torch.compile does without a word where it is switched off."""
    import torch._dynamo as dynamo

    if dynamo.config.disable:
        return "torch.compile is switched off (TORCH_COMPILE_DISABLE, torch._dynamo.config.disable)"
    try:
        dynamo.eval_frame.check_if_dynamo_supported()
    except RuntimeError as error:
        return str(error)
    return ""


def _no_compiler() -> str:
    """Why there is no C++ compiler."""
    from torch._inductor import config

    names = config.cpp.cxx if isinstance(config.cpp.cxx, (list, tuple)) else (config.cpp.cxx,)
    wanted = [name for name in names if name]
    return "" if any(map(shutil.which, wanted)) else f"no C++ compiler {' or '.join(map(repr, wanted))} (CXX)"


@functools.cache
def region(function: types.FunctionType, kind: Hashable) -> Callable[..., Any]:
    """A function, compiled as one graph for calls of one kind.

    Args:
        function: of tensors and constants; without a closure.
        kind: what tells calls apart that should share no compiled code: what differs beyond it, and is marked dynamic
            or seen to change, becomes a variable.
    """
    # torch.compile keeps what it compiled, how often, and which sizes it has seen change by the code object and its
    # name: each kind has its own, or kinds would use up one another's limit and turn fixed sizes into variables
    name = f"{function.__name__}_{next(_count)}"
    own = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    compiled = torch.compile(own, fullgraph=True)

    def call(*args: Any) -> Any:
        if not torch.is_grad_enabled() or not any(isinstance(t, Tensor) and t.requires_grad for t in args):
            return compiled(*args)
        return Region.apply(compiled, *args)

    return call


def _leaf(x: Tensor) -> Tensor:
    """The same numbers without their graph; sizes that are variables stay so."""
    found = x.detach().requires_grad_(x.requires_grad)
    for dim in getattr(x, "_dynamo_weak_dynamic_indices", ()):
        torch._dynamo.maybe_mark_dynamic(found, dim)
    return found


class Region(torch.autograd.Function):
    """A compiled function of tensors and constants, whose backward is idle where no gradient comes.

    What torch.compile makes has no second derivative and refuses to be asked for one, also where it is gone round
    (autograd/composing.py): then its gradients are none, not zeros.
    """

    @staticmethod
    def forward(ctx, compiled, *args):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        own = [_leaf(a) if isinstance(a, Tensor) else a for a in args]
        with torch.enable_grad():
            outputs = compiled(*own)
        ctx.single = isinstance(outputs, Tensor)
        ctx.outputs = (outputs,) if ctx.single else tuple(outputs)
        ctx.wanted = [a for a in own if isinstance(a, Tensor) and a.requires_grad]
        ctx.places = [isinstance(a, Tensor) and a.requires_grad for a in own]
        found = tuple(t.detach() for t in ctx.outputs)
        return found[0] if ctx.single else found

    @staticmethod
    @fast_backward
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        pairs = [(out, grad) for out, grad in zip(ctx.outputs, grads, strict=True) if grad is not None]
        outputs, given = zip(*pairs, strict=True)
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        found = iter(torch.autograd.grad(outputs, ctx.wanted, given, retain_graph=keep, allow_unused=True))
        return None, *(next(found) if wanted else None for wanted in ctx.places)
