"""Sizes in bytes as people write them: 600MB, 8GB, 8GiB."""

from __future__ import annotations

import re

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(name: str, value: object) -> int:
    """Bytes of a number with a unit, or of a whole number of bytes.

    Args:
        name: of the option, for the error.
        value: "600MB", "8GB", "8GiB", "0.5 GiB", 600000000.
    Raises:
        ValueError: it is no such size, or less than a byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", str(value))
    if found and not isinstance(value, bool) and found[2].upper() in UNITS:
        unit = UNITS[found[2].upper()]
        size = int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit
        if size > 0:
            return size
    raise ValueError(f"{name}={value!r}; wanted a size such as 600MB, 8GB, 8GiB or a number of bytes")


def show_bytes(size: int) -> str:
    """A size in MB, or from ten thousand of them in GB; rounded up, so that the next smaller is too little."""
    unit, name = (10**9, "GB") if size >= 10**10 else (10**6, "MB")
    tenths = -(-size * 10 // unit)
    return f"{tenths / 10:.1f} {name}" if name == "GB" else f"{-(-size // unit)} MB"
