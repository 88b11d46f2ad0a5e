"""``upt-fast plan``."""

from __future__ import annotations

import json
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from upt_fast.common.sizes import parse_bytes, show_bytes
from upt_fast.methods import MAIN_METHOD

HELP = "what a training step needs and costs before it runs: bytes by part, work, time; the plan below a limit"


def add_options(parser: ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("--clip", type=str, default="ViT-B-16", help="CLIP model, of which no weights are read")
    parser.add_argument("--method", type=str, default=MAIN_METHOD, help="name of a method, with its default options")
    parser.add_argument("--classes", type=int, default=100, help="number of classes, of Caltech101 or ImageNet")
    parser.add_argument("--batch-size", type=int, default=32, help="images per training step")
    parser.add_argument("--precision", type=str, default="fp32", help="fp32 or bf16")
    parser.add_argument("--memory", type=str, default="fast", help="fast, balanced or lean; a limit chooses it itself")
    parser.add_argument(
        "--max-memory", type=str | int | None, default=None, help="600MB, 8GB, 8GiB or bytes, as for train"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: Namespace) -> int:
    """Print what :func:`upt_fast.tools.plan.collect` found."""
    limit = None if options.max_memory is None else parse_bytes("max_memory", options.max_memory)
    from upt_fast.tools.plan import collect

    arguments = (options.clip, options.method, options.classes, options.batch_size, options.precision, options.memory)
    found = collect(*arguments, limit)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    print(
        f"{found['clip']}, {found['method']}, {found['classes']} classes, {found['batch_size']} images in a step, "
        f"{found['precision']}, memory={found['memory']!r}"
    )
    at_once = found["at_once"]
    if found["plan"]:
        print(f"plan below {options.max_memory}: {at_once['images']} images and {at_once['classes']} classes at once")
    for name, size in _lines(found["bytes"]):
        print(f"{name:<42}{size:>12}")
    seconds, rate = found["estimated_seconds"], found["flops_per_second"]
    print(f"work of a step: {found['flops'] / 1e9:,.0f} GFLOP")
    print(f"time of a step: about {seconds:.2g} s, an estimate: as if all were products, of which this machine")
    print(f"    did {rate / 1e9:,.0f} GFLOP/s just now")
    return 0


def _lines(sizes: dict[str, Any]) -> list[tuple[str, str]]:
    named = [("weights", sizes["weights"])]
    for tower in ("text", "image"):
        named += [(f"{tower} tower, kept for backward", sizes[tower]["kept"])]
        named += [(f"{tower} tower, passing", sizes[tower]["passing"])]
    named += [
        ("gradients and optimizer of the prompts", sizes["optimizer"]),
        ("features and logits", sizes["features"]),
        ("images of a batch", sizes["images"]),
        ("peak of the towers' tensors", sizes["peak_alive"]),
        ("peak beside the weights, allocator included", sizes["peak"]),
    ]
    return [(name, show_bytes(size)) for name, size in named]
