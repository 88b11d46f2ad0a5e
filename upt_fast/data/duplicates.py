"""The same image twice: equal bytes in two classes, or in training and test.

Files can only be equal where their sizes are, and most of equal size differ in a few of their bytes; so whole files are
read only where size and three small pieces agree, and only where it matters.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from upt_fast.common.messages import shorten
from upt_fast.data.images import digest_file
from upt_fast.data.listing import ImageItem
from upt_fast.data.sampling import FewShotSplit
from upt_fast.data.sources import ShardImage

PIECE = 1024  # bytes at the beginning, the middle and the end of a file
NAMED = 5  # groups that a message names


@dataclass(frozen=True)
class Duplicates:
    """Images of equal bytes among those of a run.

    Args:
        two_classes: groups with images of more than one class.
        train_test: groups with training and with test images.
        test_copies: the test images of train_test.
    """

    two_classes: tuple[tuple[ImageItem, ...], ...] = ()
    train_test: tuple[tuple[ImageItem, ...], ...] = ()
    test_copies: tuple[ImageItem, ...] = ()

    def keys(self) -> dict[str, list[list[str]]]:
        """Both kinds of groups by their images' keys, as split.json holds them."""
        kinds = {"two_classes": self.two_classes, "train_test": self.train_test}
        return {kind: [[item.key for item in group] for group in groups] for kind, groups in kinds.items()}

    def describe(self) -> dict[str, str]:
        """Both kinds in words, if there are any: how many, and the first ones' keys."""
        said = {}
        if self.two_classes:
            count = sum(len(group) for group in self.two_classes)
            said["two_classes"] = f"{count} images are the same file in more than one class: {_name(self.two_classes)}"
        if self.train_test:
            copies = f"{len(self.test_copies)} test image(s) are copies of training images"
            said["train_test"] = f"{copies}: {_name(self.train_test)}"
        return said


def _name(groups: Sequence[Sequence[ImageItem]]) -> str:
    return shorten([" = ".join(item.key for item in group) for group in groups], NAMED)


def find_duplicates(split: FewShotSplit) -> Duplicates:
    """Find equal files among the images of a run: in two classes anywhere, or in training and test.

    Files that cannot be read are passed over: they are told when they are decoded.
    """
    train, test = {item.key for item in split.train}, {item.key for item in split.test}
    items = {item.key: item for item in (*split.train, *split.val, *split.test)}

    def in_two_classes(group: Iterable[ImageItem]) -> bool:
        return len({item.label for item in group}) > 1

    def in_train_and_test(group: Iterable[ImageItem]) -> bool:
        keys = {item.key for item in group}
        return bool(keys & train and keys & test)

    groups = _equal_files(list(items.values()), lambda group: in_two_classes(group) or in_train_and_test(group))
    crossing = tuple(group for group in groups if in_train_and_test(group))
    return Duplicates(
        two_classes=tuple(group for group in groups if in_two_classes(group)),
        train_test=crossing,
        test_copies=tuple(item for group in crossing for item in group if item.key in test),
    )


def drop_test_copies(split: FewShotSplit, found: Duplicates) -> FewShotSplit:
    """The split without the test images that are copies of training images.

    Raises:
        ValueError: no test image is left.
    """
    copies = {item.key for item in found.test_copies}
    test = tuple(item for item in split.test if item.key not in copies)
    if not test:
        raise ValueError(
            f"all {len(split.test)} test images are copies of training images, so none is left to test on; wanted "
            "images of their own for the test"
        )
    return replace(split, test=test)


def _equal_files(
    items: Sequence[ImageItem], matters: Callable[[Iterable[ImageItem]], bool]
) -> list[tuple[ImageItem, ...]]:
    """Groups of files with equal bytes, of those groups that matter, each and all sorted by key."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = pool.map(_identity, [item.path for item in items])
        files = {item.key: identity for item, identity in zip(items, found, strict=True) if identity is not None}
        groups = _regroup([[item for item in items if item.key in files]], lambda item: files[item.key].size, matters)
        for read in (_pieces, digest_file):
            # a file that several links lead to is read once, and not at all when it is alone in its group
            paths = {
                files[item.key]: item.path
                for group in groups
                if len({files[item.key] for item in group}) > 1
                for item in group
            }
            digests = dict(zip(paths, pool.map(read, paths.values()), strict=True))
            groups = _regroup(groups, lambda item: digests.get(files[item.key], b""), matters)  # noqa: B023
    return sorted((tuple(sorted(group, key=_key)) for group in groups), key=lambda group: group[0].key)


def _regroup(
    groups: Iterable[Iterable[ImageItem]],
    key: Callable[[ImageItem], Hashable],
    matters: Callable[[Iterable[ImageItem]], bool],
) -> list[list[ImageItem]]:
    found = []
    for group in groups:
        parts: defaultdict[Hashable, list[ImageItem]] = defaultdict(list)
        for item in group:
            parts[key(item)].append(item)
        found += [part for value, part in parts.items() if value is not None and matters(part)]
    return found


def _key(item: ImageItem) -> str:
    return item.key


class _File(NamedTuple):
    size: int
    device: int
    inode: int


def _identity(path: Path | ShardImage) -> _File | None:
    """What a file is, links followed; None for what holds nothing that could be an image."""
    if isinstance(path, ShardImage):  # equal ones are one, and nothing need be read
        return _File(path.size, -1, int.from_bytes(path.digest, "big"))
    try:
        found = os.stat(path)
    except OSError:
        return None
    return _File(found.st_size, found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) and found.st_size else None


def _pieces(path: Path | ShardImage) -> bytes | None:
    """A digest of three pieces of a file; None if it cannot be read."""
    if isinstance(path, ShardImage):
        return path.digest
    try:
        with path.open("rb", buffering=0) as file:
            end = max(0, os.fstat(file.fileno()).st_size - PIECE)
            pieces = []
            for start in (0, end // 2, end):
                file.seek(start)
                pieces.append(file.read(PIECE))
            return hashlib.blake2b(b"".join(pieces), digest_size=16).digest()
    except OSError:
        return None
