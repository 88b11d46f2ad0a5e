"""Part "memory": the largest batch whose training step fits a card."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu.machine import MIB, Machine, saved_bytes, set_precision, significant
from gpu.models import Clips, step
from gpu.record import Skipped, Task

GIB = 1024 * MIB
USABLE = 0.95  # of a card: the rest is the driver's and CUDA's own
LARGEST = 8192


def largest(fits: Callable[[int], bool], guess: int, unit: int, most: int) -> int:
    """The largest batch that fits, to a unit or 2 %; 0 where not even one unit does.

    Args:
        fits: whether a batch does; larger ones do not where it does not.
        guess: where to begin.
        unit: batches tried are multiples of it.
        most: no larger batch is tried.
    """
    low, high, batch = 0, most + unit, _multiple(guess, unit)
    while high - low > max(unit, _multiple(low // 50, unit)):
        batch = min(max(batch, low + unit), high - unit)
        if fits(batch):
            low = batch
            batch = _multiple(1.06 * low, unit) + unit if high > most else _multiple((low + high) / 2, unit)
        else:
            high = batch
            # close to a good guess the answer is near; far from one, halve
            batch = _multiple(0.94 * high if low < 0.9 * high and high > 0.5 * guess else (low + high) / 2, unit)
    return low


def _multiple(value: float, unit: int) -> int:
    return int(value) // unit * unit


class Memory:
    """Steps of one provider within a limit.

    Args:
        clips: where models come from.
    """

    def __init__(self, clips: Clips) -> None:
        self.clips, self.machine = clips, clips.machine

    @contextlib.contextmanager
    def limit(self, limit: int) -> Iterator[None]:
        """Let PyTorch have so many bytes and no more."""
        if self.machine.dry:
            yield
            return
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(limit / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def measure(
        self, geometry: str, precision: str, classes: int, provider: str, memory: str, gib: float
    ) -> dict[str, Any]:
        limit = int(USABLE * gib * GIB)
        if not self.machine.dry and limit > 0.98 * torch.cuda.get_device_properties(0).total_memory:
            raise Skipped(f"this device has less than {gib:g} GiB")
        dtype, machine = set_precision(precision), self.machine
        options = {"memory": memory} if provider.startswith("fast") else {}
        unit = 1 if machine.dry else 8

        def run(model: Any, batch: int) -> None:
            images = self.clips.images(geometry, batch, dtype)
            step(model, images, torch.arange(batch, device=images.device) % classes)

        machine.release()
        with self.limit(limit):
            model = self.clips.build(provider, geometry, dtype, classes, **options)
            machine.release()

            def fits(batch: int) -> bool:
                machine.release()
                if machine.dry:
                    return saved_bytes(lambda: run(model, batch)) <= limit
                try:
                    run(model, batch)
                    run(model, batch)
                except torch.OutOfMemoryError:
                    return False
                return True

            peaks: dict[int, float] = {}
            try:
                for batch in (unit, 2 * unit):
                    peaks[batch] = machine.peak(lambda b=batch: run(model, b))["peak_mib"]
            except torch.OutOfMemoryError:
                return {"largest_batch": largest(fits, unit, unit, 2 * unit), "peaks_mib": peaks}
            per_image = max((peaks[2 * unit] - peaks[unit]) / unit, 1e-3)
            guess = unit + int((limit / MIB - peaks[unit]) / per_image)
            most = 16 if machine.dry else LARGEST
            batch = largest(fits, min(guess, most), unit, most)
            row: dict[str, Any] = {"largest_batch": batch, "mib_per_image": round(per_image, 3), "peaks_mib": peaks}
            if batch:
                machine.release()
                row |= machine.times(lambda: run(model, batch), 1.0)
                row["images_per_s"] = significant(1e3 * batch / row["p50_ms"])
        return row


def tasks(machine: Machine, clips: Clips) -> list[Task]:
    memory, found = Memory(clips), []
    providers = [("truncated", ""), ("fast torch", "fast"), ("fast triton,xformers", "fast"), ("fast triton", "fast")]
    providers += [("reference", ""), ("fast torch", "balanced"), ("fast torch", "lean")]
    if machine.dry:
        configurations = [("tiny", "fp32", 5, 0.002)]
        providers = [("truncated", ""), ("fast torch", "fast"), ("fast torch", "lean")]
    else:
        models, sizes = ("ViT-B/16", "ViT-L/14"), (16.0, 24.0, 80.0)
        configurations = [(m, "bf16", c, gib) for m in models for gib in sizes for c in (1000, 100)]
    for geometry, precision, classes, gib in configurations:
        for provider, level in providers:
            info = {"model": geometry, "precision": precision, "classes": classes, "gib": gib, "provider": provider}
            info["memory"] = level
            run = functools.partial(memory.measure, geometry, precision, classes, provider, level, gib)
            key = f"{geometry} {precision} C={classes} {gib:g} GiB {provider} {level}".rstrip()
            found.append(Task(key, run, info))
    return found
