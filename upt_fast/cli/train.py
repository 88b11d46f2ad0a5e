"""``upt-fast train``."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from upt_fast.common import processes
from upt_fast.methods import Method
from upt_fast.train.config import TrainConfig
from upt_fast.train.options import add_run_options
from upt_fast.train.recipes import list_recipes

HELP = "train prompts on a directory of images"


def add_options(parser: ArgumentParser, method: Method) -> None:
    """Add the options of a run and of its method."""
    parser.description = (
        f"{HELP}; shown for {method.title}, another with --method. Many runs as one job: upt-fast train --tasks FILE"
    )
    recipes = ", ".join(list_recipes())
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML or JSON file of these options, or a recipe by name ({recipes}); later options override it",
    )
    add_run_options(parser, method)


def run(options: Namespace) -> int:
    """Train, and say how accurate it became."""
    values = options.as_dict()
    values.pop("config", None)
    config = TrainConfig.from_dict(values)  # before torch, so that a bad value is told at once
    from upt_fast.train.loop import train

    results = train(config)
    test, where = results["test"], Path(config.out) / "results.json"
    accuracy = "no test images" if test is None else f"accuracy {100 * test['accuracy']:.2f} %"
    if processes.rank() == 0:
        print(f"{accuracy}  results in {where}")
    return 0
