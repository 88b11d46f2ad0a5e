"""Datasets as shards: tar files in WebDataset's form, and an index of where each image is in them.

    DIR/shards.json                  classes, splits and shards, and what images.jsonl has to be
    DIR/images.jsonl                 a line for each image: [shard, key, label, offset, bytes, SHA-256]
    DIR/train-000000.tar, ...        members NUMBER.jpg, NUMBER.cls (label), NUMBER.json (class, folder, path)

Offsets make each image readable without those before it. So a listing of shards is one of folders whose images are
elsewhere: draws, caches, features and evaluation are the same. Reading needs no library; sharding.py writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from upt_fast.common.messages import shorten
from upt_fast.data.listing import FolderListing, ImageItem
from upt_fast.data.sources import ShardImage, Source

FORMAT, VERSION = "upt_fast shards", 1
INDEX_FILE, IMAGES_FILE = "shards.json", "images.jsonl"
ADVICE = "copy the folder again, or write it anew with upt-fast shard"


def is_sharded(root: str | Path) -> bool:
    """Whether a folder has an index of shards."""
    return (Path(root) / INDEX_FILE).is_file()


def read_index(root: Path) -> dict[str, Any]:
    """What shards.json holds.

    Raises:
        ValueError: it cannot be read, is damaged or of another version.
    """
    path = root / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        known = index["format"], index["version"]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is damaged, or no index of shards: {error}; {ADVICE}") from error
    if known != (FORMAT, VERSION):
        raise ValueError(f"{path} is of {known[0]!r}, version {known[1]!r}; wanted {FORMAT!r}, version {VERSION}")
    return dict(index)


def list_shards(root: Path, classes_from: str = "top") -> FolderListing:
    """The images of a folder of shards, in the order that the folder they were written from has.

    Args:
        root: folder with shards.json.
        classes_from: "top" for whatever the shards' classes are; "leaf": they must be the innermost folders.
    Raises:
        ValueError: the index is damaged, a shard is missing or of another size, or classes are others.
    """
    index = read_index(root)
    try:
        splits, folders, names = dict(index["splits"]), tuple(index["folders"]), tuple(index["classnames"])
        found_from, shards, images = str(index["classes_from"]), list(index["shards"]), dict(index["images"])
        _check_shards(root, {shard["name"]: int(shard["bytes"]) for shard in shards})
        items: dict[str, list[ImageItem]] = {split: [] for split in splits}
        paths, of_shard = [root / shard["name"] for shard in shards], [items[shard["split"]] for shard in shards]
        for number, key, label, offset, size, digest in _lines(root / IMAGES_FILE, images["sha256"]):
            image = ShardImage(paths[number], key, offset, size, bytes.fromhex(digest))
            of_shard[number].append(ImageItem(image, key, label, names[label]))
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{root / INDEX_FILE} is damaged: {error!r}; {ADVICE}") from error
    if classes_from == "leaf" != found_from:
        raise ValueError(
            f"classes_from='leaf', but the classes of {root} are its {found_from} folders; wanted {found_from}: shards "
            "keep the classes they were written with (upt-fast shard --classes-from leaf)"
        )
    listed = {
        split: tuple(sorted(of_split, key=lambda item: (item.label, item.key))) for split, of_split in items.items()
    }
    return FolderListing(root, names, listed, folders, classes_from=found_from, named=True)


def _check_shards(root: Path, sizes: dict[str, int]) -> None:
    missing, changed = [], []
    for name, size in sizes.items():
        try:
            found = (root / name).stat().st_size
        except OSError as error:
            missing.append(f"{name} ({error.strerror})")
            continue
        if found != size:
            changed.append(f"{name} has {found} bytes, not {size}")
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(sizes)} shard(s) of {root} cannot be read: {shorten(missing)}; {ADVICE}"
        )
    if changed:
        raise ValueError(f"{len(changed)} of {len(sizes)} shard(s) of {root} are damaged: {shorten(changed)}; {ADVICE}")


def _lines(path: Path, digest: str) -> Iterator[Any]:
    """The values of a file of JSON lines, which must have a checksum."""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
            if found.hexdigest() != digest:
                raise ValueError(f"{path} is damaged: its checksum is not that in {INDEX_FILE}; {ADVICE}")
            file.seek(0)
            yield from map(json.loads, file)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; {ADVICE}") from error


def find_images(paths: Iterable[str | Path]) -> list[Source]:
    """The images that paths mean: files, all images of a folder of shards, or those below a path that goes on in one.

    Args:
        paths: each FILE, SHARDS, SHARDS/test/red or SHARDS/test/red/0.jpg.
    Raises:
        ValueError: shards hold nothing of that name; what is no file and in no shards is left as it is.
    """
    listed: dict[Path, list[ImageItem]] = {}
    found: list[Source] = []
    for path in map(Path, paths):
        root = None if path.is_file() else next(filter(is_sharded, (path, *path.parents)), None)
        if root is None:
            found.append(path)
            continue
        if root not in listed:
            listed[root] = [item for of_split in list_shards(root).splits.values() for item in of_split]
        key = path.relative_to(root).as_posix()
        inside = [i.path for i in listed[root] if key in (".", i.key) or i.key.startswith(f"{key}/")]
        if not inside:
            examples = shorten([item.key for item in listed[root]], 3)
            raise ValueError(f"the shards of {root} hold no image {key}; wanted one of {examples}")
        found += inside
    return found
