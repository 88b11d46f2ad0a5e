"""Which kernels of a route are slower here than PyTorch's own operation, each at the shapes of a model at hand.

A route with kernels has every operation that its backends have computed by them. Here each is held to PyTorch's in
float64, and timed beside it, forward and backward; what is slower, wrong or fails is left to PyTorch by an override,
"triton,linear_gelu=torch". The route with its overrides is one more candidate, for only whole steps decide.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from upt_fast import testing_ops
from upt_fast.engine import graphs
from upt_fast.engine.backends import dispatch
from upt_fast.engine.backends.asked import TORCH, Asked, AskedOfTowers
from upt_fast.engine.towers import routes
from upt_fast.engine.towers.streams import Streams
from upt_fast.engine.tuning import choices
from upt_fast.engine.tuning.candidates import BY_DEVICE
from upt_fast.engine.tuning.judge import Judge
from upt_fast.engine.tuning.measuring import BrokenDeviceError, Entry, Told, describe, describe_race
from upt_fast.engine.tuning.race import WORTH, Race
from upt_fast.tools.op_calls import PREFIX, Call, calls_of

if TYPE_CHECKING:
    from upt_fast.model import FastPromptedCLIP

PLAIN = "torch"
CALLS = 5  # that a time is the median of
FLUSH = 256 * 2**20  # bytes that leave nothing of a call in a GPU's cache
WAIT = 0.02  # seconds at most that a GPU waits for its host
CLOCK = 2e9  # cycles per second, about, that torch.cuda._sleep counts


def with_kernels(kind: str) -> tuple[str, ...]:
    """The declared backends of a kind of device in which kernels compute single operations of a tower."""
    return tuple(d.backend for d in BY_DEVICE.get(kind, ()) if any(map(_has_kernels, AskedOfTowers.of(d.backend))))


def _has_kernels(part: Asked) -> bool:
    return isinstance(routes.choose(part), Streams)


def known(kind: str) -> dict[str, Entry]:
    """What is known of single operations on this machine."""
    return {key: entry for key, entry in choices.kept(kind).items() if key.startswith(PREFIX)}


class Kernels(NamedTuple):
    """What is to be measured; see :class:`upt_fast.tools.isolated.Work`.

    Args:
        model: whose shapes count; it is left on another route.
        step: runs its forward.
        backends: routes with kernels.
        seconds: after which no further operation is measured.
        fresh: measure what is known, too.
    """

    model: FastPromptedCLIP
    step: Callable[[], object]
    backends: Sequence[str]
    seconds: float
    fresh: bool = False

    def measure(self, tell: Told, refused: Mapping[str, str]) -> Entry:
        """The route with its overrides, for each route that has some.

        Args:
            tell: hears of each operation, by its key.
            refused: kernels that are not to be tried, by key, with the reasons.
        """
        end, done, found = time.monotonic() + self.seconds, set[str](), Entry()
        for backend in self.backends:
            try:
                asked = dispatch.resolve(backend)
                # the other tower does not matter, and may take long to compile
                shown = AskedOfTowers(*(part if _has_kernels(part) else TORCH for part in asked))
                calls = calls_of(self.model, shown, self.step)
            except ValueError:  # a package that is not there
                continue
            # where there is not enough time, the large ones matter
            for call in sorted((call for of_op in calls.values() for call in of_op.values()), key=_work, reverse=True):
                kept = choices.kept(self._kind).get(call.key)
                if call.key in done or (kept is not None and not self.fresh) or time.monotonic() >= end:
                    continue
                done.add(call.key)
                tell({"candidate": call.key, "stage": "an operation"})
                self._measure(call, refused.get(call.key, ""), end - time.monotonic(), tell)
            slower = {place for place, of_op in calls.items() if _is_slower(of_op, choices.kept(self._kind))}
            if slower:
                found[backend] = overridden(asked, set(calls), slower)
        return found

    @property
    def _kind(self) -> str:
        return self.model.logit_scale.device.type

    def _measure(self, call: Call, refused: str, seconds: float, tell: Told) -> None:
        try:
            entry = measure_call(call, refused, seconds)
        except BrokenDeviceError:
            raise
        except Exception as error:  # PyTorch's own does not run at this size: nothing to replace the kernel by
            tell({"candidate": call.key, "refused": describe(error)})
            _require_health(call, error)
        else:
            choices.keep(call.key, entry, self._kind)


def _work(call: Call) -> int:
    """About what a step spends on an operation, to order them by: numbers that go in."""
    return call.count * sum(t.numel() for t in call.tensors)


def overridden(asked: AskedOfTowers, has: set[tuple[str, str]], slower: set[tuple[str, str]]) -> str:
    """A route with those ops left to PyTorch that are slower by their kernels.

    Args:
        asked: the route.
        has: the ops that kernels compute there, as (tower, op).
        slower: some of them.
    """

    def with_ops(one_for_both: bool) -> AskedOfTowers:
        parts = []
        for tower, part in asked._asdict().items():
            ops = {
                op for other, op in slower if other == tower or (one_for_both and (tower, op) not in has)
            }  # an op of the other tower alone may stand in the text of both
            parts.append(part._replace(ops=tuple(sorted({**dict(part.ops), **dict.fromkeys(ops, PLAIN)}.items()))))
        return AskedOfTowers(*parts)

    found = with_ops(asked.images == asked.texts)
    return str(found if found.images == found.texts else with_ops(False))


def _is_slower(calls: Mapping[str, Call], entries: Mapping[str, Entry]) -> bool:
    """Whether PyTorch takes less for all calls of an op in a tower, or the kernel is refused for one."""
    found = [(call, entries[key]) for key, call in calls.items() if key in entries]
    if any(call.backend in entry["refused"] for call, entry in found):
        return True
    if len(found) < len(calls):
        return False
    kernel, plain = (
        sum(call.count * entry["ms"].get(name or call.backend, math.inf) for call, entry in found)
        for name in ("", PLAIN)
    )
    return plain <= WORTH * kernel


def measure_call(call: Call, refused: str = "", seconds: float = math.inf) -> Entry:
    """An operation by its kernel and by PyTorch: "choice", "ms" and the rest as choices.keep takes them.

    Args:
        call: the operation.
        refused: why the kernel is not to be tried; empty: it is.
        seconds: after which the race ends as it stands.
    Raises:
        BrokenDeviceError: the kernel has broken the device for this process.
        Exception: what PyTorch's own raises.
    """
    weights = [torch.randn_like(y) for y in _outputs(call, PLAIN, call.arguments)]
    race = Race([call.backend, PLAIN], call.backend, seconds)

    def run(name: str) -> str:
        race.add(name, seconds_of(call, name, functools.partial(_results, call, name, call.arguments, weights)))
        return ""

    if reason := refused or call.refused or _try(call, functools.partial(_not_close, call, weights)):
        race.refuse(call.backend, reason)
    while True:
        for name in race.running:
            if name == PLAIN:
                run(name)
            elif reason := _try(call, functools.partial(run, name)):
                race.refuse(name, reason)
        race.end_round()
        if race.over:
            return describe_race(race, {})


def seconds_of(call: Call, name: str, run: Callable[[], object]) -> float:
    """Seconds of a run that has run before, the median of several.

    On a GPU its own, with nothing in its cache: it waits until the host has launched all of a run.

    Args:
        call: the operation.
        name: who computes it.
        run: computes it, forward and backward.
    """
    device = call.tensors[0].device
    graphs.synchronize(device)
    began = time.perf_counter()
    run()
    launched = time.perf_counter() - began
    graphs.synchronize(device)
    if device.type != "cuda":
        return launched
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    marks = []
    for _ in range(CALLS):
        flush.zero_()
        torch.cuda._sleep(int(min(1.5 * launched, WAIT) * CLOCK))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        marks.append((begin, end))
    graphs.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in marks) / 1e3


def _outputs(call: Call, name: str, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    with torch.set_grad_enabled(bool(testing_ops.leaves(arguments))):
        return testing_ops.call(call.op, arguments, name)


def _results(call: Call, name: str, arguments: Sequence[Any], weights: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and gradients where there are some."""
    outputs = _outputs(call, name, arguments)
    found = testing_ops.gradients(outputs, arguments, weights) if testing_ops.leaves(arguments) else ()
    return [t.detach() for t in (*outputs, *found)]


def _not_close(call: Call, weights: Sequence[Tensor]) -> str:
    """Why a kernel's outputs and gradients are not to be taken; empty: they are as close as PyTorch's."""

    def results(name: str, dtype: torch.dtype) -> list[Tensor]:
        arguments = call.arguments if dtype == call.dtype else testing_ops.copied(call.arguments, dtype)
        if call.op == "prompt_insert":  # which changes its first argument in place
            arguments = [arguments[0].clone(), *arguments[1:]]
        return _results(call, name, arguments, weights)

    plain, exact = results(PLAIN, call.dtype), functools.partial(results, PLAIN, torch.float64)
    names = [f"{call.op}'s result {place}" for place in range(len(plain))]
    return Judge(exact(), plain, names, call.dtype, exact)(results(call.backend, call.dtype)).reason


def _try(call: Call, run: Callable[[], str]) -> str:
    """What it says, or why it failed."""
    try:
        return run()
    except Exception as error:  # whatever a library raises
        _require_health(call, error)
        return describe(error)


def _require_health(call: Call, error: Exception) -> None:
    """Raise a BrokenDeviceError where the device does not work after an error."""
    try:
        graphs.synchronize(call.tensors[0].device)
    except RuntimeError:
        raise BrokenDeviceError(f"{call.key}: {describe(error)}") from error
