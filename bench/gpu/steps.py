"""Part "steps": time and memory of training steps, each provider checked against the truncated reference first."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from gpu.machine import Machine, set_precision, significant
from gpu.models import PROVIDERS, Clips, gradients, step
from gpu.record import Task
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from upt_fast.common.closeness import relative_rms

# relative RMS between two right answers in the same precision; part "closeness" has the sharp bound
CLOSE = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
COUNTED = ("truncated", "reference", "fast torch")  # whose floating-point operations PyTorch can count


class Steps:
    """Steps of all providers on the same inputs.

    Args:
        clips: where models come from.
    """

    def __init__(self, clips: Clips) -> None:
        self.clips, self.machine = clips, clips.machine
        self.anchored = 2 if self.machine.dry else 8  # images of each batch whose logits and gradients are compared

    @functools.lru_cache(maxsize=1)  # noqa: B019 (neighbouring measurements share it)
    def anchor(self, geometry: str, precision: str, classes: int) -> tuple[Tensor, Tensor]:
        """Logits and gradients of the truncated reference for a few images."""
        dtype = set_precision(precision)
        model = self.clips.build("truncated", geometry, dtype, classes)
        images = self.clips.images(geometry, self.anchored, dtype)
        logits = step(model, images, torch.arange(self.anchored, device=images.device) % classes)
        return logits.cpu(), gradients(model).cpu()

    def inputs(self, geometry: str, dtype: torch.dtype, classes: int, batch: int) -> tuple[Tensor, Tensor]:
        """Images, the last of them the anchor's, and labels."""
        last = self.clips.images(geometry, self.anchored, dtype)
        others = self.clips.images(geometry, batch - self.anchored, dtype, seed=2)
        return torch.cat([others, last]), torch.arange(batch, device=last.device) % classes

    def check(
        self, model: nn.Module, provider: str, images: Tensor, wanted: tuple[Tensor, Tensor], limit: float
    ) -> dict[str, Any]:
        """One step of the whole batch, with a loss that only the last images enter; also counts its operations."""
        classes = wanted[0].shape[1]
        labels = torch.full((len(images),), -100, device=images.device)  # which cross_entropy leaves out
        labels[-self.anchored :] = torch.arange(self.anchored, device=images.device) % classes
        counter = FlopCounterMode(display=False)
        # the others have operations that it does not know
        with counter if provider in COUNTED else contextlib.nullcontext():
            logits = step(model, images, labels)
        logits_error = relative_rms(logits[-self.anchored :], wanted[0])
        row: dict[str, Any] = {
            "errors": {"logits": logits_error, "gradients": relative_rms(gradients(model), wanted[1])}
        }
        if provider in COUNTED:
            row["tflop"] = significant(counter.get_total_flops() / 1e12)
        row["error"] = max(row["errors"].values())
        if not row["error"] <= limit:
            row |= {"status": "failed", "message": f"differs from truncated by {row['error']:.2g}"}
        return row

    def measure(self, geometry: str, precision: str, classes: int, batch: int, provider: str) -> dict[str, Any]:
        wanted = self.anchor(geometry, precision, classes)
        dtype = set_precision(precision)
        peak_tflops = self.machine.gemm_peak(precision)
        self.machine.release()
        model = self.clips.build(provider, geometry, dtype, classes)
        self.machine.release()
        images, labels = self.inputs(geometry, dtype, classes, batch)
        row = self.check(model, provider, images, wanted, CLOSE[precision])
        row |= self.machine.peak(lambda: step(model, images, labels))
        row |= self.machine.times(lambda: step(model, images, labels), 2.0)
        row |= {"images_per_s": significant(1e3 * batch / row["p50_ms"]), "gemm_peak_tflops": peak_tflops}
        if "tflop" in row:
            row["of_gemm_peak"] = significant(1e3 * row["tflop"] / row["p50_ms"] / peak_tflops)
        if provider != "compiled":
            row |= self.towers(model, images)
        if provider.startswith("fast"):
            row |= self.graphed(model, images, labels, wanted[0], CLOSE[precision])
        return row

    def graphed(self, model: Any, images: Tensor, labels: Tensor, wanted: Tensor, limit: float) -> dict[str, Any]:
        """Milliseconds of the step, an optimizer's with it, in one CUDA graph; its layout, or why it is not one."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=images.is_cuda)
        graph = model.make_graphed_step(optimizer, len(images))
        for _ in range(6):
            _, logits = graph(images, labels)
        row: dict[str, Any] = {"graph": graph.reason or ("two streams" if graph.two_streams else "one stream")}
        if not (error := relative_rms(logits[-self.anchored :], wanted)) <= limit:
            return row | {"status": "failed", "message": f"the graph's logits differ from truncated by {error:.2g}"}
        if not graph.reason:
            row["graph_ms"] = self.machine.times(lambda: graph(images, labels), 1.0)["p50_ms"]
        return row

    def towers(self, model: Any, images: Tensor) -> dict[str, float]:
        """Milliseconds of each tower's forward and backward."""

        def run(encode: Any) -> None:
            model.zero_grad(set_to_none=True)
            features = encode()
            (features.float() * 0.1).sum().backward()

        text = self.machine.times(lambda: run(model.encode_text), 0.4)
        image = self.machine.times(lambda: run(lambda: model.encode_image(images)), 0.4)
        return {"text_ms": text["p50_ms"], "image_ms": image["p50_ms"]}


def configurations(machine: Machine) -> Iterator[tuple[str, str, int, int]]:
    """(geometry, precision, classes, batch), the most telling first."""
    if machine.dry:
        yield "tiny", "fp32", 5, 2
        return
    first = [("ViT-B/16", "bf16", 100, 32), ("ViT-B/16", "bf16", 1000, 32)]
    yield from first
    for precision in ("bf16", "tf32", "fp32"):
        for geometry in ("ViT-B/16", "ViT-L/14"):
            for classes in (100, 1000, 397):
                for batch in (32, 128, 512):
                    if (geometry, precision, classes, batch) not in first:
                        yield geometry, precision, classes, batch


def tasks(machine: Machine, clips: Clips) -> list[Task]:
    steps, found = Steps(clips), []
    for geometry, precision, classes, batch in configurations(machine):
        for provider in PROVIDERS:
            configuration = {"model": geometry, "precision": precision, "classes": classes, "batch": batch}
            run = functools.partial(steps.measure, geometry, precision, classes, batch, provider)
            key = f"{geometry} {precision} C={classes} B={batch} {provider}"
            found.append(Task(key, run, configuration | {"provider": provider}))
    return found
