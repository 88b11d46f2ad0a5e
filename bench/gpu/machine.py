"""The device at hand: precision, time, memory, and what it could do at best."""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from gpu.checkout import ROOT
from torch import Tensor

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
PACKAGES = ("torch", "triton", "xformers", "open_clip_torch", "numpy", "pytest")
MIB = 2**20
CLOCK = 2e9  # cycles per second, about, that torch.cuda._sleep counts


def set_precision(precision: str) -> torch.dtype:
    """Allow tf32 in matrix products and convolutions, or ask for ieee float32; the dtype that goes with it."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return PRECISIONS[precision]


@dataclass(frozen=True)
class Machine:
    """A GPU, or in a dry run the CPU at tiny sizes.

    Attributes:
        dry: a dry run.
        seed: of all random numbers.
    """

    dry: bool
    seed: int = 0

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def healthy(self) -> bool:
        """Give memory back after an error; False where the error has broken the process's CUDA context."""
        try:
            self.release()
            self.synchronize()
        except Exception:  # torch names a lost context in many ways
            return False
        return True

    def release(self) -> None:
        if not self.dry:
            gc.collect()
            torch.cuda.empty_cache()

    def times(self, call: Callable[[], object], seconds: float = 1.0, cold: bool = False) -> dict[str, Any]:
        """Milliseconds of a call that has run before.

        The host runs ahead: between the calls only events are recorded, and one synchronisation ends them all.

        Args:
            call: what to time.
            seconds: about how long to go on.
            cold: fill the cache with something else before each call, leave out what lies between calls, and keep the
                device waiting until the host has launched all of a call: its own speed, whatever the host's.
        Returns:
            p20_ms, p50_ms, p80_ms, and calls.
        """
        count, host = (2, 0.0) if self.dry else self._count(call, seconds)
        marks = []
        for _ in range(count):
            if cold and not self.dry:
                self._flush.zero_()
                torch.cuda._sleep(int(1.5 * host * CLOCK))
            begin = self._mark()
            call()
            marks.append((begin, self._mark()))
        self.synchronize()
        if cold:
            found = [self._between(*pair) for pair in marks]
        else:  # from start to start, gaps included
            starts = [begin for begin, _ in marks] + [marks[-1][1]]
            found = [self._between(a, b) for a, b in itertools.pairwise(starts)]
        p20, _, _, p80 = statistics.quantiles(found, n=5, method="inclusive")
        quantiles = {"p20_ms": p20, "p50_ms": statistics.median(found), "p80_ms": p80}
        return {name: significant(value) for name, value in quantiles.items()} | {"calls": count}

    def _count(self, call: Callable[[], object], seconds: float) -> tuple[int, float]:
        """How many calls fill so many seconds, and how many seconds the host needs to launch one."""
        call()
        self.synchronize()
        start = time.perf_counter()
        call()
        launched = time.perf_counter()
        self.synchronize()
        return max(7, min(200, int(seconds / (time.perf_counter() - start)))), launched - start

    def _mark(self) -> Any:
        if self.dry:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return 1e3 * (end - begin) if self.dry else begin.elapsed_time(end)

    @functools.cached_property
    def _flush(self) -> Tensor:
        return torch.empty(256 * MIB, dtype=torch.uint8, device=self.device)

    def peak(self, call: Callable[[], object]) -> dict[str, float]:
        """MiB while call runs: peak_mib of all tensors, activations_mib of it above what was there before."""
        if self.dry:  # a stand-in: what autograd saves
            held = saved_bytes(call) / MIB
            return {"peak_mib": round(held, 3), "activations_mib": round(held, 3)}
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return {"peak_mib": round(peak / MIB, 1), "activations_mib": round((peak - before) / MIB, 1)}

    @functools.cache  # noqa: B019 (one machine per process)
    def gemm_peak(self, precision: str) -> float:
        """TFLOP/s of a large square matrix product, measured once in this process."""
        size = 128 if self.dry else 4096 if precision == "fp32" else 8192
        return self.gemm(precision, size, size, size)

    def gemm(self, precision: str, m: int, k: int, n: int) -> float:
        """TFLOP/s of (m, k) x (k, n) on random numbers, the median of many."""
        dtype = set_precision(precision)
        a, b = (torch.randn(shape, device=self.device).to(dtype) for shape in ((m, k), (k, n)))
        return significant(2e-9 * m * k * n / self.times(lambda: torch.mm(a, b))["p50_ms"])

    @functools.cache  # noqa: B019
    def copy_bandwidth(self) -> float:
        """GB/s of a large copy on the device, read and written bytes counted, measured once in this process."""
        source = torch.empty(MIB if self.dry else 1024 * MIB, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        return significant(2e-6 * source.numel() / self.times(lambda: target.copy_(source), 0.3)["p50_ms"])

    def launch_us(self) -> float:
        """Microseconds that the host needs for each of many small operations."""
        x = torch.zeros(8, device=self.device)

        def many() -> None:
            for _ in range(1000):
                x.add_(1)

        return significant(self.times(many, 0.3)["p50_ms"])

    def environment(self) -> tuple[str, dict[str, Any]]:
        """What measurements depend on, and a short name that differs where it does."""
        found: dict[str, Any] = {
            "dry": self.dry,
            "seed": self.seed,
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "cuda": torch.version.cuda,
            "compute-sanitizer": sanitizer_path() is not None,
            "source": source_hash(),
        }
        if self.dry:
            found |= {"device": platform.processor() or platform.machine(), "driver": None}
        else:
            p = torch.cuda.get_device_properties(0)
            found |= {"device": p.name, "driver": _query("driver_version"), "capability": f"{p.major}.{p.minor}"}
            found |= {"processors": p.multi_processor_count, "memory_mib": p.total_memory // MIB}
        name = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:12]
        return name, found | {"commit": _commit()}


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def saved_bytes(call: Callable[[], object]) -> int:
    """Bytes of the storages that autograd saves while call runs."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(seen.values())


def sanitizer_path() -> str | None:
    """compute-sanitizer: on the PATH, or where CUDA's installer puts it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{home}/{sub}" for home in homes if home for sub in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


# what compiles and tells, and changes no figure
REPORTING = (
    *("report.py", "summary.py", "plan.py", "info.py"),
    *("_compile.py", "_instructions.py", "_targets.py", "_workloads.py"),
)


def source_hash() -> str:
    """Of everything that is measured and measures; the commit does not tell what is not committed."""
    found = hashlib.sha256()
    for pattern in ("upt_fast/**/*.py", "kernels/*.py", "bench/gpu_suite.py", "bench/gpu/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            if path.name not in REPORTING and path.parent.name != "cli":
                found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _query(field: str) -> str | None:
    return _output(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"])


def _commit() -> str | None:
    return _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"])


def _output(command: list[str]) -> str | None:
    """The first line that a command prints; None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [None])[0]
