"""Which part gets how much of the time, the most valuable first; imports nothing that takes long.

A new part is a module of this folder with ``tasks(machine, clips)``, and a name in SHARES.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

# part -> minutes of the whole, in order
SHARES = {
    "environment": 1.0,
    "closeness": 4.0,
    "tests": 4.0,
    "steps": 7.5,
    "tune": 4.5,
    "ops": 4.0,
    "profile": 1.5,
    "memory": 1.5,
    "sanitizer": 1.0,
}
PARTS = tuple(SHARES)
TOTAL_MINUTES = 28.0  # with what starting a machine takes, three calls of ten minutes
CALL_MINUTES = 9.3  # of a call, which GRACE and the end of its processes bring close to ten
LEAST = 0.3  # minutes that are worth a process


def planned(part: str, total: float) -> float:
    """Minutes of the total that a part may use before others have used theirs."""
    return SHARES[part] * total / sum(SHARES.values())


def spent(folder: Path, part: str) -> float:
    """Minutes that a part's measurements in its last run's environment have taken so far."""
    return sum(row.get("seconds", 0.0) for row in _rows(folder, part)) / 60


def todo(folder: Path, part: str) -> bool:
    """Whether a part has not run yet or has measurements left, as its file says."""
    stored = _stored(folder, part)
    return not stored or bool(stored["left"])


def turns(folder: Path, parts: Sequence[str], total: float) -> list[tuple[str, float]]:
    """Parts in their order with the minutes of their plan that are left; then those that have more to measure, with
    what is left of the whole.

    Args:
        folder: OUT, with the files of earlier calls.
        parts: those wanted.
        total: minutes for all of them, all calls together.
    """
    of_these = total * sum(SHARES.values()) / sum(SHARES[part] for part in parts)
    first = [(part, planned(part, of_these) - spent(folder, part)) for part in parts]
    rest = total - sum(spent(folder, part) for part in parts)
    return [(part, minutes) for part, minutes in [*first, *((part, rest) for part in parts)] if minutes >= LEAST]


def _stored(folder: Path, part: str) -> dict:
    path = folder / f"{part}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _rows(folder: Path, part: str) -> list[dict]:
    stored = _stored(folder, part)
    rows = stored.get("measurements", {}).values()
    return [row for row in rows if row["environment"] == stored["current"]]
