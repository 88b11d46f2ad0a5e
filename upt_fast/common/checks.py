"""Checks of options, with errors that say what came and what was wanted."""

from __future__ import annotations


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}; wanted one of {', '.join(map(repr, choices))}")


def require_int(name: str, value: object, minimum: int) -> None:
    """Raise a ValueError unless value is an int of at least minimum."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value!r}; wanted a whole number of at least {minimum}")


def require_bool(name: str, value: object) -> None:
    """Raise a ValueError unless value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}; wanted True or False")
