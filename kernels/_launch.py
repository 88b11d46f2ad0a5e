"""How kernels are launched, and how the same launches are recorded to be compiled without a GPU.

Every kernel goes through :func:`launch`. Inside :func:`record` nothing runs: the launchers are called with tensors on
the meta device, and what they would have launched, with exactly the settings of a real run, is kept for
kernels/report.py to compile ahead of time.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

# read once, as triton does: its own helpers are decorated when it is imported
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its grid, its arguments by name, and options such as num_warps."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


# (name, function that calls launchers on meta tensors) of the shapes that a kernel file is compiled for in advance
Workload = tuple[str, Callable[[], object]]

_recorded: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("recorded", default=None)
_limit: contextvars.ContextVar[int | None] = contextvars.ContextVar("limit", default=None)
_OPTIONS = ("num_warps", "num_stages")
SMALLEST_LIMIT = 64 * 1024  # bytes of shared memory that a block may use on any GPU of _targets.py


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run kernel[grid](**arguments), or note it inside :func:`record`; an empty grid runs nothing.

    Raises:
        ValueError: it is interpreted, and the interpreter does not run here.
    """
    recorded = _recorded.get()
    if recorded is not None:
        options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
        recorded.append(Launch(kernel, grid, arguments, options))
    elif all(grid):
        if reason := interpreter_refusal():
            raise ValueError(reason)
        tensor = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
        # triton launches on the current device, whatever device the tensors are on
        with torch.cuda.device_of(tensor) if tensor is not None and tensor.is_cuda else contextlib.nullcontext():
            kernel[grid](**arguments)


def interpreter_refusal() -> str:
    """Why Triton's interpreter would not run the kernels; empty: it would, or they are compiled."""
    return _try_interpreter() if INTERPRETED else ""


@functools.cache
def _try_interpreter() -> str:
    """What keeps a loop from running: the interpreter computes with NumPy, each scalar as an array of one number.

    Triton 3.6 makes a loop's bounds of it by int(array), which NumPy 2.4 has for arrays without dimensions only.
    """
    found = torch.zeros(3, dtype=torch.int32)
    try:
        _count[(1,)](found, len(found))
    except Exception as error:  # wrapped in the interpreter's own
        problem = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        return (
            f"triton {triton.__version__}'s interpreter does not run with NumPy {np.__version__} ({problem[0]}): "
            "install 'numpy<2.4', or triton 3.7 or newer"
        )
    return ""


@triton.jit
def _count(x_ptr, n):  # (n,)
    for i in range(n):
        tl.store(x_ptr + i, i)


@contextlib.contextmanager
def record(limit: int | None = None) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, as on a GPU whose blocks may use limit bytes of shared memory."""
    launches: list[Launch] = []
    tokens = _recorded.set(launches), _limit.set(limit)
    try:
        yield launches
    finally:
        _recorded.reset(tokens[0])
        _limit.reset(tokens[1])


def with_precision(precision: str, run: Callable[..., object], *arguments: Any) -> object:
    """run(*arguments) under torch.set_float32_matmul_precision, for workloads."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return run(*arguments)
    finally:
        torch.set_float32_matmul_precision(before)


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may use on a device, or on the one that is recorded for."""
    if (limit := _limit.get()) is not None:
        return limit
    return _device_limit(device) if device.type == "cuda" else SMALLEST_LIMIT


@functools.cache
def _device_limit(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    # ROCm has no larger limit to opt in to
    return getattr(properties, "shared_memory_per_block_optin", 0) or SMALLEST_LIMIT


def row_tile(rows: int, columns: int) -> dict[str, int]:
    """BLOCK_M, BLOCK_N and num_warps of a kernel that reduces whole rows: about 32 numbers per thread.

    The interpreter pays per program, so there a program takes many rows.
    """
    block_n = triton.next_power_of_2(max(columns, 1))
    numbers = 1 << 16 if INTERPRETED else 4096
    block_m = max(1, min(numbers // block_n, triton.next_power_of_2(max(rows, 1))))
    num_warps = max(1, min(16, block_m * block_n // 1024))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps}


def rows_of(x: Tensor) -> Tensor:
    """(..., N) -> (M, N), a view where the strides allow one; the last dimension contiguous."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
