"""What the benchmarks share: models on ViT-B/16's geometry with random weights, a training step, closeness, timing."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.clip.open_clip import frozen_clip
from upt_fast.data.benchmark import bench_classnames
from upt_fast.methods import find_method
from upt_fast.testing import build, vit_b16
from upt_fast.tools.step_cost import StepCost, step_cost

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = 1e-4  # relative RMS in float32: logits and all gradients


@cache
def clip() -> nn.Module:
    return vit_b16().to(DEVICE)


@lru_cache(maxsize=4)  # each holds weights of its own
def model(provider: str, classes: int, method: str = "upt", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    if provider == "fast":
        return build("fast", clip(), bench_classnames(classes), method, dtype=dtype).train()
    own = clip() if dtype == torch.float32 else copy.deepcopy(clip()).to(dtype)
    return build(provider, own, bench_classnames(classes), method).train()


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
    F.cross_entropy(logits.float(), labels).backward()
    synchronize()
    return logits.detach()


@cache
def anchor(classes: int, batch: int, method: str = "upt") -> tuple[Tensor, Tensor]:
    """Logits and gradients of the truncated reference, against which the others are checked."""
    module = model("truncated", classes, method)
    logits = step(module, *inputs(classes, batch))
    return logits, gradients(module)


def best_seconds(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of several runs, after one that warms up."""
    run()
    times = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


@cache
def gemm_rates(dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """GFLOP/s of the product that dominates a ViT-B/16 step, (1576, 768) x (768, 3072), by PyTorch and by oneDNN."""
    x, w = torch.randn(1576, 768, device=DEVICE).to(dtype), torch.randn(3072, 768, device=DEVICE).to(dtype)
    runs: dict[str, Callable[[], object]] = {"torch.mm": lambda: torch.mm(x, w.t())}
    if DEVICE == "cpu" and torch.backends.mkldnn.is_available():
        runs["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return {name: 2 * 1576 * 768 * 3072 / best_seconds(run, 20) / 1e9 for name, run in runs.items()}


def measure(  # type: ignore[no-untyped-def]
    benchmark, function, *, rounds: int, flops: int = 0, dtype: torch.dtype = torch.float32, **info
) -> None:
    """Time a function; with its FLOPs also as a share of the best plain product of the same run."""
    peak = max(gemm_rates(dtype).values())
    benchmark.extra_info.update(
        info, device=DEVICE, dtype=str(dtype).removeprefix("torch."), gemm_peak_gflops=round(peak)
    )
    benchmark.pedantic(function, rounds=rounds, iterations=1)
    if flops:
        rate = flops / benchmark.stats.stats.median / 1e9
        benchmark.extra_info.update(gflop=round(flops / 1e9, 1), share_of_gemm_peak=round(rate / peak, 3))


@cache
def cost(classes: int, batch: int, method: str = "upt") -> StepCost:
    """FLOPs of a step."""
    found = find_method(method)
    return step_cost(frozen_clip(clip()), bench_classnames(classes), found, found.config.from_options({}), batch)


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
