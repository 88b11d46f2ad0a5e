"""``upt-fast info``: versions, devices, and which backend runs each op here and why the others do not."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "torchvision", "triton", "xformers", "open_clip_torch", "timm", "safetensors", "numpy")


def collect() -> dict[str, Any]:
    """Everything the command shows, as plain values."""
    import torch

    from upt_fast.engine import fp8
    from upt_fast.engine.backends import dispatch
    from upt_fast.engine.cpu import library
    from upt_fast.engine.tuning import choices, machine
    from upt_fast.version import __version__

    devices = [f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        devices.append(f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    requested = os.environ.get("UPT_FAST_BACKEND", "")
    ops, problem = {}, ""
    try:
        for op in dispatch.OPS:
            chosen, refused = dispatch.explain(op, device)
            ops[op] = {"backend": chosen, "refused": refused}
    except ValueError as error:
        problem = str(error)
    return {
        "upt_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "devices": devices,
        "UPT_FAST_BACKEND": requested,
        "problem": problem,
        "ops": ops,
        "cpu_ops": {str(d).removeprefix("torch."): library.refusal(d) for d in (torch.float32, torch.bfloat16)},
        "choices": {"measured": choices.measures(), "machine": machine.machine(), "kept": choices.kept()},
        "fp8": {name: fp8.refusal(torch.device(name)) for name in (line.split(": ")[0] for line in devices)},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
