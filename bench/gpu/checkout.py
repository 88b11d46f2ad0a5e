"""Makes upt_fast importable from a checkout that pip has not installed; as a pytest plugin (-p gpu.checkout) too."""

from __future__ import annotations

import importlib
import sys
from importlib import util
from pathlib import Path

BENCH = Path(__file__).parents[1]
ROOT = BENCH.parent


def make_importable() -> None:
    if util.find_spec("upt_fast") is None:
        sys.path.insert(0, str(ROOT))
    if util.find_spec("upt_fast.kernels") is None:
        # setup.py's mapping of the top-level folder kernels/
        importlib.import_module("upt_fast").__path__.append(str(ROOT))


def pytest_configure() -> None:
    make_importable()
