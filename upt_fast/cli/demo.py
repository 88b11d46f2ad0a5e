"""``upt-fast demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

HELP = "a small training run that downloads nothing"


def add_options(parser: ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("--out", type=str | None, default=None, help="folder of the demo; none: a new one under runs")
    parser.add_argument("--methods", nargs="+", type=str, default=None, help="one or more; none: coop vpt_deep upt")
    parser.add_argument("--all", action="store_true", help="all methods, about three times as long")
    parser.add_argument("--shots", nargs="+", type=int, default=None, help="images per class, one or more numbers")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="seeds, one or more numbers")
    parser.add_argument("--workers", type=int | None, default=None, help="processes; none: one per core, at most 4")


def run(options: Namespace) -> int:
    """Run the demo."""
    from upt_fast.demo.run import run_demo

    lists = ("methods", "shots", "seeds")
    given: dict[str, Any] = {name: tuple(options[name]) for name in lists if options[name] is not None}
    if options.all:
        from upt_fast.demo.methods import ALL_METHODS

        if "methods" in given:
            raise ValueError(f"--all and --methods {' '.join(given['methods'])}; wanted one or the other")
        given["methods"] = ALL_METHODS
    if options.workers is not None:
        given["workers"] = options.workers
    run_demo(out_dir=None if options.out is None else Path(options.out), **given)
    return 0
