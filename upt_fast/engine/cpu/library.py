"""The engine's own CPU operations (kernels/cpu), compiled where they are first needed.

They are used by towers of at least MIN_WIDTH in float32 or bfloat16 on processors with AVX-512 (bfloat16: with its
instructions); a compiler is needed once, the result is kept in the cache folder. Where there is none, PyTorch's own
operations compute the same, slower; ``upt-fast info`` says why. Which of the two runs hangs on the machine alone.

``UPT_FAST_CPU_OPS=0`` switches them off, ``UPT_FAST_CACHE`` moves the cache folder from ~/.cache/upt_fast.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upt_fast.common.files import cache_folder
from upt_fast.engine.cpu import counted

logger = logging.getLogger("upt_fast")

MIN_WIDTH = 256  # narrower towers gain nothing
BLOCK = 64  # columns of a packed block, NB in linear.cpp
PANELS = (192, 96, 384, 0)  # rows of a panel to choose from, the usual first; 0: PyTorch multiplies
ACTIVATIONS = {"none": 0, "quick_gelu": 1, "gelu": 2, "gelu_tanh": 3}
BF16_FLAGS = ["-mavx512bf16"]  # where the processor has them
FLAGS = ["-O3", "-fopenmp", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"]
DEFINES = ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"]


class Factor(NamedTuple):
    """The frozen factor (K, N) of a product, and how rows are multiplied with it."""

    values: Tensor  # packed, see pack; where panel is 0 (K, N)
    panel: int  # rows of a panel at most; 0: PyTorch multiplies


def pack(b: Tensor, panel: int = PANELS[0]) -> Factor:
    """A factor (K, N) as blocks of columns, (N / 64, K, 64), bfloat16 (N / 64, K / 2, 64, 2); unpacked for panel 0."""
    if panel == 0:
        return Factor(b, 0)
    b = F.pad(b, (0, -b.shape[1] % BLOCK))
    if b.dtype == torch.float32:
        return Factor(b.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous(), panel)
    return Factor(b.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, 2)).permute(2, 0, 3, 1).contiguous(), panel)


def refusal(dtype: torch.dtype, width: int | None = None, num_heads: int = 1) -> str:
    """Why the operations would not run on rows of this dtype and width; empty: they would, and are loaded."""
    if os.environ.get("UPT_FAST_CPU_OPS", "") == "0":
        return "UPT_FAST_CPU_OPS=0"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{str(dtype).removeprefix('torch.')} (take float32, bfloat16)"
    if width is not None and width < MIN_WIDTH:
        return f"width {width} (run from {MIN_WIDTH})"
    if dtype == torch.bfloat16 and width is not None and width // num_heads % 2:
        return f"heads of width {width // num_heads} (in bfloat16 an even one)"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return "the processor, or PyTorch on it, has no AVX-512"
    if dtype == torch.bfloat16 and not _has_bfloat16():
        return "the processor has no bfloat16 instructions"
    return _load() or _no_product(dtype)


def _has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


@functools.cache
def _load() -> str:
    """Load the library, compiling it if need be; returns what kept it from that, or an empty text."""
    folder = Path(str(resources.files("upt_fast.kernels"))) / "cpu"
    sources = sorted(folder.glob("*.cpp"))
    code = b"".join(path.read_bytes() for path in [*sources, folder / "common.h"])
    flags = [*FLAGS, *BF16_FLAGS] if _has_bfloat16() else FLAGS
    version = f"{torch.__version__} {platform.machine()} {flags} {DEFINES}".encode()
    target = cache_folder() / f"cpu-{hashlib.sha256(code + version).hexdigest()[:16]}.so"
    try:
        if target.is_file():
            torch.ops.load_library(str(target))
        else:
            _compile_and_load([str(path) for path in sources], flags, target)
    except Exception as error:  # compilers and loaders fail in many ways; PyTorch's operations do the same
        reason = str(error).strip().splitlines()
        return f"cannot be compiled: {reason[0] if reason else type(error).__name__}"
    counted.register_compiled()
    return ""


@functools.cache
def _no_product(dtype: torch.dtype) -> str:
    """Why PyTorch's micro-kernel does not multiply, which its version and oneDNN decide: tried, for neither tells."""
    a, b = (torch.ones(n, BLOCK, dtype=dtype, device="cpu") for n in (4, BLOCK))
    try:
        torch.ops.upt_fast_cpu.linear_residual(a, *pack(b), None, None, torch.empty_like(a))
    except RuntimeError as error:
        return f"PyTorch does not multiply so here: {str(error).strip().splitlines()[0]}"
    return ""


def _compile_and_load(sources: list[str], flags: list[str], target: Path) -> None:
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler {compiler!r}")
    logger.info("compiling CPU operations, once, into %s (about half a minute)", target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    # one process compiles for those that start with it; the kernel drops the lock with a process that dies
    with open(target.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():
            torch.ops.load_library(str(target))
            return
        _compile(cpp_extension, sources, flags, target)


def _compile(cpp_extension: Any, sources: list[str], flags: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder, _ninja_on_path():
        cpp_extension.load(
            "upt_fast_cpu",
            sources,
            extra_cflags=[*flags, *DEFINES],
            build_directory=folder,
            with_cuda=False,
            is_python_module=False,
        )
        os.replace(Path(folder) / "upt_fast_cpu.so", target)


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """ninja lies beside the interpreter, where a virtual environment that is not activated does not look for it."""
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    try:
        yield
    finally:
        os.environ["PATH"] = path
