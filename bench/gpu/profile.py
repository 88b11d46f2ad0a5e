"""Part "profile": where a step's time goes: kernels, share of the GEMM peak, gaps between launches."""

from __future__ import annotations

import functools
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu.machine import Machine, set_precision, significant
from gpu.models import Clips, step
from gpu.record import Task
from torch.utils.flop_counter import FlopCounterMode

STEPS, TOP = 3, 25
# first match decides
KINDS = (
    ("attention", ("flash", "fmha", "attention", "softmax")),
    ("product", ("gemm", "cutlass", "nvjet", "cublas", "wgmma", "mm_", "matmul", "conv")),
    ("copy", ("memcpy", "memset", "copy", "cat", "index", "gather", "scatter")),
    ("norm", ("layer_norm", "norm")),
)


def kind_of(name: str) -> str:
    """What a kernel does, by its name."""
    name = name.lower()
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "elementwise and other")


def summarise(events: Sequence[dict[str, Any]], steps: int) -> dict[str, Any]:
    """What the device did, from a trace's events.

    Args:
        events: with name, ts and dur in microseconds.
        steps: how many steps they are of.
    Returns:
        Per step: span_ms from the first start to the last end, busy_ms in which at least one ran, idle_share, number of
        launches, gaps (how many of more than 1 us, and the longest in us), milliseconds by kind, and the top kernels.
    """
    events = sorted(events, key=lambda e: e["ts"])
    if not events:
        raise ValueError("the trace has no kernel")
    busy, gaps, end = 0.0, [], events[0]["ts"]
    kernels: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, float] = defaultdict(float)
    for event in events:
        start, stop = event["ts"], event["ts"] + event["dur"]
        if start > end:
            gaps.append(start - end)
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
        kernels[event["name"]].append(event["dur"])
        kinds[kind_of(event["name"])] += event["dur"]
    span, total = end - events[0]["ts"], sum(kinds.values())
    top = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:TOP]
    return {
        "span_ms": significant(span / steps / 1e3),
        "busy_ms": significant(busy / steps / 1e3),
        "idle_share": significant(1 - busy / max(span, 1e-9)),
        "launches": round(len(events) / steps),
        "gaps": round(sum(gap > 1 for gap in gaps) / steps),
        "longest_gap_us": significant(max(gaps, default=0.0)),
        "ms_by_kind": {kind: significant(ms / steps / 1e3) for kind, ms in sorted(kinds.items(), key=lambda i: -i[1])},
        "top": [
            {
                "name": name[:160],
                "kind": kind_of(name),
                "calls": significant(len(durations) / steps),
                "ms": significant(sum(durations) / steps / 1e3),
                "share": significant(sum(durations) / total),
            }
            for name, durations in top
        ],
    }


def trace(machine: Machine, call: Any) -> list[dict[str, Any]]:
    """Events of what the device runs while call does; in a dry run of the host's operations."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not machine.dry:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        machine.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    wanted = ("cpu_op",) if machine.dry else ("kernel", "gpu_memcpy", "gpu_memset")
    return [event for event in events if event.get("cat") in wanted and "dur" in event]


def measure(clips: Clips, geometry: str, precision: str, classes: int, batch: int, provider: str) -> dict[str, Any]:
    machine, dtype = clips.machine, set_precision(precision)
    peak_tflops = machine.gemm_peak(precision)
    machine.release()
    model = clips.build(provider, geometry, dtype, classes)
    images = clips.images(geometry, batch, dtype)
    labels = torch.arange(batch, device=images.device) % classes

    def run() -> None:
        step(model, images, labels)

    run()
    row = machine.times(run, 1.0) | {"gemm_peak_tflops": peak_tflops}
    if provider in ("truncated", "fast torch"):
        with FlopCounterMode(display=False) as counter:
            run()
        row["tflop"] = significant(counter.get_total_flops() / 1e12)
        row["of_gemm_peak"] = significant(1e3 * row["tflop"] / row["p50_ms"] / peak_tflops)
    found = summarise(trace(machine, lambda: [run() for _ in range(STEPS)]), STEPS)
    if "tflop" in row and "product" in found["ms_by_kind"]:
        # attention's operations are counted too, so this is a little more than the products reach
        row["products_of_gemm_peak"] = significant(1e3 * row["tflop"] / found["ms_by_kind"]["product"] / peak_tflops)
    row["busy_of_step"] = significant(found["busy_ms"] / row["p50_ms"])  # unlike idle_share without the profiler's cost
    return row | found


def tasks(machine: Machine, clips: Clips) -> list[Task]:
    providers = ("fast triton,xformers", "fast triton", "fast torch", "truncated", "compiled")
    if machine.dry:
        configurations, providers = [("tiny", "fp32", 5, 2)], ("fast torch",)
    else:
        sizes = [("ViT-B/16", 100, 32), ("ViT-B/16", 1000, 32), ("ViT-B/16", 100, 512), ("ViT-L/14", 100, 32)]
        configurations = [(model, "bf16", classes, batch) for model, classes, batch in sizes]
    found = []
    for geometry, precision, classes, batch in configurations:
        for provider in providers:
            info = {"model": geometry, "precision": precision, "classes": classes, "batch": batch}
            run = functools.partial(measure, clips, geometry, precision, classes, batch, provider)
            key = f"{geometry} {precision} C={classes} B={batch} {provider}"
            found.append(Task(key, run, info | {"provider": provider}))
    return found
