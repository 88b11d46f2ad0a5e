"""Training's augmentation for whole batches: the boxes of torchvision's RandomResizedCrop and its flips, drawn from the
same random numbers, on images of any sizes.

On a CPU each crop is resized by the kernel that single images are resized with, to the same bits, in several threads.
Of a copy that was scaled down the box is the same, and may then begin and end between pixels; Pillow resizes it. For
another device the cut pixels of a batch go there in one piece, and are resized there as products with the weights of
the antialiased filter, in float32.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from upt_fast.data.cached import CachedImages
from upt_fast.data.dataset import AugmentedDataset, ImageDataset
from upt_fast.data.transforms import CROP_RATIO, CROP_SCALE, image_size, interpolation_mode

ATTEMPTS = 10  # of RandomResizedCrop, before it takes the centre
PART = 32  # images that are resized at once on a device
GRAIN = 32_000  # numbers that PyTorch does not share out between threads
LOG_RATIO = tuple(torch.log(torch.tensor(CROP_RATIO)).tolist())  # in float32, as torchvision has it


class Box(NamedTuple):
    """A part of an image, in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def draw_box(height: int, width: int, flip: bool, generator: torch.Generator) -> Box:
    """The box that RandomResizedCrop and RandomHorizontalFlip draw for an image from the same random numbers.

    Args:
        height: of the image.
        width: of the image.
        flip: whether a flip is drawn.
        generator: of the random numbers.
    """
    box = _draw_crop(height, width, generator)
    return box._replace(flip=flip and torch.rand(1, generator=generator).item() < 0.5)


def _draw_crop(height: int, width: int, generator: torch.Generator) -> Box:
    number, start = torch.empty(1), torch.empty(1, dtype=torch.int64)
    for _ in range(ATTEMPTS):
        area = height * width * number.uniform_(*CROP_SCALE, generator=generator).item()
        ratio = number.uniform_(*LOG_RATIO, generator=generator).exp_().item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = (start.random_(0, 1 + room, generator=generator).item() for room in (height - h, width - w))
            return Box(int(top), int(left), h, w)
    h, w = height, width
    if width / height < CROP_RATIO[0]:
        h = round(width / CROP_RATIO[0])
    elif width / height > CROP_RATIO[1]:
        w = round(height * CROP_RATIO[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


class Part(NamedTuple):
    """What is drawn of an image.

    Args:
        image: (3, h, w) uint8, the pixels around it.
        rows: where in them it begins and ends, down.
        cols: the same, across.
        flip: whether it is mirrored.
    """

    image: Tensor
    rows: tuple[float, float]
    cols: tuple[float, float]
    flip: bool


def cut(image: Tensor, full_size: tuple[int, int], box: Box) -> Part:
    """The part of an image, or of a smaller copy, where it may begin and end between pixels, in a box of the whole one.

    Args:
        image: (3, h, w) uint8.
        full_size: (height, width) of the whole image, in whose pixels the box is.
        box: that is drawn.
    """
    top, bottom, rows = _scale(box.top, box.height, full_size[0], image.shape[1])
    left, right, cols = _scale(box.left, box.width, full_size[1], image.shape[2])
    return Part(image[:, top:bottom, left:right], rows, cols, box.flip)


def _scale(start: int, length: int, full: int, kept: int) -> tuple[int, int, tuple[float, float]]:
    first, last = start * kept / full, min((start + length) * kept / full, kept)
    whole = math.floor(first)
    return whole, math.ceil(last), (first - whole, last - whole)


@dataclass(frozen=True)
class Crops:
    """Parts of images, cut but not yet resized, and what they become on a device.

    Args:
        pixels: (N,) uint8, the parts (h, w, 3) one behind the other.
        sizes: (B, 2) their heights and widths.
        spans: (B, 2, 2) float64: where in them what is drawn begins and ends, down and across.
        flips: (B,) which are mirrored.
        size: (height, width) of the results.
        cubic: whether the filter is bicubic, else bilinear.
    """

    pixels: Tensor
    sizes: Tensor
    spans: Tensor
    flips: Tensor
    size: tuple[int, int]
    cubic: bool

    @classmethod
    def of(cls, parts: Sequence[Part], size: tuple[int, int], cubic: bool) -> Crops:
        """The crops of a batch."""
        return cls(
            torch.from_numpy(np.concatenate([part.image.permute(1, 2, 0).reshape(-1).numpy() for part in parts])),
            torch.tensor([part.image.shape[1:] for part in parts]),
            torch.tensor([(part.rows, part.cols) for part in parts], dtype=torch.float64),
            torch.tensor([part.flip for part in parts]),
            size,
            cubic,
        )

    def pin_memory(self) -> Crops:
        """With pixels in page-locked memory, as a loader asks for."""
        return replace(self, pixels=self.pixels.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        """(B, 3, height, width) uint8 on the device, resized there."""
        pixels = self.pixels.to(device, non_blocking=non_blocking)
        ends = [0, *self.sizes.prod(dim=1).mul(3).cumsum(0).tolist()]
        parts = []
        for first in range(0, len(self.sizes), PART):
            last = min(first + PART, len(self.sizes))
            of_part = pixels[ends[first] : ends[last]], self.sizes[first:last], self.spans[first:last]
            parts.append(_resize(*of_part, self.size, self.cubic))
        images = torch.cat(parts)
        return torch.where(self.flips.to(device)[:, None, None, None], images.flip(-1), images)


def _resize(pixels: Tensor, sizes: Tensor, spans: Tensor, size: tuple[int, int], cubic: bool) -> Tensor:
    """(N,) uint8 of parts (h, w, 3) -> (B, 3, height, width) uint8."""
    longest, (heights, widths) = sizes.amax(dim=0).tolist(), sizes.to(pixels.device).unbind(1)
    down, across = spans.to(pixels.device).unbind(1)
    rows, cols = (torch.arange(length, device=pixels.device) for length in longest)
    starts = (heights * widths).cumsum(0) - heights * widths
    index = rows[:, None] * widths[:, None, None] + cols + starts[:, None, None]  # (B, H, W)
    # beyond a part's edges the weights are zero, whatever is there
    images = pixels.view(-1, 3)[index.clamp_(max=len(pixels) // 3 - 1)].permute(0, 3, 1, 2).float()
    images = images @ filter_weights(widths, across, longest[1], size[1], cubic)[:, None].transpose(-1, -2)
    # integers between the passes, as the kernels for uint8 have them
    images = filter_weights(heights, down, longest[0], size[0], cubic)[:, None] @ images.round_().clamp_(0, 255)
    return images.round_().clamp_(0, 255).to(torch.uint8)


def filter_weights(lengths: Tensor, spans: Tensor, longest: int, size: int, cubic: bool) -> Tensor:
    """Weights of the antialiased filter: (B, size, longest) float32, zero from lengths[b] on.

    Args:
        lengths: (B,) pixels of each input.
        spans: (B, 2) float64, where in them what is resized begins and ends.
        longest: of the lengths.
        size: pixels of each output.
        cubic: bicubic with a = -0.5, else bilinear.
    """
    scale = ((spans[:, 1] - spans[:, 0]) / size)[:, None, None]
    centre = spans[:, :1, None] + (torch.arange(size, device=lengths.device)[:, None] + 0.5) * scale
    source = torch.arange(longest, device=lengths.device)
    x = ((source + 0.5 - centre) / scale.clamp(min=1)).abs()
    if cubic:
        inner = (1.5 * x - 2.5) * x * x + 1
        outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))
    else:
        weights = (1 - x).clamp(min=0)
    weights = weights.masked_fill(source >= lengths[:, None, None], 0)
    return (weights / weights.sum(dim=-1, keepdim=True)).float()


@functools.lru_cache(maxsize=2)
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Threads that stay, for each new one that resizes makes OpenMP begin anew; not those of a process that forked."""
    return ThreadPoolExecutor(count, thread_name_prefix="resize")


class BatchedAugmentation(AugmentedDataset):
    """Images whose crops are drawn and resized a batch at a time, as a function of (seed, epoch, index).

    Args:
        base: the images.
        images: their pixels.
        preprocess_cfg: open_clip's settings.
        augment: "standard" or "crop".
        seed: of the run.
        on_device: whether :meth:`Crops.to` is to resize them; else they are resized here.
        views: as for AugmentedDataset.
    """

    def __init__(
        self,
        base: ImageDataset,
        images: CachedImages,
        preprocess_cfg: dict[str, Any],
        augment: str,
        seed: int,
        on_device: bool = False,
        views: int | None = None,
    ) -> None:
        super().__init__(base, None, seed, views)
        self.images, self.flip = images, augment == "standard"
        self.size, self.mode = image_size(preprocess_cfg), interpolation_mode(preprocess_cfg)
        self.on_device = on_device and self.mode in (F.InterpolationMode.BICUBIC, F.InterpolationMode.BILINEAR)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        image = torch.empty(3, *self.size, dtype=torch.uint8)
        self._resize_into(image, self._draw(key))
        return image, self.base.items[key[1]].label

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> tuple[Tensor | Crops, Tensor]:
        """A batch, which a loader asks for if there is such a method; it needs :meth:`collate`."""
        labels = torch.tensor([self.base.items[index].label for _, index in keys])
        if self.on_device:
            cubic = self.mode == F.InterpolationMode.BICUBIC
            return Crops.of([self._draw(key) for key in keys], self.size, cubic), labels
        batch = torch.empty(len(keys), 3, *self.size, dtype=torch.uint8)
        threads = min(torch.get_num_threads(), len(keys))  # 1 in a loader's processes
        # here, for threads that draw hand the interpreter's lock to and fro; decoding is worth a thread
        parts = [self._draw(key) if self.images.is_kept(key[1]) else None for key in keys]
        left = iter(range(len(keys)))  # of which each thread takes the next

        def fill(_: int) -> None:
            for i in left:
                self._resize_into(batch[i], parts[i] or self._draw(keys[i]))

        if threads == 1:
            fill(0)
        else:
            list(_threads(threads, os.getpid()).map(fill, range(threads)))
        return batch, labels

    @staticmethod
    def collate(batch: Any) -> Any:
        """A batch is one already."""
        return batch

    def _draw(self, key: tuple[int, int]) -> Part:
        epoch, index = key
        image, full_size = self.images.read(index)
        generator = torch.Generator().manual_seed(self.random_seed(epoch, index))
        return cut(image, full_size, draw_box(*full_size, self.flip, generator))

    def _resize_into(self, image: Tensor, part: Part) -> None:
        if (part.rows, part.cols) == ((0, part.image.shape[1]), (0, part.image.shape[2])):
            resized = F.resize_image(part.image, list(self.size), interpolation=self.mode, antialias=True)
        else:  # of a scaled copy: PyTorch resizes from whole pixels to whole pixels alone
            pixels = Image.fromarray(part.image.permute(1, 2, 0).contiguous().numpy())
            box = (part.cols[0], part.rows[0], part.cols[1], part.rows[1])
            filter_ = Image.Resampling[self.mode.name.removesuffix("_EXACT")]
            resized = F.pil_to_tensor(pixels.resize(self.size[::-1], filter_, box))
        if not part.flip:
            np.copyto(image.numpy(), resized.numpy())
            return
        rows, source = image.view(-1, self.size[1]), resized.reshape(-1, self.size[1])
        # several threads mirror pieces that PyTorch does not share out: its own would wait for each other
        step = max(1, GRAIN // self.size[1]) if torch.get_num_threads() > 1 else len(rows)
        for first in range(0, len(rows), step):
            rows[first : first + step] = source[first : first + step].flip(-1)
