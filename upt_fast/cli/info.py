"""``upt-fast info``."""

from __future__ import annotations

import json
from typing import Any

from jsonargparse import ArgumentParser, Namespace

HELP = "what runs here, and why not"


def add_options(parser: ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: Namespace) -> int:
    """Print what tools/info.py found; 1 where UPT_FAST_BACKEND names a backend that cannot run here."""
    from upt_fast.tools.info import collect

    found = collect()
    if options.json:
        print(json.dumps(found, indent=2))
        return 1 if found["problem"] else 0
    print(f"upt_fast {found['upt_fast']}, Python {found['python']}, {found['platform']}")
    print("packages: " + ", ".join(f"{name} {version}" for name, version in found["packages"].items()))
    print(f"torch was built for CUDA {found['cuda']}" if found["cuda"] else "torch was built without CUDA")
    for device in found["devices"]:
        print(f"device {device}")
    if found["problem"]:
        print(f"error: {found['problem']}")
    for dtype, backend in found["auto"].items():
        print(
            f"auto, ViT-B/16, {dtype}: {backend}{'' if found['routes'] else ' (not measured here: run upt-fast tune)'}"
        )
    for key, entry in sorted(found["routes"].items()):
        ms, choice, usual = entry["ms"], entry["choice"], entry["usual"]
        beside = "" if choice == usual or usual not in ms else f" ({usual}: {ms[usual]:.4g} ms)"
        print(f"auto, measured, {key}: {choice}, {ms[choice]:.4g} ms{beside}")
    for tower, ops in (("", found["ops"]), (" of the text tower", found["text_ops"])):
        for op, choice in ops.items():
            print(f"op {op}{tower}: {choice['backend']}")
            for backend, reasons in choice["refused"].items():
                print(f"    not {backend}: {'; '.join(reasons)}")
    print(_describe_xformers(**found["xformers"]))
    for dtype, reason in found["cpu_ops"].items():
        print(f"compiled CPU operations, {dtype}: {reason or 'used by wide towers'}")
    print(_describe_choices(**found["choices"]))
    for device, reason in found["fp8"].items():
        runs = "runs where it is asked for" + (", slower than bfloat16" if device == "cpu" else "")
        print(f"dtype fp8, {device}: {reason or runs}")
    return 1 if found["problem"] else 0


def _describe_xformers(problem: str, cards: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The operators that would compute attention with backend="xformers", by GPU."""
    if problem:
        return f"xformers' operators: {problem}"
    lines = ["xformers' operators, forward and backward, as its dispatcher says:"]
    for card, uses in cards.items():
        said: dict[str, list[str]] = {}
        for use, operators in uses.items():
            named = [operators[direction] or f"no {direction}" for direction in ("forward", "backward")]
            why = [f"{name}: {', '.join(reasons)}" for name, reasons in operators["refused"].items()]
            said.setdefault(f"{' and '.join(named)}{' (' * bool(why)}{'; '.join(why)}{')' * bool(why)}", []).append(use)
        lines += [f"    {card}, {', '.join(uses)}: {text}" for text, uses in said.items()]
    return "\n".join(lines)


def _describe_choices(measured: bool, machine: dict[str, str], kept: dict[str, dict[str, Any]]) -> str:
    """What was measured on this machine, and where another way than the usual one was taken."""
    from upt_fast.engine.tuning.candidates import is_route

    if not measured:
        return "ways to compute: the usual ones (UPT_FAST_MEASURE=0)"
    ways = {key: entry for key, entry in sorted(kept.items()) if not is_route(key)}
    lines = [f"ways to compute: {len(ways)} measured on {machine.get('gpu') or machine['processor']}"]
    for key, entry in ways.items():
        choice, usual, ms = entry["choice"], entry["usual"], entry["ms"]
        if choice != usual:
            lines.append(f"    {key}: {choice}, {ms[choice]} ms ({usual}: {ms[usual]} ms)")
        lines += [f"    {key}: not {name}: {reason}" for name, reason in entry["refused"].items()]
    return "\n".join(lines)
