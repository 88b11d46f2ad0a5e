"""Words that messages of all parts share."""

from __future__ import annotations

from collections.abc import Iterable


def shorten(names: Iterable[object], limit: int = 10) -> str:
    """The first names, comma-separated, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(str(name) for name in names[:limit]) + more
