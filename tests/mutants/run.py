"""Run the kernels' tests on each mutant of catalogue.py: every one must be caught, by a comparison that fails.

    python tests/mutants/run.py [--only TEXT] [--jobs N] [--list]

A mutant lives in a copy of the package; the working tree is never changed. It is caught if a test ends in a failed
assertion; it survives if all tests pass or are skipped, and counts as broken where it does not compile, or where tests
end in any other way. First the same tests run without a change: they must pass. Exit code 0: all caught.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path

from catalogue import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 1200.0
LOADED = """
import torch, upt_fast.kernels
from upt_fast.engine.cpu import library
print(upt_fast.kernels.__file__)
print(library.refusal(torch.float32))
"""


@contextlib.contextmanager
def copied(mutant: Mutant | None) -> Iterator[Path]:
    """A folder with the package and its tests, the kernels inside the package, and one change."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        ignore = shutil.ignore_patterns("__pycache__")
        for source in ("upt_fast", "tests", "bench"):
            shutil.copytree(ROOT / source, folder / source, ignore=ignore)
        for source in ("kernels", "configs"):
            shutil.copytree(ROOT / source, folder / "upt_fast" / source, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutant is not None:
            file = folder / "upt_fast" / "kernels" / mutant.file
            file.write_text(mutant.apply(file.read_text(encoding="utf-8")), encoding="utf-8")
        yield folder


def outcome(mutant: Mutant | None, test_file: str, select: str = "") -> tuple[str, str]:
    """("caught" | "survived" | "broken", by what) of the tests on a mutant, or on none."""
    with copied(mutant) as folder:
        environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        if mutant is None or mutant.compiled:
            loaded = _run([sys.executable, "-c", LOADED], folder, environment).splitlines()
            if not loaded or not loaded[0].startswith(str(folder)):
                return "broken", f"the package of {loaded[:1]} would be tested"
            if loaded[1:] != [""] and test_file == "engine/test_cpu_ops.py":
                return "broken", loaded[-1]
        report = folder / "report.xml"
        command = [sys.executable, "-m", "pytest", f"tests/{test_file}", "-q", "-x", "-p", "no:cacheprovider"]
        tail = _run([*command, f"--junit-xml={report}", *(["-k", select] if select else [])], folder, environment)
        if not report.is_file():
            return "broken", tail.strip()[-300:]
        return _verdict(report)


def _run(command: Sequence[str], folder: Path, environment: dict[str, str]) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end after {LIMIT_S:.0f} s"
    return done.stdout or done.stderr


def _verdict(report: Path) -> tuple[str, str]:
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    for case in cases:
        for kind in ("error", "failure"):
            if (found := case.find(kind)) is not None:
                message = (found.get("message") or "").strip()
                asserted = kind == "failure" and ("AssertionError" in message or message.startswith("assert"))
                return (
                    "caught" if asserted else "broken",
                    f"{case.get('name')}: {message.splitlines()[0][:120] if message else kind}",
                )
    passed = sum(case.find("skipped") is None for case in cases)
    return ("survived", f"{passed} tests pass") if passed else ("broken", "no test runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the mutants that are chosen; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="those with this text in the name or file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="side by side")
    parser.add_argument("--list", action="store_true", help="print them and run nothing")
    options = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if options.only in m.name or options.only in m.file]
    if not chosen:
        parser.error(f"no mutant has {options.only!r} in its name or file; --list shows all")
    if options.list:
        print("\n".join(f"{m.file:24} {m.name}" for m in chosen))
        return 0
    groups = sorted({(m.test_file, m.select) for m in chosen})
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        started = time.monotonic()
        for (file, select), (verdict, by) in zip(groups, pool.map(lambda g: outcome(None, *g), groups), strict=True):
            print(
                f"{'passes' if verdict == 'survived' else 'FAILS':8} without a change: {file} {select} ({by})",
                flush=True,
            )
            failed += verdict != "survived"
        if failed:
            print("the tests must pass before a mutant can be caught")
            return 1
        found = pool.map(lambda m: outcome(m, m.test_file, m.select), chosen)
        for mutant, (verdict, by) in zip(chosen, found, strict=True):
            word = verdict if verdict == "caught" else verdict.upper()
            print(f"{word:8} {mutant.name} ({by})", flush=True)
            failed += verdict != "caught"
    print(f"{len(chosen) - failed} of {len(chosen)} caught in {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
