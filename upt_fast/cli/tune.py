"""``upt-fast tune``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from upt_fast.cli.common import DEVICES
from upt_fast.methods import MAIN_METHOD

HELP = "measure which route through the towers is the fastest here, and keep it for backend auto"


def add_options(parser: ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("--clip", type=str, default="ViT-B-16", help="CLIP model, with random weights")
    parser.add_argument("--method", type=str, default=MAIN_METHOD, help="name of a method, with its default options")
    parser.add_argument("--classes", type=int, default=100, help="number of classes, of Caltech101 or ImageNet")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step")
    parser.add_argument("--precision", type=str, default="fp32", help="fp32, bf16 or fp16")
    parser.add_argument("--memory", type=str, default="fast", help="fast, balanced or lean")
    parser.add_argument("--mode", type=str, default="both", help="train (a training step), inference or both")
    parser.add_argument("--device", type=str, default="auto", help=DEVICES)
    parser.add_argument(
        "--seconds",
        type=float | None,
        default=None,
        help="after which nothing more is begun; none: 110 on a GPU, 900 on a CPU",
    )
    parser.add_argument(
        "--only",
        type=str | None,
        default=None,
        help="backends to measure beside the usual one, instead of all, with semicolons: 'torch; inductor/torch'",
    )
    parser.add_argument("--fresh", type=bool, default=False, help="measure again what is known")
    parser.add_argument("--json", action="store_true", help="print JSON: every candidate, and why others are none")
    parser.add_argument("--export", type=str | None, default=None, help="write what is known of this machine to a file")
    parser.add_argument(
        "--import", type=str | None, default=None, help="take over a file of another machine of the same kind; no more"
    )


def run(options: Namespace) -> int:
    """Print what :func:`upt_fast.tools.tune.tune` found."""
    from upt_fast.tools import tune
    from upt_fast.train.setup import resolve_device

    device = str(resolve_device(options.device))
    kind = device.partition(":")[0]
    if file := options["import"]:
        count = tune.take_over(kind, Path(file))
        print(f"{count} choices taken over from {file}")
        return 0

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    asked = (options.clip, options.method, options.classes, options.batch_size, options.precision, options.memory)
    only = None if options.only is None else [name.strip() for name in options.only.split(";") if name.strip()]
    found = tune.tune(*asked, options.mode, device, options.seconds, options.fresh, only, tell)
    if options.export:
        tell(f"{tune.export(kind, Path(options.export))} choices written to {options.export}")
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    machine = found["machine"]
    print(
        f"{options.clip}, {options.method}, {options.classes} classes, {options.batch_size} images, "
        f"{options.precision}, memory={options.memory!r}, on {machine.get('gpu') or machine['processor']}"
    )
    for mode, measured in found["modes"].items():
        known = ", measured before (--fresh true measures again)" if measured["known"] else ""
        print(f"{'training step' if mode == 'step' else mode}{known}:")
        for line in _lines(measured["entry"]):
            print(f"    {line}")
    return 0


def _lines(entry: dict[str, Any]) -> list[str]:
    found = []
    for name, ms in sorted(entry["ms"].items(), key=lambda item: item[1]):
        details = entry["details"].get(name, {})
        peak = details.get("peak_mib")
        parts = [f"{name:<24}{ms:>10.4g} ms", f"spread {100 * entry['spread'][name]:3.0f} %"]
        parts += [f"{peak:7.0f} MiB"] if peak is not None else []
        parts += [f"error {details['error']:.1e} (plain {details['plain_error']:.1e})"] if "error" in details else []
        marks = [mark for mark, key in (("chosen", "choice"), ("usual", "usual")) if entry[key] == name]
        found.append("  ".join(parts) + (f"  <- {', '.join(marks)}" if marks else ""))
    return found + [f"not {name}: {reason}" for name, reason in entry["refused"].items()]
