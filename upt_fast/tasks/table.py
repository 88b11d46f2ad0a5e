"""The live table of a job: a line for each task, redrawn in its place on a terminal."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger("upt_fast")

SECONDS = 0.5  # between two drawings
SPARSELY = 60.0  # between two lines of a log, where there is no terminal
WAITING = "waiting"


class Row:
    """A task's line; its trainer tells it of each step as it would tell a progress bar.

    Args:
        name: of the task.
    """

    disable = False  # of a bar: trainers whose bar is off log their epochs instead

    def __init__(self, name: str) -> None:
        self.name, self.status, self.note = name, WAITING, ""
        self.step, self.steps = 0, 0
        self.values: dict[str, Any] = {}
        self.accuracy: float | None = None

    def begin(self, steps: int, step: int) -> None:
        """The task is at step of steps."""
        self.status, self.steps, self.step = "training", steps, step

    def set_postfix(self, refresh: bool = True, **values: Any) -> None:
        """Epoch, loss, accuracy and learning rate at this step."""
        self.values = values

    def update(self) -> None:
        """A step is done."""
        self.step += 1

    def ended(self, status: str, note: str = "", accuracy: float | None = None) -> None:
        """The task is done or failed."""
        self.status, self.note, self.accuracy = status, note, accuracy

    def cells(self) -> tuple[str, ...]:
        """Name, status, steps, epoch, loss, training accuracy, test accuracy."""
        test = "" if self.accuracy is None else f"{100 * self.accuracy:.2f} %"
        steps = f"{self.step}/{self.steps}" if self.steps else ""
        values = self.values if self.status == "training" else {}
        told = tuple(str(values.get(key, "")) for key in ("epoch", "loss", "accuracy"))
        return (self.name, self.status, steps, *told, test or self.note)


HEAD = ("task", "status", "steps", "epoch", "loss", "accuracy", "test")


def format_table(rows: Sequence[Row]) -> list[str]:
    """The lines of a table, the first one its head."""
    cells = [HEAD, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEAD) - 1)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]).rstrip() for line in cells]


class Table:
    """Shows rows while a job runs: on a terminal all that fit, else now and then a line of the log.

    Args:
        rows: the tasks.
        progress: whether to show anything.
    """

    def __init__(self, rows: Sequence[Row], progress: bool = True) -> None:
        self.rows = rows
        self.terminal = progress and sys.stderr.isatty()
        self.logs = progress and not self.terminal
        self.drawn, self.last, self.logged = 0, 0.0, time.monotonic()

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def show(self) -> None:
        """Draw the table, if it is time."""
        now = time.monotonic()
        if self.terminal and now - self.last >= SECONDS:
            self.last = now
            self._clear()
            lines = self._fitting()
            sys.stderr.write("".join(f"{line}\n" for line in lines))
            sys.stderr.flush()
            self.drawn = len(lines)
        if self.logs and now - self.logged >= SPARSELY:
            self.logged = now
            logger.info("%s", self.summary())

    def _clear(self) -> None:
        if self.drawn:
            sys.stderr.write(f"\x1b[{self.drawn}A\x1b[J")
            sys.stderr.flush()
            self.drawn = 0

    def _fitting(self) -> list[str]:
        """The table cut to the terminal: tasks that are trained first."""
        columns, height = shutil.get_terminal_size()
        first = sorted(self.rows, key=lambda row: row.status not in ("training", "testing"))
        shown = self.rows if len(self.rows) <= height - 3 else first[: max(1, height - 3)]
        return [line[: columns - 1] for line in [*format_table(shown), self.summary()]]

    def summary(self) -> str:
        """How many tasks are at what."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.status] = counts.get(row.status, 0) + 1
        steps, total = (sum(getattr(row, key) for row in self.rows) for key in ("step", "steps"))
        at = f"; step {steps} of {total}" if total else ""
        return f"{len(self.rows)} tasks: {', '.join(f'{n} {status}' for status, n in counts.items())}{at}"
