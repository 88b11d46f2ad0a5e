# Every target sets up what it needs: a virtual environment in .venv with the pinned packages of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# what is installed: the versions, and the extra of pyproject.toml
CONSTRAINTS := constraints.txt
EXTRA := dev
OLDEST := .venv-oldest
# what follows "make demo ARGS=..." goes to the command
ARGS ?=
# processes that run tests side by side
JOBS ?= 2

.PHONY: help setup demo test test-portable test-oldest mutants bench bench-full check kernel-report clean

help:
	@echo "make setup          virtual environment in $(VENV) with the pinned packages"
	@echo "make demo           adapt a small CLIP to handwritten digits in a new domain, in under five minutes"
	@echo "make test           the test suite"
	@echo "make test-portable  its numeric part under settings that make this processor pass for others (about an hour)"
	@echo "make test-oldest    the test suite with the oldest versions that pyproject.toml allows, in $(OLDEST)"
	@echo "make mutants        kernels made wrong, one operation at a time: each must be caught (about half an hour)"
	@echo "make bench          benchmarks, default selection (about ten minutes)"
	@echo "make bench-full     all benchmarks"
	@echo "make check          ruff, mypy, and which part of the package may import which"
	@echo "make kernel-report  registers, spills and shared memory of every kernel; needs no GPU"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py $(CONSTRAINTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint $(CONSTRAINTS) --editable '.[$(EXTRA)]'
	@touch $@

demo: setup
	$(BIN)/upt-fast demo $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-portable: setup
	$(BIN)/python tests/portable.py --jobs $(JOBS) $(ARGS)

mutants: setup
	$(BIN)/python tests/mutants/run.py --jobs $(JOBS) $(ARGS)

# releases of that time know Python 3.10 to 3.12: PYTHON=python3.11 names one where python3 is newer
test-oldest:
	$(MAKE) test VENV=$(OLDEST) CONSTRAINTS=constraints-oldest.txt EXTRA=test

bench: setup
	$(BIN)/python -m pytest bench/ --benchmark-only $(ARGS)

bench-full: setup
	$(BIN)/python -m pytest bench/ --benchmark-only -m "full or not full" $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

kernel-report: setup
	$(BIN)/python -m upt_fast.kernels.report $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
