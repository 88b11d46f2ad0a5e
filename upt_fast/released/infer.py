"""Which method a released checkpoint is of, and what its shapes tell of the options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upt_fast.common.messages import shorten
from upt_fast.methods import find_method, list_releases
from upt_fast.methods.release import ReleasedTensors


def describe_options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def choose_method(tensors: ReleasedTensors, given: str | None) -> str:
    """The method of a file; a ValueError if there is none, or several and none is given."""
    releases = ", ".join(list_releases())
    if given is not None and given not in list_releases():
        name = find_method(given).name  # says so if there is none
        raise ValueError(f"method={name!r} has no released checkpoints; wanted one of {releases}")
    possible = possible_methods(tensors, given)
    keys = f"its trained tensors are {shorten(sorted(tensors.shapes)) or 'none'}"
    if not possible:
        raise ValueError(f"no method of {releases} has such parameters: {keys}")
    if given is not None:
        if given not in possible:
            raise ValueError(f"method={given!r} was given; the file is of {' or '.join(possible)}: {keys}")
        return given
    if len(possible) > 1:
        shapes = ", ".join(f"{name} {shape}" for name, shape in tensors.shapes.items())
        raise ValueError(f"{shapes} can be {' or '.join(possible)}: say which by method (--method {possible[0]})")
    return possible[0]


def possible_methods(tensors: ReleasedTensors, named: str | None = None) -> list[str]:
    """Methods that a file's names and shapes allow, the one with fewest other tensors first.

    They are those that have all of the file's tensors; where none has, a single one that has the most of them, so that
    the others can be told.
    """
    releases = {}
    for name, release in list_releases().items():
        marks = *release.marks, *(release.marks_if_named if name == named else ())
        if tensors.matching(*marks) and release.fits(tensors):
            releases[name] = release
    known = {name: len(tensors.matching(*release.tensors)) for name, release in releases.items()}
    most = max(known.values(), default=0)
    best = [name for name in releases if known[name] == most]
    if most < len(tensors.shapes) and len(best) > 1:
        return []
    return sorted(best, key=lambda name: len(releases[name].tensors))


def infer_options(method: str, tensors: ReleasedTensors, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that shapes tell.

    Args:
        method: one of :func:`list_releases`.
        tensors: of the file.
        given: options that the user gave; one that is None counts as not given.
    Raises:
        ValueError: a given option contradicts a shape, or a tensor has another number of dimensions.
    """
    found = list_releases()[method].infer(tensors, given)
    for name, value in found.items():
        if given.get(name) is not None and given[name] != value:
            raise ValueError(f"{name}={given[name]!r}; the file's shapes say {value!r}: leave {name} out")
    return found
