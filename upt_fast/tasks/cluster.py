"""A job on several workers, which Ray places on the machines of a cluster, or on this one.

Here the job is kept: its file, its table, its summary. A worker is an actor with one frozen backbone; it takes a
portion of the tasks of one shape, says how many of them fit into its step, and trains those, writing their folders
itself, which every machine must see under one path. What a lost worker held goes to another one, from the last
checkpoints: as steps of a group always hold the same tasks (run.py), it ends in the bits that it would have ended in.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upt_fast.tasks.grid import Task
from upt_fast.tasks.job import (
    Job,
    Member,
    Portion,
    backbone_of,
    of_one_backbone,
    portions,
    prepare,
    rest_of,
)
from upt_fast.tasks.run import summarise
from upt_fast.tasks.table import Row, Table
from upt_fast.tasks.worker import Outcome, Worker, settings_of
from upt_fast.train.checkpoint import locked

logger = logging.getLogger("upt_fast")

TRIES = 3  # of a portion whose worker is lost each time: it may be the reason
POLL = 0.5  # seconds between two looks at the workers
PATIENCE = 60.0  # seconds without a worker before it is told


def train_on_ray(
    tasks: Sequence[Task],
    out: str | Path,
    workers: int,
    resume: bool = False,
    max_memory: int | None = None,
    progress: bool = True,
    address: str | None = None,
    cpus: int | None = None,
) -> list[Member]:
    """Train all tasks on so many workers; as :func:`upt_fast.tasks.run.train_tasks` otherwise.

    Args:
        workers: at least 1.
        max_memory: bytes that a worker's step may need beside the weights; None: half of its device's free memory,
            divided among the workers where they may share it.
        address: of a Ray cluster; None: RAY_ADDRESS's, or one on this machine for as long as the job takes.
        cpus: cores, and threads, of a worker; None: the cluster's divided by workers.
    Raises:
        ValueError: as train_tasks; Ray is not installed, or there is no cluster at that address.
    """
    ray = _ray()
    if numbered := [task.name for task in tasks if task.config.device.startswith("cuda:")]:
        raise ValueError(
            f"task {numbered[0]}: device='cuda:N' with workers; wanted auto, cpu or cuda: Ray gives GPUs out"
        )
    job = prepare(tasks, Path(out), resume, here=False)
    if not any(member.open for member in job.members):
        summarise(job)
        return job.members
    job.out.mkdir(parents=True, exist_ok=True)
    with locked(job.out), Table([member.row for member in job.members], progress) as table:
        started = _connect(ray, address)
        try:
            _Driver(ray, job, workers, max_memory, cpus, table).run()
        finally:
            summarise(job)
            if started:
                ray.shutdown()
    return job.members


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("workers are placed by Ray, which is not installed: pip install upt_fast[cluster]") from error
    return ray


def _connect(ray: Any, address: str | None) -> bool:
    """Whether the connection is this job's to end."""
    if ray.is_initialized():
        return False
    # what chooses methods and numbers, for workers elsewhere too
    variables = {name: value for name, value in os.environ.items() if name.startswith("UPT_FAST_")}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            configure_logging=False,
            include_dashboard=None if address or os.environ.get("RAY_ADDRESS") else False,
            runtime_env={"env_vars": variables} if variables else None,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"no Ray cluster at {address or os.environ.get('RAY_ADDRESS') or 'this machine'}: {reason}"
        ) from error
    return True


class _Board:
    """An actor that holds the newest rows until they are asked for."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def put(self, rows: dict[str, Row]) -> None:
        self.rows.update(rows)

    def take(self) -> dict[str, Row]:
        rows, self.rows = self.rows, {}
        return rows


@dataclass
class _Placed:
    """An actor and what it is at: nothing before it is there."""

    number: int
    actor: Any
    portion: Portion | None = None
    process: str = ""


@dataclass
class _Driver:
    """Hands portions to workers until none is left."""

    ray: Any
    job: Job
    workers: int
    max_memory: int | None
    cpus: int | None
    table: Table
    left: list[Portion] = field(default_factory=list)
    running: dict[Any, _Placed] = field(default_factory=dict)  # what is awaited -> the worker
    idle: list[_Placed] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)  # the first task of a portion -> workers it was lost with
    wanted: dict[str, int] = field(default_factory=dict)  # by each worker
    by_name: dict[str, Member] = field(init=False)
    board: Any = field(init=False)  # a _Board

    def run(self) -> None:
        """Train what is left of the job."""
        # no smaller than keeps all workers busy: tasks are faster together
        most = -(-sum(member.open for member in self.job.members) // self.workers)
        for members in of_one_backbone(self.job.members):
            self.left += portions(self.job, members, most)
        self.by_name = {member.task.name: member for member in self.job.members}
        self.board = self.ray.remote(num_cpus=0)(_Board).remote()
        try:
            for number in range(min(self.workers, len(self.left))):
                self._place(number + 1)
            self._work()
        finally:
            for worker in [*self.running.values(), *self.idle]:
                self.ray.kill(worker.actor)
            self.ray.kill(self.board)

    def _work(self) -> None:
        waiting = time.monotonic()
        while self.left or any(worker.portion for worker in self.running.values()):
            while self.left and self.idle:
                self._give(self.idle.pop(), self.left.pop(0))
            done, _ = self.ray.wait(list(self.running), timeout=POLL)
            for reference in done:
                self._hear(reference, self.running.pop(reference))
            for name, row in self._rows().items():
                if self.by_name[name].open:
                    vars(self.by_name[name].row).update(vars(row))
            self.table.show()
            if self.idle or any(worker.process for worker in self.running.values()):
                waiting = time.monotonic()
            elif time.monotonic() - waiting > PATIENCE:
                waiting = time.monotonic()
                logger.warning("no worker is placed yet: each wants %s of %s", self.wanted, self._resources())

    def _rows(self) -> dict[str, Row]:
        try:
            rows: dict[str, Row] = self.ray.get(self.board.take.remote(), timeout=POLL)
            return rows
        except (self.ray.exceptions.RayError, TimeoutError):  # a table may be late
            return {}

    def _resources(self) -> dict[str, float]:
        found = self.ray.cluster_resources()
        return {name: found.get(name, 0) for name in ("CPU", "GPU")}

    def _place(self, number: int) -> None:
        """Ask for a worker; it gets work once it is there."""
        found, devices = self._resources(), {member.config.device for member in self.job.members}
        gpus = int("cuda" in devices or ("auto" in devices and found["GPU"] > 0))
        cpus = self.cpus or max(1, int(found["CPU"]) // self.workers)
        self.wanted = {"CPU": cpus, "GPU": gpus}
        # Ray gives each as many threads as it has cores
        place = self.ray.remote(num_cpus=cpus, num_gpus=gpus)(Worker)
        board = self.board

        def tell(rows: dict[str, Row]) -> None:
            board.put.remote(rows)

        actor = place.remote(self.workers, tell)
        self.running[actor.describe.remote()] = _Placed(number, actor)

    def _give(self, worker: _Placed, portion: Portion) -> None:
        """Let a worker train a group, or say first what of a portion is one."""
        worker.portion = portion
        settings, key = settings_of(portion.members), backbone_of(portion.members[0])
        if portion.recorded:
            reference = worker.actor.train.remote(key, settings, str(self.job.out), self.job.ended)
        else:
            reference = worker.actor.fit.remote(key, settings, self.max_memory)
        self.running[reference] = worker

    def _hear(self, reference: Any, worker: _Placed) -> None:
        portion, worker.portion = worker.portion, None
        errors = self.ray.exceptions
        try:
            answer = self.ray.get(reference)
        except errors.RayTaskError as error:  # the worker is there, the tasks failed together
            assert portion is not None
            cause = error.cause if error.cause is not None else error
            for member in portion.members:
                if member.open:
                    member.fail(str(cause))
            self.idle.append(worker)
        except errors.RayError as error:
            self._replace(worker, portion, error)
        else:
            if portion is None:
                process, machine = answer
                worker.process = f"process {process} on {machine}"
                logger.info("worker %d: %s", worker.number, worker.process)
                self.idle.append(worker)
            elif portion.recorded:
                self._note(portion, answer)
                self.idle.append(worker)
            else:
                self.left[:0] = rest_of(portion.members, len(answer))
                group = portion.members[: len(answer)]
                self.job.begin(group)
                self._give(worker, Portion(group, True))

    def _note(self, portion: Portion, outcome: Outcome) -> None:
        self.job.ended.update(outcome.ended)
        if outcome.ended:
            self.job.write()
        for member in portion.members:
            name = member.task.name
            if not member.open:
                continue
            vars(member.row).update(vars(outcome.rows[name]))
            if name in outcome.results:
                member.finish(outcome.results[name])
            else:
                member.fail(outcome.errors.get(name, "it was not trained"))

    def _replace(self, worker: _Placed, portion: Portion | None, error: Exception) -> None:
        """Another worker for one that is lost; what it held is the next to be given out."""
        reason = " ".join(str(error).split())
        logger.warning("worker %d is lost (%s): %s", worker.number, worker.process or "not placed yet", reason[:200])
        name = portion.members[0].task.name if portion is not None else ""
        self.lost[name] += 1
        if portion is None:
            if self.lost[name] >= TRIES:
                raise RuntimeError(f"workers cannot begin: {reason}") from error
        elif self.lost[name] < TRIES:
            self.left.insert(0, portion)
        else:
            for member in portion.members:
                if member.open:
                    member.fail(f"its worker was lost {TRIES} times, the last time: {reason[:200]}")
        self._place(worker.number)
