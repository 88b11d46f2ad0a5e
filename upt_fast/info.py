"""``upt-fast info``: versions, devices, and which backend runs each op here and why the others do not."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "torchvision", "triton", "xformers", "open_clip_torch", "timm", "safetensors", "numpy")


def collect() -> dict[str, Any]:
    """Everything the command shows, as plain values."""
    import torch

    from upt_fast.engine import fp8
    from upt_fast.engine.backends import choices, cpu_ops, dispatch
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
        "cpu_ops": {str(d).removeprefix("torch."): cpu_ops.refusal(d) for d in (torch.float32, torch.bfloat16)},
        "choices": {"measured": choices.measures(), "machine": choices.machine(), "kept": choices.kept()},
        "fp8": {name: fp8.refusal(torch.device(name)) for name in (line.split(": ")[0] for line in devices)},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _describe_choices(measured: bool, machine: dict[str, str], kept: dict[str, dict[str, Any]]) -> str:
    """What was measured on this machine, and where another way than the usual one was taken."""
    if not measured:
        return "ways to compute: the usual ones (UPT_FAST_MEASURE=0)"
    lines = [f"ways to compute: {len(kept)} measured on {machine['processor']}"]
    for key, entry in sorted(kept.items()):
        choice, usual, ms = entry["choice"], entry["usual"], entry["ms"]
        if choice != usual:
            lines.append(f"    {key}: {choice}, {ms[choice]} ms ({usual}: {ms[usual]} ms)")
        lines += [f"    {key}: not {name}: {reason}" for name, reason in entry["refused"].items()]
    return "\n".join(lines)


def main_info(as_json: bool = False) -> int:
    """Print what :func:`collect` found; 1 where UPT_FAST_BACKEND names a backend that cannot run here."""
    found = collect()
    if as_json:
        print(json.dumps(found, indent=2))
        return 1 if found["problem"] else 0
    print(f"upt_fast {found['upt_fast']}, Python {found['python']}, {found['platform']}")
    print("packages: " + ", ".join(f"{name} {version}" for name, version in found["packages"].items()))
    print(f"torch was built for CUDA {found['cuda']}" if found["cuda"] else "torch was built without CUDA")
    for device in found["devices"]:
        print(f"device {device}")
    if found["problem"]:
        print(f"error: {found['problem']}")
    for op, choice in found["ops"].items():
        print(f"op {op}: {choice['backend']}")
        for backend, reasons in choice["refused"].items():
            print(f"    not {backend}: {'; '.join(reasons)}")
    for dtype, reason in found["cpu_ops"].items():
        print(f"compiled CPU operations, {dtype}: {reason or 'used by wide towers'}")
    print(_describe_choices(**found["choices"]))
    for device, reason in found["fp8"].items():
        runs = "runs where it is asked for" + (", slower than bfloat16" if device == "cpu" else "")
        print(f"dtype fp8, {device}: {reason or runs}")
    return 1 if found["problem"] else 0
