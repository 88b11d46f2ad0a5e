"""Folders of images -> shards (shards.py), written beside their place and renamed when all is there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from upt_fast.common.checks import require_choice, require_int
from upt_fast.common.files import fsync_directory, write_text
from upt_fast.data.folder import scan_folder
from upt_fast.data.images import corrupt_message, decode_each, decode_rgb, unreadable
from upt_fast.data.listing import FolderListing, ImageItem
from upt_fast.data.shards import FORMAT, IMAGES_FILE, INDEX_FILE, VERSION, is_sharded
from upt_fast.data.sources import Source, read_source

logger = logging.getLogger("upt_fast")

SHARD_BYTES = 512 * 10**6
LOCK_FILE = ".lock"
MANY = 2**62
SHUFFLED = ("train", "all")  # splits that training reads shard by shard; others are read in their own order


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        images: of each split.
        shards: tar files.
        num_bytes: of all tar files.
        left_out: of images that cannot be read, why.
    """

    images: dict[str, int]
    shards: int
    num_bytes: int
    left_out: tuple[str, ...]


def write_shards(
    data: str | Path,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    images_per_shard: int | None = None,
    classes_from: str = "top",
    classnames: str | Path | Mapping[str, str] | None = None,
    on_corrupt: str = "error",
    progress: bool = True,
) -> Written:
    """Write a dataset as shards with its files' own bytes; every image is decoded once, to find those that cannot be.

    Training images go into the shards in an order that a hash of their keys gives, so that each shard has images of
    all classes. The same folder gives the same bytes again. A killed run leaves a hidden folder beside out, which the
    next one begins anew.

    Args:
        data: see :func:`upt_fast.data.scan_folder`; shards are written anew.
        out: folder of the shards: new or empty.
        shard_bytes: images that make a shard full.
        images_per_shard: makes a shard full instead, if given.
        classes_from: see scan_folder.
        classnames: see scan_folder; the index keeps the names.
        on_corrupt: images that cannot be read: "error", after all were looked at, or "skip": left out.
        progress: whether to show a progress bar.
    Raises:
        ValueError: bad data or option; out holds something; images cannot be read; webdataset is not installed.
    """
    require_choice("on_corrupt", on_corrupt, ("error", "skip"))
    require_int("shard_bytes", shard_bytes, 1)
    if images_per_shard is not None:
        require_int("images_per_shard", images_per_shard, 1)
    _webdataset()
    place = Path(os.path.realpath(out))
    _check_out(place, data)
    listing = scan_folder(data, classes_from, classnames)
    if lost := [reason for reasons in listing.broken.values() for reason in reasons]:
        _refuse_or_say(lost, on_corrupt)
    place.parent.mkdir(parents=True, exist_ok=True)
    with _beside(place) as folder:
        writer = _Writer(folder, listing, shard_bytes, images_per_shard)
        for split, items in listing.splits.items():
            writer.write(split, items, progress)
        left_out = [*lost, *writer.left_out]
        if writer.left_out:
            _refuse_or_say(writer.left_out, on_corrupt)
        writer.finish(left_out)
        (folder / LOCK_FILE).unlink()
        fsync_directory(folder)
        os.rename(folder, place)
        fsync_directory(place.parent)
    images = {split: writer.images[split] for split in listing.splits}
    return Written(images, len(writer.shards), sum(shard["bytes"] for shard in writer.shards), tuple(left_out))


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ValueError(
            f"shards are written with webdataset, which cannot be imported ({error}): pip install upt_fast[shards]"
        ) from error
    return webdataset


def _check_out(out: Path, data: str | Path) -> None:
    if out.is_relative_to(os.path.realpath(data)):
        raise ValueError(f"out={str(out)!r} is in the dataset {str(data)!r}; wanted a folder elsewhere")
    if is_sharded(out):
        raise ValueError(f"out={str(out)!r} holds shards already; remove them, or pass another out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file; wanted a new or empty folder")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out={str(out)!r} is not empty; wanted a new or empty folder")


def _refuse_or_say(reasons: Sequence[str], on_corrupt: str) -> None:
    if on_corrupt == "error":
        raise ValueError(f"{corrupt_message(reasons)}; remove them, or leave them out with --on-corrupt skip")
    logger.warning("left out: %s", corrupt_message(reasons))


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """An empty hidden folder beside out, locked against other processes; what is left of it in the end is removed."""
    folder = out.parent / f".{out.name}.shards.tmp"
    folder.mkdir(exist_ok=True)
    with open(folder / LOCK_FILE, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing shards into {out}; wait for it, or pass another out"
            ) from error
        except OSError:  # a file system without locks
            pass
        try:
            for left in folder.iterdir():
                if left.name != LOCK_FILE:
                    left.unlink()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _load(source: Source) -> bytes:
    """The bytes of an image that can be decoded; raises ImageDecodeError."""
    try:
        content = read_source(source)
        decode_rgb(io.BytesIO(content))
    except Exception as error:  # as read_rgb
        raise unreadable(source, error) from error
    return content


class _Writer:
    """Writes splits into shards, and then the index.

    Args:
        folder: of the shards.
        listing: the dataset.
        shard_bytes: of a full shard.
        images_per_shard: of a full shard; None: any number.
    """

    def __init__(self, folder: Path, listing: FolderListing, shard_bytes: int, images_per_shard: int | None) -> None:
        self.folder, self.listing = folder, listing
        self.limit = (
            {"maxsize": shard_bytes, "maxcount": MANY}
            if images_per_shard is None
            else {"maxsize": MANY, "maxcount": images_per_shard}
        )
        self.shards: list[dict[str, Any]] = []
        self.images: dict[str, int] = {}
        self.left_out: list[str] = []
        self.digest = hashlib.sha256()
        self.pending: dict[str, tuple[ImageItem, bytes]] = {}  # member -> image and its digest, of the open shard

    def write(self, split: str, items: Sequence[ImageItem], progress: bool) -> None:
        """Write the images of a split."""
        if split in SHUFFLED:
            items = sorted(items, key=lambda item: _digest(item.key.encode(errors="surrogateescape")))
        self.split, self.images[split] = split, 0
        loaded = decode_each([item.path for item in items], _load, f"writing {split} images", progress)
        pattern = str(self.folder / f"{split}-").replace("%", "%%") + "%06d.tar"
        options = {"opener": self._open, "post": self._close, "encoder": False, "mtime": 0, "verbose": 0}
        writer = _webdataset().ShardWriter(pattern, **options, **self.limit)
        try:
            for item, content in zip(items, loaded, strict=True):
                if isinstance(content, str):
                    self.left_out.append(content)
                    continue
                name, kind = f"{self.images[split]:09d}", os.path.splitext(item.key)[1].lower().lstrip(".")
                about = {"class": item.classname, "folder": self.listing.folders[item.label], "path": item.key}
                sample = {kind: content, "cls": str(item.label).encode(), "json": json.dumps(about).encode()}
                writer.write({"__key__": name, **sample})  # may close the shard of those before
                self.pending[f"{name}.{kind}"] = item, _digest(content)
                self.images[split] += 1
            writer.close()
        except BaseException:
            with contextlib.suppress(Exception):  # or it would be closed, and complain, when it is collected
                writer.tarstream.close()
            raise

    def _open(self, name: str) -> BinaryIO:
        self.file: BinaryIO = open(name, "wb")  # noqa: SIM115  # _close does
        return self.file

    def _close(self, name: str) -> None:
        """Put a shard that is whole on the disk, and its images into the index."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if not self.pending:  # all images of the split were left out
            os.unlink(name)
            return
        counts = [0] * len(self.listing.folders)
        with tarfile.open(name, "r:") as shard, open(self.folder / IMAGES_FILE, "ab") as lines:
            for member in shard:
                if member.name not in self.pending:
                    continue
                item, digest = self.pending.pop(member.name)
                counts[item.label] += 1
                place = [len(self.shards), item.key, item.label, member.offset_data, member.size, digest.hex()]
                line = json.dumps(place).encode() + b"\n"
                self.digest.update(line)
                lines.write(line)
        assert not self.pending
        described = {"name": Path(name).name, "split": self.split, "bytes": os.path.getsize(name)}
        self.shards.append({**described, "images": sum(counts), "images_of_class": counts})

    def finish(self, left_out: Sequence[str]) -> None:
        """Write the index.

        Raises:
            ValueError: a split has no image that can be read.
        """
        if empty := [split for split, count in self.images.items() if not count]:
            raise ValueError(f"no image of {', '.join(empty)} of {self.listing.root} can be read; wanted at least one")
        listing = self.listing
        index = {
            "format": FORMAT,
            "version": VERSION,
            "classes_from": listing.classes_from,
            "folders": listing.folders,
            "classnames": listing.classnames,
            "splits": self.images,
            "shards": self.shards,
            "images": {"file": IMAGES_FILE, "sha256": self.digest.hexdigest()},
            "left_out": left_out,
        }
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in index.items() if name != "shards"]
        shards = ",\n  ".join(map(json.dumps, self.shards))
        text = "{\n " + ",\n ".join([*lines, f'"shards": [\n  {shards}\n ]']) + "\n}\n"
        write_text(self.folder / INDEX_FILE, text)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
