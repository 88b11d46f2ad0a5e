"""``upt-fast train --tasks``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from upt_fast.cli.messages import EXIT_FAILED
from upt_fast.common import processes
from upt_fast.common.sizes import parse_bytes
from upt_fast.tasks.grid import Task, read_tasks

if TYPE_CHECKING:
    from upt_fast.tasks.run import Member

HELP = "train many tasks, of datasets, shots, seeds and methods, on one frozen CLIP"


def add_options(parser: ArgumentParser) -> None:
    """Add the options of a job; what a task is stands in the file."""
    parser.add_argument(
        "--tasks",
        type=str,
        required=True,
        help="YAML file: settings of upt-fast train, of which lists expand to a task for each value; tasks: [...] has "
        "further settings, name: names them",
    )
    parser.add_argument(
        "--out", type=str | None, default=None, help="folder of the job, with one for each task; none: the file's out"
    )
    parser.add_argument("--resume", action="store_true", help="go on where the job in out stopped")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan: groups, steps, FLOPs, memory and time; train nothing"
    )
    parser.add_argument(
        "--max-memory",
        type=str | None,
        default=None,
        help="what a step may need beside the weights, such as 8GB: bounds the tasks that share one; none: half of "
        "what is free",
    )
    parser.add_argument(
        "--workers",
        type=int | None,
        default=None,
        help="processes that train groups of tasks side by side, placed by Ray on its cluster, or on this machine "
        "where there is none; none: this process",
    )
    parser.add_argument(
        "--ray-address", type=str | None, default=None, help="of the Ray cluster; none: RAY_ADDRESS, or this machine"
    )
    parser.add_argument(
        "--cpus-per-worker", type=int | None, default=None, help="cores; none: those of the cluster, divided by workers"
    )
    parser.add_argument("--progress", type=bool, default=True, help="show a table of the tasks")


def run(options: Namespace) -> int:
    """Train the tasks, and print a line for each."""
    if processes.count() > 1:
        raise ValueError(
            f"--tasks on {processes.count()} processes of torchrun or accelerate launch; wanted one process: such "
            "share one large run; Ray spreads many: --workers N, without a launcher"
        )
    tasks = read_tasks(options.tasks, options.out)  # before torch, so that a bad value is told at once
    out = tasks[0].out
    max_memory = None if options.max_memory is None else parse_bytes("max_memory", options.max_memory)
    _check_workers(options)
    if options.dry_run:
        from upt_fast.tasks.plan import describe

        print("\n".join(describe(tasks, max_memory)))
        return 0
    try:
        members = _train(tasks, out, options, max_memory)
    except KeyboardInterrupt as interrupt:
        command = f"upt-fast train --tasks {shlex.quote(options.tasks)} --out {shlex.quote(str(out))} --resume"
        command += f" --workers {options.workers}" if options.workers else ""
        raise KeyboardInterrupt(f"continue with: {command}") from interrupt
    _print(members)
    failed = [member for member in members if member.error is not None]
    print(f"{len(members) - len(failed)} of {len(members)} tasks done  results in {out / 'results.json'}")
    return EXIT_FAILED if failed else 0


def _check_workers(options: Namespace) -> None:
    for name in ("workers", "cpus_per_worker"):
        count = getattr(options, name)
        if count is not None and count < 1:
            raise ValueError(f"{name}={count}; wanted at least 1")
    if options.workers is None and (options.ray_address is not None or options.cpus_per_worker is not None):
        raise ValueError("--ray-address and --cpus-per-worker are for workers; wanted --workers N beside them")


def _train(tasks: list[Task], out: Path, options: Namespace, max_memory: int | None) -> list[Member]:
    if options.workers is None:
        from upt_fast.tasks.run import train_tasks

        return train_tasks(tasks, out, options.resume, max_memory, options.progress)
    from upt_fast.tasks.cluster import train_on_ray

    where = options.ray_address, options.cpus_per_worker
    return train_on_ray(tasks, out, options.workers, options.resume, max_memory, options.progress, *where)


def _print(members: list[Member]) -> None:
    from upt_fast.tasks.table import format_table

    for line in format_table([member.row for member in members]):
        print(line)
