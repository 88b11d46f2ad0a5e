"""What a job is going to do, before it does it: ``upt-fast train --tasks FILE --dry-run``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from upt_fast.data.dataset import steps_of_epoch
from upt_fast.steps.planning import Step
from upt_fast.tasks.grid import Task
from upt_fast.tasks.job import Member, of_one_backbone, of_one_shape, prepare
from upt_fast.tasks.joint import MultiTask
from upt_fast.tasks.run import Backbone, empty_batch, fitting, in_turn
from upt_fast.train.images import GIB


class GroupPlan(NamedTuple):
    """Tasks that share steps.

    Args:
        names: of the tasks.
        method: that they have.
        steps: until the longest of them ends.
        images: of a step, while all train.
        flops: of such a step, forward and backward.
        memory: bytes that such a step needs beside the weights.
        seconds: of all steps, expected: of the FLOPs at the speed of a step that was timed.
    """

    names: tuple[str, ...]
    method: str
    steps: int
    images: int
    flops: int
    memory: int
    seconds: float


def plan_tasks(tasks: Sequence[Task], max_memory: int | None = None) -> list[GroupPlan]:
    """The groups of a job that is begun anew. Loads the CLIPs and times one step of each; decodes no image.

    Args:
        tasks: as for :func:`upt_fast.tasks.run.train_tasks`.
        max_memory: as there.
    Raises:
        ValueError: as there.
    """
    job = prepare(tasks, tasks[0].out, resume=False)
    plans: list[GroupPlan] = []
    for members in of_one_backbone(job.members):
        backbone = Backbone()
        speed: float | None = None  # FLOP/s
        for group in of_one_shape(members):
            left = list(group)
            while left:
                chosen = fitting(left, backbone, max_memory)
                left = left[len(chosen) :]
                plan, work, timed, together = _plan(chosen)
                if speed is None and work:
                    speed = timed / _seconds(together, chosen)
                plans.append(plan._replace(seconds=work / speed if speed else 0.0))
                for member in chosen:
                    member.model = None
    return plans


def _plan(group: Sequence[Member]) -> tuple[GroupPlan, int, int, MultiTask]:
    """The plan of a group, still without time; the FLOPs of all its steps and of a batch of each; its models."""
    flops, steps, work, timed, total, models = 0, 0, 0, 0, 0, []
    for member in group:
        assert member.run is not None
        assert member.model is not None
        model, batch_size, images = member.model, member.config.batch_size, len(member.run.split.train)
        member.size = min(batch_size, images)
        config = member.config
        whole = min(images, config.step_size, max(1, images // batch_size) * batch_size)  # of a step
        at_once = config.memory, member.size, len(model.classnames)
        cost = Step(model, whole).flops(*at_once)
        timed, total = timed + Step(model, member.size).flops(*at_once), total + whole
        trained = any(True for _ in model.parameters())
        member.end = config.epochs * steps_of_epoch(images, batch_size, config.accumulate) if trained else 0
        flops, steps, work = flops + cost, max(steps, member.end), work + cost * member.end
        models.append(model)
    together, sizes = MultiTask(models), [member.size for member in group]
    names = tuple(member.task.name for member in group)
    memory = together.predict_peak_memory(sizes)
    if in_turn(group[0]):
        memory = max(model.predict_peak_memory(size) for model, size in zip(models, sizes, strict=True))
    return GroupPlan(names, group[0].config.method, steps, total, flops, memory, 0.0), work, timed, together


def _seconds(together: MultiTask, members: Sequence[Member]) -> float:
    """Of a step, the second of two."""
    together.train()
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        found = together.losses([empty_batch(member) for member in members])
        torch.stack([loss for loss, _ in found]).sum().backward()
        if together.tasks[0].logit_scale.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        together.zero_grad(set_to_none=True)
    return seconds


def describe(tasks: Sequence[Task], max_memory: int | None = None) -> list[str]:
    """The plan, a line for each group."""
    plans = plan_tasks(tasks, max_memory)
    lines = []
    for number, plan in enumerate(plans, 1):
        shown = ", ".join(plan.names[:3]) + (f" and {len(plan.names) - 3} more" if len(plan.names) > 3 else "")
        lines.append(f"group {number}: {len(plan.names)} task(s) of {plan.method}: {shown}")
        lines.append(
            f"    {plan.steps} steps of up to {plan.images} images, {plan.flops / 1e9:.2f} GFLOPs each, "
            f"{plan.memory / GIB:.2f} GiB beside the weights, about {_time(plan.seconds)}"
        )
    total = sum(plan.seconds for plan in plans)
    folder = Path(tasks[0].out)
    lines.append(
        f"{len(tasks)} tasks in {len(plans)} group(s), about {_time(total)} of steps (of one that was timed; images, "
        f"validation and tests come on top), into {folder}"
    )
    return lines


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
