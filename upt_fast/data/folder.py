"""Directories of images, one folder per class.

Two layouts are read: ``DIR/<class>/*.jpg``, or ``DIR/train/<class>/*.jpg`` with ``DIR/val`` and ``DIR/test`` beside it.
Every listing is sorted by name, so that nothing depends on the order in which a file system returns its entries.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
)
SPLIT_NAMES = ("train", "val", "test")
ALL_IMAGES = "all"  # the one split of a dataset without split folders


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
