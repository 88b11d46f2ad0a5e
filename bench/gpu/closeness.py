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

from upt_fast.closeness import relative_rms

ALLOWED = 1.5  # times the error of the plain reference in the same precision
ALLOWED_DRY = 3.0  # a dry run has too few numbers for the sharp bound
# below this an error counts as none: the plain one may happen to be small
FLOORS = {"fp32": 1e-6, "tf32": 1e-5, "fp16": 1e-4, "bf16": 1e-3}
LOSS_SCALE = 4096.0  # without it small gradients would vanish in float16; it changes nothing for the others


class Closeness:
    """The float64 results and the reference's errors, each computed once.

    Errors of one draw of images and prompts are dominated by a few directions, the ratio of two such errors by chance:
    squares are summed over several draws.

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
            generator = torch.Generator().manual_seed(draw)
            with torch.no_grad():
                prompts.copy_(0.02 * torch.randn(prompts.shape, generator=generator))
            images = self.clips.images(self.geometry, self.batch, dtype, seed=draw)
            logits = step(model, images, labels, LOSS_SCALE)
            yield logits.double().cpu(), gradients(model).cpu() / LOSS_SCALE

    @functools.cache  # noqa: B019 (lives as long as the process)
    def exact(self) -> list[tuple[Tensor, Tensor]]:
        set_precision("fp32")
        return list(self.run("reference", torch.float64))

    def errors(self, provider: str, precision: str) -> dict[str, float]:
        wanted = self.exact()
        found = list(self.run(provider, set_precision(precision)))
        errors = {}
        for i, name in enumerate(("logits", "gradients")):
            draws = [relative_rms(f[i], w[i]) for f, w in zip(found, wanted, strict=True)]
            errors[name] = statistics.fmean(error**2 for error in draws) ** 0.5
        return errors

    @functools.cache  # noqa: B019
    def own(self, precision: str) -> dict[str, float]:
        """The plain reference's errors."""
        return self.errors("reference", precision)

    def check(self, provider: str, precision: str) -> dict[str, Any]:
        own = self.own(precision)
        found = own if provider == "reference" else self.errors(provider, precision)
        ratios = {name: found[name] / max(own[name], FLOORS[precision]) for name in found}
        allowed = ALLOWED_DRY if self.clips.machine.dry else ALLOWED
        row: dict[str, Any] = {"errors": found, "reference_errors": own, "ratios": ratios, "allowed": allowed}
        row["error"] = max(found.values())
        if not max(ratios.values()) <= allowed:
            row |= {"status": "failed", "message": f"{max(ratios.values()):.2f} times the reference's own error"}
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
