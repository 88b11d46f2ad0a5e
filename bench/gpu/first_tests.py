"""A pytest plugin (-p gpu.first_tests) for dry runs: the first test of each file and no more."""

from __future__ import annotations

from gpu.checkout import pytest_configure

__all__ = ["pytest_configure"]


def pytest_collection_modifyitems(items: list) -> None:
    first = {item.path: item for item in reversed(items)}
    items[:] = [item for item in items if first[item.path] is item]
