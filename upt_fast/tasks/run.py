"""A job: many tasks on one frozen backbone, in groups whose batches run through the towers together.

Each task is a run of ``upt-fast train`` in a folder of its own, with its own images, optimizer, schedule, random
numbers and checkpoints; it ends, or fails, for itself. Tasks with one CLIP, method and options are of one shape and
share each step, as many at once as memory allows; groups take turns.

A step's numbers depend, in their last bits, on which tasks share it. So step g of a group always holds the tasks whose
own end lies behind g: where a job is resumed from checkpoints that are not of one step, tasks that are ahead, or done,
stand in with empty images until the others have caught up, and nothing of them changes. ``JOB/tasks.json`` holds the
groups, and where tasks ended early.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
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
from upt_fast.tasks.joint import MultiTask
from upt_fast.tasks.memory import room
from upt_fast.tasks.table import Row, Table
from upt_fast.train.checkpoint import is_run, locked, read_json, write_json
from upt_fast.train.config import TrainConfig
from upt_fast.train.interrupt import InterruptBetweenSteps
from upt_fast.train.loop import Run, finished
from upt_fast.train.recording import TrainingDivergedError
from upt_fast.train.setup import RESULTS_FILE, SPLIT_FILE, build_model, fixed_features_train, resolve_device
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


def train_tasks(
    tasks: Sequence[Task], out: str | Path, resume: bool = False, max_memory: int | None = None, progress: bool = True
) -> list[Member]:
    """Train all tasks; each ends as :func:`upt_fast.train.train` would end it, in a folder of its own.

    Args:
        tasks: with out / name as their folders.
        out: the job's folder.
        resume: go on where the job in out stopped.
        max_memory: bytes that a step may need beside the weights; None: half of what is free.
        progress: show a table on a terminal.
    Returns:
        the tasks with their results, or why they failed.
    Raises:
        ValueError: bad settings or data of any task, with its name, before an image is decoded; out holds a job
            already, or with resume none or one of other tasks.
    """
    job = prepare(tasks, Path(out), resume)
    job.out.mkdir(parents=True, exist_ok=True)
    with locked(job.out), Table([member.row for member in job.members], progress) as table:
        try:
            for members in of_one_backbone(job.members):
                backbone: FastPromptedCLIP | None = None
                for group in of_one_shape(members):
                    backbone = _train_groups(job, group, backbone, max_memory, table)
        finally:
            _summarise(job)
    return job.members


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


def _train_groups(
    job: Job, members: list[Member], backbone: FastPromptedCLIP | None, max_memory: int | None, table: Table
) -> FastPromptedCLIP | None:
    """Train tasks of one shape, as many at once as fit; returns a model on their backbone."""
    left = list(members)
    recorded = [group for group in job.groups if group[0] in {member.task.name for member in members}]
    by_name = {member.task.name: member for member in members}
    for names in recorded:
        group = [by_name[name] for name in names]
        left = [member for member in left if member not in group]
        if any(member.run is not None and member.error is None for member in group):
            backbone = _train_group(job, group, backbone, table)
    while left := [member for member in left if member.error is None and (member.run is not None)]:
        group, backbone = fitting(left, backbone, max_memory)
        left = left[len(group) :]
        job.groups.append([member.task.name for member in group])
        job.write()
        backbone = _train_group(job, group, backbone, table)
    return backbone


def _model(member: Member, backbone: FastPromptedCLIP | None) -> FastPromptedCLIP:
    config = member.config
    classnames = _classnames(member)
    return build_model(config, classnames, Path(config.out), resolve_device(config.device), backbone)


def _classnames(member: Member) -> Sequence[str]:
    if member.run is not None:
        return member.run.listing.classnames
    names: list[str] = read_json(Path(member.config.out) / SPLIT_FILE)["classnames"]
    return names


def fitting(
    members: Sequence[Member], backbone: FastPromptedCLIP | None, max_memory: int | None
) -> tuple[list[Member], FastPromptedCLIP]:
    """The first tasks whose step needs no more memory than there is, at least one."""
    limit, chosen = max_memory, []
    for member in members:
        member.model = _model(member, backbone)
        backbone = backbone or member.model
        chosen.append(member)
        if limit is None:
            limit = room(resolve_device(member.config.device))
        models = [m.model for m in chosen if m.model is not None]
        if len(chosen) > 1 and MultiTask(models).predict_peak_memory([m.config.batch_size for m in chosen]) > limit:
            chosen.pop().model = None
            break
    assert backbone is not None
    return chosen, backbone


def _train_group(job: Job, group: list[Member], backbone: FastPromptedCLIP | None, table: Table) -> FastPromptedCLIP:
    with contextlib.ExitStack() as stack, InterruptBetweenSteps() as interrupt:
        for member in group:
            backbone = _begin(member, group, backbone, stack, interrupt)
        try:
            _take_steps(job, [member for member in group if member.model is not None], table)
        finally:
            for member in group:
                if member.steps is not None:
                    member.steps.close()
                member.model = member.steps = member.batch = member.run = None
    assert backbone is not None
    return backbone


def _begin(
    member: Member,
    group: Sequence[Member],
    backbone: FastPromptedCLIP | None,
    stack: contextlib.ExitStack,
    interrupt: InterruptBetweenSteps,
) -> FastPromptedCLIP | None:
    """Make a task's model and trainer, or what stands in for a task that has ended."""
    model = member.model or _model(member, backbone)
    backbone, member.model = backbone or model, None
    config, run = member.config, member.run
    if run is None or member.error is not None:
        if is_run(Path(config.out)):
            count = len(read_json(Path(config.out) / SPLIT_FILE)["train"])
            member.size = min(config.batch_size, count)
            if member.results is not None:
                member.end = member.results.get("epochs_done", config.epochs) * max(1, count // config.batch_size)
            member.at, member.model = member.end, model
            member.from_features = fixed_features_train(config, model)
        return backbone
    with contextlib.ExitStack() as opened:
        try:
            opened.enter_context(run.opened())
            run.begin(model, len(group))
            trainer = run.trainer
            if trainer is None or trainer.done:
                _finish(member)
        except (ValueError, OSError) as error:
            member.fail(error)
            return backbone
        stack.enter_context(opened.pop_all())
    if trainer is None:  # nothing to train, and nothing that shares steps
        return backbone
    member.size, member.from_features = min(config.batch_size, len(run.data.train)), trainer.from_features
    member.at = trainer.state.step
    member.end = member.at if trainer.done else config.epochs * len(trainer.sampler)
    member.model, member.randomness = model, Randomness(trainer.device)
    if not trainer.done:
        member.row.begin(member.end, member.at)
        member.steps = trainer.steps(member.row, interrupt)
    return backbone


def _take_steps(job: Job, group: list[Member], table: Table) -> None:
    """Take the steps of a group, from the first that one of its tasks has not taken."""
    for member in group:
        if member.steps is not None:
            _advance(job, member, None)
    together: dict[tuple[int, ...], MultiTask] = {}
    for step in itertools.count(min((member.at for member in group if member.batch is not None), default=0)):
        if not any(member.batch is not None for member in group):
            return
        sharing = [i for i, member in enumerate(group) if step < member.end]
        key = tuple(sharing)
        if key not in together:
            together.clear()
            together[key] = MultiTask([model for i in sharing if (model := group[i].model) is not None])
        _step(job, together[key], [group[i] for i in sharing], step)
        table.show()


def _step(job: Job, together: MultiTask, sharing: Sequence[Member], step: int) -> None:
    """One step of the tasks that are at it; the others stand in."""
    training = [member.at == step and member.batch is not None for member in sharing]
    batches = [
        member.batch if real and member.batch is not None else empty_batch(member)
        for member, real in zip(sharing, training, strict=True)
    ]

    def randomness(i: int) -> Any:
        own = sharing[i].randomness
        return own if training[i] and own is not None else contextlib.nullcontext()

    trainers = [member.run.trainer if member.run is not None else None for member in sharing]
    losses = [torch.nn.functional.cross_entropy if t is None else t.loss for t in trainers]
    found = together.losses(batches, losses, randomness)
    real = [(i, trainer) for i, trainer in enumerate(trainers) if training[i] and trainer is not None]
    for _, trainer in real:
        trainer.optimizer.zero_grad(set_to_none=True)
    torch.stack([found[i][0] for i, _ in real]).sum().backward()
    for i, trainer in real:
        trainer.optimizer.step()
        _advance(job, sharing[i], (found[i][0].detach(), found[i][1].detach()))


def empty_batch(member: Member) -> Batch:
    """A batch of a task's size without images."""
    assert member.model is not None
    model, device = member.model, member.model.logit_scale.device
    shape = (model.embed_dim,) if member.from_features else (3, *model.vision_tower.image_size)
    return torch.zeros(member.size, *shape, device=device), torch.zeros(member.size, dtype=torch.int64, device=device)


def _advance(job: Job, member: Member, result: tuple[Tensor, Tensor] | None) -> None:
    """Give a task its step's result and take its next batch; finish it where that was its last step."""
    assert member.steps is not None
    assert member.randomness is not None
    member.at += result is not None
    try:
        with member.randomness:
            member.batch = next(member.steps) if result is None else member.steps.send(result)
    except StopIteration:
        member.batch, member.end = None, member.at
        with member.randomness:
            try:
                _finish(member)
            except (ValueError, OSError) as error:
                member.fail(error)
    except TrainingDivergedError as error:
        member.fail(error)
        member.end = member.at
        job.ended[member.task.name] = member.at, str(member.error)
        job.write()
    except (ValueError, OSError) as error:
        member.fail(error)


def _finish(member: Member) -> None:
    assert member.run is not None
    member.row.status = "testing"
    member.results = member.run.finish()
    member.row.ended("done", accuracy=member.results["test"]["accuracy"])


def _summarise(job: Job) -> None:
    """Write the job's results.json: of each task its accuracy, or why it failed."""
    tasks: dict[str, Any] = {}
    for member in job.members:
        entry: dict[str, Any] = {"status": member.row.status}
        if member.results is not None:
            test = member.results["test"]
            entry |= {"accuracy": test["accuracy"], "mean_class_accuracy": test["mean_class_accuracy"]}
        if member.error is not None:
            entry["error"] = member.error
        tasks[member.task.name] = entry
    write_json(job.out / RESULTS_FILE, {"tasks": tasks})
