"""The tuner's choices beside an independent timing, in one run.

``python bench/tuner_check.py OUT.json [--sizes 100x8 1000x8 8x64] [--precisions fp32 bf16]``

For each size and precision ViT-B/16's training step of UPT is tuned as ``upt-fast tune --fresh true`` does, in a table
of this run's own; then each candidate that the tuner could run is timed again: models of their own, built with
backend=..., plain forward, backward and SGD, in turns, every one at least twice, those within a tenth of the fastest
five times. Says whether the choice is the fastest of that timing, or within 3 % of it, and what the route that is taken
where nothing is measured would have cost. Exits with 1 where a choice is further off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from upt_fast import FastUPT
from upt_fast.clip.loading import clip_with_random_weights
from upt_fast.common.files import cache_folder
from upt_fast.common.memory_pool import MemoryPool
from upt_fast.data.benchmark import bench_classnames
from upt_fast.engine.tuning.machine import machine
from upt_fast.tools.tune import tune

LEAST, MOST = 2, 5  # times of a candidate, of one that may be the fastest
CLOSE, ALLOWED = 1.1, 1.03


def independent(backends: list[str], classes: int, batch: int, precision: str) -> dict[str, float]:
    """Seconds of a step by each backend, the median of several."""
    torch.manual_seed(0)
    clip, tokenizer = clip_with_random_weights("ViT-B-16")
    names = bench_classnames(classes)
    images = torch.randn(batch, 3, 224, 224).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    labels = torch.arange(batch) % classes
    seconds: dict[str, list[float]] = {backend: [] for backend in backends}
    steps, pool = {}, MemoryPool()
    for backend in backends:
        model = FastUPT(clip, names, tokenizer=tokenizer, dtype=precision, backend=backend).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for blocks in (model.vision_tower.blocks, model.text_tower.blocks):
            blocks._pool = pool  # the memory of one model for all

        def step(model: FastUPT = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images).float(), labels).backward()
            optimizer.step()

        step()
        steps[backend] = step
    for turn in range(MOST):
        best = min((statistics.median(found) for found in seconds.values() if found), default=0.0)
        for backend, step in steps.items():
            if turn < LEAST or statistics.median(seconds[backend]) <= CLOSE * best:
                start = time.perf_counter()
                step()
                seconds[backend].append(time.perf_counter() - start)
    return {backend: statistics.median(found) for backend, found in seconds.items()}


def check(classes: int, batch: int, precision: str) -> dict[str, Any]:
    """One size: the tuner's entry, the independent times, and what comes of them."""
    start = time.perf_counter()
    found = tune("ViT-B-16", "upt", classes, batch, precision, mode="train", fresh=True)
    entry = found["modes"]["step"]["entry"]
    tuned = time.perf_counter() - start
    times = independent(list(entry["ms"]), classes, batch, precision)
    best = min(times, key=times.__getitem__)
    choice, usual = entry["choice"], entry["usual"]
    return {
        "classes": classes,
        "batch_size": batch,
        "precision": precision,
        "choice": choice,
        "usual": usual,
        "fastest": best,
        "choice_to_fastest": times[choice] / times[best],
        "usual_to_choice": times[usual] / times[choice],
        "tuner_seconds": tuned,
        "independent_ms": {name: 1e3 * value for name, value in times.items()},
        "entry": entry,
    }


def describe(row: dict[str, Any]) -> str:
    """A row in a line."""
    return (
        f"({row['classes']}, {row['batch_size']}) {row['precision']}: {row['choice']} takes "
        f"{row['choice_to_fastest']:.3f} times the fastest one's time ({row['fastest']}), the usual {row['usual']} "
        f"{row['usual_to_choice']:.3f} times the choice's; tuned in {row['tuner_seconds']:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON, written after each size")
    parser.add_argument("--sizes", nargs="+", default=["100x8", "1000x8", "8x64"], help="CLASSESxBATCH")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for library in cache_folder().glob("cpu-*.so"):  # compiled once is enough
            (Path(folder) / library.name).symlink_to(library)
        os.environ["UPT_FAST_CACHE"] = folder
        for precision in args.precisions:
            for size in args.sizes:
                classes, batch = map(int, size.split("x"))
                row = check(classes, batch, precision)
                rows.append(row)
                args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
                print(describe(row), flush=True)
    return 0 if all(row["choice_to_fastest"] <= ALLOWED for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
