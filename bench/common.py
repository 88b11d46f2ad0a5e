"""What the benchmarks share: models on ViT-B/16's geometry with random weights, a training step, closeness, timing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import cache, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.testing import bench_classnames, build, vit_b16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = 1e-4  # relative RMS in float32: logits and all gradients


@cache
def clip() -> nn.Module:
    return vit_b16().to(DEVICE)


@lru_cache(maxsize=4)  # each holds weights of its own
def model(provider: str, classes: int, method: str = "upt") -> nn.Module:
    torch.manual_seed(0)
    return build(provider, clip(), bench_classnames(classes), method).to(DEVICE).train()


@cache
def inputs(classes: int, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 224, 224, generator=generator)
    return images.to(DEVICE), torch.randint(classes, (batch,), generator=generator).to(DEVICE)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def gradients(module: nn.Module) -> Tensor:
    """All gradients, in the order of the names in the state dict."""
    state = module.state_dict(keep_vars=True)
    return torch.cat([state[name].grad.flatten() for name in sorted(state)])


def step(module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Forward, loss and backward of a training step; returns the logits."""
    module.zero_grad(set_to_none=True)
    logits = module(images)
    F.cross_entropy(logits, labels).backward()
    synchronize()
    return logits.detach()


@cache
def anchor(classes: int, batch: int, method: str = "upt") -> tuple[Tensor, Tensor]:
    """Logits and gradients of the truncated reference, against which the others are checked."""
    module = model("truncated", classes, method)
    logits = step(module, *inputs(classes, batch))
    return logits, gradients(module)


@cache
def gemm_peak() -> float:
    """GFLOP/s of the product that dominates a ViT-B/16 step, (1576, 768) x (768, 3072), on this machine now."""
    a, b = torch.randn(1576, 768, device=DEVICE), torch.randn(768, 3072, device=DEVICE)
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize()
        best = max(best, 2 * 1576 * 768 * 3072 / (time.perf_counter() - start) / 1e9)
    return best


def measure(benchmark, function, *, rounds: int, **info) -> None:  # type: ignore[no-untyped-def]
    benchmark.extra_info.update(info, device=DEVICE, dtype="float32", gemm_peak_gflops=round(gemm_peak()))
    benchmark.pedantic(function, rounds=rounds, iterations=1)


def measure_peak_memory(  # type: ignore[no-untyped-def]
    benchmark, provider: str, classes: int, batch: int, method: str = "upt", memory: str = ""
) -> None:
    """Peak memory of steps in a process of its own; the time is that of the whole process."""
    script = str(Path(__file__).with_name("peak_memory.py"))
    command = [sys.executable, script, provider, str(classes), str(batch), method, memory]

    def run() -> dict[str, float]:
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    found = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(found, provider=memory or provider)
    assert found["process_mib"] > found["activations_mib"] > 0
