"""A machine of which nothing is known yet, on which routes through narrow towers are measured."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from upt_fast.engine.tuning import candidates, choices
from upt_fast.engine.tuning.candidates import Declared
from upt_fast.engine.tuning.race import Race
from upt_fast.steps import tuned
from upt_fast.testing import xformers_on_cpu

ROUTES = ("torch", "xformers", "torch/xformers", "xformers/torch")


@contextlib.contextmanager
def unknown_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """Candidates are ROUTES, through xformers' stand-in; runs have any time to measure them.

    Args:
        folder: keeps what is found.
    """
    monkeypatch.setenv("UPT_FAST_MEASURE", "1")
    monkeypatch.setenv("UPT_FAST_CACHE", str(folder))
    monkeypatch.setenv("UPT_FAST_CPU_OPS", "0")  # or they were compiled for the folder
    monkeypatch.setitem(candidates.BY_DEVICE, "cpu", tuple(map(Declared, ROUTES)))
    monkeypatch.setattr(tuned, "SHARE", 1e9)
    known = dict(choices._chosen)
    choices.forget()
    torch.use_deterministic_algorithms(False)
    try:
        with xformers_on_cpu():
            yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
        choices.forget()
        choices._chosen.update(known)


def declare_times(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Seconds of a step by route, or of each of its steps, instead of those that it takes; to be changed."""
    found = dict.fromkeys(ROUTES, 1.0)
    add = Race.add

    def declared(self, name, seconds):
        add(self, name, found[name] if isinstance(found[name], float) else next(found[name]))

    monkeypatch.setattr(Race, "add", declared)
    return found


def kept() -> dict:
    """What is known of training steps."""
    return {key: entry for key, entry in choices.kept().items() if key.startswith("step of ")}
