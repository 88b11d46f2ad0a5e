"""``upt-fast train --tasks``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from upt_fast.cli.messages import EXIT_FAILED
from upt_fast.common.sizes import parse_bytes
from upt_fast.tasks.grid import read_tasks

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
    parser.add_argument("--progress", type=bool, default=True, help="show a table of the tasks")


def run(options: Namespace) -> int:
    """Train the tasks, and print a line for each."""
    tasks = read_tasks(options.tasks, options.out)  # before torch, so that a bad value is told at once
    out = tasks[0].out
    max_memory = None if options.max_memory is None else parse_bytes("max_memory", options.max_memory)
    if options.dry_run:
        from upt_fast.tasks.plan import describe

        print("\n".join(describe(tasks, max_memory)))
        return 0
    from upt_fast.tasks.run import train_tasks

    try:
        members = train_tasks(tasks, out, options.resume, max_memory, options.progress)
    except KeyboardInterrupt as interrupt:
        command = f"upt-fast train --tasks {shlex.quote(options.tasks)} --out {shlex.quote(str(out))} --resume"
        raise KeyboardInterrupt(f"continue with: {command}") from interrupt
    _print(members)
    failed = [member for member in members if member.error is not None]
    print(f"{len(members) - len(failed)} of {len(members)} tasks done  results in {out / 'results.json'}")
    return EXIT_FAILED if failed else 0


def _print(members: list[Member]) -> None:
    from upt_fast.tasks.table import format_table

    for line in format_table([member.row for member in members]):
        print(line)
