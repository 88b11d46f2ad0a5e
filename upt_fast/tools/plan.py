"""What a training step needs and costs, before there are weights or images: ``upt-fast plan``.

The model is built without values; bytes and FLOPs are the formulas', and the time is that of a product that is measured
here, as if a step were nothing else.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from upt_fast.clip.loading import model_without_weights
from upt_fast.common.checks import require_choice, require_int
from upt_fast.data.benchmark import bench_classnames
from upt_fast.engine.autograd import functions
from upt_fast.engine.backends import compiled
from upt_fast.engine.memory import Need
from upt_fast.engine.towers.blocks import MEMORY_LEVELS, FrozenBlocks
from upt_fast.engine.towers.stacks import PlainStack
from upt_fast.engine.workspace import keep_heap_small
from upt_fast.methods import find_method
from upt_fast.model import FastPromptedCLIP
from upt_fast.steps.planning import Step

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 5  # of the product that is timed


class _OnCPU(PlainStack):
    """Blocks without values, which answer as they would with values on a CPU."""

    def __init__(self, blocks: FrozenBlocks) -> None:
        dtype = blocks.qkv_bias.dtype
        self.packed = not compiled.refusals("cpu", dtype, width=blocks.width, num_heads=blocks.num_heads)
        self.pooled = self.packed or dtype.itemsize >= 4
        onednn = not self.packed and functions.takes_onednn(torch.empty(1, dtype=dtype))
        self.piece = functions.PRODUCT_PIECE_BYTES if onednn else 0

    def pools(self, blocks: FrozenBlocks) -> bool:
        return self.pooled

    def piece_bytes(self, blocks: FrozenBlocks) -> int:
        return self.piece


def collect(
    clip: str,
    method: str,
    classes: int,
    batch_size: int,
    precision: str = "fp32",
    memory: str = "fast",
    max_bytes: int | None = None,
) -> dict[str, Any]:
    """Everything the command shows, as plain values.

    Args:
        clip: a name for :func:`upt_fast.clip.loading.clip_without_weights`.
        method: its name; its default options.
        classes: C, names of Caltech101's classes up to 100, of ImageNet's beyond.
        batch_size: B.
        precision: "fp32" or "bf16".
        memory: level of a step without a limit.
        max_bytes: limit; None: none.
    Raises:
        ValueError: no such name, a number out of range, or nothing stays below the limit.
    """
    for name, number in (("classes", classes), ("batch_size", batch_size)):
        require_int(name, number, 1)
    require_choice("precision", precision, tuple(PRECISIONS))
    require_choice("memory", memory, MEMORY_LEVELS)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        keep_heap_small()  # as train --max-memory does
    model = _without_values(clip, method, classes, PRECISIONS[precision], memory)
    weights = sum(b.nbytes for b in model.buffers())
    if not on_gpu:
        for tower in (model.text_tower, model.vision_tower):
            tower.blocks.stack = stack = _OnCPU(tower.blocks)
            weights += 2 * stack.packed * sum(b.nbytes for b in tower.blocks.buffers())  # a copy for each direction
    step = Step(model, batch_size)
    plan = None if max_bytes is None else model.plan_memory(batch_size, max_bytes)
    if plan is not None:
        memory = plan.memory
    images, at_once = (batch_size, classes) if plan is None else (plan.images, plan.classes)
    text = step.text(images if step.learner.by_image else 1, at_once, memory)
    alive = step.whole() if plan is None else step.in_parts(memory, images, at_once)
    flops = step.flops(memory, images, at_once)
    rate = product_rate(PRECISIONS[precision])
    return {
        "clip": clip,
        "method": model.method,
        "classes": classes,
        "batch_size": batch_size,
        "precision": precision,
        "memory": memory,
        "at_once": {"images": images, "classes": at_once},
        "bytes": {
            "weights": weights,
            "text": _plain(text),
            "image": _plain(step.vision(images, memory)),
            **step.rest(),
            "peak_alive": alive,
            "peak": step.with_room(alive),
        },
        "flops": flops,
        "flops_per_second": round(rate),
        "estimated_seconds": flops / rate,
        "plan": None if plan is None else plan._asdict(),
    }


def _plain(need: Need) -> dict[str, int]:
    return {"kept": need.lasting, "passing": need.passing}


def _without_values(clip: str, method: str, classes: int, dtype: torch.dtype, memory: str) -> FastPromptedCLIP:
    shapes, tokenizer = model_without_weights(clip)
    names, config = bench_classnames(classes), find_method(method).config.from_options({})
    model = FastPromptedCLIP(
        shapes, names, method=method, tokenizer=tokenizer, config=config, dtype=dtype, memory=memory
    )
    return model.train()


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of a ViT-B/16's size, the better of PyTorch's and oneDNN's; takes a tenth of a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, wide, out = 788, 768, 3072
    x, w = torch.randn(rows, wide, device=device).to(dtype), torch.randn(out, wide, device=device).to(dtype)
    ways: list[Callable[[], Tensor]] = [functools.partial(torch.mm, x, w.t())]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))
    return 2 * rows * wide * out / min(_seconds(way, device) for way in ways)


def _seconds(run: Callable[[], Tensor], device: str) -> float:
    times = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
