"""Part "closeness": errors of logits and gradients against the reference in float64, in every precision."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from gpu.machine import Machine, set_precision
from gpu.models import FAST, Clips, gradients, step
from gpu.record import Task
from torch import Tensor

from upt_fast.common.closeness import excesses, relative_rms

ALLOWED = 1.5  # times the error of the plain reference in the same precision
# which rounds what; tf32 keeps as many digits of a factor as float16
ROUNDED_TO = {"fp32": torch.float32, "tf32": torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16}
# below this an error counts as none: the plain one may happen to be small
FLOORS = {"fp32": 1e-6, "tf32": 1e-5, "fp16": 1e-4, "bf16": 1e-3}
LOSS_SCALE = 4096.0  # without it small gradients would vanish in float16; it changes nothing for the others


class Closeness:
    """The float64 results and the reference's errors, each computed once.

    Errors of one draw of images and prompts are dominated by a few directions, the ratio of two such errors by chance:
    squares are summed over several draws. Where one is above what is allowed all the same, it fails unless rounding
    explains it (upt_fast/common/closeness.py): the plain one may happen to be small.

    Args:
        clips: where models come from.
        geometry: which.
    """

    def __init__(self, clips: Clips, geometry: str) -> None:
        self.clips, self.geometry = clips, geometry
        self.classes, self.batch, self.draws = (5, 2, 2) if clips.machine.dry else (50, 8, 8)

    def run(self, provider: str, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """For each draw logits and gradients of all parameters."""
        model = self.clips.build(provider, self.geometry, dtype, self.classes)
        prompts = model.prompt_learner.uni_ctx
        labels = torch.arange(self.batch, device=prompts.device) % self.classes
        for draw in range(self.draws):
            generator = torch.Generator().manual_seed(1000 * self.clips.machine.seed + draw)
            with torch.no_grad():
                prompts.copy_(0.02 * torch.randn(prompts.shape, generator=generator))
            images = self.clips.images(self.geometry, self.batch, dtype, seed=draw)
            logits = step(model, images, labels, LOSS_SCALE)
            yield logits.double().cpu(), gradients(model).cpu() / LOSS_SCALE

    @functools.cache  # noqa: B019 (lives as long as the process)
    def exact(self) -> list[tuple[Tensor, Tensor]]:
        set_precision("fp32")
        return list(self.run("reference", torch.float64))

    def explained(self, found: list[tuple[Tensor, Tensor]], precision: str) -> float:
        """Errors of logits and gradients of all draws as shares of what rounding explains; the largest."""

        def exact() -> list[Tensor]:
            return [torch.cat(parts) for parts in zip(*self.run("reference", torch.float64), strict=True)]

        set_precision("fp32")
        parts = [torch.cat(parts) for parts in zip(*found, strict=True)]
        return max(excesses(parts, exact, ROUNDED_TO[precision]))

    def errors(self, found: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        wanted = self.exact()
        errors = {}
        for i, name in enumerate(("logits", "gradients")):
            draws = [relative_rms(f[i], w[i]) for f, w in zip(found, wanted, strict=True)]
            errors[name] = statistics.fmean(error**2 for error in draws) ** 0.5
        return errors

    @functools.cache  # noqa: B019
    def own(self, precision: str) -> dict[str, float]:
        """The plain reference's errors."""
        return self.errors(list(self.run("reference", set_precision(precision))))

    def check(self, provider: str, precision: str) -> dict[str, Any]:
        own = self.own(precision)
        self.exact()  # which sets another precision
        results = list(self.run(provider, set_precision(precision)))
        found = own if provider == "reference" else self.errors(results)
        ratios = {name: found[name] / max(own[name], FLOORS[precision]) for name in found}
        row: dict[str, Any] = {"errors": found, "reference_errors": own, "ratios": ratios, "allowed": ALLOWED}
        row["error"], worst = max(found.values()), max(ratios.values())
        if not worst <= ALLOWED:
            row["explained"] = share = self.explained(results, precision)
            if not share <= 1:
                message = f"{worst:.2f} times the reference's own error, {share:.2f} times what rounding explains"
                row |= {"status": "failed", "message": message}
        return row


def tasks(machine: Machine, clips: Clips) -> list[Task]:
    found = []
    for geometry in ("tiny",) if machine.dry else ("ViT-B/16", "ViT-L/14"):
        closeness = Closeness(clips, geometry)
        for precision in ("fp32", "bf16", "tf32", "fp16"):
            for provider in ("reference", "truncated", *FAST):
                info = {"model": geometry, "precision": precision, "provider": provider}
                run = functools.partial(closeness.check, provider, precision)
                found.append(Task(f"{geometry} {precision} {provider}", run, info))
    return found
