"""Registers, spills, shared memory and occupancy of every kernel, compiled ahead of time: no GPU is needed.

    python -m upt_fast.kernels.report --target sm_90 --kernel layer_norm

Taken is each module of this package with a function ``workloads()``. What a workload launches is recorded (_launch.py)
and compiled with the specialisation, the settings and the compiler flags of a real launch, on pointers whose storage
begins at a multiple of 16 bytes. The exit status is 1 where a kernel does not compile, spills, or exceeds what a block
may use on a target; on NVIDIA's GPUs also where it multiplies 16-bit numbers without a matrix instruction, has memory
of its own, or makes no wide load (_instructions.py). With TRITON_CACHE_DIR set, PTX and assembly stay there.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from upt_fast.kernels._compile import compile_all
from upt_fast.kernels._instructions import Instructions
from upt_fast.kernels._targets import TARGETS, Resources
from upt_fast.kernels._workloads import NothingToCompileError, collect, modules_with_kernels


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report: a kernel as one workload launches it, for one target."""

    file: str
    kernel: str
    workload: str
    target: str
    resources: Resources | None
    problems: list[str]

    @property
    def cells(self) -> list[str]:
        names = [self.file, self.kernel, self.workload, self.target]
        took, target = self.resources, TARGETS[self.target]
        if took is None:
            return [*names, "-", "-", "-", "-", "-", str(target.shared_limit), "-", "-", "-", "-"]
        resident = target.resident_warps(took.num_warps, took.registers, took.shared_bytes)
        return [
            *names,
            *map(str, (took.num_warps, took.registers, took.spill_bytes, took.sgpr_spills)),
            *map(str, (took.shared_bytes, target.shared_limit)),
            f"{resident}/{target.max_warps}",
            *_instruction_cells(took.instructions),
            f"{took.seconds:.2f}",
        ]

    def as_dict(self) -> dict[str, Any]:
        took, target = self.resources, TARGETS[self.target]
        resident = None if took is None else target.resident_warps(took.num_warps, took.registers, took.shared_bytes)
        return {
            **{name: getattr(self, name) for name in ("file", "kernel", "workload", "target")},
            **{f.name: None if took is None else getattr(took, f.name) for f in dataclasses.fields(Resources)},
            "instructions": None if took is None or took.instructions is None else took.instructions._asdict(),
            "shared_limit": target.shared_limit,
            "resident_warps": resident,
            "max_warps": target.max_warps,
            "problems": self.problems,
        }


def _instruction_cells(found: Instructions | None) -> list[str]:
    """Who multiplies, and the widest load."""
    if found is None:
        return ["-", "-"]
    return ["+".join(found.products).replace(" ", ":") or ("fma" if found.dots else "-"), str(found.load_bytes or "-")]


HEADINGS = (
    *("file", "kernel", "workload", "target", "warps", "registers"),
    *("spill B", "sgpr spills", "shared B", "limit B", "occupancy", "products", "load B", "seconds"),
)
LEFT_ALIGNED = 4


def compile_workloads(
    modules: Sequence[str], targets: Sequence[str], pattern: str, jobs: int
) -> tuple[list[Row], list[str], int]:
    """The table, all failures, and how many compilations that took.

    Raises:
        NothingToCompileError: the modules have no workloads, or none launches a kernel with the pattern in its name.
    """
    uses, failures, kernels = collect(modules, targets, pattern)
    if not uses and not failures:
        if not kernels:
            raise NothingToCompileError(f"no workloads in {', '.join(modules)}")
        raise NothingToCompileError(f"--kernel {pattern}: wanted a part of one of {', '.join(kernels)}")
    unique = {use.compilation.key: use.compilation for use in uses}
    results = dict(zip(unique, compile_all(list(unique.values()), jobs), strict=True))
    rows: dict[tuple, Row] = {}
    for use in uses:
        key, target = use.compilation.key, use.compilation.target
        result = results[key]
        if isinstance(result, str):
            row = Row(*use[:3], target, None, [result])
        else:
            row = Row(*use[:3], target, result, result.problems(TARGETS[target]))
        rows.setdefault((*use[:3], target, key), row)
    return list(rows.values()), failures + _failures(rows.values()), len(unique)


def _failures(rows: Iterable[Row]) -> list[str]:
    """The problems of rows, those of several workloads in one."""
    failed: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        for problem in row.problems:
            failed.setdefault((row.file, row.kernel, row.target, problem), []).append(row.workload)
    return [
        f"{file} {kernel} {target} ({', '.join(workloads)}): {problem}"
        for (file, kernel, target, problem), workloads in failed.items()
    ]


def _text(rows: list[Row]) -> str:
    table = [list(HEADINGS), *(row.cells for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        padded = [
            cell.ljust(width) if n < LEFT_ALIGNED else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _markdown(rows: list[Row], failures: list[str], summary: str) -> str:
    rules = [":--" if n < LEFT_ALIGNED else "--:" for n in range(len(HEADINGS))]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (HEADINGS, rules, *(row.cells for row in rows)))
    failed = "".join(f"\n- {failure.splitlines()[0]}" for failure in failures)
    return f"# Kernels, compiled ahead of time\n\n{summary}\n\n{table}\n" + (
        f"\nFailures:\n{failed}\n" if failed else ""
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m upt_fast.kernels.report",
        description="Compile every kernel without a GPU, and tell registers, spills, shared memory and occupancy.",
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPUs to compile for")
    parser.add_argument("--kernel", default="", metavar="SUBSTRING", help="only kernels with this in file or name")
    parser.add_argument("--module", nargs="+", help="modules with workloads(), in place of those of upt_fast.kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report as Markdown")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0, 1 where a kernel fails, 2 where there is nothing to do."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for path in (options.json, options.markdown):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path}: {path.parent} is not a directory")
    if "TRITON_INTERPRET" in os.environ:
        # Triton's own helpers are decorated for the interpreter when it is imported, and then compile no more
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "upt_fast.kernels.report", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.run(command, env=environment, check=False).returncode
    if importlib.util.find_spec("triton") is None:
        print("upt_fast.kernels.report: triton is not installed", file=sys.stderr)
        return 2
    import torch
    import triton

    start = time.perf_counter()
    try:
        rows, failures, compilations = compile_workloads(
            modules_with_kernels(options.module), options.target, options.kernel, max(1, options.jobs)
        )
    except NothingToCompileError as error:
        print(f"upt_fast.kernels.report: {error}", file=sys.stderr)
        return 2
    kernels, files = len({(row.file, row.kernel) for row in rows}), len({row.file for row in rows})
    summary = (
        f"{kernels} kernels of {files} files for {', '.join(options.target)}: {compilations} compilations in "
        f"{time.perf_counter() - start:.0f} s, triton {triton.__version__}, torch {torch.__version__}"
    )
    print(_text(rows))
    print(summary)
    for failure in failures:
        print(f"failed: {failure}")
    if options.markdown is not None:
        options.markdown.write_text(_markdown(rows, failures, summary))
    if options.json is not None:
        report = {
            "triton": triton.__version__,
            "torch": torch.__version__,
            "targets": {name: dataclasses.asdict(TARGETS[name]) for name in options.target},
            "compilations": compilations,
            "rows": [row.as_dict() for row in rows],
            "failures": failures,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
