"""A list of image files, decoded once into a store of pixels (pixel_store.py) and read from it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from upt_fast.data.decoding import Pixels
from upt_fast.data.images import decode_each
from upt_fast.data.listing import ImageItem
from upt_fast.data.pixel_store import Entry, FileKey, PixelStore, map_pixels
from upt_fast.data.sources import ShardImage

logger = logging.getLogger("upt_fast")

Decode = Callable[[Path | ShardImage], Pixels]


class CachedImages(Sequence[Tensor]):
    """Images that lie in a file of pixels; those that do not are decoded when asked for, to the same pixels.

    Args:
        paths: N image files.
        decode: what is kept of a file.
        entries: where each image lies; None: nowhere.
        pixels: the file of pixels.
    """

    def __init__(
        self,
        paths: Sequence[Path | ShardImage],
        decode: Decode,
        entries: Sequence[Entry | None],
        pixels: Path | None,
    ) -> None:
        self.paths, self.decode, self.entries, self.pixels = paths, decode, entries, pixels
        # of this process and of those forked from it; also when the file is removed
        self._data = None if pixels is None else map_pixels(pixels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        """(3, h, w) uint8."""
        return self.read(index).image

    def is_kept(self, index: int) -> bool:
        """Whether an image lies in the file of pixels, so that reading it decodes nothing."""
        return self.entries[index] is not None and self._data is not None

    def read(self, index: int) -> Pixels:
        """An image and the size of its file; the image may be a view of the file of pixels."""
        entry = self.entries[index]
        if entry is None or self._data is None:
            return self.decode(self.paths[index])
        pixels = self._data[entry.offset : entry.offset + entry.num_bytes]
        image = pixels.view(entry.height, entry.width, 3).permute(2, 0, 1)
        return Pixels(image, (entry.full_height, entry.full_width))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_data": None}  # a process that is not forked maps the file itself

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._data = None if self.pixels is None else map_pixels(self.pixels)


def cache_images(
    items: Sequence[ImageItem],
    decode: Decode,
    store: PixelStore,
    description: str = "reading images",
    progress: bool = True,
) -> tuple[CachedImages, dict[int, str]]:
    """Decode the files that the store does not have, into it while it takes them.

    Args:
        items: N images.
        decode: what is kept of a file; raises ImageDecodeError.
        store: of what decode gives.
        description: of the progress bar.
        progress: whether to show it.
    Returns:
        The images that can be read, in order; index in items -> reason of the others.
    """
    keys = [_key(item) for item in items]
    store.read()
    entries = _find(store, keys)
    failures: dict[int, str] = {}
    if None in entries and not store.limit:
        _decode_missing(items, keys, entries, failures, decode, None, description, progress)
    elif None in entries:
        try:
            with store.writing():
                entries = _find(store, keys)  # another process may have decoded them meanwhile
                _decode_missing(items, keys, entries, failures, decode, store, description, progress)
        except OSError as error:
            _warn(store, error)
            _decode_missing(items, keys, entries, failures, decode, None, description, progress)
    good = [i for i in range(len(items)) if i not in failures]
    images = CachedImages([items[i].path for i in good], decode, [entries[i] for i in good], store.pixels)
    return images, failures


def _key(item: ImageItem) -> FileKey | None:
    try:
        return FileKey.of(item.key, item.path)
    except OSError:  # decoding it says why
        return None


def _find(store: PixelStore, keys: Sequence[FileKey | None]) -> list[Entry | None]:
    """Where each image lies whole: checksums of all are compared, by several threads."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda key: None if key is None else store.get(key), keys))


def _decode_missing(
    items: Sequence[ImageItem],
    keys: Sequence[FileKey | None],
    entries: list[Entry | None],
    failures: dict[int, str],
    decode: Decode,
    store: PixelStore | None,
    description: str,
    progress: bool,
) -> None:
    missing = [i for i, entry in enumerate(entries) if entry is None and i not in failures]
    found = decode_each([items[i].path for i in missing], decode, description, progress)
    for i, pixels in zip(missing, found, strict=True):
        key = keys[i]
        if isinstance(pixels, str):
            failures[i] = pixels
        elif store is not None and key is not None and key == _key(items[i]):  # not changed while it was read
            try:
                entries[i] = store.append(key, pixels.image, pixels.full_size)
            except OSError as error:
                _warn(store, error)
                store = None
                continue
            if entries[i] is None:
                logger.warning(
                    "no room in %s for all decoded images (--cache-gib allows %.3g, and 1 GiB of the disk is left "
                    "free): up to %d of %d are decoded when used",
                    store.stores,
                    store.limit / 2**30,
                    sum(entry is None for entry in entries),
                    len(entries),
                )
                store = None


def _warn(store: PixelStore, error: OSError) -> None:
    logger.warning(
        "cannot keep decoded images in %s (%s): they are decoded when used; $UPT_FAST_IMAGE_CACHE names another folder",
        store.folder,
        error.strerror or error,
    )
