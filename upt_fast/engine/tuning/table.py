"""Tables of measured choices: one file a machine in the cache folder, and files that go from machine to machine.

    {"format": 1, "machine": {...}, "choices": {key: {"choice": ..., "usual": ..., "ms": {...}, "refused": {...}}}}

A table holds only for the machine that it names; one of another machine, a damaged or an older one is none, and what
it would have told is measured again. Tables of known cards may be shipped in tables/; the driver may differ there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from upt_fast.common.files import cache_folder, write_text
from upt_fast.engine.tuning.machine import DRIVER

FORMAT = 1
SHIPPED = Path(__file__).parent / "tables"
Entries = dict[str, dict[str, Any]]


def path(machine: Mapping[str, str]) -> Path:
    """Where a machine's table is kept."""
    digest = hashlib.sha256(json.dumps(dict(machine), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"choices-{digest}.json"


def read(machine: Mapping[str, str]) -> Entries:
    """What is known of a machine: shipped, and over that what was measured; none where its table is damaged."""
    found = dict(_shipped(tuple(sorted(_but_driver(machine).items()))))
    try:
        there, entries = _parse(path(machine).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return found
    return found | entries if there == dict(machine) else found


def write(machine: Mapping[str, str], entries: Entries) -> None:
    """Replace a machine's table, whole or not at all."""
    write_text(path(machine), dump(machine, entries))


def dump(machine: Mapping[str, str], entries: Entries) -> str:
    """A table as text."""
    return json.dumps({"format": FORMAT, "machine": dict(machine), "choices": entries}, indent=1) + "\n"


def load(file: Path, machine: Mapping[str, str]) -> Entries:
    """The entries of a table that came from another machine of the same kind.

    Raises:
        ValueError: it is no table, or one of another kind of machine; with what differs.
    """
    try:
        there, entries = _parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{file} is no table of choices: {reason}; wanted what upt-fast tune --export wrote"
        ) from error
    here, there = _but_driver(machine), _but_driver(there)
    if differ := sorted(name for name in {*here, *there} if here.get(name) != there.get(name)):
        said = "; ".join(f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in differ)
        raise ValueError(f"{file} was measured on another machine ({said}); wanted one of this kind, or upt-fast tune")
    return entries


def _but_driver(machine: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in machine.items() if name != DRIVER}


def _parse(text: str) -> tuple[dict[str, str], Entries]:
    """The machine and the entries of a table; a ValueError says what is wrong with it."""
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"format {found.get('format') if isinstance(found, dict) else None!r}; wanted {FORMAT}")
    machine, entries = found.get("machine"), found.get("choices")
    if not isinstance(machine, dict) or not all(isinstance(value, str) for value in machine.values()):
        raise ValueError("'machine' is not an object of strings")
    if not isinstance(entries, dict):
        raise ValueError("'choices' is not an object")
    for key, entry in entries.items():
        _check(key, entry)
    return machine, entries


def _check(key: str, entry: Any) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("choice"), str):
        raise ValueError(f"{key!r} has no 'choice'")
    ms, refused = entry.get("ms"), entry.get("refused")
    if not isinstance(ms, dict) or not all(isinstance(v, (int, float)) and v > 0 for v in ms.values()):
        raise ValueError(f"'ms' of {key!r} are not positive numbers")
    if not isinstance(refused, dict) or entry["choice"] not in ms or entry["choice"] in refused:
        raise ValueError(f"{key!r} chose {entry['choice']!r}, which was not measured or was refused")


@cache
def _shipped(machine: tuple[tuple[str, str], ...]) -> Entries:
    found: Entries = {}
    for file in sorted(SHIPPED.glob("*.json")):
        there, entries = _parse(file.read_text(encoding="utf-8"))
        if _but_driver(there) == dict(machine):
            found |= entries
    return found
