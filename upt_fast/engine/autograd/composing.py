"""Where PyTorch must differentiate and transform the operations itself; derivatives of any order.

The engine's own backward passes have no derivative and write in place; under torch.func, in forward mode, in fake
tensors, on the meta device and for second derivatives the towers run op by op instead.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

_thread = threading.local()
_TRACERS = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def op_by_op(x: Tensor) -> bool:
    """Whether ops must be PyTorch's own: autocast chooses the dtype of each, torch.compile fuses them itself."""
    return torch.compiler.is_compiling() or autocasts(x.device.type) or composes(x)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a kind of device; "meta" has none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def composes(*tensors: Tensor) -> bool:
    """Whether ops must be such that PyTorch can transform them: its own, none in place, nothing kept between calls.

    So under torch.func's transforms, in forward-mode differentiation, in fake tensors, in make_fx and on the meta
    device, where no number can be looked at, and where :func:`composable` asks for it.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        getattr(_thread, "composable", False)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)
        or not has_data(*tensors)
    )


def has_data(*tensors: Tensor) -> bool:
    """Whether tensors have numbers: those on the meta device and fake ones have shapes alone."""
    return not any(t.device.type == "meta" or isinstance(t, FakeTensor) for t in tensors)


@contextlib.contextmanager
def composable() -> Iterator[None]:
    """Let :func:`composes` say yes in this thread."""
    before = getattr(_thread, "composable", False)
    _thread.composable = True
    try:
        yield
    finally:
        _thread.composable = before


def twice_differentiable(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """function(*inputs), computed as fast as it goes, with derivatives of any order.

    The engine's own backward passes have no derivative. Where one is asked for (``create_graph=True``), or where a
    transform runs backward, the function is computed once more from its inputs, op by op, and differentiated by
    autograd; otherwise the gradient goes the fast way, and all this costs is to hold on to the inputs.

    Args:
        function: of the inputs; gives one tensor, the same fast and op by op.
        inputs: all that may need a gradient; what the function closes over gets none.
    """
    out = function(*inputs)
    if not out.requires_grad or torch.compiler.is_compiling() or composes(out):
        return out
    return _Twice.apply(function, out, *inputs)


class _Twice(torch.autograd.Function):
    """See :func:`twice_differentiable`: the identity of a result whose gradient it sends one way or the other."""

    @staticmethod
    def forward(ctx, function, out, *inputs):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)
        device = out.device.type
        ctx.function, ctx.autocast = function, (device, torch.get_autocast_dtype(device), autocasts(device))
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        again = torch.is_grad_enabled()
        batched = torch._C._functorch.is_legacy_batchedtensor(dout)  # autograd.grad(..., is_grads_batched=True)
        if not (again or batched or composes(dout)):
            return None, dout, *[None] * (len(ctx.needs_input_grad) - 2)
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        with torch.enable_grad(), composable(), torch.autocast(*ctx.autocast):
            out = ctx.function(*inputs)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, dout, create_graph=again, allow_unused=True))
        return None, None, *(next(found) if need else None for need in needs)


def fast_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass of the engine's own, which has no derivative; idle where :func:`twice_differentiable` goes round.

    Its forward pass says ``ctx.set_materialize_grads(False)``.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        return once(ctx, *grads) if any(g is not None for g in grads) else (None,) * len(ctx.needs_input_grad)

    return run
