"""Other processes, which end with all that they started; imports nothing that takes long."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

PATIENCE = 5.0  # seconds between asking a process to end and ending it


def run(
    command: Sequence[str],
    seconds: float,
    env: Mapping[str, str],
    cwd: Path | None = None,
    capture: bool = False,
) -> tuple[int | None, str]:
    """Run a command in a process group of its own.

    Args:
        command: program and arguments.
        seconds: after which the group is killed.
        env: its environment variables.
        cwd: its working directory.
        capture: return what it prints instead of showing it.
    Returns:
        its exit code, None where it was killed; what it printed.
    """
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if capture else {}
    process = subprocess.Popen(command, env=env, cwd=cwd, start_new_session=True, text=True, errors="replace", **out)
    try:
        output, _ = process.communicate(timeout=max(seconds, 1.0))
        return process.returncode, output or ""
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.poll() is None:
            _stop(process)


def _stop(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=PATIENCE)
            return
