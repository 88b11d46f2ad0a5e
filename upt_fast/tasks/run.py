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
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upt_fast.data.dataset import steps_of_epoch
from upt_fast.engine.memory import Need, peak
from upt_fast.engine.tuning.candidates import STEP
from upt_fast.model import FastPromptedCLIP
from upt_fast.steps.planning import Step
from upt_fast.tasks.grid import Task
from upt_fast.tasks.job import Job, Member, of_one_backbone, portions, prepare, rest_of
from upt_fast.tasks.joint import MultiTask
from upt_fast.tasks.memory import room
from upt_fast.tasks.table import Table
from upt_fast.train.checkpoint import is_run, locked, read_json, write_json
from upt_fast.train.features import FixedFeatures
from upt_fast.train.interrupt import InterruptBetweenSteps
from upt_fast.train.randomness import Randomness
from upt_fast.train.recording import TrainingDivergedError
from upt_fast.train.routes import take_known_route
from upt_fast.train.setup import (
    RESULTS_FILE,
    SPLIT_FILE,
    build_model,
    parts_of,
    resolve_device,
    trains_on_features,
)
from upt_fast.train.trainer import Batch


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
                _train_all(job, members, max_memory, table)
        finally:
            summarise(job)
    return job.members


@dataclass
class Backbone:
    """What the tasks on one CLIP share.

    Args:
        model: one of theirs, whose siblings the others become; None before the CLIP is loaded.
        features: what computes features that no prompt changes; see :func:`upt_fast.train.setup.fixed_features`.
    """

    model: FastPromptedCLIP | None = None
    features: dict[Any, FixedFeatures] = field(default_factory=dict)

    def model_of(self, member: Member) -> FastPromptedCLIP:
        """A task's model, made now."""
        config, out = member.config, Path(member.config.out)
        run = member.run
        classnames = read_json(out / SPLIT_FILE)["classnames"] if run is None else run.listing.classnames
        model = build_model(config, classnames, out, resolve_device(config.device), self.model)
        self.model = self.model or model
        return model


def _train_all(job: Job, members: list[Member], max_memory: int | None, table: Table) -> None:
    """Train tasks on one CLIP, as many at once as fit."""
    backbone, left = Backbone(), portions(job, members)
    while left:
        group, recorded = left.pop(0)
        if not recorded:
            rest, group = group, fitting(group, backbone, max_memory)
            left[:0] = rest_of(rest, len(group))
            job.begin(group)
        train_group(job, group, backbone, table.show)


def fitting(members: Sequence[Member], backbone: Backbone, max_memory: int | None) -> list[Member]:
    """The first tasks whose step needs no more memory than there is, at least one."""
    limit, chosen, needs = max_memory, list[Member](), list[Need]()
    for member in members:
        member.model = backbone.model_of(member)
        if limit is None:
            limit = room(resolve_device(member.config.device))
        own = Step(member.model, member.config.batch_size).needs()
        needs = [*own] if in_turn(member) else [*needs, *own]
        if chosen and peak(*needs) > limit:
            member.model = None
            break
        chosen.append(member)
    return chosen


def train_group(job: Job, group: list[Member], backbone: Backbone, show: Callable[[], None]) -> None:
    """Train tasks that share steps until each has finished or failed.

    Args:
        job: learns which tasks ended early.
        group: of one shape, in the order in which they stand in the job's file.
        backbone: theirs.
        show: called after each step.
    """
    with contextlib.ExitStack() as stack, InterruptBetweenSteps() as interrupt:
        for member in group:
            _begin(member, group, backbone, stack, interrupt)
        try:
            _take_steps(job, [member for member in group if member.model is not None], show)
        finally:
            for member in group:
                if member.steps is not None:
                    member.steps.close()
                member.model = member.steps = member.batch = member.run = None


def _begin(
    member: Member,
    group: Sequence[Member],
    backbone: Backbone,
    stack: contextlib.ExitStack,
    interrupt: InterruptBetweenSteps,
) -> None:
    """Make a task's model and trainer, or what stands in for a task that has ended."""
    model = member.model or backbone.model_of(member)
    member.model = None
    config, run = member.config, member.run
    if run is None or member.error is not None:
        if is_run(Path(config.out)):
            count = len(read_json(Path(config.out) / SPLIT_FILE)["train"])
            member.size = min(config.batch_size, count)
            if member.results is not None:
                epochs = member.results.get("epochs_done", config.epochs)
                member.end = epochs * steps_of_epoch(count, config.batch_size, config.accumulate)
            member.at, member.model = member.end, model
            member.from_features = trains_on_features(config, model)
        return
    with contextlib.ExitStack() as opened:
        try:
            opened.enter_context(run.opened())
            _take_route(group, model)
            run.begin(model, len(group), backbone.features)
            trainer = run.trainer
            if trainer is None or trainer.done:
                _finish(member)
        except (ValueError, OSError) as error:
            member.fail(error)
            return
        stack.enter_context(opened.pop_all())
    if trainer is None:  # nothing to train, and nothing that shares steps
        return
    member.size, member.from_features = min(config.batch_size, len(run.data.train)), trainer.from_features
    member.at = trainer.state.step
    member.end = member.at if trainer.done else config.epochs * len(trainer.sampler)
    member.model, member.randomness = model, Randomness(trainer.device)
    if not trainer.done:
        member.row.begin(member.end, member.at)
        member.steps = trainer.steps(member.row, interrupt)


def _take_route(group: Sequence[Member], model: FastPromptedCLIP) -> None:
    """Put the towers that a group shares on the route that is known for all its classes and images together."""
    if model.auto and not model.settled:
        runs = [member.run for member in group if member.run is not None]
        classes = sum(len(run.listing.classnames) for run in runs)
        images = sum(min(run.config.batch_size, len(run.split.train)) for run in runs)
        began = any(os.path.lexists(run.out / "last") for run in runs)
        from_features = trains_on_features(runs[0].config, model)
        take_known_route(model, model.route_key(STEP, images, from_features, classes), began)
    for member in group:
        if member.model is not None:
            member.model.settled = True


def _take_steps(job: Job, group: list[Member], show: Callable[[], None]) -> None:
    """Take the steps of a group, from the first that one of its tasks has not taken."""
    for member in group:
        if member.steps is not None:
            _advance(job, member, None)
    together: dict[tuple[int, ...], MultiTask] = {}
    for step in itertools.count(min((member.at for member in group if member.batch is not None), default=0)):
        if not any(member.batch is not None for member in group):
            return
        sharing = [i for i, member in enumerate(group) if step < member.end]
        if in_turn(group[0]):
            _step_in_turn(job, [group[i] for i in sharing], step)
            show()
            continue
        key = tuple(sharing)
        if key not in together:
            together.clear()
            together[key] = MultiTask([model for i in sharing if (model := group[i].model) is not None])
        _step(job, together[key], [group[i] for i in sharing], step)
        show()


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
    losses = [F.cross_entropy if t is None else t.loss for t in trainers]
    found = together.losses(batches, losses, randomness)
    real = [(i, trainer) for i, trainer in enumerate(trainers) if training[i] and trainer is not None]
    for _, trainer in real:
        trainer.optimizer.zero_grad(set_to_none=True)
    torch.stack([found[i][0] for i, _ in real]).sum().backward()
    for i, trainer in real:
        trainer.optimizer.step()
        _advance(job, sharing[i], (found[i][0].detach(), found[i][1].detach()))


def in_turn(member: Member) -> bool:
    """Whether a task takes its steps for itself: one of several batches is to have the memory of one."""
    return member.config.accumulate > 1


def _step_in_turn(job: Job, sharing: Sequence[Member], step: int) -> None:
    """One step of each task that is at it, as it would take it alone."""
    for member in sharing:
        if member.at != step or member.batch is None:
            continue
        assert member.model is not None
        assert member.run is not None
        assert member.run.trainer is not None
        assert member.randomness is not None
        parts, trainer = parts_of(member.config, member.model), member.run.trainer
        assert parts is not None
        trainer.optimizer.zero_grad(set_to_none=True)
        with member.randomness:
            result = member.model.backward_in_parts(*member.batch, parts, trainer.loss)
        trainer.optimizer.step()
        _advance(job, member, result)


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
    member.finish(member.run.finish())


def summarise(job: Job) -> None:
    """Write the job's results.json: of each task its accuracy, or why it failed."""
    tasks: dict[str, Any] = {}
    for member in job.members:
        entry: dict[str, Any] = {"status": member.row.status}
        if member.results is not None:
            test = member.results["test"] or {}
            entry |= {"accuracy": test.get("accuracy"), "mean_class_accuracy": test.get("mean_class_accuracy")}
        if member.error is not None:
            entry["error"] = member.error
        tasks[member.task.name] = entry
    write_json(job.out / RESULTS_FILE, {"tasks": tasks})
