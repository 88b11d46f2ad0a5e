"""Each method's training step on ViT-B/16 geometry: its reference, its truncated reference and the engine, in one run.

Closeness of logits and all gradients is checked before anything is timed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from common import CLOSE, anchor, gradients, inputs, measure, measure_peak_memory, model, step, synchronize

from upt_fast.common.closeness import relative_rms

STEPS = [
    pytest.param("coop", 100, 8, id="coop-C100-B8"),
    pytest.param("cocoop", 100, 1, id="cocoop-C100-B1"),
    pytest.param("maple", 100, 4, id="maple-C100-B4"),
    pytest.param("vpt_deep", 100, 8, id="vpt_deep-C100-B8"),
    pytest.param("vpt_shallow", 100, 8, id="vpt_shallow-C100-B8"),
    pytest.param("ivlp", 100, 4, id="ivlp-C100-B4"),
    pytest.param("mvpt", 100, 4, id="mvpt-C100-B4", marks=pytest.mark.full),
    pytest.param("coop", 1000, 8, id="coop-C1000-B8", marks=pytest.mark.full),
    pytest.param("cocoop", 100, 8, id="cocoop-C100-B8", marks=pytest.mark.full),
]


@pytest.mark.parametrize("provider", ["truncated", "fast", "reference"])
@pytest.mark.parametrize(("method", "classes", "batch"), STEPS)
def test_step(benchmark, provider: str, method: str, classes: int, batch: int) -> None:  # type: ignore[no-untyped-def]
    """Forward, loss and backward of a training step."""
    benchmark.group = f"{method} step C={classes} B={batch}"
    if provider == "reference" and classes * (batch if method == "cocoop" else 1) > 100:
        pytest.skip("the plain step needs tens of GB")
    images, labels = inputs(classes, batch)
    module = model(provider, classes, method)
    wanted_logits, wanted_gradients = anchor(classes, batch, method)  # for "truncated" this is the warm-up
    if provider != "truncated":
        assert relative_rms(step(module, images, labels), wanted_logits) < CLOSE
        assert relative_rms(gradients(module), wanted_gradients) < CLOSE
    rounds = 1 if provider == "reference" else 3
    measure(benchmark, lambda: step(module, images, labels), rounds=rounds, provider=provider)


@pytest.mark.parametrize("provider", ["truncated", "fast"])
def test_zero_shot(benchmark, provider: str) -> None:  # type: ignore[no-untyped-def]
    """Logits of 8 images over 100 classes; the texts have run before."""
    benchmark.group = "zeroshot inference C=100 B=8"
    images, _ = inputs(100, 8)
    module = model(provider, 100, "zeroshot").eval()

    def run() -> torch.Tensor:
        with torch.no_grad():
            logits = module(images)
        synchronize()
        return logits

    with torch.no_grad():
        wanted = model("truncated", 100, "zeroshot")(images)
    assert relative_rms(run(), wanted) < CLOSE
    measure(benchmark, run, rounds=4, provider=provider)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's high-water mark")
@pytest.mark.parametrize(
    ("provider", "method", "batch"),
    [
        ("reference", "cocoop", 1),
        ("truncated", "cocoop", 1),
        ("fast", "cocoop", 1),
        ("fast", "cocoop", 64),
        ("fast", "coop", 8),
        ("fast", "maple", 4),
        pytest.param("reference", "maple", 4, marks=pytest.mark.full),
        pytest.param("reference", "coop", 8, marks=pytest.mark.full),
    ],
)
def test_peak_memory(benchmark, provider: str, method: str, batch: int) -> None:  # type: ignore[no-untyped-def]
    """Peak memory of a step of 100 classes in a process of its own."""
    benchmark.group = f"{method} peak memory C=100 B={batch} (see extra_info)"
    measure_peak_memory(benchmark, provider, 100, batch, method)


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's high-water mark")
@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
def test_memory_levels(benchmark, memory: str) -> None:  # type: ignore[no-untyped-def]
    """Peak memory and time of UPT's step at batch 32, in a process of its own."""
    benchmark.group = "memory levels C=100 B=32 (see extra_info)"
    measure_peak_memory(benchmark, "fast", 100, 32, "upt", memory)
