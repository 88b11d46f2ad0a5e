"""Peak memory of steps in a process of its own.

``python bench/peak_memory.py PROVIDER CLASSES BATCH [METHOD [MEMORY [DTYPE [LIMIT]]]]``

Prints JSON: ``seconds`` of the faster step; ``activations_mib``, the peak during the steps above what the process held
before them (Python, PyTorch, weights, inputs), and of the fast engine ``predicted_mib``, that by its formula;
``process_mib``, the peak of the whole process. Linux reads both off the kernel's high-water mark, which is reset before
the first step; building the model does not count. With a LIMIT such as 600MB the fast engine runs the step that
``model.plan_memory`` chooses for it, and ``planned_mib`` is what that expects at most.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from upt_fast.common.sizes import parse_bytes
from upt_fast.data.benchmark import bench_classnames
from upt_fast.engine.workspace import keep_heap_small
from upt_fast.testing import build, vit_b16


def status_mib(key: str) -> float:
    """A field of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def main(
    provider: str,
    classes: int,
    batch: int,
    method: str = "upt",
    memory: str = "",
    dtype: str = "",
    limit: str = "",
) -> dict[str, float | str]:
    if limit:
        keep_heap_small()  # as upt-fast train --max-memory does
    torch.manual_seed(0)
    clip = vit_b16()
    options = {name: value for name, value in (("memory", memory), ("dtype", dtype)) if value}
    model = build(provider, clip, bench_classnames(classes), method, **options).train()
    del clip  # the fast engine has its own weights; the reference keeps it alive
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(classes, (batch,))
    plan = model.plan_memory(batch, parse_bytes("limit", limit)) if limit else None
    if plan:
        model.follow_plan(plan)
    importlib.import_module("torch._dynamo")  # as PyTorch's checkpoints and optimizers do when first called: 150 MiB
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed weights must not serve as activations unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        if plan and plan.micro_batches:
            model.backward_in_parts(images, labels, plan.micro_batches)
        else:
            loss = F.cross_entropy(model(images), labels)  # alive through the next forward, as in most training loops
            loss.backward()
        seconds.append(time.perf_counter() - start)
    peak = status_mib("VmHWM")
    found: dict[str, float | str] = {}
    if plan:
        found |= {"planned_mib": round(plan.bytes / 2**20, 1), "plan": plan.describe()}
    elif provider == "fast":
        found["predicted_mib"] = round(model.predict_peak_memory(batch) / 2**20, 1)
    return found | {
        "activations_mib": round(peak - before, 1),
        "process_mib": round(peak, 1),
        "seconds": round(min(seconds), 3),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])))
