"""The tasks of a job, what is known of each, and the job's own file."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from upt_fast.common.messages import shorten
from upt_fast.data.folder import list_folders, scan_folder
from upt_fast.model import FastPromptedCLIP
from upt_fast.tasks.grid import Task
from upt_fast.tasks.table import Row
from upt_fast.train.checkpoint import is_run, read_json, write_json
from upt_fast.train.config import TrainConfig
from upt_fast.train.images import with_cache
from upt_fast.train.loop import Run, finished
from upt_fast.train.randomness import Randomness
from upt_fast.train.setup import CONFIG_FILE
from upt_fast.train.trainer import Batch, Steps

logger = logging.getLogger("upt_fast")

JOB_FILE = "tasks.json"
# what is one backbone's, and may not differ among its siblings
OF_THE_BACKBONE = ("clip", "pretrained", "quick_gelu", "precision", "memory", "backend", "text_batch", "device")


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

    @property
    def open(self) -> bool:
        """Whether it has neither finished nor failed."""
        return self.run is not None and self.results is None and self.error is None

    def finish(self, results: dict[str, Any]) -> None:
        """Note the task's results."""
        self.results = results
        test = results["test"] or {}  # None without test images
        self.row.ended("done", accuracy=test.get("accuracy"))

    def fail(self, error: BaseException | str) -> None:
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
        written: whether this process keeps the job's own file.
    """

    out: Path
    members: list[Member]
    groups: list[list[str]] = field(default_factory=list)
    ended: dict[str, tuple[int, str]] = field(default_factory=dict)

    written: bool = True

    def note_ended(self, ended: Mapping[str, Sequence[Any]]) -> None:
        """Take over what is known of tasks that failed for good, but for those whose folder was taken away since."""
        for member in self.members:
            if member.task.name in ended and is_run(Path(member.config.out)):
                step, why = ended[member.task.name]
                self.ended[member.task.name] = step, why
                member.error, member.end = why, step
                member.row.ended("failed", why)

    def begin(self, group: Sequence[Member]) -> None:
        """Write down that tasks are going to share steps, before they do."""
        self.groups.append([member.task.name for member in group])
        self.write()

    def write(self) -> None:
        """Write tasks.json."""
        if self.written:
            write_json(self.out / JOB_FILE, {"groups": self.groups, "ended": self.ended})


def prepare(tasks: Sequence[Task], out: Path, resume: bool, here: bool = True) -> Job:
    """Check everything that can be checked without the CLIP and without decoding an image.

    Args:
        tasks: of the job.
        out: its folder.
        resume: whether it is one that was stopped.
        here: whether the tasks are trained on this machine, which then must have their device.
    Raises:
        ValueError: see :func:`upt_fast.tasks.run.train_tasks`.
    """
    known = read_json(out / JOB_FILE) if (out / JOB_FILE).is_file() else None
    if known is not None and not resume:
        raise ValueError(f"out={str(out)!r} holds tasks already; add --resume to go on with them, or pass another out")
    if known is None and resume:
        raise ValueError(f"nothing to resume: out={str(out)!r} holds no tasks; leave out --resume to start them")
    names = [task.name for task in tasks]
    groups: list[list[str]] = known["groups"] if known else []
    if missing := [name for group in groups for name in group if name not in names]:
        raise ValueError(f"cannot resume {out}: the file lacks its tasks {shorten(missing)}; wanted all of them")
    members = members_of(tasks, here)
    job = Job(out, members, groups)
    job.note_ended(known["ended"] if known else {})
    return job


def members_of(tasks: Sequence[Task], here: bool = True) -> list[Member]:
    """Tasks as they stand in their folders: new, to be resumed, or finished; see :func:`prepare`."""
    scan, scan_test = functools.cache(scan_folder), functools.cache(list_folders)
    members = []
    for task in tasks:
        config = task.config.changed(resume=is_run(Path(task.config.out)), progress=False)
        config = with_cache(config, Path(config.out) / CONFIG_FILE)
        member = Member(Task(task.name, config), Row(task.name))
        try:
            if (results := finished(config)) is not None:
                member.finish(results)
            else:
                member.run = Run.prepare(config, scan, here, scan_test)
        except ValueError as error:
            raise ValueError(f"task {task.name}: {error}") from error
        members.append(member)
    return members


def of_one_backbone(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Tasks that can be siblings."""
    return _together(members, backbone_of)


def backbone_of(member: Member) -> str:
    """What tells the CLIP of a task, as it is used, from others."""
    return repr([member.config.to_dict()[name] for name in OF_THE_BACKBONE])


def of_one_shape(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Tasks whose prompts have one shape; those whose steps are of several batches apart from the others."""

    def shape(member: Member) -> str:
        config = member.config
        return repr((config.method, config.method_config(), config.accumulate > 1))

    return _together(members, shape)


class Portion(NamedTuple):
    """Tasks of one shape that are still to be trained.

    Args:
        members: in their order.
        recorded: whether they are a group of the job's file, of which some may have ended; else as many of the first
            ones as fit become a group.
    """

    members: list[Member]
    recorded: bool


def portions(job: Job, members: Sequence[Member], most: int | None = None) -> list[Portion]:
    """What is to be trained of tasks on one CLIP; of what is in no group yet at most so many tasks together."""
    found = []
    for shape in of_one_shape(members):
        by_name, left = {member.task.name: member for member in shape}, list(shape)
        for names in job.groups:
            if names[0] in by_name:
                group = [by_name[name] for name in names]
                left = [member for member in left if member not in group]
                if any(member.open for member in group):
                    found.append(Portion(group, True))
        left = [member for member in left if member.open]
        parts = -(-len(left) // (most or max(1, len(left))))
        for part in range(parts):  # as equal as can be
            first, end = (len(left) * i // parts for i in (part, part + 1))
            found.append(Portion(left[first:end], False))
    return found


def rest_of(members: Sequence[Member], count: int) -> list[Portion]:
    """What is left of a portion once its first tasks are a group."""
    return [Portion(list(members[count:]), False)] if members[count:] else []


def _together(members: Sequence[Member], key: Callable[[Member], str]) -> Iterator[list[Member]]:
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(key(member), []).append(member)
    yield from found.values()
