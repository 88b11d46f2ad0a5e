"""What a user sees of log, warnings and errors: single lines on stderr."""

from __future__ import annotations

import argparse
import errno
import logging
import shlex
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from upt_fast.common import processes
from upt_fast.train.options import option_error

EXIT_FAILED = 1  # the run went wrong: the loss diverged, memory ran out, or the disk
EXIT_USAGE = 2  # the user can put it right
EXIT_INTERRUPTED = 130

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: disk, quota or size of a file leave no room
KEPT = "; what was written before is kept: make room, and go on with --resume"

CHATTY_LOGGERS = ("huggingface_hub", "urllib3", "httpx", "httpx2", "PIL")


def say(message: str, code: int) -> int:
    """Print a line and return the exit code."""
    print(f"upt-fast: {message}", file=sys.stderr)
    return code


def interrupted(out: str | None) -> str:
    """What to say of a command that was interrupted, with the run's folder if it trains."""
    if out is None or not (Path(out) / "config.json").is_file():
        return "interrupted"
    config = shlex.quote(str(Path(out) / "config.json"))
    command = "upt-fast" if processes.count() == 1 else f"{processes.launcher()} -m upt_fast"
    return f"interrupted; continue with: {command} train --config {config} --resume"


def speaks(error: BaseException) -> bool:
    """Whether this process tells of an error; of several processes the first does, unless another alone knows of it."""
    if processes.rank() == 0:
        return True
    if isinstance(error, (processes.OtherProcessError, KeyboardInterrupt)):
        return False
    torch = sys.modules.get("torch")
    joined = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    return joined and type(error).__name__ != "TrainingDivergedError"


def failure(error: Exception, commands: Iterable[str]) -> tuple[str, int] | None:
    """The one line and the exit code for an error that is not ours, or None."""
    text = str(error).strip()
    if "Original Traceback" in text:  # from a loader process: its traceback's last line is the message
        text = text.splitlines()[-1].partition(": ")[2]
    message = " ".join(text.split())
    if isinstance(error, argparse.ArgumentError):
        return _option_message(message, commands), EXIT_USAGE
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror or message}{where}", EXIT_FAILED if error.errno in FULL else EXIT_USAGE
    if isinstance(error, ValueError):
        return message, EXIT_USAGE
    if isinstance(error, processes.OtherProcessError):
        return message, error.code
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory; try --memory balanced or lean, or a smaller --batch-size", EXIT_FAILED
    if type(error).__name__ == "TrainingDivergedError":
        return message, EXIT_FAILED
    return None


def _option_message(message: str, commands: Iterable[str]) -> str:
    """jsonargparse's message with options in the place of its parser keys."""
    if message.startswith('expected "subcommand"'):
        return f"no command; wanted one of {', '.join(commands)}, for example upt-fast train --help"
    for command in commands:
        message = message.replace(f" {command}.", " --")
    if message.startswith("the following arguments are required: "):
        message = message.replace("_", "-")
    return option_error(message)


class Messages(logging.Handler):
    """Shows this package's log and warnings as single lines on stderr, clear of progress bars.

    Args:
        debug: whether other libraries' logs are shown too; what they log of a failure comes again as its exception.
    """

    def __init__(self, debug: bool) -> None:
        super().__init__()
        self.debug = debug

    def __enter__(self) -> Messages:
        self.levels_before = {name: logging.getLogger(name).level for name in CHATTY_LOGGERS}
        self.quiet = logging.NullHandler()
        if not self.debug:
            for name in CHATTY_LOGGERS:
                logging.getLogger(name).setLevel(logging.CRITICAL)
            logging.getLogger().addHandler(self.quiet)
        self.logger = logging.getLogger("upt_fast")
        self.level_before, self.propagate_before = self.logger.level, self.logger.propagate
        self.logger.addHandler(self)
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        self.catcher = warnings.catch_warnings()
        self.catcher.__enter__()
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # --num-workers is the user's choice
        warnings.showwarning = self._warning  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        self.catcher.__exit__(None, None, None)
        self.logger.removeHandler(self)
        self.logger.setLevel(self.level_before)
        self.logger.propagate = self.propagate_before
        logging.getLogger().removeHandler(self.quiet)
        for name, level in self.levels_before.items():
            logging.getLogger(name).setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        if processes.rank() > 0 and record.levelno < logging.ERROR:
            return
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        self._write(prefix + record.getMessage())

    def _warning(self, message: Warning | str, *_: object, **__: object) -> None:
        if processes.rank() == 0:
            self._write(f"warning: {' '.join(str(message).split())}")

    def _write(self, line: str) -> None:
        from tqdm import tqdm

        tqdm.write(f"upt-fast: {line}", file=sys.stderr)
