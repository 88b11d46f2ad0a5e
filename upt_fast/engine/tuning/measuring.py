"""Measure candidates: closeness first, then times in turns; what fails on the way is named and never chosen."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from upt_fast.engine.tuning.judge import Verdict
from upt_fast.engine.tuning.race import ROUNDS, Race

Told = Callable[[dict[str, Any]], None]  # is given each thing before it begins and after it has ended
Entry = dict[str, Any]  # what choices.keep takes


class Candidate(Protocol):
    """One way to the same results, at work."""

    def prepare(self) -> None:
        """All that is done once: take the route, compile, warm up."""

    def results(self) -> Sequence[Tensor]:
        """Logits and gradients at the size at which they are held to float64."""

    def results_at_full_size(self) -> Sequence[Tensor]:
        """The same at the size that is timed."""

    def run(self) -> float:
        """Seconds of a step."""

    def peak_mib(self) -> float | None:
        """Most memory of a step beside the weights, in MiB; None where it is not known."""

    def close(self) -> None:
        """Give back what it holds, its graph above all; it may not have been prepared, and does not run again."""


class Judging(Protocol):
    """See judge.py."""

    def __call__(self, got: Sequence[Tensor]) -> Verdict: ...

    def at_full_size(self, got: Sequence[Tensor], usual: Sequence[Tensor]) -> str: ...


class BrokenDeviceError(RuntimeError):
    """A candidate has left the device such that nothing more can be measured in this process."""


def measure(
    candidates: Mapping[str, Candidate],
    usual: str,
    judge: Judging,
    budget: float,
    tell: Told = lambda event: None,
    refused: Mapping[str, str] | None = None,
    healthy: Callable[[], bool] = lambda: True,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Entry:
    """Which of several candidates is fastest, with closeness, times and memory of each, or the reason why not.

    Args:
        candidates: by name.
        usual: the name of that which is taken where no other is better.
        judge: of closeness.
        budget: seconds in all; when they are over the race ends as it stands, and who has not begun is not measured.
        tell: hears of each step, so that a watcher knows who hangs.
        refused: candidates that are not to be tried, with the reasons.
        healthy: whether the device still works after an error.
        rounds: of timing at most.
        clock: gives seconds.
    Raises:
        BrokenDeviceError: an error has broken the device for this process; it has been told of before.
    """
    race = Race(list(candidates), usual, budget, rounds, clock)
    details: dict[str, dict[str, float]] = {}
    wanted: list[Tensor] = []
    order = [usual, *(name for name in candidates if name != usual)]
    still_open = set(candidates)

    def close_others() -> None:
        """Let those that have left the race give their memory back to those that are in it."""
        for name in [name for name in order if name in still_open and name not in race.running]:
            still_open.remove(name)
            candidates[name].close()

    def attempt(name: str, stage: str, call: Callable[[], Any]) -> Any:
        """The call's result; None where it failed, which refuses the candidate."""
        tell({"candidate": name, "stage": stage})
        try:
            return call()
        except Exception as error:  # whatever a library raises
            race.refuse(name, reason := describe(error))
            tell({"candidate": name, "refused": reason})
            if not healthy():
                raise BrokenDeviceError(f"{name}: {reason}") from error
            return None

    def begin(name: str) -> bool:
        """Whether a candidate is right, and ready to be timed."""
        candidate, began = candidates[name], clock()
        candidate.prepare()
        verdict = judge(candidate.results())
        details[name] = {"error": verdict.error, "plain_error": verdict.plain_error}
        reason = verdict.reason
        if not reason:
            results = candidate.results_at_full_size()
            if name == usual:
                wanted.extend(t.detach().clone() for t in results)
            else:
                reason = judge.at_full_size(results, wanted) if wanted else ""
        if reason:
            race.refuse(name, reason)
            tell({"candidate": name, "refused": reason})
            return False
        candidate.run()
        details[name]["prepare_s"] = clock() - began
        return True

    for name in order:
        if refused and name in refused:
            race.refuse(name, refused[name])
        elif race.left <= 0:
            race.refuse(name, f"not tried: the {budget:.0f} s were over")
        elif attempt(name, "prepare", functools.partial(begin, name)):
            peak = attempt(name, "memory", candidates[name].peak_mib)
            if peak is not None:
                details[name]["peak_mib"] = peak
        close_others()
    while race.running:
        for name in race.running:
            seconds = attempt(name, f"round {len(race.seconds[name]) + 1}", candidates[name].run)
            if seconds is not None:
                race.add(name, seconds)
        race.end_round()
        close_others()
        if race.over:
            break
    return describe_race(race, details)


def describe_race(race: Race, details: Mapping[str, Mapping[str, float]]) -> Entry:
    """A race's outcome as choices.keep takes it."""
    timed = [name for name in race.seconds if race.seconds[name] and name not in race.refused]
    if not timed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in race.refused.items())
        raise RuntimeError(f"nothing could be measured: {reasons}")
    return {
        "choice": race.leader,
        "usual": race.usual,
        "ms": {name: round(1e3 * race.median(name), 4) for name in timed},
        "spread": {name: round(race.spread(name), 4) for name in timed},
        "rounds": {name: len(race.seconds[name]) for name in timed},
        "details": {name: dict(details[name]) for name in race.seconds if name in details},
        "refused": dict(race.refused),
    }


def describe(error: BaseException) -> str:
    """An error in a line."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "out of memory"
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, ValueError):  # ours: what came, and why not
        return line.partition("; wanted")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
