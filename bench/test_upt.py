"""UPT on ViT-B/16 geometry with random weights: reference, truncated and fast on the same inputs, in one run.

Closeness is checked before anything is timed. The reference of 1000 classes needs 40 GB: its step is timed by parts,
the text tower in ten parts of 100 classes, then the image tower; its text tower alone (group text) on a tenth of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from common import (
    CLOSE,
    DEVICE,
    anchor,
    cost,
    gradients,
    inputs,
    measure,
    measure_peak_memory,
    model,
    step,
    synchronize,
)
from torch import Tensor

from upt_fast.common.closeness import relative_rms

STEPS = [
    pytest.param(100, 8, id="C100-B8"),
    pytest.param(100, 32, id="C100-B32", marks=pytest.mark.full),
    pytest.param(1000, 8, id="C1000-B8"),
]


@pytest.mark.parametrize("provider", ["truncated", "fast", "reference"])
@pytest.mark.parametrize(("classes", "batch"), STEPS)
def test_step(benchmark, provider: str, classes: int, batch: int) -> None:  # type: ignore[no-untyped-def]
    """Forward, loss and backward of a training step."""
    benchmark.group = f"step C={classes} B={batch}"
    if provider == "reference" and classes > 100 and DEVICE == "cpu":
        measure(benchmark, lambda: step_by_parts(classes, batch), rounds=1, provider=provider, by_parts=True)
        return
    images, labels = inputs(classes, batch)
    module = model(provider, classes)
    wanted_logits, wanted_gradients = anchor(classes, batch)  # for "truncated" this is the warm-up
    if provider != "truncated":
        assert relative_rms(step(module, images, labels), wanted_logits) < CLOSE
        assert relative_rms(gradients(module), wanted_gradients) < CLOSE
    rounds, flops = (4, cost(classes, batch).engine.total) if provider == "fast" else (2, 0)
    measure(benchmark, lambda: step(module, images, labels), rounds=rounds, flops=flops, provider=provider)


def step_by_parts(classes: int, batch: int) -> None:
    """The work of the reference's step without its logits: texts in parts of 100 classes, each with its backward."""
    module, (images, _) = model("reference", 100), inputs(classes, batch)
    for part in [module.encode_text] * (classes // 100) + [lambda: module.encode_image(images)]:
        module.zero_grad(set_to_none=True)
        part().sum().backward()
    synchronize()


@pytest.mark.parametrize("provider", ["reference bf16", "fast", "fast bf16"])
def test_step_bf16(benchmark, provider: str) -> None:  # type: ignore[no-untyped-def]
    """Our step in float32 and in bfloat16, whose error is at most 1.5 times that of the plain step in bfloat16."""
    benchmark.group = "step in bfloat16 C=100 B=8"
    kind, dtype = provider.split()[0], torch.bfloat16 if "bf16" in provider else torch.float32
    if dtype == torch.bfloat16 and DEVICE == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("the processor has no bfloat16 instructions")
    images, labels = inputs(100, 8)

    def errors(kind: str) -> list[float]:
        """Of the logits and of the gradients."""
        module = model(kind, 100, "upt", dtype)
        got = step(module, images.to(dtype), labels), gradients(module)
        return [relative_rms(g, exact) for g, exact in zip(got, anchor(100, 8), strict=True)]

    found = errors(kind)
    allowed = [CLOSE] * 2 if dtype == torch.float32 else [1.5 * error for error in errors("reference")]
    assert all(error <= limit for error, limit in zip(found, allowed, strict=True))
    info = {"provider": provider, "dtype": dtype, "logits_error": found[0], "gradient_error": found[1]}
    rounds, flops = (6, cost(100, 8).engine.total) if kind == "fast" else (2, 0)
    module = model(kind, 100, "upt", dtype)
    measure(benchmark, lambda: step(module, images.to(dtype), labels), rounds=rounds, flops=flops, **info)


@pytest.mark.parametrize("provider", ["truncated", "fast", "reference"])
@pytest.mark.parametrize("classes", [100, pytest.param(1000, marks=pytest.mark.full)])
def test_text_tower(benchmark, provider: str, classes: int) -> None:  # type: ignore[no-untyped-def]
    """Prompts to class features and back; the slow reference without a warm-up."""
    benchmark.group = f"text tower C={classes}"
    # a plain text tower costs in proportion to its classes, and a tenth of 1000 fits
    share = 10 if provider == "reference" and classes > 100 else 1
    module = model(provider, classes // share)
    weights = torch.linspace(-1, 1, 512, device=DEVICE)

    def run() -> Tensor:
        module.zero_grad(set_to_none=True)
        features = module.encode_text()
        (features @ weights).sum().backward()
        synchronize()
        return features.detach()

    if provider != "reference":
        assert relative_rms(run(), model("truncated", classes).encode_text().detach()) < CLOSE
    rounds = 2 if provider == "reference" else 5
    measure(benchmark, run, rounds=rounds, provider=provider, share_of_classes=1 / share)


@pytest.mark.parametrize("provider", ["fast", "reference"])
@pytest.mark.parametrize("batch", [8])
def test_vision_tower(benchmark, provider: str, batch: int) -> None:  # type: ignore[no-untyped-def]
    """Prompts and images to image features and back to the prompts."""
    benchmark.group = f"vision tower B={batch}"
    images, _ = inputs(100, batch)
    module = model(provider, 100)
    weights = torch.linspace(-1, 1, 512, device=DEVICE)

    def run() -> Tensor:
        module.zero_grad(set_to_none=True)
        features = module.encode_image(images)
        (features @ weights).sum().backward()
        synchronize()
        return features.detach()

    with torch.no_grad():
        wanted = model("truncated", 100).encode_image(images)
    assert relative_rms(run(), wanted) < CLOSE
    flops = cost(100, batch).engine_vision.total if provider == "fast" else 0
    measure(benchmark, run, rounds=4, flops=flops, provider=provider)


@pytest.mark.parametrize("provider", ["truncated", "fast"])
def test_inference(benchmark, provider: str) -> None:  # type: ignore[no-untyped-def]
    """Logits of 8 images over 100 classes in eval mode, as a user calls it again and again."""
    benchmark.group = "inference C=100 B=8"
    images, _ = inputs(100, 8)
    module = model(provider, 100).eval()

    def run() -> Tensor:
        with torch.no_grad():
            logits = module(images)
        synchronize()
        return logits

    with torch.no_grad():
        wanted = model("truncated", 100)(images)
    assert relative_rms(run(), wanted) < CLOSE
    measure(benchmark, run, rounds=4, provider=provider)
    module.train()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's high-water mark")
@pytest.mark.parametrize(
    ("provider", "classes"),
    [
        ("reference", 100),
        ("truncated", 100),
        ("fast", 100),
        ("fast", 1000),
        pytest.param("truncated", 1000, marks=pytest.mark.full),
    ],
)
def test_peak_memory(benchmark, provider: str, classes: int) -> None:  # type: ignore[no-untyped-def]
    """Peak memory of a step at batch 8 in a process of its own; the time is that of the whole process."""
    benchmark.group = f"peak memory C={classes} B=8 (see extra_info)"
    measure_peak_memory(benchmark, provider, classes, 8)


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's high-water mark")
@pytest.mark.parametrize("provider", ["truncated", "fast"])
@pytest.mark.parametrize("batch", [2, 8, 32, 128])
def test_batch_sweep(benchmark, provider: str, batch: int) -> None:  # type: ignore[no-untyped-def]
    """Peak memory and images a second of steps of 100 classes, each in a process of its own."""
    benchmark.group = f"batches C=100 B={batch} (see extra_info)"
    measure_peak_memory(benchmark, provider, 100, batch)
    benchmark.extra_info["images_per_second"] = round(batch / benchmark.extra_info["seconds"], 2)
