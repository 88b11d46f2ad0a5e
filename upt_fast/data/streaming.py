"""The order of an epoch over shards: front to back through one after another, shuffled within a window.

An image is read at its offset when its batch is due, so a stream needs no state but its place: the order is a function
of (seed, epoch), and a resumed run goes on behind the batches that were trained on. No pixel is kept.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import torch

from upt_fast.data.dataset import EpochBatchSampler, derive_seed
from upt_fast.data.listing import ImageItem
from upt_fast.data.sources import ShardImage

WINDOW = 2048  # images that are shuffled with each other, beside the order of shards and that within them
DRAWN = 4096  # random numbers at a time


class ShardBatchSampler(EpochBatchSampler):
    """Batches of (epoch, index) that need no more than a window of a shard at a time; see :class:`EpochBatchSampler`.

    Each image comes once in an epoch, but for those that do not fill the last batch.

    Args:
        items: N images in shards.
        batch_size: images per batch.
        seed: of the run.
        accumulate: batches that are one.
        window: images that are shuffled with each other.
    """

    def __init__(
        self, items: Sequence[ImageItem], batch_size: int, seed: int, accumulate: int = 1, window: int = WINDOW
    ) -> None:
        super().__init__(len(items), batch_size, seed, accumulate)
        self.window = window
        self.images = [item.path for item in items if isinstance(item.path, ShardImage)]
        if len(self.images) != len(items):
            raise ValueError("images in files of their own cannot be streamed; wanted shards (upt-fast shard)")
        self.shards = _by_shard(self.images)

    def order(self) -> Iterator[int]:
        """Indices of this epoch's images."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        shards = [self.shards[i] for i in torch.randperm(len(self.shards), generator=generator).tolist()]
        with _ReadAhead() as ahead:
            yield from shuffled(chain.from_iterable(shards), self.window, generator, lambda i: ahead(self.images[i]))


def _by_shard(images: Sequence[ShardImage]) -> list[list[int]]:
    """Indices of each shard's images, by their offsets."""
    shards: dict[Path, list[int]] = {}
    for index, image in enumerate(images):
        shards.setdefault(image.shard, []).append(index)
    return [sorted(shards[path], key=lambda index: images[index].offset) for path in sorted(shards)]


def shuffled(
    indices: Iterator[int], window: int, generator: torch.Generator, enters: Callable[[int], object]
) -> Iterator[int]:
    """Numbers in an order in which each comes about a window behind its place.

    Args:
        indices: the numbers.
        window: how many are held back.
        generator: of the random numbers.
        enters: told of each number when it is held back.
    """
    held = list(islice(indices, window))
    for index in held:
        enters(index)
    draws: Iterator[int] = iter(())
    for index in indices:
        enters(index)
        place = next(draws, None)
        if place is None:
            draws = iter(torch.randint(window, (DRAWN,), generator=generator).tolist())
            place = next(draws)
        held[place], index = index, held[place]
        yield index
    for place in torch.randperm(len(held), generator=generator).tolist():
        yield held[place]


class _ReadAhead:
    """Asks the kernel for images' bytes before they are due: in the order of a shard, which disks like."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.file: BinaryIO | None = None

    def __enter__(self) -> _ReadAhead:
        return self

    def __call__(self, image: ShardImage) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError):  # it is told when it is read
            if image.shard != self.path:
                self.__exit__()
                self.path, self.file = image.shard, open(image.shard, "rb", buffering=0)  # noqa: SIM115
            if self.file is not None:
                os.posix_fadvise(self.file.fileno(), image.offset, image.size, os.POSIX_FADV_WILLNEED)

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
        self.path = self.file = None
