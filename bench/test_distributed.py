"""UPT's training step on 1 and 2 processes of one thread each: the same step, images and classes shared out.

A row's time is that of the whole job, Python's start and the model included; the step's own is in extra_info, as the
fastest of several, and so is the share of the ideal that is reached: seconds on one process / (processes x seconds).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROUNDS = 5
SECONDS: dict[tuple[int, int], float] = {}  # on one process


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("classes", "batch"), [(100, 8), pytest.param(1000, 8, marks=pytest.mark.full)], ids=["C100-B8", "C1000-B8"]
)
def test_step(benchmark, tmp_path: Path, classes: int, batch: int, processes: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"distributed step C={classes} B={batch}"
    file, script = tmp_path / "seconds.json", str(Path(__file__).with_name("distributed_step.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launch, script, str(classes), str(batch), str(ROUNDS), str(file)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run() -> None:
        subprocess.run(command, check=True, capture_output=True, env=one_thread)

    benchmark.pedantic(run, rounds=1, iterations=1)
    seconds = min(json.loads(file.read_text()))
    alone = SECONDS.setdefault((classes, batch), seconds) if processes == 1 else SECONDS.get((classes, batch))
    benchmark.extra_info.update(processes=processes, threads=1, step_ms=round(1e3 * seconds))
    if alone is not None:
        benchmark.extra_info.update(speedup=round(alone / seconds, 2), of_ideal=round(alone / seconds / processes, 2))
