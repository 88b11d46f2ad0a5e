"""Batches on a model's device, and its mode while it is evaluated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def to_device(
    batches: Iterable[tuple[Tensor, Tensor]], normalize: Callable[[Tensor], Tensor], device: torch.device
) -> Iterable[tuple[Tensor, Tensor]]:
    """(B, 3, H, W) uint8 and (B,) labels of a loader -> normalised float32 images and labels on the device."""
    for images, labels in batches:
        yield normalize(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is, also one without parameters."""
    return next(itertools.chain(model.parameters(), model.buffers())).device


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A model in eval mode; its mode is put back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
