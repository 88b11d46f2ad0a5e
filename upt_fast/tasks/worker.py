"""What trains groups of a job in another process than the one that keeps the job: one frozen backbone at a time.

Knows nothing of how it came there: :mod:`upt_fast.tasks.cluster` places it.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from upt_fast.tasks.grid import Task
from upt_fast.tasks.job import Job, Member, members_of
from upt_fast.tasks.memory import room
from upt_fast.tasks.run import Backbone, fitting, train_group
from upt_fast.tasks.table import Row
from upt_fast.train.config import TrainConfig
from upt_fast.train.setup import resolve_device

SECONDS = 0.5  # between two reports

Settings = Sequence[tuple[str, Mapping[str, Any]]]  # of each task its name and TrainConfig.to_dict()


def settings_of(members: Sequence[Member]) -> list[tuple[str, dict[str, Any]]]:
    """What a worker is told of tasks: plain values, for a method may come from a file that another process imports."""
    return [(member.task.name, member.task.config.to_dict()) for member in members]


class Outcome(NamedTuple):
    """What became of a group's tasks.

    Args:
        results: of those that finished, as their results.json holds them.
        errors: of the others why they failed.
        ended: of those that failed for good their step and why.
        rows: of all what a table shows.
    """

    results: dict[str, dict[str, Any]]
    errors: dict[str, str]
    ended: dict[str, tuple[int, str]]
    rows: dict[str, Row]


class Worker:
    """Trains groups of tasks.

    Args:
        sharing: workers that may be on one machine and share its memory.
        tell: called now and then with the rows of the tasks that are trained.
    """

    def __init__(self, sharing: int = 1, tell: Callable[[dict[str, Row]], None] | None = None) -> None:
        self.sharing, self.tell = sharing, tell
        self._key: Any = None
        self._backbone = Backbone()
        self._told = 0.0
        self._fitted: list[Member] = []  # prepared by fit, for the train that follows

    def describe(self) -> tuple[int, str]:
        """The process and its machine's name."""
        return os.getpid(), platform.node()

    def fit(self, key: Any, settings: Settings, max_memory: int | None) -> list[str]:
        """The first tasks that fit into one step here.

        Args:
            key: of their backbone, which is kept until another one is wanted.
            settings: of tasks of one shape.
            max_memory: bytes that a step may need beside the weights; None: a share of what is free.
        Returns:
            their names, at least one.
        """
        members = self._members(settings)
        if max_memory is None:
            device = resolve_device(members[0].config.device)
            max_memory = room(device) // (1 if device.type == "cuda" else self.sharing)
        self._fitted = fitting(members, self._of(key), max_memory)
        return [member.task.name for member in self._fitted]

    def train(self, key: Any, settings: Settings, out: str, ended: Mapping[str, tuple[int, str]]) -> Outcome:
        """Train a group from where its tasks stand in their folders.

        Args:
            key: of their backbone.
            settings: of the group's tasks, in the order in which they stand in the job's file.
            out: the job's folder.
            ended: tasks that ended early by failing for good, as the job's file has them.
        """
        fitted, self._fitted = self._fitted, []
        same = [member.task.name for member in fitted] == [name for name, _ in settings]
        members = fitted if same else self._members(settings)
        job = Job(Path(out), members, written=False)
        job.note_ended(ended)
        rows = {member.task.name: member.row for member in members}

        def show() -> None:
            if self.tell is not None and time.monotonic() - self._told >= SECONDS:
                self._told = time.monotonic()
                self.tell(rows)

        train_group(job, members, self._of(key), show)
        return Outcome(
            {member.task.name: member.results for member in members if member.results is not None},
            {member.task.name: member.error for member in members if member.error is not None},
            job.ended,
            rows,
        )

    def _members(self, settings: Settings) -> list[Member]:
        return members_of([Task(name, TrainConfig.from_dict(values)) for name, values in settings])

    def _of(self, key: Any) -> Backbone:
        if key != self._key:
            self._backbone = Backbone()  # the one before goes first: two may not fit
            self._key = key
        return self._backbone
