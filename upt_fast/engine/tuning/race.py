"""Which of several is fastest, in few runs: they run in turns, and those that fall behind drop out.

A race knows names and seconds, not what is run: that is why a simulated device can drive all of it. Interleaved runs
let drifts of a machine hit all alike; medians leave out what a busy neighbour cost. Half of those that run drop out
after each round once each has two times, the nearly equal stay, and in the end so many runs are left for few names
that the last few percent show (successive halving, Jamieson and Talwalkar 2016, arXiv 1502.07943).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence

ROUNDS = 7  # of timing at most
SURE = 2  # of them, before half drop out
HOPELESS = 1.5  # times the fastest one's median: out after the first round
NEAR = 1.05  # times the fastest one's median: stays when half drop out
WORTH = 0.98  # of the usual one's median: another that takes more is not worth it


class Race:
    """Runners by name, one of them the usual one, which wins where no other is faster by 2 %.

    Args:
        names: in their order; the usual one is among them.
        usual: its name.
        budget: seconds after which it ends as it stands.
        rounds: of timing at most.
        clock: gives seconds.
        alike: tells the group of a name; while there are several, one falls behind those of its own.
    """

    def __init__(
        self,
        names: Sequence[str],
        usual: str,
        budget: float = math.inf,
        rounds: int = ROUNDS,
        clock: Callable[[], float] = time.perf_counter,
        alike: Callable[[str], Hashable] = lambda name: None,
    ) -> None:
        assert usual in names
        self.usual, self.budget, self.rounds, self.clock = usual, budget, rounds, clock
        self.alike, self.started = alike, clock()
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.refused: dict[str, str] = {}
        self._running = list(names)

    @property
    def running(self) -> tuple[str, ...]:
        """Those that run in the next round."""
        return tuple(self._running)

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - (self.clock() - self.started)

    @property
    def over(self) -> bool:
        """Whether nothing more is to be run."""
        return (
            len(self._running) < 2
            or self.left <= 0
            or min(len(self.seconds[name]) for name in self._running) >= self.rounds
        )

    def join(self, name: str) -> None:
        """Somebody who comes later."""
        self.seconds[name] = []
        self._running.append(name)

    def revive(self, name: str) -> None:
        """Somebody who had fallen behind those that failed since."""
        if name not in self._running and name not in self.refused:
            self._running.append(name)

    def add(self, name: str, seconds: float) -> None:
        """A run's time."""
        self.seconds[name].append(seconds)

    def refuse(self, name: str, reason: str) -> None:
        """One that fails, or is not to be taken: out, whatever its times."""
        self.refused[name] = reason
        if name in self._running:
            self._running.remove(name)

    def end_round(self) -> None:
        """Drop those that fell behind."""
        for group in {self.alike(name) for name in self._running}:
            self._drop(
                sorted((n for n in self._running if self.seconds[n] and self.alike(n) == group), key=self.median)
            )

    def _drop(self, timed: Sequence[str]) -> None:
        """Of those that are sorted by their times."""
        if not timed:
            return
        best, count = self.median(timed[0]), min(len(self.seconds[name]) for name in timed)
        keep = len(timed) if count < SURE else -(-len(timed) // 2)
        limit = HOPELESS if count < SURE else NEAR
        out = {
            name
            for place, name in enumerate(timed)
            if (place >= keep or count < SURE) and self.median(name) > limit * best
        }
        self._running = [name for name in self._running if name not in out]

    def median(self, name: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> float:
        """Of its times: largest less smallest, as a share of the median."""
        found = self.seconds[name]
        return (max(found) - min(found)) / self.median(name)

    @property
    def leader(self) -> str:
        """The fastest of those that run, the usual one where none is faster by enough, or nothing was timed."""
        return self.best([name for name in self._running if self.seconds[name]] or list(self.seconds))

    def best(self, names: Sequence[str]) -> str:
        """The same among some of the names."""
        timed = [name for name in names if self.seconds[name] and name not in self.refused]
        if not timed:
            return self.usual
        first = min(timed, key=self.median)
        if self.usual in timed and self.median(first) > WORTH * self.median(self.usual):
            return self.usual
        return first
