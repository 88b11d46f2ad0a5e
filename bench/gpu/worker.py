"""The process that measures: gpu_suite.py starts it, and starts it again when a measurement has broken it."""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from gpu import outside, report, summary, tune
from gpu.machine import Machine
from gpu.models import Clips
from gpu.plan import PARTS
from gpu.record import PartFile, Task, run_part

from upt_fast.common.files import write_text
from upt_fast.engine.backends import dispatch
from upt_fast.testing import xformers_on_cpu

ELSEWHERE = {"tests": ("outside", "test_tasks"), "sanitizer": ("outside", "sanitizer_tasks")}  # module, function
RESTART = 75  # exit code: the CUDA context is lost, a new process can go on


def tasks_of(part: str, machine: Machine, clips: Clips) -> list[Task]:
    """A part's measurements, the most valuable first."""
    module, function = ELSEWHERE.get(part, (part, "tasks"))
    return getattr(importlib.import_module(f"gpu.{module}"), function)(machine, clips)


def run(folder: Path, parts: Sequence[str], dry: bool, minutes: float, died: str, seed: int = 0) -> int:
    """Measure.

    Args:
        folder: OUT.
        parts: names of PARTS.
        dry: on the CPU, at tiny sizes.
        minutes: for each part.
        died: how the process before this one ended, where it did not end well.
        seed: of all random numbers.
    Returns:
        exit code: 0, 1 where a check failed, 2 without a GPU, RESTART.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what a measurement started ends too
    machine = Machine(dry, seed)
    if no_device(machine):
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    described = machine.environment()
    clips = Clips(machine)
    passed = True
    with stand_in(machine):
        for part in parts:
            file = PartFile(folder, part)
            file.bury(died or "its process died")
            sound = run_part(file, tasks_of(part, machine, clips), described, minutes, machine.healthy)
            write_report(folder, described[0])
            if not sound:
                return RESTART
            passed &= file.passed(described[0])
            machine.release()
    return 0 if passed else 1


def no_device(machine: Machine) -> bool:
    """Whether the GPU is missing, which is said."""
    if machine.dry or torch.cuda.is_available():
        return False
    print("gpu_suite.py: no CUDA device here; --dry runs every part on the CPU at a tiny size", file=sys.stderr)
    return True


def stand_in(machine: Machine) -> contextlib.AbstractContextManager:
    """In a dry run exact attention in the place of xformers', which has none for a CPU."""
    installed = machine.dry and not dispatch.refusals("xformers", "cuda")
    return xformers_on_cpu() if installed else contextlib.nullcontext()


def write_report(folder: Path, environment: str) -> None:
    """OUT/report.md, one page, and OUT/details.md, of all parts measured so far; OUT/choices.json of the tuner's."""
    files = [PartFile(folder, part) for part in PARTS]
    tune.write_choices(folder, PartFile(folder, "tune"), environment)
    write_text(folder / "report.md", summary.markdown(files, environment))
    write_text(folder / "details.md", report.markdown(files, environment))


def bury(folder: Path, part: str, reason: str) -> bool:
    """After a worker that will not be started again: say what became of its measurement; whether the part passed."""
    file = PartFile(folder, part)
    if file.current is None:
        return False
    file.bury(reason)
    write_report(folder, file.current)
    return file.passed(file.current)


def exercise(kernels: Sequence[str], dry: bool) -> int:
    """Run each kernel file's ops on small inputs; prints what it found as JSON, 1 where it is wrong."""
    machine = Machine(dry)
    if no_device(machine):
        return 2
    found = {kernel: outside.exercise(kernel, machine) for kernel in kernels}
    print(json.dumps(found, indent=1))
    return 1 if any(row.get("status") == "failed" for row in found.values()) else 0
