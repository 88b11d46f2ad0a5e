"""Image files -> pixels no larger than random crops of a CLIP's size need, for a cache of decoded images.

An image whose shorter side is longer than the limit is scaled down to it, with antialiasing; none is scaled up. Pixels
of an image that is not scaled are those of :func:`upt_fast.data.images.read_rgb`.

A JPEG file that is far larger goes by libjpeg's scaled inverse DCT (Pillow's draft mode) to at least twice the wanted
size. Pillow reads all files: torchvision's decoder needs a fifth less time for small ones, but scales nothing, and
is deprecated since torchvision 0.29.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch import Tensor

from upt_fast.data.images import read_rgb, rgb_of, unreadable
from upt_fast.data.sources import Source, open_source

ORIENTATION = 0x0112  # EXIF tag; from 5 on width and height change places
SPARE = 2  # times the wanted size that a scaled inverse DCT leaves for the antialiased filter


class Pixels(NamedTuple):
    """An image as it is kept.

    Args:
        image: (3, h, w) uint8.
        full_size: (height, width) of the whole file, upright.
    """

    image: Tensor
    full_size: tuple[int, int]


def scaled_size(height: int, width: int, shorter: int) -> tuple[int, int]:
    """(height, width) with the shorter side scaled down to a limit; as they are, if it is no longer than that."""
    ratio = shorter / min(height, width)
    if ratio >= 1:
        return height, width
    return max(shorter, round(height * ratio)), max(shorter, round(width * ratio))


def read_scaled(path: Source, shorter: int) -> Pixels:
    """Decode an image file to 8-bit RGB as :func:`read_rgb` does, and scale its shorter side down to a limit.

    Args:
        path: of the file.
        shorter: pixels of the shorter side at most.
    Raises:
        ImageDecodeError: as of read_rgb.
    """
    try:
        with Image.open(open_source(path)) as image:
            orientation = _orientation(image)
            width, height = image.size
            size = scaled_size(height, width, shorter)
            image.draft(None, (SPARE * size[1], SPARE * size[0]))
            image.load()
            # rgb_of copies twice what needs nothing
            plain = image.mode == "RGB" and orientation == 1 and "transparency" not in image.info
            upright = image if plain else rgb_of(image)
            if orientation >= 5:
                size, height, width = size[::-1], width, height
            if upright.size != size[::-1]:
                upright = upright.resize(size[::-1], Image.Resampling.BICUBIC)
            return Pixels(torch.from_numpy(np.array(upright)).permute(2, 0, 1), (height, width))
    except Exception as error:  # decoders raise what they like
        raise unreadable(path, error) from error


def read_transformed(path: Source, transform: Any) -> Pixels:
    """Decode an image file to 8-bit RGB and keep what a transform without randomness makes of it."""
    image = transform(read_rgb(path))
    return Pixels(image, (image.shape[1], image.shape[2]))


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF beside good pixels says nothing about the orientation
        return 1
    return found if found in range(1, 9) else 1


@functools.cache
def decoders() -> dict[str, str]:
    """The versions of what decodes and scales: pixels of others may differ in their last bits."""
    turbo = features.version_feature("libjpeg_turbo") if features.check_feature("libjpeg_turbo") else None
    return {"pillow": PIL.__version__, "libjpeg_turbo": str(turbo)}
