"""``upt-fast tune``: measure the routes through the towers on this machine, and keep which is the fastest.

The CLIP has random weights, which are as fast as any; nothing is downloaded. Each candidate is held to the plain
reference (upt_fast/reference) in float64 first, on few classes and images, and to the usual route at the size that is
timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from upt_fast.clip.loading import model_without_weights
from upt_fast.common.checks import require_choice, require_int
from upt_fast.data.benchmark import bench_classnames
from upt_fast.engine.backends import dispatch
from upt_fast.engine.tuning import choices, table
from upt_fast.engine.tuning.candidates import INFERENCE, STEP
from upt_fast.engine.tuning.machine import machine
from upt_fast.engine.tuning.measuring import Entry
from upt_fast.tools import kernel_choices
from upt_fast.tools.isolated import measure_isolated
from upt_fast.tools.tune_process import make_model

PRECISIONS = ("fp32", "bf16", "fp16")
MODES = {"train": (STEP,), "inference": (INFERENCE,), "both": (STEP, INFERENCE)}
SECONDS = {"cuda": 110.0, "cpu": 900.0}  # of all that is measured for a size
PATIENCE = {"cuda": 90.0, "cpu": 300.0}  # without a word: compilation is the longest
KERNELS_SHARE = 0.2  # of these seconds, at most, for single operations


def tune(
    clip: str,
    method: str,
    classes: int,
    batch_size: int,
    precision: str = "fp32",
    memory: str = "fast",
    mode: str = "both",
    device: str = "cpu",
    seconds: float | None = None,
    fresh: bool = False,
    only: Sequence[str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure, keep what was found, and say it; what is known is not measured again.

    Args:
        clip: a name for :func:`upt_fast.clip.loading.clip_with_random_weights`.
        method: its name; its default options.
        classes: C, names of Caltech101's classes up to 100, of ImageNet's beyond.
        batch_size: B.
        precision: one of PRECISIONS.
        memory: level of a training step.
        mode: a name of MODES.
        device: "cpu" or "cuda".
        seconds: for all that is measured; None: those of SECONDS.
        fresh: measure what is known, too.
        only: backends that are measured, beside the usual one; None: all.
        tell: hears in a line what is done.
    Returns:
        "machine", what was asked for, by mode "key", "entry", and whether it was "known" before; and "kernels", what
        is known of single operations.
    Raises:
        ValueError: a name or a number that is not taken; says what was wanted.
        RuntimeError: nothing could be measured; says why.
    """
    for name, number in (("classes", classes), ("batch_size", batch_size)):
        require_int(name, number, 1)
    require_choice("precision", precision, PRECISIONS)
    require_choice("mode", mode, tuple(MODES))
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ValueError(f"seconds={seconds}; wanted a number above 0")
    for backend in only or ():
        dispatch.resolve(backend)
    kind = device.partition(":")[0]
    asked = {"clip": clip, "method": method, "classes": classes, "batch_size": batch_size}
    asked |= {"precision": precision, "memory": memory, "device": device}
    seconds = SECONDS[kind] if seconds is None else seconds
    with torch.random.fork_rng(devices=[]):
        shapes = make_model(*model_without_weights(clip), method, bench_classnames(classes), precision, memory)
    found: dict[str, Any] = {"machine": machine(kind), **asked, "modes": {}}
    modes = [m for m in MODES[mode] if m == INFERENCE or any(True for _ in shapes.parameters())]
    end = time.monotonic() + seconds
    for place, name in enumerate(modes):
        key = shapes.route_key(name, batch_size, device=kind)
        entry = None if fresh else choices.kept(kind).get(key)
        known = entry is not None and "budget_s" not in entry  # what a run has measured had no time for all
        if not known:
            share = 1.0 if place == len(modes) - 1 else 0.7
            for_kernels = KERNELS_SHARE * share * (end - time.monotonic())
            beside = _routes_beside({**asked, "mode": name}, kind, for_kernels, fresh, tell) if only is None else {}
            budget = (end - time.monotonic()) * share
            arguments = {**asked, "mode": name, "budget": max(budget, 1.0), "only": only, "beside": beside}
            entry = measure_isolated("upt_fast.tools.tune_process:measurement", arguments, PATIENCE[kind], tell)
            choices.keep(key, entry | {"at": [classes, batch_size]}, kind)
        found["modes"][name] = {"key": key, "entry": entry, "known": known}
    return found | {"kernels": kernel_choices.known(kind)}


def _routes_beside(
    asked: Mapping[str, Any], kind: str, seconds: float, fresh: bool, tell: Callable[[str], None]
) -> Entry:
    """Routes whose slow kernels are left to PyTorch, by the declared ones that have the kernels."""
    backends = kernel_choices.with_kernels(kind)
    if not backends:
        return {}
    arguments = {**asked, "backends": backends, "seconds": seconds, "fresh": fresh}
    try:
        return measure_isolated("upt_fast.tools.tune_process:kernels", arguments, PATIENCE[kind], tell)
    except RuntimeError as error:  # the routes themselves are measured all the same
        tell(f"no single operation was measured: {error}")
        return {}


def export(kind: str, file: Path) -> int:
    """Write this machine's table into a file; how many entries.

    Raises:
        ValueError: there are none.
    """
    entries = table.read(machine(kind))
    if not entries:
        raise ValueError("nothing was measured on this machine; run upt-fast tune first")
    file.write_text(table.dump(machine(kind), entries), encoding="utf-8")
    return len(entries)


def take_over(kind: str, file: Path) -> int:
    """Take the entries of a file into this machine's table; how many.

    Raises:
        ValueError: it is no table, or that of another kind of machine.
    """
    entries = table.load(file, machine(kind))
    for key, entry in entries.items():
        choices.keep(key, entry, kind)
    return len(entries)
