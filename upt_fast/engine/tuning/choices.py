"""Which of several exact ways computes something: timed once on the machine at hand, kept, and recorded by runs.

Ways differ in the order of their sums, so in the last bits, and which is fastest hangs on the processor or the GPU and
on the libraries, not on a vendor's name. A choice is found once per machine (machine.py) and kept in a table in the
cache folder beside the compiled operations; equal choices give equal bits. A training run writes its choices down, and
takes them from there when it is resumed.

``UPT_FAST_MEASURE=0`` measures nothing and takes the first way everywhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from upt_fast.common.closeness import relative_rms
from upt_fast.engine.tuning import machine as machines
from upt_fast.engine.tuning import table
from upt_fast.engine.tuning.machine import machine

logger = logging.getLogger("upt_fast")

ROUNDS = 5  # of timing; ways that fall behind sit out the later ones
UNSURE = 2  # of them: another process may have had the core
BEHIND = 1.15
WORTH = 0.97  # of the first way's time: another that takes more is not worth it
# relative RMS of results against the first way's; ways round in other places
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Way = Callable[[], Sequence[Tensor]]
_chosen: dict[str, str] = {}  # by this process
_measured: dict[str, dict[str, Any]] = {}


def choose(key: str, ways: Mapping[str, Way]) -> str:
    """The name of the fastest of several ways to the same results, on the CPU.

    Args:
        key: what is computed, with everything that the choice may hang on beside the machine: sizes, dtype, threads.
        ways: by name, each runs once and returns its results; the first is taken where nothing is measured.
    """
    found = _chosen.get(key, "")
    if found in ways:
        return found
    found = next(iter(ways))
    if len(ways) > 1 and measures():
        try:
            found = _kept_or_measured(key, ways)
        except OSError as error:  # no place to keep it: measured by each process
            logger.debug("choices are not kept: %s", error)
            found = _measure(key, ways)["choice"]
    _chosen[key] = found
    return found


def measures() -> bool:
    """Whether ways are timed, rather than the first one taken."""
    return os.environ.get("UPT_FAST_MEASURE", "") != "0"


def find(key: str, kind: str = "cpu") -> str | None:
    """The choice that this process has taken or taken up, else the one that was measured here before, if any."""
    if key not in _chosen and measures():
        entry = kept(kind).get(key)
        if entry is None:
            return None
        _chosen[key] = entry["choice"]
    return _chosen.get(key)


def is_taken(key: str) -> bool:
    """Whether this process has chosen, or taken up what was chosen."""
    return key in _chosen


def take(key: str, name: str) -> None:
    """Choose from now on, in this process, what somebody else has found."""
    _chosen[key] = name


def keep(key: str, entry: Mapping[str, Any], kind: str = "cpu") -> None:
    """Choose what was measured, in this process and, where there is a place for it, in those to come.

    Args:
        key: see :func:`choose`.
        entry: "choice", "usual", "ms" of each way, "refused": why others are not; and what else is to be known.
        kind: of device.
    """
    _chosen[key], _measured[key] = str(entry["choice"]), dict(entry)
    try:
        with _locked():
            table.write(machine(kind), table.read(machine(kind)) | {key: dict(entry)})
    except OSError as error:
        logger.warning("what was measured is not kept: %s", error)


def record() -> dict[str, Any]:
    """The machine and what this process has chosen on it, to be written down by a run."""
    return {"machine": _here(), "choices": dict(sorted(_chosen.items()))}


def restore(recorded: Mapping[str, Any]) -> None:
    """Choose from now on what :func:`record` had written down; say so where the machine is another.

    Raises:
        ValueError: it is not what record returns.
    """
    there, found = recorded.get("machine"), recorded.get("choices")
    if not isinstance(there, Mapping) or not isinstance(found, Mapping):
        raise ValueError("recorded choices are damaged; wanted a 'machine' and its 'choices'")
    here = _here()
    if differ := [name for name, value in here.items() if name in there and there[name] != value]:
        logger.warning(
            "this run began on another machine or with other versions (%s): from here on its numbers may differ in the "
            "last bits",
            "; ".join(f"{name}: {there[name]!r} there, {here[name]!r} here" for name in differ),
        )
    _chosen.update({str(key): str(name) for key, name in found.items()})


def forget() -> None:
    """Choose anew in this process."""
    _chosen.clear()
    _measured.clear()
    machines.forget()


def kept(kind: str = "cpu") -> dict[str, dict[str, Any]]:
    """What is known of this machine: key -> its choice, the usual way, milliseconds or the refusal of each way."""
    return {**table.read(machine(kind)), **_measured}


def _here() -> dict[str, str]:
    """The processor, and the GPU where there is one."""
    return machine() | (machines.gpu() if torch.cuda.is_available() else {})


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One process at a time; the kernel drops the lock with a process that dies."""
    folder = table.path(machine()).parent
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".choices-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _kept_or_measured(key: str, ways: Mapping[str, Way]) -> str:
    entry = table.read(machine()).get(key)
    if entry is not None and entry["choice"] in ways:
        return entry["choice"]
    with _locked():  # one process measures for those that start with it
        entries = table.read(machine())
        if key not in entries or entries[key]["choice"] not in ways:
            entries[key] = _measure(key, ways)
            table.write(machine(), entries)
        return entries[key]["choice"]


def _measure(key: str, ways: Mapping[str, Way]) -> dict[str, Any]:
    """Time the ways whose results agree with the first one's."""
    with _plain_numbers():
        usual, *others = ways
        wanted = [t.clone() for t in ways[usual]()]
        refused = {name: reason for name in others if (reason := _refusal(ways[name], wanted))}
        seconds = _time({name: way for name, way in ways.items() if name not in refused})
    best = min(seconds, key=seconds.__getitem__)
    if seconds[best] > WORTH * seconds[usual]:
        best = usual
    ms = {name: round(1e3 * value, 3) for name, value in seconds.items()}
    found: dict[str, Any] = {"choice": best, "usual": usual, "ms": ms, "refused": refused}
    _measured[key] = found
    logger.debug("%s: %s of %s", key, best, found["ms"] | refused)
    return found


@contextlib.contextmanager
def _plain_numbers() -> Iterator[None]:
    """Nothing around a measurement changes it, and it changes nothing: modes, gradients, random numbers, filling."""
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    try:
        deterministic.fill_uninitialized_memory = False
        with _disable_current_modes(), torch.random.fork_rng(devices=()), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        deterministic.fill_uninitialized_memory = fill


def _refusal(way: Way, wanted: Sequence[Tensor]) -> str:
    """Why a way is not to be taken: it fails, or its results are others; empty: it may be."""
    try:
        got = way()
    except Exception as error:  # a library without the operation, a processor without the instructions
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    errors = [relative_rms(a, b) for a, b in zip(got, wanted, strict=True)]
    allowed = [CLOSE[t.dtype] for t in wanted]
    if any(error > limit for error, limit in zip(errors, allowed, strict=True)):
        return f"off by {max(errors):.1e}"
    return ""


def _time(ways: Mapping[str, Way]) -> dict[str, float]:
    """Seconds of the fastest run of each, the ways taking turns."""
    best = dict.fromkeys(ways, float("inf"))
    for round_ in range(ROUNDS):
        behind = BEHIND * min(best.values()) if round_ >= UNSURE else float("inf")
        for name, way in ways.items():
            if best[name] <= behind:
                start = time.perf_counter()
                way()
                best[name] = min(best[name], time.perf_counter() - start)
    return best
