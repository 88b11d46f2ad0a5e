"""FastUPT against the reference on a GPU, in one command: ``python bench/gpu_suite.py OUT [--dry]``.

Writes OUT/results.json and, for the fast step, OUT/profile-<dtype>.txt: environment; error of logits and gradients
against float64 in float32, bfloat16 and float16, beside the reference's own error; median step time and peak memory
of reference, truncated and fast. ``--dry`` runs every part on the CPU at a tiny size.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.files import write_text
from upt_fast.testing import PROVIDERS, bench_classnames, random_clip, relative_rms, vit_b16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build(provider: str, clip: nn.Module, classes: int) -> nn.Module:
    torch.manual_seed(0)
    return PROVIDERS[provider](clip, bench_classnames(classes)).train()


def step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    logits = model(images)
    F.cross_entropy(logits.float(), labels).backward()
    return logits.detach()


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def make_clip(dry: bool, dtype: torch.dtype, device: str) -> nn.Module:
    return (random_clip() if dry else vit_b16()).to(device, dtype)


def closeness(dry: bool, device: str, images: Tensor, classes: int) -> list[dict[str, Any]]:
    """Relative RMS errors against the reference in float64."""
    batch = images[:2]
    labels = torch.arange(len(batch), device=device)
    exact = build("reference", make_clip(dry, torch.float64, device), classes)
    wanted = step(exact, batch.double(), labels), gradients(exact)
    rows = []
    for name, dtype in DTYPES.items():
        clip = make_clip(dry, dtype, device)
        for provider in ("reference", "fast"):
            model = build(provider, clip, classes)
            logits = step(model, batch.to(dtype), labels)
            errors = {"logits": relative_rms(logits, wanted[0]), "gradients": relative_rms(gradients(model), wanted[1])}
            rows.append({"dtype": name, "provider": provider, **errors})
    return rows


def timing(dry: bool, device: str, images: Tensor, classes: int, out: Path) -> list[dict[str, Any]]:
    """Median milliseconds and peak MiB of a step, and a profile of the fast one."""
    rows = []
    for name in ("float32", "bfloat16"):
        dtype = DTYPES[name]
        clip, batch = make_clip(dry, dtype, device), images.to(dtype)
        labels = torch.arange(len(images), device=device) % classes
        for provider in PROVIDERS:
            row: dict[str, Any] = {"dtype": name, "provider": provider, "classes": classes, "batch": len(images)}
            rows.append(row)
            try:
                model = build(provider, clip, classes)
                step(model, batch, labels)
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                seconds = []
                for _ in range(2 if dry else 10):
                    start = time.perf_counter()
                    step(model, batch, labels)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    seconds.append(time.perf_counter() - start)
            except torch.OutOfMemoryError:
                row["out_of_memory"] = True
                torch.cuda.empty_cache()
                continue
            row["median_ms"] = round(1e3 * statistics.median(seconds), 3)
            if device == "cuda":
                row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
            if provider == "fast":
                with torch.profiler.profile() as profile:
                    step(model, batch, labels)
                key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
                table = profile.key_averages().table(sort_by=key, row_limit=30)
                write_text(out / f"profile-{name}-C{classes}.txt", table + "\n")
            del model
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--dry", action="store_true", help="every part on the CPU at a tiny size")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry runs every part on the CPU at a tiny size")
    device = "cpu" if args.dry else "cuda"
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    size, batch = (32, 2) if args.dry else (224, 32)
    images = torch.randn(batch, 3, size, size, device=device)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dry": args.dry,
    }
    results["closeness"] = closeness(args.dry, device, images, 5 if args.dry else 20)
    write_text(args.out / "results.json", json.dumps(results, indent=2) + "\n")
    results["timing"] = []
    for classes in (5,) if args.dry else (100, 1000):
        results["timing"] += timing(args.dry, device, images, classes, args.out)
        write_text(args.out / "results.json", json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
