"""Pixels of a dataset's images in one memory-mapped file, kept on disk between runs and shared by processes.

A store is a folder: ``index.jsonl`` (a header, then a line for each image) and the file of pixels that the header
names. Both only grow, under a lock that the kernel drops with a process that dies; a line is written after its pixels.
What a crash, a full disk or another program leaves is found by its checksum, and that image is decoded anew. Files of
pixels have names of their own and are replaced, never cut: who has mapped one keeps it.

The bytes of all stores in a folder are bounded: those of stores not used for the longest time are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upt_fast.common.files import write_text
from upt_fast.data.sources import ShardImage

logger = logging.getLogger("upt_fast")

FORMAT = 1
INDEX_FILE, LOCK_FILE = "index.jsonl", ".lock"
KEEP_FREE = 2**30  # bytes of the disk that are left to others
# private, so that nobody writes into the file; without memory set aside for that, or files larger than it are refused
MAP_FLAGS = mmap.MAP_PRIVATE | (getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0)
MAP_ACCESS = mmap.PROT_READ | mmap.PROT_WRITE


class FileKey(NamedTuple):
    """What tells an image file from what it was before: its name in the dataset, bytes, time of its last change.

    Of an image in a shard a part of its checksum stands for the time.
    """

    name: str
    num_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, name: str, path: Path | ShardImage) -> FileKey:
        """The key of a file; raises OSError where there is none."""
        if isinstance(path, ShardImage):
            return cls(name, path.size, int.from_bytes(path.digest[:7], "big"))
        found = path.stat()
        return cls(name, found.st_size, found.st_mtime_ns)


class Entry(NamedTuple):
    """Where an image lies in the file of pixels: (height, width, 3) bytes from offset on.

    Args:
        offset: in bytes.
        height: of the pixels.
        width: of the pixels.
        full_height: of the whole image file.
        full_width: of the whole image file.
        checksum: of key, sizes and pixels.
    """

    offset: int
    height: int
    width: int
    full_height: int
    full_width: int
    checksum: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the pixels."""
        return 3 * self.height * self.width


class PixelStore:
    """One dataset's images after one preprocessing.

    Args:
        stores: folder of all stores.
        described: what the pixels hang on: dataset, preprocessing, decoders.
        limit: bytes of all stores together.
    """

    def __init__(self, stores: Path, described: Mapping[str, Any], limit: int) -> None:
        self.header = {"format": FORMAT, **json.loads(json.dumps(described))}
        digest = hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()
        self.stores, self.folder, self.limit = stores, stores / digest[:16], limit
        self.pixels: Path | None = None
        self.entries: dict[FileKey, Entry] = {}
        self._data: Tensor | None = None
        self._used = 0  # bytes of all stores

    def read(self) -> None:
        """Read the index; a missing, foreign or damaged one, or a part of it, has no entries."""
        pixels, self.entries = self.pixels, {}
        self.pixels = None
        try:
            with open(self.folder / INDEX_FILE, encoding="utf-8", errors="replace") as lines:
                header = json.loads(next(lines))
                name = header.pop("pixels")
                if header != self.header or Path(name).name != name:
                    raise ValueError("another store's")
                self.pixels = self.folder / name
                self.entries = dict(filter(None, map(_read_line, lines)))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
            logger.debug("no decoded images in %s: %r", self.folder, error)
        if self.pixels != pixels:
            self._data = None
        with contextlib.suppress(OSError):  # another's, or none
            os.utime(self.folder / INDEX_FILE)  # when it was last used

    def get(self, key: FileKey) -> Entry | None:
        """Where an image lies whole; None: it is to be decoded."""
        entry = self.entries.get(key)
        if entry is None or entry.num_bytes <= 0 or entry.offset < 0:
            return None
        if self._data is None or entry.offset + entry.num_bytes > len(self._data):
            self._data = map_pixels(self.pixels) if self.pixels is not None else None
        if self._data is None or entry.offset + entry.num_bytes > len(self._data):
            return None
        pixels = self._data[entry.offset : entry.offset + entry.num_bytes]
        return entry if entry.checksum == _checksum(key, entry, pixels.numpy().data) else None

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Alone with the store, its index read anew; the store is made where there is none.

        Raises:
            OSError: the folder cannot be written to, or locks nothing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / LOCK_FILE, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("waiting for another process that decodes images into %s", self.folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            self.read()
            # the last entry of each name: files that changed since leave waste
            live = sum({key.name: entry.num_bytes for key, entry in self.entries.items()}.values())
            if self.pixels is None or not self.pixels.is_file() or self.pixels.stat().st_size > 2 * live:
                self._begin()
            assert self.pixels is not None
            self._used = sum(self._sizes().values())
            with (
                open(self.pixels, "ab", buffering=0) as self._pixels_file,
                open(self.folder / INDEX_FILE, "ab", buffering=0) as self._index_file,
            ):
                yield

    def append(self, key: FileKey, image: Tensor, full_size: tuple[int, int]) -> Entry | None:
        """Keep an image, within :meth:`writing`.

        Args:
            key: of its file.
            image: (3, h, w) uint8.
            full_size: (height, width) of the whole image file.
        Returns:
            Where it lies; None: it would be more than the limit, or leave less than a GiB of the disk.
        Raises:
            OSError: the disk is full, or will not have it.
        """
        pixels = image.permute(1, 2, 0).contiguous()
        height, width, _ = pixels.shape
        if not self._make_room(pixels.numel()) or shutil.disk_usage(self.folder).free < KEEP_FREE + pixels.numel():
            return None
        entry = Entry(self._pixels_file.seek(0, os.SEEK_END), height, width, *full_size, 0)
        content = pixels.view(-1).numpy().data
        entry = entry._replace(checksum=_checksum(key, entry, content))
        _write(self._pixels_file, content)
        # a line's end before, should the last one have been cut off
        _write(self._index_file, memoryview(f"\n{json.dumps([*key, *entry])}\n".encode()))
        self._used += len(content)
        self.entries[key] = entry
        return entry

    def _begin(self) -> None:
        """An empty store in the place of what is there."""
        for old in self.folder.glob("pixels-*"):
            old.unlink(missing_ok=True)
        self.pixels, self.entries, self._data = self.folder / f"pixels-{secrets.token_hex(8)}", {}, None
        self.pixels.touch()
        write_text(self.folder / INDEX_FILE, json.dumps({**self.header, "pixels": self.pixels.name}) + "\n")

    def _make_room(self, num_bytes: int) -> bool:
        """Whether so many bytes more are within the limit, once stores that were not used lately are gone."""
        if self._used + num_bytes <= self.limit:
            return True
        others = {path.parent for path in self._sizes() if path.parent != self.folder}
        for store in sorted(others, key=_last_used):
            if _remove(store):
                self._used = sum(self._sizes().values())
            if self._used + num_bytes <= self.limit:
                return True
        return False

    def _sizes(self) -> dict[Path, int]:
        """Bytes of each store's pixels."""
        sizes = {}
        for path in self.stores.glob("*/pixels-*"):
            with contextlib.suppress(OSError):  # another process has just removed it
                sizes[path] = path.stat().st_size
        return sizes


def map_pixels(path: Path) -> Tensor | None:
    """A file of pixels as (N,) uint8 that takes no memory of the process; None where there is none, or an empty one."""
    try:
        with open(path, "rb") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), 0, flags=MAP_FLAGS, prot=MAP_ACCESS), dtype=torch.uint8)
    except (OSError, ValueError):
        return None


def _write(file: FileIO, content: memoryview) -> None:
    """Write all of it, unlike one call of an unbuffered file, which may end at the edge of a full disk."""
    while content:
        content = content[file.write(content) :]


def _checksum(key: FileKey, entry: Entry, pixels: memoryview) -> int:
    return zlib.crc32(pixels, zlib.crc32(repr((*key, *entry[1:5])).encode(errors="surrogateescape")))


def _read_line(line: str) -> tuple[FileKey, Entry] | None:
    try:
        name, *numbers = json.loads(line)
    except (ValueError, TypeError):  # cut off, or another program's
        return None
    if not isinstance(name, str) or len(numbers) != 8 or not all(type(number) is int for number in numbers):
        return None
    return FileKey(name, *numbers[:2]), Entry(*numbers[2:])


def _last_used(store: Path) -> float:
    try:
        return (store / INDEX_FILE).stat().st_mtime
    except OSError:
        return 0.0


def _remove(store: Path) -> bool:
    """Remove a store, unless a process is writing to it."""
    try:
        with open(store / LOCK_FILE, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (store / INDEX_FILE).unlink(missing_ok=True)
            for pixels in store.glob("pixels-*"):
                pixels.unlink(missing_ok=True)
        return True
    except OSError:
        return False
