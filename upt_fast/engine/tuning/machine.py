"""What a measured choice hangs on, beside what is computed: the device, libraries, variables that make them choose."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from upt_fast.version import __version__

LIBRARIES = ("triton", "xformers", "flash_attn", "flash_attn_4")
# what makes libraries choose other code
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
)
# updates of it leave choices valid elsewhere
DRIVER = "driver"


@cache
def machine(kind: str = "cpu") -> dict[str, str]:
    """What choices on a kind of device hang on, beside their keys.

    Args:
        kind: "cpu", or "cuda": the current GPU, which then must be there.
    """
    libraries = {name: _version(name) for name in LIBRARIES}
    found = gpu() if kind == "cuda" else processor()
    return found | {name: version for name, version in libraries.items() if version} | {"upt_fast": __version__}


@cache
def processor() -> dict[str, str]:
    """The CPU, what PyTorch makes of it, and the variables that make libraries choose other code for it."""
    found = {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "compiled": "off" if os.environ.get("UPT_FAST_CPU_OPS", "") == "0" else "on",
    }
    return found | {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}


def gpu() -> dict[str, str]:
    """The current GPU and what PyTorch runs it with."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        DRIVER: driver(),
        "torch": torch.__version__,
    }


def driver() -> str:
    """The newest CUDA that the driver runs, as 13000; empty where it does not say."""
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):  # no such library, or not NVIDIA's
        return ""
    return "" if failed else str(version.value)


def forget() -> None:
    """Look again: for processes whose variables change."""
    machine.cache_clear()
    processor.cache_clear()


def _processor() -> str:
    """The processor's name and a digest of what it can do: virtual machines hide parts of it."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    what = " ".join(fields.get(field, "") for field in ("cpu family", "model", "stepping", "flags"))
    return f"{name} ({hashlib.sha256(what.encode()).hexdigest()[:8]})"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
