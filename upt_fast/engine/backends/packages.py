"""Whether a backend's package can be imported, its import without a word, and what backends refuse alike."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import warnings
from collections.abc import Iterator
from importlib import util

import torch


def other_dtype(dtype: torch.dtype | None, taken: tuple[torch.dtype, ...]) -> list[str]:
    """A refusal of a dtype that is not taken; none of None, which is any that is."""
    if dtype is None or dtype in taken:
        return []
    name, *names = (str(t).removeprefix("torch.") for t in (dtype, *taken))
    return [f"{name} (takes {', '.join(names)})"]


def older_card(device: str, wanted: tuple[int, int]) -> list[str]:
    """A refusal of an NVIDIA card of a compute capability below that wanted; none where there is no such card."""
    if device != "cuda" or torch.compiler.is_compiling() or torch.version.hip or not torch.cuda.is_available():
        return []
    found = torch.cuda.get_device_capability()
    return [] if found >= wanted else ["compute capability {}.{} (takes {}.{} or newer)".format(*found, *wanted)]


def with_missing(package: str, module: str, reasons: list[str]) -> list[str]:
    """The reasons, behind that for which a package cannot be imported, if any.

    Args:
        package: its name.
        module: of the package, which is used.
        reasons: found so far; where there are some, the package is looked for, but not imported, for that is slow.
    """
    if torch.compiler.is_compiling():  # the model's constructor has looked at the package
        return reasons
    reason = missing(package, module, not reasons)
    return [reason, *reasons] if reason else reasons


@functools.cache
def missing(package: str, module: str, try_import: bool) -> str:
    """Why a package cannot be imported; empty where it can."""
    if util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        if try_import:
            with quiet_import():
                importlib.import_module(module)
    except Exception as error:  # a broken build raises what it likes
        return f"{package} does not import: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ""


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Import without the imported package's warnings: xformers logs which of its own extensions do not load."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
