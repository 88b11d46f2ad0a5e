"""Memory of the frozen towers on a CPU: few large blocks that passes use one after another.

PyTorch takes CPU memory from the C library's heap, where it fragments: aligned blocks of equal size do not fit the
holes that their like leave behind, and a small tensor that lives on keeps a large hole from closing. At 600 MB of
activations that cost up to a third more, differently in each run. So what backward needs, and the large intermediate
results, live in blocks of a :class:`MemoryPool`; what an op must allocate itself is made in small :func:`pieces`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from upt_fast.common.memory_pool import MemoryPool

PIECE_BYTES = 1 << 20
_M_MMAP_THRESHOLD = -3  # of mallopt, in glibc's malloc.h
_heap_is_small = False


def keep_heap_small() -> bool:
    """Let this process's C library take blocks of a megabyte and more from the kernel one by one, and give them back.

    Left alone, glibc keeps what was freed, and puts the next parts of a step beside it where they do not fit: up to
    twice the memory that is alive. To be called before a model is built, for what the heap has it fills first.

    Returns:
        whether the C library does so: glibc's does.
    """
    global _heap_is_small
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    _heap_is_small = bool(mallopt(_M_MMAP_THRESHOLD, PIECE_BYTES))
    return _heap_is_small


def heap_is_small() -> bool:
    """Whether :func:`keep_heap_small` was called, and did something."""
    return _heap_is_small


def pieces(x: Tensor, limit: int | None = None) -> list[slice]:
    """Slices of x's first dimension for an op that allocates its result.

    On a CPU no larger than the limit in bytes, by default PIECE_BYTES: small pieces stay in the cache until they are
    copied, and leave small holes in the allocator's heap where a whole result would leave large ones.
    """
    count = -(-x.numel() * x.dtype.itemsize // (limit or PIECE_BYTES)) if x.device.type == "cpu" else 1
    size = max(1, -(-len(x) // max(1, count)))
    return [slice(i, i + size) for i in range(0, len(x), size)]


class Workspace:
    """Memory of one forward pass through a tower and its backward, in few large blocks.

    Long-lived and short-lived tensors that alternate leave holes in the allocator's heap: on a CPU a quarter of the
    peak. So the largest of both kinds live here. A workspace belongs to one call of a tower: models and threads never
    share one.

    Args:
        num_layers: layers that will ask for kept memory of one shape; 0 where layers are recomputed, in an order of
            their own: what one keeps is another's as soon as nothing refers to it.
        pool: where the blocks come from.
        label: tells this pass's blocks in the pool from those of other kinds of passes.
    """

    def __init__(self, num_layers: int, pool: MemoryPool | None = None, label: str = "") -> None:
        self._num_layers, self._label = num_layers, label
        self._pool = MemoryPool() if pool is None else pool
        self._first_layer: dict[str, int] = {}
        self._kept: dict[str, Tensor] = {}

    def scratch(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor in like's dtype and device, the caller's for as long as it refers to it."""
        return self._pool.take(f"{self._label} {name}", like, *shape)

    def kept(self, name: str, layer: int, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor in like's dtype and device, one per name and layer, that backward will read."""
        if not self._num_layers or like.device.type != "cpu":  # a GPU's allocator takes each back as backward goes
            return self.scratch(name, like, *shape)
        block = self._kept.get(name)
        if block is None or block.shape[1:] != shape or layer - self._first_layer[name] >= len(block):
            self._first_layer[name] = layer
            layers = max(1, self._num_layers - layer)
            self._kept[name] = block = self._pool.take(f"{self._label} {name} {shape[1:]}", like, layers, *shape)
        row = block[layer - self._first_layer[name]]
        # not a view: with a version counter of its own, so that writing the next layer's does not invalidate this one
        return like.new_empty(0).set_(row.untyped_storage(), row.storage_offset(), row.size(), row.stride())

    def keep(self, name: str, layer: int, x: Tensor) -> Tensor:
        """x, in kept memory."""
        return self.kept(name, layer, x, *x.shape).copy_(x)

    def normalize(self, name: str, layer: int, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D) normalised (scratch), its mean and 1 / standard deviation (kept under this name)."""
        parts = pieces(x)
        if len(parts) == 1:
            return torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        h = self.scratch("row", x, *x.shape)
        mean, rstd = (self.kept(f"{name} {kind}", layer, x, len(x), 1) for kind in ("mean", "rstd"))
        for i in parts:
            h[i], mean[i], rstd[i] = torch.native_layer_norm(x[i], x.shape[-1:], None, None, eps)
        return h, mean, rstd

    def normalize_backward(self, dh: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor) -> Tensor:
        """dy plus the gradient of x, given dh of its normalised rows (scratch)."""
        dx = self.scratch("grad", x, *x.shape)
        for i in pieces(x):
            part = torch.ops.aten.native_layer_norm_backward(
                dh[i], x[i], x.shape[-1:], mean[i], rstd[i], None, None, [True, False, False]
            )[0]
            torch.add(part, dy[i], out=dx[i])
        return dx

    def end_forward(self) -> None:
        """Let go of the memory: from here on autograd's saved tensors hold it, and release it as backward goes.

        A loss that outlives its backward, as in most training loops, keeps its graph and with it this object alive.
        """
        self._kept.clear()
