"""Which of several exact ways computes something: timed once on the machine at hand, kept, and recorded by runs.

Ways differ in the order of their sums, so in the last bits, and which is fastest hangs on the processor and the
libraries, not on a vendor's name. A choice is found once per machine (processor, versions, the environment variables
that make libraries choose) and kept in the cache folder beside the compiled operations; equal choices give equal bits.
A training run writes its choices down, and takes them from there when it is resumed.

``UPT_FAST_MEASURE=0`` measures nothing and takes the first way everywhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from upt_fast.common.closeness import relative_rms
from upt_fast.common.files import cache_folder, write_text

logger = logging.getLogger("upt_fast")

ROUNDS = 5  # of timing; ways that fall behind sit out the later ones
UNSURE = 2  # of them: another process may have had the core
BEHIND = 1.15
WORTH = 0.97  # of the first way's time: another that takes more is not worth it
# relative RMS of results against the first way's; ways round in other places
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# what makes libraries choose other code
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
)

Way = Callable[[], Sequence[Tensor]]
_chosen: dict[str, str] = {}  # by this process
_measured: dict[str, dict[str, Any]] = {}


def choose(key: str, ways: Mapping[str, Way]) -> str:
    """The name of the fastest of several ways to the same results.

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


def record() -> dict[str, Any]:
    """The machine and what this process has chosen on it, to be written down by a run."""
    return {"machine": machine(), "choices": dict(sorted(_chosen.items()))}


def restore(recorded: Mapping[str, Any]) -> None:
    """Choose from now on what :func:`record` had written down; say so where the machine is another.

    Raises:
        ValueError: it is not what record returns.
    """
    there, found = recorded.get("machine"), recorded.get("choices")
    if not isinstance(there, Mapping) or not isinstance(found, Mapping):
        raise ValueError("recorded choices are damaged; wanted a 'machine' and its 'choices'")
    if differ := [name for name, value in machine().items() if there.get(name) != value]:
        here = machine()
        logger.warning(
            "this run began on another machine (%s): from here on its numbers may differ in the last bits",
            "; ".join(f"{name}: {there.get(name)!r} there, {here[name]!r} here" for name in differ),
        )
    _chosen.update({str(key): str(name) for key, name in found.items()})


def forget() -> None:
    """Choose anew in this process."""
    _chosen.clear()
    _measured.clear()
    machine.cache_clear()


def kept() -> dict[str, dict[str, Any]]:
    """What is known of this machine: key -> its choice, the usual way, milliseconds or the refusal of each way."""
    return {**_read(_file()), **_measured}


@cache
def machine() -> dict[str, str]:
    """What choices hang on, beside their keys."""
    found = {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "compiled": "off" if os.environ.get("UPT_FAST_CPU_OPS", "") == "0" else "on",
    }
    return found | {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}


def _processor() -> str:
    """The processor's name and a digest of what it can do: virtual machines hide parts of it."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    what = " ".join(fields.get(field, "") for field in ("cpu family", "model", "stepping", "flags"))
    return f"{name} ({hashlib.sha256(what.encode()).hexdigest()[:8]})"


def _file() -> Path:
    digest = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"choices-{digest}.json"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a file of choices; none of one that is missing or damaged: they are measured again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["choices"]
        return {key: dict(value) for key, value in found.items() if isinstance(value["choice"], str)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _kept_or_measured(key: str, ways: Mapping[str, Way]) -> str:
    path = _file()
    entry = _read(path).get(key)
    if entry is not None and entry["choice"] in ways:
        return entry["choice"]
    path.parent.mkdir(parents=True, exist_ok=True)
    # one process measures for those that start with it; the kernel drops the lock with a process that dies
    with open(path.parent / ".choices-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = _read(path)
        if key not in entries or entries[key]["choice"] not in ways:
            entries[key] = _measure(key, ways)
            write_text(path, json.dumps({"machine": machine(), "choices": entries}, indent=1) + "\n")
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
