"""Datasets and the batch sampler of a run.

All randomness is a function of (seed, epoch, sample index): a batch sampler hands out ``(epoch, index)`` pairs, and
each sample draws its augmentation from a generator seeded with them. A resumed run therefore sees the very same
batches, and so does one with another number of loader processes.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from upt_fast.data.images import read_rgb
from upt_fast.data.listing import ImageItem


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed that is a function of the numbers; neighbouring numbers give unrelated seeds."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images through a transform without randomness.

    Args:
        items: N images.
        load: RGB image -> (3, h, w) uint8.
        images: what load gives for each item, decoded before; None, as a whole or for an item: read when asked for.
    """

    def __init__(
        self,
        items: Sequence[ImageItem],
        load: Callable[[Image.Image], Tensor],
        images: Sequence[Tensor | None] | None = None,
    ) -> None:
        if images is not None and len(images) != len(items):
            raise ValueError(f"{len(images)} decoded images for {len(items)} items; wanted as many")
        self.items = items
        self.load = load
        self.images = images

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.items[index]
        image = None if self.images is None else self.images[index]
        return self.load(read_rgb(item.path)) if image is None else image, item.label


class AugmentedDataset(Dataset[tuple[Tensor, int]]):
    """Images with an augmentation that is a function of (seed, epoch, index).

    Args:
        base: the images, of any sizes.
        transform: (3, H, W) uint8 -> (3, h, w) uint8, drawing from torch's default generator; None: leave them.
        seed: of the run.
        views: augmented views that an image has, gone through epoch by epoch; None: a new one in each epoch.
    """

    def __init__(
        self,
        base: ImageDataset,
        transform: Callable[[Tensor], Tensor] | None,
        seed: int,
        views: int | None = None,
    ) -> None:
        self.base = base
        self.transform = transform
        self.seed = seed
        self.views = views

    def random_seed(self, epoch: int, index: int) -> int:
        """What seeds an image's augmentation: of a view its number and the image's key, whatever the run is."""
        if self.views is None:
            return derive_seed(self.seed, epoch, index)
        name = self.base.items[index].key.encode(errors="surrogateescape")
        return derive_seed(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big"), epoch % self.views)

    def __len__(self) -> int:
        return len(self.base)

    @staticmethod
    def collate(batch: Any) -> Any:
        """A loader's batch of what it has from here."""
        return default_collate(batch)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image, label = self.base[index]
        if self.transform is not None:
            with torch.random.fork_rng(devices=()):
                torch.default_generator.manual_seed(self.random_seed(epoch, index))
                image = self.transform(image)
        return image, label


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) in an order that is a function of (seed, epoch).

    As in the field's recipe, images that do not fill the last batch sit out this epoch (others do in the next), unless
    there is no full batch at all. Where batches are accumulated several are one, the last of an epoch what is left.

    Args:
        num_samples: N images.
        batch_size: images per batch.
        seed: of the run.
        accumulate: batches that are one.

    ``epoch`` and ``start``, batches that are left out at its beginning, are set from outside.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, accumulate: int = 1) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.accumulate = accumulate
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return steps_of_epoch(self.num_samples, self.batch_size, self.accumulate)

    def order(self) -> Iterator[int]:
        """Indices of this epoch's images."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        yield from torch.randperm(self.num_samples, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        used, size = max(1, self.num_samples // self.batch_size) * self.batch_size, self.batch_size * self.accumulate
        epoch, order = self.epoch, islice(self.order(), used)
        deque(islice(order, self.start * size), maxlen=0)
        for _ in range(self.start, len(self)):
            yield [(epoch, index) for index in islice(order, size)]


def steps_of_epoch(num_samples: int, batch_size: int, accumulate: int = 1) -> int:
    """Optimizer steps of an epoch, of accumulate batches each; the last one may have fewer."""
    return -(-max(1, num_samples // batch_size) // accumulate)
