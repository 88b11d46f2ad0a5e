"""Large blocks of CPU memory that are used again as soon as nothing refers to them."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class MemoryPool:
    """Blocks of CPU memory, for what a tower's passes, or batches of images, use one after another.

    Half a gigabyte of activations returned to the allocator after each step leaves holes in its heap, by chance up to a
    third of the peak, and is cleared by the kernel page by page when it comes back: a third of the time of normalising
    a batch. A block is used again when nothing refers to its storage any more: neither a graph that backward could
    still need, nor a tensor that left the tower, nor another process. A GPU's caching allocator does all this, so other
    devices' memory passes through.

    Args:
        most: blocks of a name that are remembered, the newest ones; None: all.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._blocks: dict[str, list[Tensor]] = {}
        self._lock = threading.Lock()

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor in like's dtype and device; names keep requests of different kinds apart."""
        if like.device.type != "cpu" or not hasattr(torch._C, "_storage_Use_Count"):
            return like.new_empty(shape)
        size = math.prod(shape)
        with self._lock:
            blocks = self._blocks.setdefault(name, [])
            idle = [b for b in blocks if self._is_idle(b)]
            fitting = [b for b in idle if b.dtype == like.dtype and b.numel() >= size]
            if fitting:
                block = min(fitting, key=Tensor.numel)
            else:  # a larger request replaces what lies idle
                used = [b for b in blocks if not any(b is other for other in idle)]
                with torch.inference_mode(False):  # passes with and without autograd share the block
                    block = like.new_empty(size)
                blocks[:] = [*used, block][-self._most if self._most else 0 :]
            return block[:size].view(shape)

    def clear(self) -> None:
        """Let go of all blocks; those in use live on until their users are done."""
        with self._lock:
            self._blocks.clear()

    @staticmethod
    def _is_idle(block: Tensor) -> bool:
        storage = block.untyped_storage()
        # the block's own reference and that of this storage object; another process may read shared memory
        return not storage.is_shared() and torch._C._storage_Use_Count(storage._cdata) <= 2  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict) -> MemoryPool:
        return MemoryPool(self._most)

    def __reduce__(self) -> tuple:
        return MemoryPool, (self._most,)
