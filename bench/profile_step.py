"""Where a training step's time goes on this CPU: ``python bench/profile_step.py [--batch 8] [--classes 100] [--bf16]``.

Prints, for ViT-B/16 with random weights: the rate of the best matrix product measured in the same run, the step's FLOPs
(upt_fast/flops.py) and rate, and the share of each kind of operation in the profile of one step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from upt_fast import cpu_ops
from upt_fast.clip.open_clip import frozen_clip
from upt_fast.flops import step_cost
from upt_fast.methods import find_method
from upt_fast.testing import bench_classnames, build, vit_b16

KINDS = {
    "products with what stands around them": ("upt_fast_cpu::norm_linear", "upt_fast_cpu::linear"),
    "attention": ("upt_fast_cpu::attention", "aten::_scaled_dot_product", "aten::softmax", "aten::_softmax"),
    "other products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear", "aten::mkldnn_linear"),
    "patch embedding": ("aten::mkldnn_convolution",),
    "copies and fills": ("aten::copy_", "aten::fill_", "aten::index", "aten::clone"),
    "LayerNorm and elementwise": ("aten::native_layer_norm", "aten::add", "aten::mul", "aten::silu", "aten::sum"),
}


def best(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of several runs."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def peaks(dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of (1576, 768) x (768, 3072): PyTorch's product, oneDNN's, our own with its elementwise work."""
    x, w = torch.randn(1576, 768).to(dtype), torch.randn(3072, 768).to(dtype)
    flops = 2 * 1576 * 768 * 3072 / 1e9
    runs: dict[str, Callable[[], object]] = {
        "torch.mm": lambda: torch.mm(x, w.t()),
        "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
    }
    if not cpu_ops.refusal(dtype):
        packed, out, slope, moments = (
            cpu_ops.pack(w.t()),
            x.new_empty(1576, 3072),
            x.new_empty(1576, 3072),
            torch.empty(1576),
        )
        runs["norm_linear with silu and its slope"] = lambda: torch.ops.upt_fast_cpu.norm_linear(
            x, 1e-5, packed, None, 1, slope, [out], [0], [0], [0], moments, moments.clone()
        )
    return {name: round(flops / best(run, 20), 1) for name, run in runs.items()}


def main(classes: int, batch: int, dtype: torch.dtype, method: str) -> dict[str, object]:
    clip, names = vit_b16(), bench_classnames(classes)
    torch.manual_seed(0)
    model = build("fast", clip, names, method, dtype=dtype).train()
    images, labels = torch.randn(batch, 3, 224, 224), torch.arange(batch) % classes

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images).float(), labels).backward()

    seconds = best(step, 4)
    known = find_method(method)
    flops = step_cost(frozen_clip(clip), names, known, known.config.from_options({}), batch).engine
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total, shares = sum(spent.values()), dict.fromkeys((*KINDS, "the rest"), 0.0)
    for key, value in spent.items():
        kind = next((k for k, starts in KINDS.items() if key.startswith(starts)), "the rest")
        shares[kind] += 100 * value / total
    peak = peaks(dtype)
    rate = flops.total / seconds / 1e9
    return {
        "step": f"{method}, ViT-B/16, {classes} classes, batch {batch}, {str(dtype).removeprefix('torch.')}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peak_gflops": peak,
        "step_seconds": round(seconds, 3),
        "step_gflop": round(flops.total / 1e9, 1),
        "step_gflops": round(rate, 1),
        "share_of_best_plain_product": round(rate / max(peak["torch.mm"], peak["oneDNN"]), 3),
        "percent_of_time": {name: round(share, 1) for name, share in shares.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--method", default="upt")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    print(json.dumps(main(options.classes, options.batch, dtype, options.method), indent=2))
