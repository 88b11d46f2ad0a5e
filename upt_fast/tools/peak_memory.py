"""Most memory between two moments."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path
from types import TracebackType

import torch

MIB = 2**20


class PeakMemory:
    """Most memory inside of a with statement, beyond what there was at its beginning.

    On a GPU that of tensors, on a CPU, by Linux, that of the process.

    Args:
        device: where tensors are.

    Attributes:
        mib: MiB; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.mib = device, None

    mib: float | None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device) / MIB
        else:
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # what the C library's heap keeps of earlier
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self._before = _resident("VmRSS") or 0.0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.mib = torch.cuda.max_memory_allocated(self.device) / MIB - self._before
        elif (peak := _resident("VmHWM")) is not None:
            self.mib = peak - self._before


def _resident(field: str) -> float | None:
    """A field of the process's status, in MiB."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    return None
