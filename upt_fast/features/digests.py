"""Digests of what features are computed with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from upt_fast.engine.towers.text import TextTower
from upt_fast.engine.towers.vision import VisionTower


def digest_tensors(tensors: Iterable[tuple[str, Tensor]], about: object = None) -> str:
    """SHA-256 of named tensors, of their dtypes and shapes, and of what else is given."""
    digest = hashlib.sha256(repr(about).encode())
    for name, value in tensors:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tower_digest(tower: TextTower | VisionTower, *numbers: object) -> str:
    """SHA-256 of a tower's weights, as they are folded, and of its numbers, further ones among them."""
    blocks = tower.blocks
    own = tower.head.eps, blocks.eps_1, blocks.eps_2, blocks.activation, blocks.num_heads
    return digest_tensors(tower.named_buffers(), (own, numbers))
