"""The tasks of a job, what is known of each, and the job's own file."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upt_fast.common.messages import shorten
from upt_fast.data.folder import scan_folder
from upt_fast.model import FastPromptedCLIP
from upt_fast.tasks.grid import Task
from upt_fast.tasks.table import Row
from upt_fast.train.checkpoint import is_run, read_json, write_json
from upt_fast.train.config import TrainConfig
from upt_fast.train.images import with_cache
from upt_fast.train.loop import Run, finished
from upt_fast.train.setup import CONFIG_FILE
from upt_fast.train.trainer import Batch, Steps

logger = logging.getLogger("upt_fast")

JOB_FILE = "tasks.json"
# what is one backbone's, and may not differ among its siblings
OF_THE_BACKBONE = ("clip", "pretrained", "quick_gelu", "precision", "memory", "backend", "text_batch", "device")


class Randomness:
    """torch's default generators as one task alone would have them; a context in which they are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.states = self._get()

    def _get(self) -> tuple[Tensor, Tensor | None]:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return torch.get_rng_state(), cuda

    def _set(self, states: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], self.device)

    def __enter__(self) -> None:
        self.outer = self._get()
        self._set(self.states)

    def __exit__(self, *_: object) -> None:
        self.states = self._get()
        self._set(self.outer)


@dataclass
class Member:
    """A task of a job and how far it is.

    Args:
        task: its name and settings.
        row: what the table shows of it.
        run: prepared; None: it was finished before.
        results: as results.json holds them, once it is finished.
        error: why it failed.
        model: on the group's backbone, while the group is trained.
        steps: its trainer's.
        batch: that of its next step.
        size: images of a batch.
        from_features: whether it is a batch of their features.
        at: its next step.
        end: the step before which it ends; known early where it has ended.
    """

    task: Task
    row: Row
    run: Run | None = None
    results: dict[str, Any] | None = None
    error: str | None = None
    model: FastPromptedCLIP | None = None
    steps: Steps | None = None
    batch: Batch | None = None
    randomness: Randomness | None = None
    size: int = 0
    from_features: bool = False
    at: int = 0
    end: int = 0

    @property
    def config(self) -> TrainConfig:
        return self.task.config

    def fail(self, error: BaseException) -> None:
        """Note that the task failed; the others go on."""
        self.error = " ".join(str(error).split()) or type(error).__name__
        self.steps = self.batch = None
        self.row.ended("failed", self.error)
        logger.warning("task %s failed: %s", self.task.name, self.error)


@dataclass
class Job:
    """Tasks in a folder.

    Args:
        out: the folder.
        members: its tasks.
        groups: names of the tasks that share steps, in their order; those of unfinished groups may be missing.
        ended: tasks that ended early by failing for good -> their step and why.
    """

    out: Path
    members: list[Member]
    groups: list[list[str]] = field(default_factory=list)
    ended: dict[str, tuple[int, str]] = field(default_factory=dict)

    def write(self) -> None:
        """Write tasks.json."""
        write_json(self.out / JOB_FILE, {"groups": self.groups, "ended": self.ended})


def prepare(tasks: Sequence[Task], out: Path, resume: bool) -> Job:
    """Check everything that can be checked without the CLIP and without decoding an image."""
    known = read_json(out / JOB_FILE) if (out / JOB_FILE).is_file() else None
    if known is not None and not resume:
        raise ValueError(f"out={str(out)!r} holds tasks already; add --resume to go on with them, or pass another out")
    if known is None and resume:
        raise ValueError(f"nothing to resume: out={str(out)!r} holds no tasks; leave out --resume to start them")
    names = [task.name for task in tasks]
    groups: list[list[str]] = known["groups"] if known else []
    if missing := [name for group in groups for name in group if name not in names]:
        raise ValueError(f"cannot resume {out}: the file lacks its tasks {shorten(missing)}; wanted all of them")
    scan = functools.cache(scan_folder)
    members = []
    for task in tasks:
        config = task.config.changed(resume=is_run(Path(task.config.out)), progress=False)
        config = with_cache(config, Path(config.out) / CONFIG_FILE)
        member = Member(Task(task.name, config), Row(task.name))
        try:
            if (results := finished(config)) is not None:
                member.results = results
                member.row.ended("done", accuracy=results["test"]["accuracy"])
            else:
                member.run = Run.prepare(config, scan)
        except ValueError as error:
            raise ValueError(f"task {task.name}: {error}") from error
        members.append(member)
    job = Job(out, members, groups)
    for name, (step, why) in (known["ended"] if known else {}).items():
        member = members[names.index(name)]
        if is_run(Path(member.config.out)):  # else its folder was taken away, for it to be tried again
            job.ended[name] = step, why
            member.error, member.end = why, step
            member.row.ended("failed", why)
    return job


def of_one_backbone(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Tasks that can be siblings."""
    return _together(members, lambda member: repr([member.config.to_dict()[name] for name in OF_THE_BACKBONE]))


def of_one_shape(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Tasks whose prompts have one shape."""
    return _together(members, lambda member: repr((member.config.method, member.config.method_config())))


def _together(members: Sequence[Member], key: Callable[[Member], str]) -> Iterator[list[Member]]:
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(key(member), []).append(member)
    yield from found.values()
