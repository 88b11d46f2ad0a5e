"""Which of several processes of one run this is, as torchrun and accelerate launch tell it. Imports no torch."""

from __future__ import annotations

import os


class OtherProcessError(RuntimeError):
    """What ends this process went wrong in another one.

    Args:
        message: what went wrong.
        code: exit code of a command.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def count() -> int:
    """Processes of the run: 1 where nobody has started several."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """This process among them; 0 is the one that speaks and writes."""
    return _number("RANK", 0) if count() > 1 else 0


def on_this_host() -> int:
    """Those of them on this host."""
    return _number("LOCAL_WORLD_SIZE", 1) if count() > 1 else 1


def restarts() -> int:
    """How often torchrun has started them anew after one of them failed."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) if count() > 1 else 0


def started_as() -> str | None:
    """The launcher's name of the run, which is that of an earlier start where it has started the run anew."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if count() == 1 or name == "none" else name


def launcher() -> str:
    """The command that would start them again, but for the module that it runs."""
    of_one_host = on_this_host() == count()
    return f"torchrun --nproc-per-node {count()}" if of_one_host else "torchrun ..."


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else default  # a launcher sets numbers: another value is somebody else's
