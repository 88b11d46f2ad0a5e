"""What a training step changes, kept apart for each of several courses that one model takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from upt_fast.engine.graphs import GraphedStep, scaler_tensors
from upt_fast.engine.tuning.candidates import Route

Result = tuple[Tensor, Tensor]  # the loss () and the logits (B, C)


class Batch(NamedTuple):
    """A step's input.

    Args:
        images: (B, 3, H, W), or features (B, e).
        labels: (B,) int64.
        rates: learning rate of each group of parameters.
        random: states of the random generators before the step.
    """

    images: Tensor
    labels: Tensor
    rates: list[float]
    random: list[Tensor]


class LaneState(NamedTuple):
    """What steps have changed so far.

    Args:
        values: of the learner's and the loss scaler's tensors.
        optimizer: the optimizer's state by parameter; its tensors are the lane's own, for a graph writes to them.
        kept: the values of these tensors.
    """

    values: list[Tensor]
    optimizer: dict[Any, dict[str, Any]]
    kept: list[Tensor]


class Lane:
    """A candidate's own course.

    Args:
        route: the candidate.
        way: of the model (upt_fast/rerouting.py).
        step: of the route.
        state: where it is.
    """

    def __init__(self, route: Route, way: Any, step: GraphedStep, state: LaneState) -> None:
        self.route, self.way, self.step, self.state = route, way, step, state
        self.first: list[Tensor] = []  # logits and gradients of the first batch
        self.taken = 0  # batches

    @property
    def ready(self) -> bool:
        """Whether its steps are as they are going to be: a graph is captured after some."""
        return not self.route.graph or not self.step.reason or bool(self.step.refused)


class RunState:
    """What steps change: a learner, an optimizer, a loss scaler.

    Args:
        learner: parameters and buffers.
        optimizer: of the parameters.
        scaler: of the loss, or None.
    """

    def __init__(self, learner: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any = None) -> None:
        self.learner, self.optimizer, self.scaler = learner, optimizer, scaler

    def save(self) -> LaneState:
        """As it is now."""
        state = {parameter: dict(values) for parameter, values in self.optimizer.state.items()}
        kept = [t.detach().clone() for t in _tensors(state)]
        return LaneState([t.detach().clone() for t in self._changing()], state, kept)

    @torch.no_grad()
    def restore(self, state: LaneState) -> None:
        """As it was, in the tensors that it was in."""
        for tensor, value in zip(self._changing(), state.values, strict=True):
            tensor.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update({parameter: dict(values) for parameter, values in state.optimizer.items()})
        for tensor, value in zip(_tensors(state.optimizer), state.kept, strict=True):
            tensor.copy_(value)

    def fork(self, state: LaneState) -> LaneState:
        """The same in other tensors of the optimizer, for a lane of its own."""
        copies = iter([t.clone() for t in state.kept])
        optimizer = {
            parameter: {name: next(copies) if isinstance(v, Tensor) else v for name, v in values.items()}
            for parameter, values in state.optimizer.items()
        }
        return LaneState(state.values, optimizer, state.kept)

    def rates(self) -> list[float]:
        """The learning rates as numbers."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def set_rates(self, rates: list[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _changing(self) -> list[Tensor]:
        return [*self.learner.parameters(), *self.learner.buffers(), *scaler_tensors(self.scaler)]


def _tensors(state: dict[Any, dict[str, Any]]) -> list[Tensor]:
    return [value for values in state.values() for value in values.values() if isinstance(value, Tensor)]


def random_states(device: torch.device) -> list[Tensor]:
    """Of PyTorch's generators that a step on the device draws from."""
    found = [torch.get_rng_state()]
    return [*found, torch.cuda.get_rng_state(device)] if device.type == "cuda" else found


def set_random_states(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
