"""Time of a step below a limit beside the step without one, in turns.

``python bench/limited_step.py CLASSES BATCH LIMIT [METHOD [ROUNDS]]``

Prints JSON: of each kind the seconds and the processor's seconds of the fastest round, and their ratios. The
processor's seconds do not count what other programs do meanwhile.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from upt_fast.common.sizes import parse_bytes
from upt_fast.data.benchmark import bench_classnames
from upt_fast.engine.workspace import keep_heap_small
from upt_fast.testing import build, vit_b16


def main(classes: int, batch: int, limit: str, method: str = "upt", rounds: int = 3) -> dict[str, object]:
    keep_heap_small()
    torch.manual_seed(0)
    model = build("fast", vit_b16(), bench_classnames(classes), method).train()
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(classes, (batch,))
    free, plan = model.plan_memory(batch), model.plan_memory(batch, parse_bytes("limit", limit))

    def in_parts() -> None:
        assert plan.micro_batches is not None
        model.backward_in_parts(images, labels, plan.micro_batches)

    def at_once() -> None:
        F.cross_entropy(model(images), labels).backward()

    ways: dict[str, tuple[object, Callable[[], None]]] = {"at_once": (free, at_once), "limited": (plan, in_parts)}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (found, run) in ways.items():
            model.follow_plan(found)
            model.zero_grad(set_to_none=True)
            start = time.perf_counter(), time.process_time()
            run()
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    best = {name: [min(kind) for kind in zip(*found, strict=True)] for name, found in seconds.items()}
    ratios = [round(ours / theirs, 2) for ours, theirs in zip(best["limited"], best["at_once"], strict=True)]
    shown = {name: [round(value, 2) for value in found] for name, found in best.items()}
    return {"plan": plan.describe(), **shown, "ratios": ratios}


if __name__ == "__main__":
    classes, batch, limit, *more = sys.argv[1:]
    print(json.dumps(main(int(classes), int(batch), limit, *more[:1], *map(int, more[1:]))))
