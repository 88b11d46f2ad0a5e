"""Measurements on disk: one JSON file per part, written after each of them, so that a later run continues."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upt_fast.common.files import write_text

# what became of a measurement; "failed": its numbers are wrong, "killed": its process died or ran out of time
STATUSES = ("ok", "failed", "error", "skipped", "killed", "running")
ATTEMPTS = 2  # of a measurement that kills its process
# parts whose measurements are checks: one that cannot be made has not been passed
CHECKS = ("closeness", "tests", "sanitizer")


class Skipped(Exception):
    """Raised by a measurement that does not apply here; the message says why."""


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        key: its name in the part's file.
        run: measures, and returns what the row is to hold; "status" in it, "failed" above all, replaces "ok".
        info: what the row says beside that.
        version: of what is measured, where the environment does not tell it; another one is measured again.
        needs: seconds that have to be left of the part's time for it to begin.
    """

    key: str
    run: Callable[[], dict[str, Any]]
    info: dict[str, Any] = field(default_factory=dict)
    version: str = ""
    needs: float = 0.0


class PartFile:
    """OUT/<part>.json, with the measurements of one part by key.

    Args:
        folder: OUT.
        part: its name.
    """

    def __init__(self, folder: Path, part: str) -> None:
        self.path, self.part = folder / f"{part}.json", part
        stored = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        self.environments: dict[str, dict[str, Any]] = stored.get("environments", {})
        self.rows: dict[str, dict[str, Any]] = stored.get("measurements", {})
        self.left: list[str] = stored.get("left", [])
        self.current: str | None = stored.get("current")  # environment of the last run

    def write(self) -> None:
        used = {self.current, *(row["environment"] for row in self.rows.values())}
        content = {
            "part": self.part,
            "current": self.current,
            "environments": {name: value for name, value in self.environments.items() if name in used},
            "measurements": self.rows,
            "left": self.left,
        }
        write_text(self.path, json.dumps(content, indent=1) + "\n")

    def finished(self, task: Task, environment: str) -> bool:
        row = self.rows.get(task.key)
        if row is None or row["environment"] != environment or row["version"] != task.version:
            return False
        return row["status"] != "running" and (row["status"] != "killed" or row["attempts"] >= ATTEMPTS)

    def bury(self, reason: str) -> None:
        """Turn what a process left "running" when it died into "killed"."""
        for row in self.rows.values():
            if row["status"] == "running":
                row |= {"status": "killed", "message": reason}
                self.write()

    def passed(self, environment: str) -> bool:
        """Whether no check failed there."""
        bad = ("failed", "error", "killed") if self.part in CHECKS else ("failed",)
        return all(row["status"] not in bad for row in self.rows.values() if row["environment"] == environment)


def run_part(
    file: PartFile,
    tasks: Sequence[Task],
    environment: tuple[str, dict[str, Any]],
    minutes: float,
    healthy: Callable[[], bool],
) -> bool:
    """Make a part's measurements until its time is up.

    Args:
        file: where they go.
        tasks: all of the part's, the most valuable first.
        environment: its id and its description.
        minutes: no measurement is started later than this, or later than what it needs before this.
        healthy: clears up after an error; False where only a new process can go on.
    Returns:
        False where a new process has to go on.
    """
    start, (name, description) = time.monotonic(), environment
    file.current, file.environments[name] = name, description
    todo = [task for task in tasks if not file.finished(task, name)]
    file.left = [task.key for task in todo]
    file.write()
    for task in todo:
        if time.monotonic() - start + task.needs > 60 * minutes:
            break
        earlier = file.rows.pop(task.key, {})
        same = earlier.get("environment") == name and earlier.get("version") == task.version
        row: dict[str, Any] = {"status": "running", "environment": name, "version": task.version, **task.info}
        row["attempts"] = 1 + (earlier["attempts"] if same else 0)
        file.rows[task.key] = row
        file.write()
        began, sound = time.monotonic(), True
        try:
            row |= {"status": "ok"} | task.run()
        except Skipped as reason:
            row |= {"status": "skipped", "message": str(reason)}
        except Exception as error:  # whatever one measurement raises, the others go on
            lines = str(error).strip().splitlines() or [""]
            row |= {"status": "error", "message": f"{type(error).__name__}: {lines[0]}"}
            row["traceback"] = traceback.format_exc()[-4000:]
        if row["status"] == "error":
            sound = healthy()
        row["seconds"] = round(time.monotonic() - began, 2)
        file.left.remove(task.key)
        file.write()
        print(f"{file.part}: {task.key}: {_summary(row)} ({row['seconds']:.1f} s)", flush=True)
        if not sound:
            return False
    if file.left:
        print(f"{file.part}: time is up, {len(file.left)} measurements left; run the same command again", flush=True)
    return True


def _summary(row: dict[str, Any]) -> str:
    shown = [f"{name} {row[name]:g}" for name in ("p50_ms", "error", "largest_batch") if row.get(name) is not None]
    message = [row["message"]] if row.get("message") else []
    return ", ".join([row["status"], *shown, *message])
