"""The command line: ``upt-fast train | eval | predict | methods | verify | info | demo | ...``.

torch is imported when a command needs it, so that ``--help`` and mistyped options answer at once. What a user can get
wrong ends in one line on stderr and exit code 2; with ``--debug`` (or UPT_FAST_DEBUG=1) the traceback is shown.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from jsonargparse import ArgumentParser, Namespace

import upt_fast
from upt_fast.cli import (
    demo,
    eval,
    export_checkpoint,
    import_checkpoint,
    info,
    methods,
    plan,
    predict,
    shard,
    train,
    train_tasks,
    tune,
    verify,
)
from upt_fast.cli.messages import EXIT_INTERRUPTED, FULL, KEPT, Messages, failure, interrupted, say, speaks
from upt_fast.common import processes
from upt_fast.methods import MAIN_METHOD, Method, find_method
from upt_fast.train.options import flag, read_train_arguments

# for how long a process that says nothing waits for the one that does: launchers end all as soon as one has ended
QUIET_SECONDS = 10

# each with HELP, add_options(parser) and run(options); train's options are those of a method too, and train --tasks
# is train_tasks.py
COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "eval": eval,
    "predict": predict,
    "shard": shard,
    "methods": methods,
    "verify": verify,
    "info": info,
    "plan": plan,
    "tune": tune,
    "demo": demo,
    "import-checkpoint": import_checkpoint,
    "export-checkpoint": export_checkpoint,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its arguments; None: the process's.
    Returns:
        Exit code: 0, 1 (the run failed), 2 (bad input) or 130 (interrupted).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("UPT_FAST_DEBUG", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    out: str | None = None
    try:
        commands = _commands(arguments)
        options = _parse(arguments, commands)
        command: Namespace = options[options.subcommand]
        module = commands[options.subcommand]
        out = command.get("out") if module is train else None
        with Messages(debug):
            code: int = module.run(command)
            return code
    except SystemExit as done:  # --help, --version and --print_config
        return done.code if isinstance(done.code, int) else 0
    except KeyboardInterrupt as interrupt:
        if debug:
            raise
        if not speaks(interrupt):
            return EXIT_INTERRUPTED
        return say(f"interrupted; {interrupt}" if str(interrupt) else interrupted(out), EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        found = failure(error, COMMANDS)
        if debug or found is None:
            raise
        if not speaks(error):
            time.sleep(QUIET_SECONDS)
            return found[1]
        place = f"process {processes.rank()}: " if processes.rank() else ""
        full = isinstance(error, OSError) and error.errno in FULL and arguments[:1] == ["train"]
        return say(f"error: {place}{found[0]}{KEPT if full else ''}", found[1])
    finally:
        if group := sys.modules.get("upt_fast.distributed.group"):
            group.leave()


def _commands(arguments: list[str]) -> dict[str, ModuleType]:
    """The commands by name; ``train --tasks`` is one of its own."""
    jobs = arguments[:1] == ["train"] and any(argument.partition("=")[0] == "--tasks" for argument in arguments)
    return COMMANDS | {"train": train_tasks} if jobs else COMMANDS


def _parse(arguments: list[str], commands: dict[str, ModuleType]) -> Namespace:
    method, trains = find_method(MAIN_METHOD), arguments[:1] == ["train"] and commands["train"] is train
    if trains:
        arguments, method = read_train_arguments(arguments)
    parser = _parser()
    parsers: dict[str, ArgumentParser] = {}
    for name, command in commands.items():
        parsers[name] = ArgumentParser(description=command.HELP, exit_on_error=False)
        command.add_options(parsers[name], *([method] if command is train else []))
        parser.commands.add_subcommand(name, parsers[name], help=command.HELP)
    try:
        return parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        if trains and (unknown := _unknown_options(str(error))):
            raise ValueError(_unknown_message(unknown, method, parsers["train"])) from error
        raise


def _unknown_options(message: str) -> list[str]:
    """The options that jsonargparse's message says it does not know."""
    if message.startswith("unrecognized arguments: "):
        return [word.partition("=")[0] for word in message.split() if word.startswith("--")]
    found = re.search(r"does not accept option '([^']+)'", message)
    return [flag(found[1])] if found else []


def _unknown_message(unknown: list[str], method: Method, parser: ArgumentParser) -> str:
    known = [name for action in parser._actions for name in action.option_strings]
    close = [name for option in unknown for name in difflib.get_close_matches(option, known, n=1)]
    guess = f"; did you mean {', '.join(close)}?" if close else ";"
    return (
        f"train with method {method.name!r} has no option {', '.join(unknown)}{guess} "
        f"see upt-fast train --method {method.name} --help"
    )


class _Parser(ArgumentParser):
    commands: Any


def _parser() -> _Parser:
    parser = _Parser(
        prog="upt-fast",
        description="Prompt learning on a frozen CLIP: Unified Prompt Tuning, exact and fast.",
        version=upt_fast.__version__,
        exit_on_error=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (or UPT_FAST_DEBUG=1)")
    parser.commands = parser.add_subcommands(required=True)
    return parser
