"""Measure candidates in a process of their own, which one of them may break, block or kill.

The process writes what it does into a journal, a line before each step. Whoever is at work when it dies, or when it
says nothing for too long, is refused by name, and another process measures the rest from the beginning: times are to
be compared only within one process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from upt_fast.engine.tuning.measuring import BrokenDeviceError, Candidate, Entry, Judging, Told, measure

POLL = 0.05  # seconds between looks at the journal
START = 600.0  # seconds without a word before the first candidate is at work: imports, models, what they are held to
TAIL = 400  # characters of what a process wrote before it died


class Work(Protocol):
    """What another process does."""

    def measure(self, tell: Told, refused: Mapping[str, str]) -> Entry:
        """What was found.

        Args:
            tell: hears of each candidate before it is tried.
            refused: candidates that are not to be tried, with the reasons.
        """


class Measurement(NamedTuple):
    """What is to be measured; the arguments of measuring.measure."""

    candidates: Mapping[str, Candidate]
    usual: str
    judge: Judging
    budget: float
    refused: Mapping[str, str] = {}
    healthy: Callable[[], bool] = lambda: True

    def measure(self, tell: Told, refused: Mapping[str, str]) -> Entry:
        """See :class:`Work`."""
        parts = self.candidates, self.usual, self.judge, self.budget
        return measure(*parts, tell, {**self.refused, **refused}, self.healthy)


def measure_isolated(
    factory: str, arguments: Mapping[str, Any], patience: float, tell: Callable[[str], None] = lambda line: None
) -> Entry:
    """What is measured in another process.

    Args:
        factory: "module:function", which makes :class:`Work` of the arguments.
        arguments: of the factory, such as JSON takes; "refused" may name candidates that are not to be tried.
        patience: seconds without a word after which the candidate at work is taken to hang.
        tell: hears in a line what is done.
    Raises:
        ValueError: the factory refuses the arguments.
        RuntimeError: the process died before any candidate was at work, or none could be measured.
    """
    refused = dict(arguments.get("refused", {}))
    while True:
        outcome = _run(factory, {**arguments, "refused": refused}, patience, tell)
        if outcome.entry is not None:
            return outcome.entry
        if outcome.error:
            raise ValueError(outcome.error)
        if not outcome.candidate or outcome.candidate in refused:
            raise RuntimeError(f"nothing could be measured: {outcome.reason}")
        refused[outcome.candidate] = outcome.reason
        tell(f"{outcome.candidate}: {outcome.reason}")


class _Outcome(NamedTuple):
    entry: Entry | None = None
    error: str = ""
    candidate: str = ""
    reason: str = ""


def _run(factory: str, arguments: Mapping[str, Any], patience: float, tell: Callable[[str], None]) -> _Outcome:
    with tempfile.TemporaryDirectory(prefix="upt_fast_tune_") as folder:
        journal, output = Path(folder) / "journal", Path(folder) / "output"
        journal.touch()
        request = json.dumps({"factory": factory, "arguments": dict(arguments), "parent": os.getpid()})
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "upt_fast.tools.isolated", str(journal)]
        with output.open("wb") as written:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=written, stderr=subprocess.STDOUT, env=environment
            )
        assert process.stdin is not None
        try:
            process.stdin.write(request.encode())
            process.stdin.close()
            return _watch(process, journal, output, patience, tell)
        finally:
            process.kill()
            process.wait()


def _watch(
    process: subprocess.Popen[bytes], journal: Path, output: Path, patience: float, tell: Callable[[str], None]
) -> _Outcome:
    heard, candidate, stage = time.monotonic(), "", "the start"
    with journal.open(encoding="utf-8") as lines:
        while True:
            ended = process.poll() is not None  # before the last look, or a line could be missed
            while line := lines.readline():
                heard, event = time.monotonic(), json.loads(line)
                if "entry" in event:
                    return _Outcome(entry=event["entry"])
                if "error" in event:
                    return _Outcome(error=event["error"])
                candidate, stage = event["candidate"], event.get("stage", stage)
                if "broken" in event:
                    return _Outcome(candidate=candidate, reason=event["broken"])
                tell(f"{candidate}: {event.get('refused') or stage}")
            if ended:
                text = output.read_text(encoding="utf-8", errors="replace").strip()[-TAIL:].splitlines()
                last = f": {text[-1]}" if text else ""
                return _Outcome(candidate=candidate, reason=f"its process ended at {stage}, {_ended(process)}{last}")
            if time.monotonic() - heard > (patience if candidate else max(START, patience)):
                return _Outcome(candidate=candidate, reason=f"hung: nothing for {patience:g} s at {stage}")
            time.sleep(POLL)


def _ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"


def _die_with(parent: int) -> None:
    """End this process when the one that waits for it is gone, however it went."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(10 * POLL)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def main() -> int:
    """The measuring process: a request on stdin, events into the journal that is named."""
    request = json.loads(sys.stdin.read())
    _die_with(request["parent"])
    with open(sys.argv[1], "a", encoding="utf-8") as journal:

        def tell(event: Mapping[str, Any]) -> None:
            journal.write(json.dumps(event) + "\n")
            journal.flush()

        module, _, name = request["factory"].partition(":")
        arguments = request["arguments"]
        try:
            found: Work = getattr(importlib.import_module(module), name)(**arguments)
        except ValueError as error:
            tell({"error": str(error)})
            return 0
        working = {"candidate": ""}

        def tell_candidate(event: dict[str, Any]) -> None:
            working["candidate"] = event["candidate"]
            tell(event)

        try:
            tell({"entry": found.measure(tell_candidate, arguments["refused"])})
        except BrokenDeviceError as error:
            tell({**working, "broken": str(error)})
    return 0


if __name__ == "__main__":
    # under its own name: the module may be imported by the factory again
    from upt_fast.tools import isolated

    sys.exit(isolated.main())
