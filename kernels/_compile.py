"""Kernels compiled ahead of time, as Triton would for a launch, and what the compilers say; no GPU is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from upt_fast.kernels._instructions import read_instructions
from upt_fast.kernels._targets import TARGETS, Resources

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
    instructions, stack_bytes = None, 0
    if target.backend == "cuda":
        registers, spill_bytes, stack_bytes = read_ptxas(log.getvalue())
        sgpr_spills = static = 0
        instructions = read_instructions(compiled.asm["ttir"], compiled.asm["ptx"])
    else:
        registers, spill_bytes, sgpr_spills, static = read_amdgcn(compiled.asm["amdgcn"])
    # on AMD Triton's own LDS is dynamic, which the assembly does not count
    shared_bytes = max(compiled.metadata.shared, static)
    taken = compiled.metadata.num_warps, registers, spill_bytes, sgpr_spills, shared_bytes
    return Resources(*taken, seconds, instructions, stack_bytes)


def read_ptxas(log: str) -> tuple[int, int, int]:
    """Registers per thread, bytes of spill stores and loads, and bytes of a stack without spills, from ptxas -v."""
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise RuntimeError(f"ptxas told no registers or spills: {log.strip() or 'nothing'}")
    spilled = sum(int(stores) + int(loads) for stores, loads in spills)
    stack = max(map(int, re.findall(r"(\d+) bytes stack frame", log)), default=0)
    return max(registers), spilled, 0 if spilled else stack


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


def message(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"


def _serve(connection: Connection, compilations: Sequence[Compilation], cache: str) -> None:
    """A worker: numbers of compilations come, what became of each goes back; None ends it."""
    os.environ |= {
        "TRITON_CACHE_DIR": cache,
        "TRITON_ALWAYS_COMPILE": "1",
        "TRITON_DUMP_PTXAS_LOG": "1",
        "TRITON_STORE_BINARY_ONLY": "0",
    }
    while (number := connection.recv()) is not None:
        try:
            connection.send(compile_kernel(compilations[number]))
        except Exception as error:
            connection.send(f"does not compile: {message(error)}")


def compile_all(compilations: Sequence[Compilation], jobs: int) -> list[Resources | str]:
    """Resources of each, or what went wrong, from jobs processes; a compiler that dies takes no other along."""
    from tqdm import tqdm

    # forked, for kernels cannot be pickled
    context = multiprocessing.get_context("fork")
    results: list[Resources | str] = ["does not compile: the compiler died"] * len(compilations)
    waiting, busy = iter(range(len(compilations))), dict[Connection, int]()

    def start() -> Connection:
        own, other = context.Pipe()
        context.Process(target=_serve, args=(other, compilations, cache), daemon=True).start()
        other.close()  # with the worker's copy the last one ends, and so does reading from it
        return own

    def give(worker: Connection) -> None:
        number = next(waiting, None)
        worker.send(number)
        if number is not None:
            busy[worker] = number

    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(total=len(compilations), desc="compiling", disable=None) as progress,
    ):
        cache = os.environ.get("TRITON_CACHE_DIR") or temporary
        for _ in range(min(jobs, len(compilations))):
            give(start())
        while busy:
            for worker in wait(list(busy)):
                number = busy.pop(worker)
                try:
                    results[number] = worker.recv()
                except (EOFError, ConnectionError):
                    worker = start()
                progress.update()
                give(worker)
        for process in multiprocessing.active_children():
            process.join()
    return results
