"""Part "environment": what is installed, and what the device does at best."""

from __future__ import annotations

from typing import Any

from gpu.machine import PRECISIONS, Machine
from gpu.models import Clips
from gpu.record import Task

from upt_fast.tools import info


def tasks(machine: Machine, clips: Clips) -> list[Task]:
    def products(precision: str) -> dict[str, Any]:
        rows, width = (8, 16) if machine.dry else (32 * 201, 768)
        return {
            "square_tflops": machine.gemm_peak(precision),
            "mlp_shape": [rows, width, 4 * width],
            "mlp_tflops": machine.gemm(precision, rows, width, 4 * width),
        }

    def device() -> dict[str, Any]:
        return {"copy_gb_per_s": machine.copy_bandwidth(), "launch_us": machine.launch_us()}

    found = [
        Task("software", lambda: {"info": info.collect(), "clip": "open_clip" if clips.open_clip else "built in"}),
        Task("device", device),
    ]
    return found + [Task(f"products {p}", lambda p=p: products(p), {"precision": p}) for p in PRECISIONS]
