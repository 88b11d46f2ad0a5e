"""Directories of images, one folder per class, and the few-shot protocol on them.

Two layouts are read: ``DIR/<class>/*.jpg``, or ``DIR/train/<class>/*.jpg`` with ``DIR/val`` and ``DIR/test`` beside it.
Every listing is sorted by name, so that nothing depends on the order in which a file system returns its entries.

A few-shot draw ranks the images of a class by a hash of (seed, path inside the dataset) and takes the first K. It is
therefore the same on every machine and Python version, and the draws of one seed are nested: 1 shot is part of 2 shots.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
)
SPLIT_NAMES = ("train", "val", "test")
ALL_IMAGES = "all"  # the one split of a dataset without split folders
VAL_SHOTS = 4  # the field's protocol: validation takes min(shots, 4) images per class


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One image of a dataset.

    Args:
        path: the file.
        key: its path inside the dataset, with "/" on every system: what sampling and records go by.
        label: index of its class.
        classname: name of its class's folder.
    """

    path: Path
    key: str
    label: int
    classname: str


@dataclass(frozen=True)
class FolderListing:
    """The images of a dataset directory.

    Args:
        root: the directory.
        classnames: names of the class folders, sorted; the index is the label.
        splits: split name -> images sorted by key; names from "train", "val", "test", or only "all".
    """

    root: Path
    classnames: tuple[str, ...]
    splits: dict[str, tuple[ImageItem, ...]]

    @property
    def has_split_folders(self) -> bool:
        """Whether the directory holds train/, val/ or test/ rather than class folders."""
        return ALL_IMAGES not in self.splits


@dataclass(frozen=True)
class FewShotSplit:
    """The images of one run.

    Args:
        train: K per class.
        val: for choosing the best epoch; empty without a val folder.
        test: for the final evaluation.
        test_name: where test comes from: "test", "val" (no test folder) or "rest" (what training does not use).
    """

    train: tuple[ImageItem, ...]
    val: tuple[ImageItem, ...]
    test: tuple[ImageItem, ...]
    test_name: str


def shorten(names: Iterable[object], limit: int = 10) -> str:
    """The first names, comma-separated, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(str(name) for name in names[:limit]) + more


def scan_folder(root: str | Path) -> FolderListing:
    """List a dataset directory without opening an image.

    Hidden files and folders and files with other suffixes are passed over; images in folders below a class folder
    are not looked for.

    Args:
        root: ``DIR`` of ``DIR/<class>/*`` or of ``DIR/{train,val,test}/<class>/*``.
    Raises:
        ValueError: root is no directory, holds no class folders, a class folder holds no image, a link leads out of
            root, a class of val/ or test/ is not in train/, or two folder names mean the same class name.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is not a directory" if root.exists() else "does not exist"
        raise ValueError(f"dataset {str(root)!r} {what}; wanted a folder with one folder of images per class")
    inside = Path(os.path.realpath(root))
    top = _subfolders(root, inside)
    split_folders = [name for name in SPLIT_NAMES if name in top and _holds_class_folders(root / name)]
    if not split_folders:
        classnames = _checked_classnames(root, top)
        return FolderListing(root, classnames, {ALL_IMAGES: _scan_split(root, "", classnames, top, inside)})

    if ignored := [name for name in top if name not in split_folders]:
        warnings.warn(
            f"{root} has split folders ({', '.join(split_folders)}): others are not read: {shorten(ignored)}",
            stacklevel=2,
        )
    folders = {split: _subfolders(root / split, inside) for split in split_folders}
    known = set(folders.get("train") or (name for names in folders.values() for name in names))
    classnames = _checked_classnames(root, sorted(known))
    for split, names in folders.items():
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{root / split} has classes that {root / 'train'} has not: {shorten(unknown)}")
    return FolderListing(
        root,
        classnames,
        {split: _scan_split(root, f"{split}/", classnames, names, inside) for split, names in folders.items()},
    )


def _subfolders(folder: Path, inside: Path) -> list[str]:
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir():
                if entry.is_symlink():
                    _require_inside(Path(entry.path), inside)
                names.append(entry.name)
    return sorted(names)


def _holds_class_folders(folder: Path) -> bool:
    """Whether a folder called train, val or test is a split; with images of its own it is a class of that name."""
    has_folder = False
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                has_folder = True
            elif _is_image_name(entry.name):
                return False
    return has_folder


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _require_inside(path: Path, inside: Path) -> None:
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(inside):
        raise ValueError(
            f"{path} is a link to {target}, outside of the dataset {inside}; wanted images inside it: "
            "copy the files there, or pass the folder that holds them all"
        )


def _checked_classnames(root: Path, names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        raise ValueError(f"dataset {str(root)!r} has no folders; wanted one folder of images per class")
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(" ".join(name.replace("_", " ").split()), name)
        if other != name:
            raise ValueError(f"class folders {other!r} and {name!r} of {root} read as the same class name: rename one")
    return tuple(names)


def _scan_split(
    root: Path, prefix: str, classnames: Sequence[str], folders: Sequence[str], inside: Path
) -> tuple[ImageItem, ...]:
    labels = {name: label for label, name in enumerate(classnames)}
    items: list[ImageItem] = []
    empty = []
    for folder in folders:
        directory = root / prefix / folder
        names = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if not _is_image_name(entry.name) or entry.is_dir():
                    continue
                if entry.is_symlink():
                    _require_inside(Path(entry.path), inside)
                names.append(entry.name)
        if not names:
            empty.append(directory)
        items += [
            ImageItem(directory / name, f"{prefix}{folder}/{name}", labels[folder], folder) for name in sorted(names)
        ]
    if empty:
        raise ValueError(
            f"{len(empty)} class folder(s) without an image: {shorten(empty)}; wanted at least one file "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}) in each: add images or remove the folder"
        )
    return tuple(items)


def sample_few_shot(items: Sequence[ImageItem], shots: int, seed: int) -> tuple[ImageItem, ...]:
    """Draw shots images per class.

    A class with fewer images gives what it has; one warning lists these classes.

    Args:
        items: images of any classes, in any order.
        shots: images per class.
        seed: another seed is another draw.
    Returns:
        The drawn images, sorted by (label, key).
    Raises:
        ValueError: shots is below 1.
    """
    if shots < 1:
        raise ValueError(f"shots={shots}; wanted at least 1 image per class")
    by_class: defaultdict[int, list[ImageItem]] = defaultdict(list)
    for item in items:
        by_class[item.label].append(item)
    drawn: list[ImageItem] = []
    short = []
    for label in sorted(by_class):
        of_class = by_class[label]
        if len(of_class) < shots:
            short.append(f"{of_class[0].classname} ({len(of_class)})")
        drawn += sorted(sorted(of_class, key=lambda item: _rank(item.key, seed))[:shots], key=lambda item: item.key)
    if short:
        warnings.warn(f"{len(short)} class(es) have fewer than {shots} images: {shorten(short)}", stacklevel=2)
    return tuple(drawn)


def _rank(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{key}".encode(errors="surrogateescape")).digest()


def few_shot_split(listing: FolderListing, shots: int | None, seed: int) -> FewShotSplit:
    """The training, validation and test images of a run.

    With split folders: shots per class of train/, min(shots, 4) of val/ (all without shots), all of test/, or of val/
    where there is no test/. Without a folder to test on: shots for training and the remaining images for the test.

    Args:
        listing: the dataset.
        shots: images per class; None: all.
        seed: of the draws.
    Raises:
        ValueError: there is nothing to train on or nothing left to test on.
    """
    if listing.has_split_folders and "train" not in listing.splits:
        raise ValueError(f"{listing.root} has {', '.join(listing.splits)} but no train folder; nothing to train on")
    pool = listing.splits["train" if listing.has_split_folders else ALL_IMAGES]
    train = pool if shots is None else sample_few_shot(pool, shots, seed)
    val_pool = listing.splits.get("val", ())
    if not val_pool or shots is None:
        val = val_pool
    else:
        with warnings.catch_warnings():
            # a class with fewer than min(shots, 4) validation images changes nothing that a user would act on
            warnings.simplefilter("ignore")
            val = sample_few_shot(val_pool, min(shots, VAL_SHOTS), seed)
    if "test" in listing.splits:
        return FewShotSplit(train, val, listing.splits["test"], "test")
    if val_pool:
        return FewShotSplit(train, val, val_pool, "val")
    used = {item.key for item in train}
    rest = tuple(item for item in pool if item.key not in used)
    if not rest:
        raise ValueError(
            f"{'every image' if shots is None else f'shots={shots}'} of {listing.root} for training leaves none to "
            f"test on; wanted fewer shots than the largest class has images, or a test folder"
        )
    return FewShotSplit(train, val, rest, "rest")
