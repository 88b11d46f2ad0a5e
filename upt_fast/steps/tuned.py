"""Training steps that find their own route: the first batches pass by every candidate, then all by the fastest.

Each candidate has a lane: what steps change, parameters, the optimizer's state, the loss scale, random numbers, is its
own. A lane that stays in the race has taken every batch, so that the winner's training is, to the bit, that of a run
that was told its choice, and none of its steps is wasted; the losers' are what measuring costs. Between two batches the
model is as the lane that leads has left it.

A step from a graph is measured for routes that are still in the race after some rounds, and takes the batches before
once more: graphs hold memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upt_fast.engine import graphs
from upt_fast.engine.graphs import GraphedStep
from upt_fast.engine.tuning.candidates import Route, declared
from upt_fast.engine.tuning.judge import Judge
from upt_fast.engine.tuning.measuring import Entry, describe, describe_race
from upt_fast.engine.tuning.race import Race
from upt_fast.steps.lanes import Batch, Lane, LaneState, Result, RunState, random_states, set_random_states
from upt_fast.steps.twins import make_judge, small_results

if TYPE_CHECKING:
    from upt_fast.model import FastPromptedCLIP

SHARE = 0.05  # of a run that measuring may take
LEAST = 4  # steps that another candidate costs at least, closeness and the first one included
GRAPHS_AFTER = 2  # rounds of timing
MEASURING = "routes are being measured"


class TunedStep:
    """One training step of a model whose route is measured; see :meth:`FastPromptedCLIP.make_graphed_step`.

    Args:
        model: on the usual route.
        state: what steps change.
        usual: the model's route.
        make: makes a route's step, given whether it may be captured.
        captures: whether steps can be captured at all.
        images_stay: the image tower's part of the backend stays: its features were computed before.
        steps: of the run, about.
        decided: is told the route that was chosen, and what was measured; None where nothing was.

    Attributes:
        route: the one that was chosen; None while routes are measured.
    """

    def __init__(
        self,
        model: FastPromptedCLIP,
        state: RunState,
        usual: Route,
        make: Callable[[bool], GraphedStep],
        captures: bool,
        images_stay: bool,
        steps: int,
        decided: Callable[[Route, Entry | None], None],
    ) -> None:
        self.model, self.usual, self.captures, self.steps = model, usual, captures, steps
        self.images_stay, self.route = images_stay, None
        self._run, self._make, self._decided = state, make, decided
        self._step = make(usual.graph)
        self._race: Race | None = None
        self._judge: Judge | None = None
        self._lanes: dict[str, Lane] = {}
        self._batches: list[Batch] = []
        self._details: dict[str, dict[str, float]] = {}
        self._origin: LaneState | None = None
        self._seconds = 0.0  # of the first step

    route: Route | None

    @property
    def reason(self) -> str:
        """Why steps run eagerly at present; empty while a graph is replayed."""
        return MEASURING if self.route is None else self._step.reason

    @property
    def optimizer_captured(self) -> bool:
        """See :class:`GraphedStep`."""
        return self._step.optimizer_captured

    @property
    def two_streams(self) -> bool:
        """See :class:`GraphedStep`."""
        return self._step.two_streams

    def __call__(self, images: Tensor, labels: Tensor) -> Result:
        """Train on one batch; see :class:`GraphedStep`."""
        if self.route is not None:
            return self._step(images, labels)
        batch = Batch(images.detach().clone(), labels.clone(), self._run.rates(), random_states(self._device))
        self._batches.append(batch)
        result = self._first_batch(batch) if self._race is None else self._next_batch(batch)
        after, race = random_states(self._device), self._race
        assert race is not None
        result = result[0].clone(), result[1].clone()
        if race.over:
            self._decide()
        else:
            self._enter(self._lanes[race.leader])
        set_random_states(self._device, after)
        return result

    def settle(self) -> None:
        """Decide now, before anybody looks at the model: what is left runs on the last batch, and is undone."""
        if self.route is not None or self._race is None:
            return
        after = random_states(self._device)
        while not self._race.over:
            for name in self._race.running:
                lane = self._lanes[name]
                before = lane.state, lane.taken
                if self._timed(name, self._batches[-1]) is not None:
                    lane.state, lane.taken = before
            self._end_round()
        self._decide()
        set_random_states(self._device, after)

    @property
    def _device(self) -> torch.device:
        return self.model.logit_scale.device

    def _first_batch(self, batch: Batch) -> Result:
        """By the usual route; then by the candidates for which there is time."""
        began, usual = time.perf_counter(), self.usual
        self._origin = self._run.save()
        lane = self._lanes[usual.name] = Lane(usual, self.model.way(), self._step, self._origin)
        result = self._take(lane, batch)
        self._seconds = seconds = time.perf_counter() - began
        budget = SHARE * self.steps * seconds
        found, left_out = declared(self._device.type, usual.backend, self.captures, budget)
        self._race = race = Race([usual.name], usual.name, budget, alike=lambda name: Route.of(name).graph)
        for name, reason in left_out.items():
            race.refuse(name, reason)
        for route in found.values():
            if route.name == usual.name or (route.graph and route.backend != usual.backend):
                continue  # graphs come later
            if self.images_stay and route.backend.split("/")[0] != usual.backend.split("/")[0]:
                continue
            if race.left < LEAST * seconds:
                race.refuse(route.name, f"not tried: measuring may take {budget:.1f} s of this run")
            else:
                self._join(route)
        return result

    def _next_batch(self, batch: Batch) -> Result:
        race = self._race
        assert race is not None
        results = {name: result for name in race.running if (result := self._timed(name, batch)) is not None}
        self._end_round()
        if race.leader not in results:  # it was behind, and those in front have failed since
            lane = self._lanes[self.usual.name]
            for missed in self._batches[lane.taken :]:
                results[race.leader] = self._take(lane, missed)
        return results[race.leader]

    def _end_round(self) -> None:
        """Drop the lanes that are behind; the usual one may be needed again."""
        race = self._race
        assert race is not None
        race.end_round()
        if not race.running:
            race.revive(self.usual.name)
        kept = {*race.running, self.usual.name}
        self._lanes = {name: lane for name, lane in self._lanes.items() if name in kept}
        self._join_graphs()

    def _join(self, route: Route) -> None:
        """Take a candidate into the race, behind the batches that the others have had, if its results are right."""
        race, began = self._race, time.perf_counter()
        assert race is not None
        assert self._origin is not None
        race.join(route.name)
        known = next((lane for lane in self._lanes.values() if lane.route.backend == route.backend), None)
        details = self._details.setdefault(route.name, {})
        try:
            self._run.restore(self._origin)
            if known is not None:
                self.model.take_way(known.way)
            else:
                if self._judge is None:
                    self.model.take_way(self._lanes[self.usual.name].way)
                    self._judge = make_judge(self.model)
                self.model.reroute(route.backend)
                verdict = self._judge(small_results(self.model))
                details |= {"error": verdict.error, "plain_error": verdict.plain_error}
                if verdict.reason:
                    race.refuse(route.name, verdict.reason)
                    return
            step = self._make(route.graph)
            step.stream = self._step.stream
            lane = self._lanes[route.name] = Lane(route, self.model.way(), step, self._run.fork(self._origin))
            for batch in self._batches:
                self._take(lane, batch)
            if self._judge is not None:
                reason = self._judge.at_full_size(lane.first, self._lanes[self.usual.name].first)
                if reason:
                    self._out(route.name, reason)
            details["prepare_s"] = time.perf_counter() - began
        except Exception as error:  # whatever a library raises: the run goes on without this candidate
            self._out(route.name, describe(error))

    def _join_graphs(self) -> None:
        """Let the routes that are still in the race be replayed from a graph as well."""
        race = self._race
        assert race is not None
        if not self.captures:
            return
        eager = [name for name in race.running if not self._lanes[name].route.graph]
        if not eager or min(len(race.seconds[name]) for name in eager) < GRAPHS_AFTER:
            return
        race.alike = lambda name: None  # from now on graphs are there to be compared with
        for name in eager:
            route = self._lanes[name].route._replace(graph=True)
            if route.name not in race.seconds and race.left > 0:
                self._join(route)

    def _timed(self, name: str, batch: Batch) -> Result | None:
        """A lane's step, timed; None where it fails, which takes it out of the race."""
        race, lane = self._race, self._lanes[name]
        assert race is not None
        counts = lane.ready and len(batch.images) == lane.step.batch_size
        try:
            seconds, result = self._stepped(lane, batch)
        except Exception as error:  # as in _join; but the usual one's errors are the run's
            if name == self.usual.name:
                raise
            self._out(name, describe(error))
            return None
        if lane.route.graph and lane.step.refused and name != self.usual.name:
            self._out(name, lane.step.refused)
            return None
        if counts:
            race.add(name, seconds)
        return result

    def _take(self, lane: Lane, batch: Batch) -> Result:
        """A lane's step, untimed."""
        result = self._stepped(lane, batch)[1]
        if not lane.first:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            lane.first = [t.detach().clone() for t in (result[1], *gradients)]
        return result

    def _stepped(self, lane: Lane, batch: Batch) -> tuple[float, Result]:
        self._enter(lane)
        self._run.set_rates(batch.rates)
        set_random_states(self._device, batch.random)
        graphs.synchronize(self._device)
        began = time.perf_counter()
        result = lane.step(batch.images, batch.labels)
        graphs.synchronize(self._device)
        seconds = time.perf_counter() - began
        self._run.set_rates(batch.rates)  # numbers, where a graph has put tensors of its own
        lane.state = self._run.save()
        lane.taken += 1
        return seconds, result

    def _enter(self, lane: Lane) -> None:
        self.model.take_way(lane.way)
        self._run.restore(lane.state)

    def _out(self, name: str, reason: str) -> None:
        assert self._race is not None
        self._race.refuse(name, reason)
        self._lanes.pop(name, None)

    def _decide(self) -> None:
        """Go on by the winner alone."""
        race = self._race
        assert race is not None
        if not race.seconds[self.usual.name]:  # no other has come as far as to be timed
            race.add(self.usual.name, self._seconds)
        tried = len(race.seconds) > 1
        entry = describe_race(race, self._details) | {"budget_s": race.budget} if tried else None
        lane = self._lanes[race.leader]
        for missed in self._batches[lane.taken :]:
            self._take(lane, missed)
        self._enter(lane)
        for tower in (self.model.text_tower, self.model.vision_tower):
            tower.blocks.release()
        self.route, self._step = lane.route, lane.step
        self._lanes, self._batches, self._judge, self._origin = {}, [], None, None
        self._decided(lane.route, entry)
