"""The operations that kernels compute in a step of a model, with their arguments: overheard, and computed by PyTorch.

No kernel runs meanwhile, so that one that fails is found out by whoever measures it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from upt_fast.engine import graphs
from upt_fast.engine.backends import dispatch, pytorch
from upt_fast.engine.backends.asked import Asked, AskedOfTowers
from upt_fast.engine.towers.routes import MODEL_OPS
from upt_fast.engine.tuning.candidates import size_class
from upt_fast.testing_ops import leaves

if TYPE_CHECKING:
    from upt_fast.model import FastPromptedCLIP

PREFIX = "op "  # of the keys


@dataclass
class Call:
    """An operation at a shape.

    Attributes:
        op: its name.
        backend: who was asked for it.
        arguments: as testing_ops.call takes them; those that need gradients in the step need some here.
        refused: why that backend would not compute it; empty: it would.
        count: how often a step calls it at such a shape.
    """

    op: str
    backend: str
    arguments: list[Any]
    refused: str = ""
    count: int = 1

    @property
    def tensors(self) -> list[Tensor]:
        """Floating-point arguments."""
        return [t for t in self.arguments if isinstance(t, Tensor) and t.is_floating_point()]

    @property
    def dtype(self) -> torch.dtype:
        """The lowest precision of an argument."""
        return min((t.dtype for t in self.tensors), key=lambda dtype: dtype.itemsize)

    @property
    def key(self) -> str:
        """What its measurement is kept under, beside the machine."""
        dtype = str(self.dtype).removeprefix("torch.")
        if dtype == "float32" and self.tensors[0].is_cuda and torch.backends.cuda.matmul.allow_tf32:
            dtype = "tf32"
        sizes = [text for argument in self.arguments if (text := _size(argument))]
        passes = "forward and backward" if leaves(self.arguments) else "forward"
        return f"{PREFIX}{self.op} by {self.backend}, {passes}; {', '.join(sizes)}; {dtype}"


def _size(argument: Any) -> str:
    """Of one argument; empty where it does not matter, or others tell."""
    if isinstance(argument, Tensor):
        first, *others = argument.shape or (1,)
        return "x".join([size_class(first), *map(str, others)])
    if isinstance(argument, nn.Module):
        return str(getattr(argument, "config", ""))
    return str(argument) if argument is None or isinstance(argument, (bool, int, str)) else ""


Calls = dict[tuple[str, str], dict[str, Call]]


def calls_of(model: FastPromptedCLIP, asked: AskedOfTowers, step: Callable[[], object]) -> Calls:
    """What a route's kernels would compute in a step: by tower ("images", "texts") and op, and then by key.

    Args:
        model: takes the route.
        asked: of the towers; the ops of neither are the images'.
        step: runs the model's forward.
    Raises:
        ValueError: the model cannot take the route.
    """
    model.reroute(str(asked))
    of_texts, found = model.text_tower.route.asked, Calls()

    def hear(tower: str, op: str, name: str, refused: str, arguments: list[Any]) -> None:
        call = Call(op, name, arguments, refused)
        calls = found.setdefault((tower, op), {})
        if call.key in calls:
            calls[call.key].count += 1
        else:
            calls[call.key] = call

    find, choose = dispatch.find, dispatch.choose

    def find_and_hear(op: str, backend: Asked | str, x: Tensor, *others: Tensor) -> Any:
        name, refused = _wanted(op, dispatch.read(backend), x)
        if name == "torch":
            return find(op, backend, x, *others)
        tower = "texts" if backend is of_texts and op not in MODEL_OPS else "images"
        return _Listening(op, lambda arguments: hear(tower, op, name, refused, arguments))

    def choose_and_hear(op: str, backend: Asked | str, x: Tensor, dropout: float = 0.0) -> str:
        if op != "prompt_transform":
            return choose(op, backend, x, dropout)
        name, refused = _wanted(op, dispatch.read(backend), x, dropout)
        if name != "torch":
            learner = copy.deepcopy(model.prompt_learner)
            hear("images", op, name, refused, [*learner.parameters(), learner])
        return "torch"

    with mock.patch.object(dispatch, "find", find_and_hear), mock.patch.object(dispatch, "choose", choose_and_hear):
        step()
    graphs.synchronize(model.logit_scale.device)  # towers may run side by side
    return found


def _wanted(op: str, asked: Asked, x: Tensor, dropout: float = 0.0) -> tuple[str, str]:
    """Who is asked for an op, and why it would not compute it; as dispatch.choose, which raises for that."""
    refused = {
        name: "; ".join(dispatch.refusals(name, x.device.type, x.dtype, dropout))
        for name in asked.wanted(op)
        if name in dispatch.OPS[op]
    }
    name = next((name for name, reason in refused.items() if not reason), next(iter(refused), "torch"))
    return name, refused.get(name, "")


class _Listening:
    """PyTorch's computation of an op in the place of another's, which says what it was called with."""

    def __init__(self, op: str, hear: Callable[[list[Any]], None]) -> None:
        self._op, self._hear = op, hear

    def __getattr__(self, name: str) -> Callable[..., Any]:
        assert name == self._op, f"{name} is called in the place of {self._op}"

        def compute(*arguments: Any) -> Any:
            self._hear(_kept(name, arguments))
            return getattr(pytorch, name)(*arguments)

        return compute


def _kept(op: str, arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments as testing_ops.call takes them: on the same memory, as far apart in it, and leaves of the graph."""
    kept = [
        t.detach().requires_grad_(t.requires_grad and torch.is_grad_enabled()) if isinstance(t, Tensor) else t
        for t in arguments
    ]
    if op == "prompt_insert":
        kept[0] = kept[0].detach().clone()  # changed in place
    return kept[:6] if op == "packed_attention" else kept  # the layout tells the tiles
