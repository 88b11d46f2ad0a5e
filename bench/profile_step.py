"""Where a training step's time goes on this CPU: ``python bench/profile_step.py [--batch 8] [--classes 100] [--bf16]``.

Prints, for ViT-B/16 with random weights: the rate of the best matrix product measured in the same run, the step's FLOPs
(upt_fast/flops.py) and rate, and the share of each kind of operation in the profile of one step.
"""

from __future__ import annotations

import argparse
import json

import torch
from common import best_seconds, cost, gemm_rates, inputs, model, step
from torch.profiler import ProfilerActivity, profile

from upt_fast import cpu_ops

KINDS = {
    "products with what stands around them": ("upt_fast_cpu::norm_linear", "upt_fast_cpu::linear"),
    "attention": ("upt_fast_cpu::attention", "aten::_scaled_dot_product", "aten::softmax", "aten::_softmax"),
    "other products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear", "aten::mkldnn_linear"),
    "patch embedding": ("aten::mkldnn_convolution",),
    "copies and fills": ("aten::copy_", "aten::fill_", "aten::index", "aten::clone"),
    "LayerNorm and elementwise": ("aten::native_layer_norm", "aten::add", "aten::mul", "aten::silu", "aten::sum"),
}


def peaks(dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of plain products, and of our own of that size with its elementwise work."""
    rates = dict(gemm_rates(dtype))
    if not cpu_ops.refusal(dtype):
        x, packed = torch.randn(1576, 768).to(dtype), cpu_ops.pack(torch.randn(768, 3072).to(dtype))
        out, slope = x.new_empty(1576, 3072), x.new_empty(1576, 3072)
        mean, rstd = torch.empty(1576), torch.empty(1576)

        def run() -> None:
            torch.ops.upt_fast_cpu.norm_linear(x, 1e-5, packed, None, 1, slope, [out], [0], [0], [0], mean, rstd)

        rates["norm_linear with silu and its slope"] = 2 * 1576 * 768 * 3072 / best_seconds(run, 20) / 1e9
    return rates


def main(classes: int, batch: int, dtype: torch.dtype, method: str) -> dict[str, object]:
    module = model("fast", classes, method, dtype)
    images, labels = inputs(classes, batch)
    seconds = best_seconds(lambda: step(module, images, labels), 4)
    flops = cost(classes, batch, method).engine
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(module, images, labels)
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
        "peak_gflops": {name: round(gflops, 1) for name, gflops in peak.items()},
        "step_seconds": round(seconds, 3),
        "step_gflop": round(flops.total / 1e9, 1),
        "step_gflops": round(rate, 1),
        "share_of_best_plain_product": round(rate / max(gemm_rates(dtype).values()), 3),
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
