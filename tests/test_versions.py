"""The versions that pyproject.toml claims are those of the tested sets."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def requirements(*extras: str) -> list[Requirement]:
    """What an installation with these extras asks for."""
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in of_extra(extra))]
    return [Requirement(text) for text in texts]


def of_extra(extra: str) -> list[str]:
    """What an extra asks for; extras that it names bring theirs."""
    found = []
    for text in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(text)
        own = requirement.name == PROJECT["name"]
        found += [text for name in sorted(requirement.extras) for text in of_extra(name)] if own else [text]
    return found


def pins(name: str) -> dict[str, Version]:
    """The versions of a file of constraints, which all are exact, by canonical name."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            assert canonicalize_name(requirement.name) not in found, line
            found[canonicalize_name(requirement.name)] = Version(pin.version)
    return found


def test_extras_bring_others():
    names = {requirement.name for requirement in requirements("dev")}
    assert {"torch", "tensorboard", "matplotlib", "pytest", "ruff"} <= names


@pytest.mark.parametrize("requirement", requirements("test"), ids=lambda requirement: requirement.name)
def test_floors_are_the_oldest_set(requirement):
    floors = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
    pin = pins("constraints-oldest.txt")[canonicalize_name(requirement.name)]
    assert floors == [pin]
    assert pin in requirement.specifier


@pytest.mark.parametrize(
    ("name", "extras"), [("constraints.txt", ["dev"]), ("constraints-oldest.txt", ["test", "interpreter"])]
)
def test_sets_are_within_the_ranges(name, extras):
    pinned = pins(name)
    for requirement in requirements(*extras):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_what_builds_is_tested():
    """The tests build a wheel with what is installed."""
    assert {Requirement(text) for text in PYPROJECT["build-system"]["requires"]} <= set(requirements("test"))


def test_sets_differ():
    """Or the oldest one tests nothing."""
    old, new = pins("constraints-oldest.txt"), pins("constraints.txt")
    for requirement in requirements("test"):
        name = canonicalize_name(requirement.name)
        assert old[name] < new[name]
