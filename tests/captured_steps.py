"""Capture of training steps on a CPU, with a stand-in for CUDA's graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from upt_fast.engine import graphs


class Replayed:
    """A graph that runs its function anew on the static tensors; like CUDA's, it does nothing when it is captured."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run, self.replays = run, 0

    def replay(self) -> None:
        self.replays += 1
        self.run()


def capture_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    """Let steps be captured; returns a list that fills with the graphs."""
    made: list[Replayed] = []

    def record(self, two_streams):
        """Without outputs of the capture: the stand-in has none before its first replay."""
        made.append(Replayed(lambda: _run(self)))
        return made[-1], (torch.zeros(()), torch.zeros(())), [None for _ in self.model.parameters()]

    monkeypatch.setattr(graphs, "refusal", lambda device: "")
    monkeypatch.setattr(graphs.GraphedStep, "_record", record)
    return made


def _run(self) -> None:
    self._outputs = self._forward_backward(*self._inputs)
    self._gradients = [p.grad for p in self.model.parameters()]
    if self.optimizer_captured:
        self._update()
