"""Where a training step's time goes on this CPU: ``python bench/profile_step.py [--batch 8] [--classes 100] [--bf16]``.

Prints, for ViT-B/16 with random weights: the rate of the best matrix product measured in the same run; FLOPs
(engine/flops.py), seconds and rate of a step and of the image tower forward and backward, by the usual ways and by
those chosen on this machine (choices.py), taking turns; the share of each kind of operation in one step.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial

import torch
from common import best_seconds, cost, gemm_rates, inputs, model, step
from torch.profiler import ProfilerActivity, profile

from upt_fast.engine.cpu import library
from upt_fast.engine.tuning import choices

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
    if not library.refusal(dtype):
        x, packed = torch.randn(1576, 768).to(dtype), library.pack(torch.randn(768, 3072).to(dtype))
        out, slope = x.new_empty(1576, 3072), x.new_empty(1576, 3072)
        mean, rstd = torch.empty(1576), torch.empty(1576)

        def run() -> None:
            torch.ops.upt_fast_cpu.norm_linear(x, 1e-5, *packed, None, 1, slope, [out], [0], [0], [0], mean, rstd)

        rates["norm_linear with silu and its slope"] = 2 * 1576 * 768 * 3072 / best_seconds(run, 20) / 1e9
    return rates


def by_ways(classes: int, method: str, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The model with the usual way everywhere, and with what was measured to be the fastest here."""
    found = {}
    for name, measure in (("usual", "0"), ("chosen", "1")):
        os.environ["UPT_FAST_MEASURE"] = measure
        choices.forget()
        model.cache_clear()
        found[name] = model("fast", classes, method, dtype)
    return found


def seconds_of(runs: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Of the fastest run of each, taking turns."""
    best = {name: best_seconds(run, 1) for name, run in runs.items()}
    for _ in range(rounds - 1):
        best = {name: min(best[name], best_seconds(run, 1)) for name, run in runs.items()}
    return best


def tower(module: torch.nn.Module, images: torch.Tensor) -> None:
    """Prompts and images to image features and back to the prompts."""
    module.zero_grad(set_to_none=True)
    module.encode_image(images).float().sum().backward()


def main(classes: int, batch: int, dtype: torch.dtype, method: str) -> dict[str, object]:
    modules = by_ways(classes, method, dtype)
    images, labels = inputs(classes, batch)
    work = cost(classes, batch, method)
    steps = seconds_of({name: partial(step, module, images, labels) for name, module in modules.items()})
    towers = seconds_of({name: partial(tower, module, images) for name, module in modules.items()})
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(modules["chosen"], images, labels)
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total, shares = sum(spent.values()), dict.fromkeys((*KINDS, "the rest"), 0.0)
    for key, value in spent.items():
        kind = next((k for k, starts in KINDS.items() if key.startswith(starts)), "the rest")
        shares[kind] += 100 * value / total
    plain = max(gemm_rates(dtype).values())

    def rates(seconds: dict[str, float], gflop: float) -> dict[str, dict[str, float]]:
        return {
            name: {
                "seconds": round(value, 3),
                "gflops": round(gflop / value, 1),
                "share_of_best_plain_product": round(gflop / value / plain, 3),
            }
            for name, value in seconds.items()
        }

    return {
        "step": f"{method}, ViT-B/16, {classes} classes, batch {batch}, {str(dtype).removeprefix('torch.')}",
        "machine": choices.machine(),
        "threads": torch.get_num_threads(),
        "peak_gflops": {name: round(gflops, 1) for name, gflops in peaks(dtype).items()},
        "step_gflop": round(work.engine.total / 1e9, 1),
        "steps": rates(steps, work.engine.total / 1e9),
        "image_tower": rates(towers, work.engine_vision.total / 1e9),
        "percent_of_time": {name: round(share, 1) for name, share in shares.items()},
        "choices": choices.record()["choices"],
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
