"""Test images from another directory than training's: ``train --test-data DIR``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from upt_fast.common.messages import shorten
from upt_fast.data.folder import ALL_IMAGES, FolderListing, list_folders
from upt_fast.data.sampling import FewShotSplit
from upt_fast.train.classes import class_finder

TEST_DATA = "test_data"  # the split's name, and what stands in front of its images' keys


def choose_split(listing: FolderListing) -> str:
    """The images of a directory that are tested on: test, else val, else train, else all."""
    names = ("test", "val", "train", ALL_IMAGES)
    return next(name for name in names if name in listing.splits or name in listing.broken)


def with_test_data(
    split: FewShotSplit,
    listing: FolderListing,
    path: str | Path,
    scan: Callable[..., FolderListing] = list_folders,
    classes_from: str = "top",
) -> tuple[FewShotSplit, tuple[str, ...]]:
    """The split with the images of another directory for its test.

    Its classes are those of training, each found by its folder's name, else by the class's name. Keys of its images
    have ``test_data:`` in front, so that none is one of training's.

    Args:
        split: of the training directory.
        listing: of the training directory.
        path: the other directory: class folders, or test, val or train with class folders, of which the first counts.
        scan: :func:`list_folders`, or what remembers its results.
        classes_from: "top" or "leaf".
    Returns:
        The split, and what to say of links there that lead nowhere.
    Raises:
        ValueError: there are no such folders; a class is missing there, or there are others.
    """
    try:
        other = scan(path, classes_from)
    except ValueError as error:
        raise ValueError(f"test_data: {error}") from error
    chosen = choose_split(other)
    items = other.splits.get(chosen, ())
    find = class_finder(other, listing.folders, listing.classnames)
    found = {index: find(index) for index in sorted({item.label for item in items})}
    broken = other.broken.get(chosen, ())
    count = Counter(found.values())
    extra = [other.folders[index] for index, label in found.items() if label is None]
    missing = [name for label, name in enumerate(listing.folders) if label not in count]
    twice = [other.folders[index] for index, label in found.items() if label is not None and count[label] > 1]
    problems = [
        f"{what} {shorten(names)}"
        for what, names in (
            ("has no images of", missing),
            ("has others:", extra),
            ("has folders that mean one class:", twice),
        )
        if names
    ]
    if problems:
        lost = f"; {shorten(broken)}" if broken else ""
        raise ValueError(
            f"test_data={str(path)!r} {' and '.join(problems)}; wanted the {len(listing.folders)} classes of "
            f"{listing.root} ({shorten(listing.folders)}), each once, by its folder's name{lost}"
        )
    labels = {index: label for index, label in found.items() if label is not None}
    test = [
        replace(item, label=labels[item.label], classname=listing.classnames[labels[item.label]], key=key_of(item.key))
        for item in items
    ]
    test.sort(key=lambda item: (item.label, item.key))
    return replace(split, test=tuple(test), test_name=TEST_DATA), broken


def key_of(key: str) -> str:
    """The key, among a run's images, of an image of the other directory that has this one there."""
    return f"{TEST_DATA}:{key}"
