"""Image files -> RGB, and the pass that decodes every image of a run before the first epoch."""

from __future__ import annotations

import hashlib
import os
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from upt_fast.common.messages import shorten
from upt_fast.data.sources import ShardImage, Source, open_source
from upt_fast.data.tree import link_target

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
T = TypeVar("T")


class ImageDecodeError(ValueError):
    """An image file that cannot be read."""


def read_rgb(path: Source) -> Image.Image:
    """Decode an image file, or an image in a shard, completely, as it is meant to be seen, to 8-bit RGB.

    The EXIF orientation is applied, 16-bit values are scaled to 8 bits, palettes and CMYK are converted, and what is
    transparent shows white. Of an animation the first frame is taken.

    Raises:
        ImageDecodeError: the file is missing, no regular file, no image, truncated or of an unsupported kind.
    """
    try:
        return decode_rgb(open_source(path))
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, DecompressionBombError and more
        raise unreadable(path, error) from error


def decode_rgb(file: Path | IO[bytes]) -> Image.Image:
    """:func:`read_rgb` of an open file; raises what decoders do."""
    with Image.open(file) as image:
        image.load()
        return rgb_of(image)


def unreadable(path: Source, error: Exception) -> ImageDecodeError:
    """What to raise of a file for what a decoder raised."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError) and not isinstance(path, ShardImage) and os.path.islink(path):
        reason = link_target(path)
    return ImageDecodeError(f"cannot read {path}: {reason}")


def rgb_of(image: Image.Image) -> Image.Image:
    """A decoded image as it is meant to be seen, as :func:`read_rgb` says.

    Raises:
        ImageDecodeError: its pixels have no set range.
    """
    return _to_rgb(_upright(image))


def digest_file(path: Path | ShardImage) -> bytes | None:
    """SHA-256 of an image's bytes, of one in a shard as its index has it; None if it cannot be read."""
    if isinstance(path, ShardImage):
        return path.digest
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.digest()
    except OSError:
        return None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    # broken EXIF beside good pixels says nothing about the orientation
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error):
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageDecodeError("32-bit float pixels have no set range; convert the file to 8 or 16 bits")
    if image.mode in _SIXTEEN_BIT_MODES:
        values = F.pil_to_tensor(image.convert("I"))
        if int(values.min()) < 0 or int(values.max()) > 65535:
            raise ImageDecodeError("32-bit integer pixels have no set range; convert the file to 8 or 16 bits")
        return F.to_pil_image((values >> 8).to(torch.uint8)).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class DecodedImages:
    """What one pass over a list of files found.

    Args:
        images: (3, H, W) uint8 of each file in order, None for one that cannot be read or was passed over; None: more
            than the limit.
        failures: index in the list -> reason.
    """

    images: list[Tensor | None] | None
    failures: dict[int, str]

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the kept images take."""
        return sum(image.numel() for image in self.images or () if image is not None)


def decode_images(
    paths: Sequence[Path | ShardImage],
    load: Callable[[Image.Image], Tensor],
    limit_bytes: int,
    description: str = "reading images",
    progress: bool = True,
    skip: Collection[int] = (),
) -> DecodedImages:
    """Decode every file once and keep the results if all of them fit into limit_bytes.

    Args:
        paths: image files.
        load: RGB image -> (3, H, W) uint8, what is kept of it.
        limit_bytes: memory for the results; when they do not fit, none is kept.
        description: of the progress bar.
        progress: whether to show it.
        skip: indices of files to pass over.
    """
    kept: list[Tensor | None] | None = []
    used = 0
    failures: dict[int, str] = {}
    wanted = [path for index, path in enumerate(paths) if index not in skip]
    results = decode_each(wanted, lambda path: load(read_rgb(path)), description, progress)
    for index in range(len(paths)):
        result = None if index in skip else next(results)
        if isinstance(result, str):
            failures[index] = result
        if kept is None:
            continue
        kept.append(None if isinstance(result, str) else result)
        used += result.numel() if isinstance(result, Tensor) else 0
        if used > limit_bytes:
            kept = None
    return DecodedImages(kept, failures)


def decode_each(
    paths: Sequence[Path | ShardImage],
    decode: Callable[[Path | ShardImage], T],
    description: str = "reading images",
    progress: bool = True,
) -> Iterator[T | str]:
    """What decode gives for each file, in order, by several threads; of a file that cannot be read, the reason.

    Args:
        paths: image files.
        decode: raises ImageDecodeError.
        description: of the progress bar.
        progress: whether to show it.
    """

    def decode_one(path: Path | ShardImage) -> T | str:
        try:
            return decode(path)
        except ImageDecodeError as error:
            return str(error)

    # decoders release the GIL, so threads do; few in flight, or a large dataset would pile up in memory
    num_threads = min(16, os.cpu_count() or 1)
    pending: deque[Future[T | str]] = deque()
    with (
        ThreadPoolExecutor(num_threads) as pool,
        tqdm(total=len(paths), desc=description, unit="image", disable=None if progress else True, leave=False) as bar,
    ):
        submitted = 0
        for _ in range(len(paths)):
            while submitted < len(paths) and len(pending) < 4 * num_threads:
                pending.append(pool.submit(decode_one, paths[submitted]))
                submitted += 1
            result = pending.popleft().result()
            bar.update()
            yield result


def corrupt_message(reasons: Sequence[str]) -> str:
    """One line for images that cannot be read: the count and the first ten."""
    return f"{len(reasons)} image(s) cannot be read: {shorten(reasons)}"
