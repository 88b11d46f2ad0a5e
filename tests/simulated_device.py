"""A device that is not there: candidates with declared times, some of which fail in a declared way."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from upt_fast.engine.tuning.judge import Judge
from upt_fast.tools.isolated import Measurement

NAMES = ("logits", "gradient of ctx", "gradient of proj")


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def truth() -> list[Tensor]:
    """Logits and two gradients in float64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 50), (30, 70), (20, 20))]


def rounded(seed: int = 1, times: float = 1.0) -> list[Tensor]:
    """The truth as off as float32 leaves it, times so much."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in truth()]
    return [t + 1e-7 * times * n for t, n in zip(truth(), noise, strict=True)]


@dataclass
class Simulated:
    """A candidate.

    Args:
        ms: of a step.
        clock: which its steps advance.
        noise: share by which times vary.
        seed: of the noise.
        fault: "wrong", "wrong at full size", "memory", "raises", "raises later", "hangs", "dies", "breaks the device",
            or none.
        preparing: seconds until it runs.

    Attributes:
        runs: steps so far.
        closed: whether it has given its memory back.
    """

    ms: float
    clock: Clock = field(default_factory=Clock)
    noise: float = 0.0
    seed: int = 0
    fault: str = ""
    preparing: float = 0.0
    runs: int = field(default=0, init=False)
    closed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def prepare(self) -> None:
        assert not self.closed
        self.clock.now += self.preparing
        if self.fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        if self.fault in ("raises", "breaks the device"):
            raise NotImplementedError("no kernel for this card\nand more")
        if self.fault == "hangs":
            time.sleep(600)
        if self.fault == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)

    def results(self) -> Sequence[Tensor]:
        found = rounded(2 + self.seed)
        if self.fault == "wrong":
            found[1] = found[1] * 1.01
        return found

    def results_at_full_size(self) -> Sequence[Tensor]:
        found = rounded(20 + self.seed)
        if self.fault == "wrong at full size":
            found[2] = found[2] * 1.01
        return found

    def run(self) -> float:
        assert not self.closed
        self.runs += 1
        if self.fault == "raises later" and self.runs > 1:
            raise RuntimeError("launch failure")
        seconds = 1e-3 * self.ms * (1 + self.noise * self.random.uniform(-1, 1))
        self.clock.now += seconds
        return seconds

    def peak_mib(self) -> float:
        assert not self.closed
        return 100 + self.ms

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def judge() -> Judge:
    """Of :class:`Simulated`'s results."""
    return Judge(truth(), rounded(), NAMES, torch.float32)


def make(
    declared: dict[str, dict[str, Any]], budget: float = 100.0, refused: dict[str, str] | None = None
) -> Measurement:
    """For upt_fast.tools.isolated: the first one declared is the usual one."""
    if not declared:
        raise ValueError("declared={}; wanted a candidate")
    candidates = {name: Simulated(seed=i, **options) for i, (name, options) in enumerate(declared.items())}
    broken = [c for c in candidates.values() if c.fault == "breaks the device"]
    return Measurement(candidates, next(iter(candidates)), judge(), budget, healthy=lambda: not broken)
