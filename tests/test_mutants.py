"""The list of mutants against the kernels of today; ``make mutants`` runs them."""

import importlib.util
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def catalogue():
    spec = importlib.util.spec_from_file_location("catalogue", TESTS / "mutants" / "catalogue.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CATALOGUE = catalogue()


@pytest.mark.parametrize("mutant", CATALOGUE.MUTANTS, ids=lambda mutant: mutant.name)
def test_place_is_there(mutant):
    text = (TESTS.parent / "kernels" / mutant.file).read_text(encoding="utf-8")
    assert mutant.apply(text) != text
    assert (TESTS / mutant.test_file).is_file()


def test_every_kernel_has_some():
    assert len({mutant.name for mutant in CATALOGUE.MUTANTS}) == len(CATALOGUE.MUTANTS)
    kernels = {
        path.name
        for path in (TESTS.parent / "kernels").glob("*.py")
        if re.search("^@triton.jit", path.read_text(), re.M)
    }
    sources = {f"cpu/{path.name}" for path in (TESTS.parent / "kernels" / "cpu").iterdir()}
    assert {mutant.file for mutant in CATALOGUE.MUTANTS} == (kernels | sources) - {
        "_launch.py"
    }  # which computes nothing


def test_a_place_that_moved_is_named():
    mutant = CATALOGUE.Mutant("m", "activation.py", "no such text", "")
    with pytest.raises(ValueError, match="'no such text' 0 times"):
        mutant.apply("text")
    with pytest.raises(ValueError, match="no 'old' behind 'here'"):
        CATALOGUE.Mutant("m", "activation.py", "old", "", after="here").apply("old here")
