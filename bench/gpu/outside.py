"""Parts "tests" and "sanitizer": the kernels under pytest and under compute-sanitizer, in processes of their own."""

from __future__ import annotations

import os
import pkgutil
import re
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

from gpu import processes
from gpu.checkout import BENCH, ROOT
from gpu.machine import Machine, file_hash, sanitizer_path
from gpu.models import Clips, require
from gpu.op_cases import Bound, errors
from gpu.record import Skipped, Task

from upt_fast.testing_ops import OPERATIONS, small_cases

TESTS = ROOT / "tests"
GPU_MARK = "mark.gpu"  # in the files outside tests/kernels that have tests for a GPU
TOOLS = ("memcheck", "racecheck")
TOOL_FOUND_ERRORS = 86  # exit code that compute-sanitizer is told to give
SECONDS = 480  # for one process


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | {"PYTHONPATH": path} | more


def run_tests(arguments: list[str], dry: bool) -> dict[str, Any]:
    """Run pytest; how many tests passed, failed and were skipped, and the failures' messages."""
    if util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        plugin = "gpu.first_tests" if dry else "gpu.checkout"
        command = [sys.executable, "-m", "pytest", "-p", plugin, "-q", f"--junitxml={report}", *arguments]
        code, output = processes.run(command, SECONDS, environment(), ROOT, capture=True)
        if code == 5:
            raise Skipped("no test was collected")
        if code not in (0, 1) or not report.is_file():
            return {"status": "failed", "message": f"pytest {_ended(code)}", "output": output[-2000:]}
        return read_junit(report.read_text(encoding="utf-8"))


def read_junit(report: str) -> dict[str, Any]:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures, reasons = {}, set()
    for case in ElementTree.fromstring(report).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if outcome is None:
            counts["passed"] += 1
        elif outcome.tag == "skipped":
            counts["skipped"] += 1
            reasons.add(outcome.get("message", ""))
        else:
            counts["failed"] += 1
            failures[f"{case.get('classname')}::{case.get('name')}"] = outcome.get("message", "")[:500]
    row: dict[str, Any] = {**counts, "skip_reasons": sorted(reasons), "failures": failures}
    if counts["failed"]:
        row |= {"status": "failed", "message": f"{counts['failed']} failed: {', '.join(list(failures)[:3])}"}
    return row


def test_tasks(machine: Machine, clips: Clips) -> list[Task]:
    # test_report.py compiles all kernels ahead of time, which needs no GPU and takes minutes
    files = [path for path in sorted(TESTS.glob("kernels/test_*.py")) if path.name != "test_report.py"]
    if machine.dry:
        return [Task("the first test of each kernel's file", partial(run_tests, [*map(str, files)], True))]
    marked = [path for path in sorted(TESTS.glob("**/test_*.py")) if path not in files and GPU_MARK in path.read_text()]
    found = [(path, [str(path)]) for path in files] + [(path, [str(path), "-m", "gpu"]) for path in marked]
    return [
        Task(str(path.relative_to(TESTS)), partial(run_tests, arguments, False), version=file_hash(path))
        for path, arguments in found
    ]


def kernel_files() -> list[str]:
    """Names of the files in kernels/ that hold kernels."""
    import upt_fast.kernels

    names = [info.name for info in pkgutil.iter_modules(upt_fast.kernels.__path__)]
    return [name for name in names if not name.startswith("_") and name != "report"]


def exercise(kernel: str, machine: Machine) -> dict[str, Any]:
    """Small forwards and backwards of every op of a kernel file, compared with float64."""
    found, ops = {}, set()
    for case in small_cases():
        for dtype in case.dtypes if OPERATIONS[case.op].kernel == kernel else ():
            name = f"{case.op} {case.name} {str(dtype).removeprefix('torch.')}"
            try:
                require("triton", machine, dtype)
            except Skipped:
                continue
            ops.add(case.op)
            bound = Bound(case, machine.device, dtype, seed=machine.seed)
            found[name] = errors(bound, partial(bound.forward, "triton"))
    if not found:
        return {"status": "failed", "message": f"no case in upt_fast/testing_ops.py exercises kernels/{kernel}.py"}
    row: dict[str, Any] = {"ops": sorted(ops), "cases": len(found), "error": max(r["error"] for r in found.values())}
    wrong = [f"{name}: {r['message']}" for name, r in found.items() if r.get("status") == "failed"]
    if wrong:
        row |= {"status": "failed", "message": wrong[0], "wrong": wrong}
    return row


def sanitize(kernel: str, tool: str, binary: str | None) -> dict[str, Any]:
    """Exercise a kernel file under a tool of compute-sanitizer."""
    if binary is None:
        raise Skipped("compute-sanitizer is not installed")
    script = [sys.executable, str(BENCH / "gpu_suite.py"), "--exercise", kernel]
    command = [binary, "--tool", tool, "--error-exitcode", str(TOOL_FOUND_ERRORS), *script]
    # the tool sees an access beyond a tensor only where each tensor is an allocation of its own
    env = environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    code, output = processes.run(command, SECONDS, env, ROOT, capture=True)
    summaries = re.findall(r"^=+ (\w+ SUMMARY: .*)$", output, re.MULTILINE)
    summary = summaries[-1] if summaries else None
    found_errors = code == TOOL_FOUND_ERRORS or bool(summary and re.search(r"\b[1-9]\d* errors?\b", summary))
    row: dict[str, Any] = {"summary": summary}
    if code == 0 and summary and not found_errors:
        return row
    reports = [line for line in output.splitlines() if line.startswith("=========")]
    row |= {"output": output[-3000:], "reports": reports[:40]}
    if found_errors:
        return row | {"status": "failed", "message": summary or "the tool found errors"}
    if code is not None and summary is None:
        return row | {"status": "error", "message": f"the tool did not run: {output.strip()[-200:]}"}
    return row | {"status": "failed", "message": f"the exercise {_ended(code)}"}


def _ended(code: int | None) -> str:
    return f"had not ended after {SECONDS} s" if code is None else f"ended with {code}"


def sanitizer_tasks(machine: Machine, clips: Clips) -> list[Task]:
    if machine.dry:
        return [Task(f"{kernel} no tool", partial(exercise, kernel, machine)) for kernel in kernel_files()]
    binary = sanitizer_path()
    return [
        Task(f"{kernel} {tool}", partial(sanitize, kernel, tool, binary), {"kernel": kernel, "tool": tool})
        for tool in TOOLS
        for kernel in kernel_files()
    ]
