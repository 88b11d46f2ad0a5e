"""``upt-fast info``: versions, devices, and which backend runs each op here and why the others do not."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upt_fast.engine.backends.asked import Asked

PACKAGES = ("torch", "torchvision", "triton", "xformers", "open_clip_torch", "timm", "safetensors", "numpy")
VIT_B16 = (768, 12), (512, 8)  # width and heads of the image tower, of the text tower


def collect() -> dict[str, Any]:
    """Everything the command shows, as plain values."""
    import torch

    from upt_fast.engine import fp8
    from upt_fast.engine.backends import dispatch, xformers_operators
    from upt_fast.engine.cpu import library
    from upt_fast.engine.towers import routes
    from upt_fast.engine.tuning import choices, machine
    from upt_fast.engine.tuning.candidates import is_route
    from upt_fast.version import __version__

    dtypes = torch.float32, torch.bfloat16
    devices = [f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        devices.append(f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    requested = os.environ.get("UPT_FAST_BACKEND", "")
    ops: dict[str, Any] = {}
    text_ops: dict[str, Any] = {}
    problem = ""
    try:
        images, texts = asked = dispatch.resolve()
        routes.check(asked)
        ops = _explain(images, device)
        text_ops = {} if images == texts else _explain(texts, device)
    except ValueError as error:
        problem = str(error)
    kept = choices.kept(device)
    return {
        "upt_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "devices": devices,
        "UPT_FAST_BACKEND": requested,
        "problem": problem,
        "auto": {str(d).removeprefix("torch."): dispatch.safe(device, d, *VIT_B16) for d in dtypes},
        "ops": ops,
        "text_ops": text_ops,
        "xformers": {"problem": xformers_operators.problem(), "cards": _xformers_operators()},
        "cpu_ops": {str(d).removeprefix("torch."): library.refusal(d) for d in dtypes},
        "choices": {"measured": choices.measures(), "machine": machine.machine(device), "kept": kept},
        "routes": {key: entry for key, entry in kept.items() if is_route(key)},
        "fp8": {name: fp8.refusal(torch.device(name)) for name in (line.split(": ")[0] for line in devices)},
    }


def _explain(asked: Asked, device: str) -> dict[str, Any]:
    """For each op who computes it, and why the others do not."""
    from upt_fast.engine.backends import dispatch

    found = {op: dispatch.explain(op, device, asked) for op in dispatch.OPS}
    return {op: {"backend": chosen, "refused": refused} for op, (chosen, refused) in found.items()}


def _xformers_operators() -> dict[str, dict[str, dict[str, Any]]]:
    """Which of xformers' operators run attention here, by GPU, then by dtype and use."""
    from upt_fast.engine.backends import xformers, xformers_operators

    if xformers_operators.problem():
        return {}
    return {
        card: {
            f"{str(dtype).removeprefix('torch.')} {use}": xformers_operators.choose(capability, dtype, use)._asdict()
            for dtype in xformers.DTYPES
            for use in xformers_operators.USES
        }
        for card, capability in xformers_operators.cards_here().items()
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
