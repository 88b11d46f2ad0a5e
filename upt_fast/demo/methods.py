"""What the demo compares: the methods that say how it trains them (upt_fast/methods). Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from upt_fast.methods import BUILTIN_METHODS, MAIN_METHOD, find_method
from upt_fast.methods.demo import DemoSettings

ZERO_SHOT = "zeroshot"  # always in the table: it trains nothing

_SETTINGS = [(name, settings) for name in BUILTIN_METHODS if (settings := find_method(name).demo) is not None]
DEMO_METHODS: dict[str, DemoSettings] = dict(sorted(_SETTINGS, key=lambda entry: entry[1].row))
DEFAULT_METHODS = tuple(name for name, settings in DEMO_METHODS.items() if settings.default)
ALL_METHODS = tuple(DEMO_METHODS)
UNIMODAL_METHODS = tuple(name for name in DEFAULT_METHODS if name != MAIN_METHOD)  # UPT's two halves, in the end


def demo_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The methods to train, in the table's order.

    Args:
        names: keys of DEMO_METHODS; "zeroshot" may be among them, for it is always shown.
    Raises:
        ValueError: an unknown name, one that comes twice, or none to train.
    """
    for name in names:
        if name not in DEMO_METHODS and name != ZERO_SHOT:
            raise ValueError(f"methods: got {name!r}, wanted some of {', '.join(ALL_METHODS)}")
    chosen = tuple(name for name in DEMO_METHODS if name in names)
    if not chosen or len(set(names)) < len(names):
        got = ", ".join(names) or "none"
        raise ValueError(f"methods: got {got}, wanted at least one of {', '.join(ALL_METHODS)} and none twice")
    return chosen
