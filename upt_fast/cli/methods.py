"""``upt-fast methods``."""

from __future__ import annotations

import json
from typing import Any

from jsonargparse import ArgumentParser, Namespace

HELP = "what can be trained: parameters, prompted layers, cost of a step, source"


def add_options(parser: ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("--clip", type=str, default="ViT-B-16", help="CLIP model, of which no weights are read")
    parser.add_argument("--classes", type=int, default=100, help="number of classes, of Caltech101 or ImageNet")
    parser.add_argument("--batch-size", type=int, default=32, help="images per training step")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: Namespace) -> int:
    """Print a table of :func:`upt_fast.tools.method_costs.method_costs`."""
    from upt_fast.tools.method_costs import method_costs

    clip, classes, batch_size = options.clip, options.classes, options.batch_size
    rows = method_costs(clip, classes, batch_size)
    if options.json:
        print(json.dumps({"clip": clip, "classes": classes, "batch_size": batch_size, "methods": rows}, indent=2))
        return 0
    header = ("method", "title", "parameters", "layers", "GFLOP here", "plain", "source", "exact against")
    table = [header, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = ("parameters", "GFLOP here", "plain")
    for line in table:
        cells = (f"{c:>{w}}" if h in right else f"{c:<{w}}" for c, w, h in zip(line, widths, header, strict=True))
        print("  ".join(cells).rstrip())
    print(f"\n{clip}, {classes} classes, {batch_size} images in a step, each method's default options.")
    print("layers: with prompts of their own, text / image. GFLOP: matrix products of a training step, forward and")
    print("backward, here and in plain PyTorch with whole texts (zero-shot CLIP: forward).")
    for row in rows:
        if "error" in row:
            print(f"{row['method']}: {row['error']}")
    return 0


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    numbers = ["-"] * 4
    if "error" not in row:
        layers, flops = row["prompted_layers"], row["flops"]
        gflop = [f"{sum(flops[kind].values()) / 1e9:,.1f}" for kind in ("engine", "plain")]
        numbers = [f"{row['parameters']:,}", f"{layers['text']} / {layers['image']}", *gflop]
    return (row["method"], row.get("title", ""), *numbers, row.get("source", ""), row.get("exact", ""))
