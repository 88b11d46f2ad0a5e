"""Registers, spills, shared memory and occupancy of every kernel, compiled ahead of time: no GPU is needed.

    python -m upt_fast.kernels.report --target sm_90 --kernel layer_norm

Taken is each module of this package with a function ``workloads()``. What a workload launches is recorded (_launch.py)
and compiled with the specialisation, the settings and the compiler flags of a real launch, on pointers whose storage
begins at a multiple of 16 bytes. The exit status is 1 where a kernel does not compile, spills, or exceeds what a block
may use on a target. With TRITON_CACHE_DIR set, PTX and assembly stay there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

KIB = 1024
# A multiprocessor (SM, CU) of every target here has four partitions (SIMDs) with 512 registers of 4 bytes per lane,
# given to warps in steps of 8 per lane; a block has at most 1024 threads.
PARTITIONS, LANE_REGISTERS, REGISTER_STEP, BLOCK_THREADS = 4, 512, 8, 1024


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for, and what one multiprocessor of it (SM, CU) offers; memory in bytes."""

    backend: str
    arch: int | str
    warp_size: int
    max_warps: int  # resident at once
    max_blocks: int  # resident at once
    shared: int  # of the multiprocessor
    shared_limit: int  # what one block may ask for
    shared_reserved: int  # taken from each block on top
    shared_step: int  # allocated in multiples of

    def resident_warps(self, num_warps: int, registers: int, shared: int) -> int:
        """Warps that a multiprocessor holds of blocks of num_warps; 0 where not even one block fits."""
        per_lane = _round_up(max(registers, 1), REGISTER_STEP)
        block_shared = _round_up(shared + self.shared_reserved, self.shared_step)
        blocks = (
            self.max_blocks,
            self.max_warps // num_warps,
            LANE_REGISTERS // per_lane * PARTITIONS // num_warps,
            self.shared // block_shared if block_shared else self.max_blocks,
        )
        return num_warps * min(blocks)


# sm_*: CUDA Programming Guide, "Compute Capabilities", technical specifications; the steps, the 1 KiB that the driver
# reserves and the arithmetic are those of cuda_occupancy.h in the CUDA toolkit.
# gfx942: "AMD GPU specifications" of the ROCm documentation (LDS 64 KiB, VGPR file 512 KiB per CU), the CDNA3 ISA guide
# and LLVM's AMDGPU/Utils/AMDGPUBaseInfo.cpp (8 waves per SIMD, VGPRs and AGPRs in one file, LDS in steps of 512 bytes).
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 64, 32, 164 * KIB, 163 * KIB, KIB, 128),
    "sm_90": Target("cuda", 90, 32, 64, 32, 228 * KIB, 227 * KIB, KIB, 128),
    "sm_100": Target("cuda", 100, 32, 64, 32, 228 * KIB, 227 * KIB, KIB, 128),
    "gfx942": Target("hip", "gfx942", 64, 32, 32, 64 * KIB, 64 * KIB, 0, 512),
}

TYPES = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "bool": "u1",
    "uint8": "u8",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
}


class NothingToCompileError(Exception):
    """No module has workloads, or no kernel is called as asked."""


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What determines a compiled kernel."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, int]
    target: str

    @property
    def key(self) -> str:
        return repr((id(self.kernel), self.signature, self.constants, self.attributes, self.options, self.target))


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes, per thread but for shared_bytes of a block and seconds of compiling it."""

    num_warps: int
    registers: int
    spill_bytes: int  # stores and loads
    sgpr_spills: int  # AMD's scalar registers that went to lanes of vector registers: they touch no memory
    shared_bytes: int
    seconds: float

    def problems(self, target: Target) -> list[str]:
        """Why the kernel should not or cannot run on a target."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > target.shared_limit:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, a block may use {target.shared_limit}")
        elif not target.resident_warps(self.num_warps, self.registers, self.shared_bytes):
            found.append(f"{self.num_warps} warps of {self.registers} registers do not fit")
        threads = self.num_warps * target.warp_size
        if threads > BLOCK_THREADS:
            found.append(f"has {threads} threads a block, at most {BLOCK_THREADS} can be launched")
        return found


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
            return [*names, "-", "-", "-", "-", "-", str(target.shared_limit), "-", "-"]
        resident = target.resident_warps(took.num_warps, took.registers, took.shared_bytes)
        return [
            *names,
            *map(str, (took.num_warps, took.registers, took.spill_bytes, took.sgpr_spills)),
            *map(str, (took.shared_bytes, target.shared_limit)),
            f"{resident}/{target.max_warps}",
            f"{took.seconds:.2f}",
        ]

    def as_dict(self) -> dict[str, Any]:
        took, target = self.resources, TARGETS[self.target]
        resident = None if took is None else target.resident_warps(took.num_warps, took.registers, took.shared_bytes)
        return {
            **{name: getattr(self, name) for name in ("file", "kernel", "workload", "target")},
            **{f.name: None if took is None else getattr(took, f.name) for f in dataclasses.fields(Resources)},
            "shared_limit": target.shared_limit,
            "resident_warps": resident,
            "max_warps": target.max_warps,
            "problems": self.problems,
        }


HEADINGS = (
    *("file", "kernel", "workload", "target", "warps", "registers"),
    *("spill B", "sgpr spills", "shared B", "limit B", "occupancy", "seconds"),
)
LEFT_ALIGNED = 4


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def specialise(kernel: Any, arguments: dict[str, Any], backend: str) -> tuple[dict, dict, dict]:
    """Types, constants and attributes with which Triton would compile a launch.

    Args:
        kernel: a @triton.jit function.
        arguments: its arguments by name; tensors may be on the meta device.
        backend: "cuda" or "hip".
    Returns:
        Signature by parameter name, constants by parameter name, attributes by (parameter index,).
    Raises:
        TypeError: an argument is missing, is not a parameter, or has a type that is not supported here.
    """
    bound = kernel.signature.bind(**arguments)
    bound.apply_defaults()
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for parameter in kernel.params:
        value = bound.arguments[parameter.name]
        kind, hints = ("constexpr", []) if parameter.is_constexpr else _kind(parameter, value, backend)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        if hints:
            attributes[parameter.num,] = hints
    return signature, constants, attributes


def _kind(parameter: Any, value: Any, backend: str) -> tuple[str, list[list[Any]]]:
    """Type and attributes of an argument that is not declared constexpr."""
    import torch

    annotated = parameter.annotation_type
    specialised = not parameter.do_not_specialize and not annotated.startswith(("fp", "bf", "u1"))
    aligned, hints = False, []
    if value is None:
        return "constexpr", []
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in TYPES:
            raise TypeError(f"{parameter.name}: tensor of {dtype}")
        kind = f"*{'k' if parameter.is_const else ''}{TYPES[dtype]}"
        aligned = bool(value.storage_offset() * value.element_size() % 16 == 0)
        # Triton's AMD backend reads such tensors through buffer instructions
        if specialised and backend == "hip" and value.untyped_storage().size() < 2**31:
            hints = [["tt.pointer_range", 32]]
    elif isinstance(value, bool):
        kind = "u1"
    elif isinstance(value, float):
        kind = "fp32"
    elif isinstance(value, int):
        if value == 1 and specialised and not annotated:
            return "constexpr", []
        kind = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        aligned = value % 16 == 0
    else:
        raise TypeError(f"{parameter.name}: {type(value).__name__}")
    if aligned and specialised and not parameter.do_not_specialize_on_alignment:
        hints = [["tt.divisibility", 16], *hints]
    return annotated or kind, hints


def compile_kernel(compilation: Compilation) -> Resources:
    """Compile and read what the compiler says; TRITON_DUMP_PTXAS_LOG and TRITON_ALWAYS_COMPILE have to be set."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[compilation.target]
    source = ASTSource(
        compilation.kernel, compilation.signature, dict(compilation.constants), dict(compilation.attributes)
    )
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=gpu, options=dict(compilation.options))
    seconds = time.perf_counter() - start
    if target.backend == "cuda":
        registers, spill_bytes = read_ptxas(log.getvalue())
        sgpr_spills = static = 0
    else:
        registers, spill_bytes, sgpr_spills, static = read_amdgcn(compiled.asm["amdgcn"])
    # on AMD Triton's own LDS is dynamic, which the assembly does not count
    shared_bytes = max(compiled.metadata.shared, static)
    return Resources(compiled.metadata.num_warps, registers, spill_bytes, sgpr_spills, shared_bytes, seconds)


def read_ptxas(log: str) -> tuple[int, int]:
    """Registers per thread, and bytes of spill stores and loads, from what ptxas -v says."""
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise RuntimeError(f"ptxas told no registers or spills: {log.strip() or 'nothing'}")
    return max(registers), sum(int(stores) + int(loads) for stores, loads in spills)


def read_amdgcn(assembly: str) -> tuple[int, int, int, int]:
    """VGPRs with AGPRs, bytes of spills, spilled SGPRs, and bytes of static LDS, from the assembly's metadata."""

    def value(name: str) -> int:
        found = re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"the assembly's metadata have no .{name}")
        return int(found[1])

    # SGPRs are spilled to lanes of VGPRs; only where those run out to scratch memory, the private segment
    sgpr_spills = value("sgpr_spill_count")
    spill_bytes = max(4 * value("vgpr_spill_count"), value("private_segment_fixed_size") if sgpr_spills else 0)
    # from CDNA2 on .vgpr_count includes .agpr_count: they share one file
    return value("vgpr_count"), spill_bytes, sgpr_spills, value("group_segment_fixed_size")


def _modules(names: Sequence[str] | None) -> list[str]:
    """The modules to look for workloads in: those named, or all of this package but this and private ones."""
    if names is not None:
        return list(names)
    package = importlib.import_module("upt_fast.kernels")
    found = (info.name for info in pkgutil.iter_modules(package.__path__))
    return [f"upt_fast.kernels.{name}" for name in found if name != "report" and not name.startswith("_")]


def _collect(modules: Sequence[str], targets: Sequence[str], pattern: str) -> tuple[list[tuple], list[str], list[str]]:
    """Launches to compile: (file, kernel name, workload, compilation), what failed, and all kernels' names."""
    from upt_fast.kernels._launch import record

    found: list[tuple[str, str, str, Compilation]] = []
    failures, kernels = [], dict[str, None]()
    for name in modules:
        file, workload = f"{name.rsplit('.', 1)[-1]}.py", "import"
        kernel = file
        try:
            module = importlib.import_module(name)
            for workload, function in module.workloads() if hasattr(module, "workloads") else ():
                for target in targets:
                    with record(TARGETS[target].shared_limit) as launches:
                        function()
                    if not launches:
                        raise RuntimeError("launches no kernel")
                    for launch in launches:
                        kernel = f"{file} {launch.kernel.__name__}"
                        kernels[kernel] = None
                        if pattern not in kernel:
                            continue
                        specialised = specialise(launch.kernel, launch.arguments, TARGETS[target].backend)
                        compilation = Compilation(launch.kernel, *specialised, launch.options, target)
                        found.append((*kernel.split(), workload, compilation))
        except Exception as error:
            if pattern in kernel:
                failures.append(f"{file} {workload}: {_message(error)}")
    return found, failures, list(kernels)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"


_compilations: list[Compilation] = []


def _start_worker(compilations: list[Compilation], cache: str) -> None:
    _compilations[:] = compilations
    os.environ |= {
        "TRITON_CACHE_DIR": cache,
        "TRITON_ALWAYS_COMPILE": "1",
        "TRITON_DUMP_PTXAS_LOG": "1",
        "TRITON_STORE_BINARY_ONLY": "0",
    }


def _compile_nth(n: int) -> Resources | str:
    try:
        return compile_kernel(_compilations[n])
    except Exception as error:
        return f"does not compile: {_message(error)}"


def _compile_all(compilations: list[Compilation], jobs: int) -> list[Resources | str]:
    """Resources of each, or what went wrong; a compiler that dies takes no other kernel with it."""
    from tqdm import tqdm

    # forked, for kernels cannot be pickled
    context = multiprocessing.get_context("fork")
    results: list[Resources | str] = ["does not compile: the compiler died"] * len(compilations)

    def run(numbers: Sequence[int], workers: int, cache: str) -> list[int]:
        lost = []
        with ProcessPoolExecutor(workers, context, _start_worker, (compilations, cache)) as pool:
            futures: list[Future] = [pool.submit(_compile_nth, n) for n in numbers]
            for n, future in zip(numbers, futures, strict=True):
                try:
                    results[n] = future.result()
                    progress.update()
                except BrokenProcessPool:
                    lost.append(n)
        return lost

    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(total=len(compilations), desc="compiling", disable=None) as progress,
    ):
        cache = os.environ.get("TRITON_CACHE_DIR") or temporary
        for n in run(range(len(compilations)), jobs, cache):
            run([n], 1, cache)
    return results


def _report(
    modules: Sequence[str], targets: Sequence[str], pattern: str, jobs: int
) -> tuple[list[Row], list[str], int]:
    """The table, all failures, and how many compilations that took."""
    found, failures, kernels = _collect(modules, targets, pattern)
    if not found and not failures:
        if not kernels:
            raise NothingToCompileError(f"no workloads in {', '.join(modules)}")
        raise NothingToCompileError(f"--kernel {pattern}: wanted a part of one of {', '.join(kernels)}")
    numbers = {key: n for n, key in enumerate(dict.fromkeys(compilation.key for *_, compilation in found))}
    unique = {compilation.key: compilation for *_, compilation in found}
    results = _compile_all([unique[key] for key in numbers], jobs)
    rows: dict[tuple, Row] = {}
    for file, kernel, workload, compilation in found:
        result = results[numbers[compilation.key]]
        target = compilation.target
        if isinstance(result, str):
            row = Row(file, kernel, workload, target, None, [result])
        else:
            row = Row(file, kernel, workload, target, result, result.problems(TARGETS[target]))
        rows.setdefault((file, kernel, workload, target, compilation.key), row)
    failed: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows.values():
        for problem in row.problems:
            failed.setdefault((row.file, row.kernel, row.target, problem), []).append(row.workload)
    for (file, kernel, target, problem), workloads in failed.items():
        failures.append(f"{file} {kernel} {target} ({', '.join(workloads)}): {problem}")
    return list(rows.values()), failures, len(numbers)


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
        rows, failures, compilations = _report(
            _modules(options.module), options.target, options.kernel, max(1, options.jobs)
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
