"""Directories of images, one folder per class; of shards of images (shards.py) the same listings.

Two layouts are read: ``DIR/<class>/*.jpg``, or ``DIR/train/<class>/*.jpg`` with ``DIR/val`` and ``DIR/test`` beside it,
under the names that people give them (``SPLIT_FOLDERS``). Classes are the folders at that place, or with
``classes_from="leaf"`` the innermost ones: ``DIR/animal/cat/*.jpg``. Links are followed.

Every listing is sorted by name, so that nothing depends on the order in which a file system returns its entries.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from upt_fast.common.checks import require_choice
from upt_fast.common.messages import shorten
from upt_fast.data.classnames import name_classes
from upt_fast.data.listing import ALL_IMAGES, FolderListing, ImageItem
from upt_fast.data.shards import is_sharded, list_shards
from upt_fast.data.tree import IMAGE_SUFFIXES, Folder, FolderTree, link_target

SPLIT_FOLDERS = {  # in any case; also with "set" behind it: test_set, trainset
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
CLASSES_FROM = ("top", "leaf")


def scan_folder(
    root: str | Path, classes_from: str = "top", classnames: str | Path | Mapping[str, str] | None = None
) -> FolderListing:
    """List a dataset directory without opening an image.

    Hidden files and folders and files with other suffixes are passed over. Links are followed; of those that lead
    nowhere, images are listed, to fail when they are read, and folders are told in the listing.

    Args:
        root: ``DIR`` of ``DIR/<class>/*`` or of ``DIR/{train,val,test}/<class>/*``, or a folder of shards.
        classes_from: "top": the folders at that place; "leaf": the innermost folders below it.
        classnames: names of the classes: a JSON or CSV file or a mapping, folder -> name; "folders": the folders' own;
            None: the folders' own, with WordNet ids by their names, and a warning where names mean nothing; shards'
            names are those that they were written with.
    Raises:
        ValueError: root is no directory, holds no class folders or ambiguous ones, a class folder holds no image, a
            class of val/ or test/ is not in train/, two folders have the same class name, or classnames does not fit.
    """
    listing = list_folders(root, classes_from)
    if listing.named and classnames is None:
        return listing
    names = name_classes(listing.folders, classnames, listing.root)
    if names == listing.classnames:
        return listing
    splits = {
        split: tuple(replace(item, classname=names[item.label]) for item in items)
        for split, items in listing.splits.items()
    }
    return replace(listing, classnames=names, splits=splits)


def list_folders(root: str | Path, classes_from: str = "top") -> FolderListing:
    """:func:`scan_folder` with the folders' own names, unchecked: for who matches them to names that are known."""
    require_choice("classes_from", classes_from, CLASSES_FROM)
    root = Path(root)
    if not root.is_dir():
        what = "is not a directory" if root.exists() else "does not exist"
        if root.is_symlink() and not root.exists():
            what = f"cannot be read: {link_target(root)}"
        raise ValueError(f"dataset {str(root)!r} {what}; wanted a folder with one folder of images per class")
    if is_sharded(root):
        return list_shards(root, classes_from)
    reader = _Reader(FolderTree(root), classes_from)
    split_folders = reader.find_splits()
    tops = split_folders or {ALL_IMAGES: reader.tree.root}
    classes = {split: reader.class_folders(split, folder) for split, folder in tops.items()}
    known = set(classes.get("train") or (name for folders in classes.values() for name in folders))
    for split, folders in classes.items():
        if unknown := [name for name in folders if name not in known]:
            raise ValueError(
                f"{tops[split].path} has classes that {tops['train'].path} has not: {shorten(unknown)}{reader.lost()}"
            )
    if circles := reader.tree.circles():
        warnings.warn(
            f"{len(circles)} link(s) lead back to a folder that they are in, and are not followed: {shorten(circles)}",
            stacklevel=3,
        )
    names = tuple(sorted(known))
    return FolderListing(
        root,
        tuple(name.rpartition("/")[2] for name in names),
        {split: reader.items(classes[split], names) for split in classes},
        names,
        reader.folder_links + sum(folder.is_link for folder in split_folders.values()),
        reader.image_links,
        {split: tuple(reasons) for split, reasons in reader.broken.items()},
        classes_from,
    )


def split_meant(name: str) -> str | None:
    """The split that a folder's name means: "train", "val", "test" or None."""
    word = re.sub(r"[ _-]?set$", "", name.casefold())
    return next((split for split, words in SPLIT_FOLDERS.items() if word in words), None)


class _Reader:
    """Finds the splits and classes of a tree, and counts the links on the way."""

    def __init__(self, tree: FolderTree, classes_from: str) -> None:
        self.tree = tree
        self.leaves = classes_from == "leaf"
        self.folder_links = self.image_links = 0
        self.broken: dict[str, list[str]] = {}

    def find_splits(self) -> dict[str, Folder]:
        """The split folders in the root by their splits, in the order of SPLIT_FOLDERS; none where it holds classes."""
        tree, root = self.tree, self.tree.root.path
        contents = tree.contents(tree.root)
        named = {name: folder for name, folder in contents.folders.items() if split_meant(name)}
        real = {name: folder for name, folder in named.items() if self._holds_classes(folder)}
        if not real:
            self._refuse_splits_without_classes(named)
            return {}
        splits = {}
        for split in SPLIT_FOLDERS:
            candidates = [name for name in named if split_meant(name) == split and self._is_candidate(name, real)]
            found = [name for name in candidates if name in real]
            if found and len(candidates) > 1:
                raise ValueError(
                    f"{root} has {' and '.join(candidates)}, which both mean {split}; wanted one: "
                    "rename or remove the other, or put the images into one of them"
                )
            if found:
                splits[split] = real[found[0]]
        self._check_others({name: f for name, f in contents.folders.items() if name not in real}, real, splits)
        for path in contents.broken:
            if meant := split_meant(path.name):
                self._note_broken(meant, [path])
        return splits

    def _holds_classes(self, folder: Folder) -> bool:
        """Whether a folder with a split's name is a split, not a class of that name, nor without class folders."""
        contents = self.tree.contents(folder)
        return bool(contents.folders or contents.broken) and (not contents.images or self.tree.images_below(folder))

    def _is_candidate(self, name: str, real: Mapping[str, Folder]) -> bool:
        return name in real or bool(self.tree.contents(self.tree.contents(self.tree.root).folders[name]).images)

    def _refuse_splits_without_classes(self, named: Mapping[str, Folder]) -> None:
        # train is a thing that can be seen on images, the other names are not
        if all(name.casefold() == "train" for name in named):
            return
        root = self.tree.root.path
        others = [name for name in self.tree.contents(self.tree.root).folders if name not in named]
        beside = f" beside class folders ({shorten(others)})" if others else ""
        raise ValueError(
            f"{root} has the split folder(s) {shorten(named)}{beside}, without class folders in them; wanted class "
            f"folders in each split ({root / 'test'}/<class>/*), or class folders only: move the images into class "
            "folders, or move or rename these"
        )

    def _check_others(
        self, others: Mapping[str, Folder], real: Mapping[str, Folder], splits: Mapping[str, Folder]
    ) -> None:
        """Refuse class folders beside split folders, and warn of anything else that is not read."""
        root = self.tree.root.path
        trained = self.tree.contents(splits["train"]).folders if "train" in splits else {}
        classes = [
            name
            for name, folder in others.items()
            if not split_meant(name)
            and self.tree.contents(folder).images
            and ("train" not in splits or name in trained)
        ]
        if classes:
            raise ValueError(
                f"{root} has the split folder(s) {shorten(real)} beside class folders ({shorten(classes)}); wanted one "
                f"or the other: move the class folders into {root / 'train'}, or the split folder(s) elsewhere"
            )
        if others:
            without = [name for name in others if split_meant(name)]
            reason = f" ({shorten(without)}: no class folders in it)" if without else ""
            warnings.warn(
                f"{root} has split folders ({', '.join(real)}): others are not read: {shorten(others)}{reason}",
                stacklevel=5,
            )

    def class_folders(self, split: str, top: Folder) -> dict[str, Folder]:
        """Class folders of the root or of a split by name, or with leaves by their path below it."""
        contents = self.tree.contents(top)
        self._note_broken(split, contents.broken)
        found = self._leaves(split, top, "", {}) if self.leaves else contents.folders
        if not found:
            raise ValueError(
                f"dataset {str(top.path)!r} has no folders; wanted one folder of images per class{self.lost()}"
            )
        if not self.leaves:
            self._check_nested(top, found)
        if empty := [folder.path for folder in found.values() if not self.tree.contents(folder).images]:
            raise ValueError(
                f"{len(empty)} class folder(s) without an image: {shorten(empty)}; wanted at least one file "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}) in each: add images or remove the folder{self.lost()}"
            )
        self.folder_links += sum(folder.is_link for folder in found.values())
        return found

    def _check_nested(self, top: Folder, found: Mapping[str, Folder]) -> None:
        """Refuse folders of class folders, and warn of images below class folders, which are not read."""
        nested = {name: folder for name, folder in found.items() if self.tree.images_below(folder)}
        groups = [name for name, folder in nested.items() if not self.tree.contents(folder).images]
        if not groups:
            if nested:
                warnings.warn(
                    f"images in folders below class folders are not read: {shorten(self._inner(nested))}; "
                    "--classes-from leaf takes the innermost folders as classes",
                    stacklevel=5,
                )
            return
        what = f"{shorten(groups)} of {top.path} hold(s) folders of images, not images: {shorten(self._inner(nested))}"
        if len(found) == 1 and top is self.tree.root:
            inner = found[groups[0]].path
            what = f"{what}. If {inner} is the dataset, pass that folder"
        raise ValueError(
            f"class folders inside class folders: {what}; wanted one folder of images per class. Add --classes-from "
            "leaf to take the innermost folders as classes, or move them up"
        )

    def _inner(self, folders: Mapping[str, Folder]) -> list[str]:
        return [f"{name}/{inner}" for name, folder in folders.items() for inner in self.tree.contents(folder).folders]

    def _leaves(self, split: str, folder: Folder, prefix: str, groups: dict[Path, Path]) -> dict[str, Folder]:
        """The innermost folders below one, by their path from the split; groups: folders of folders, by real path."""
        found = {}
        for name, sub in self.tree.contents(folder).folders.items():
            contents, below = self.tree.contents(sub), self.tree.images_below(sub)
            if contents.images and below:
                raise ValueError(
                    f"{sub.path} holds images and folders of images ({shorten(contents.folders)}); wanted one or the "
                    "other with --classes-from leaf: move its own images into a folder of their class"
                )
            if contents.images or not (below or contents.broken):
                found[f"{prefix}{name}"] = sub
                continue
            other = groups.setdefault(sub.way[-1], sub.path)
            if other != sub.path:
                raise ValueError(f"{other} and {sub.path} are the same folder of class folders; wanted it once")
            self.folder_links += sub.is_link
            self._note_broken(split, contents.broken)
            found |= self._leaves(split, sub, f"{prefix}{name}/", groups)
        return found

    def _note_broken(self, split: str, paths: Sequence[Path]) -> None:
        if paths:
            self.broken.setdefault(split, []).extend(f"cannot read {path}: {link_target(path)}" for path in paths)

    def lost(self) -> str:
        """What else to say in an error: the links that lead nowhere."""
        reasons = [reason for of_split in self.broken.values() for reason in of_split]
        return f"; {shorten(reasons)}" if reasons else ""

    def items(self, classes: Mapping[str, Folder], names: Sequence[str]) -> tuple[ImageItem, ...]:
        """The images of class folders, sorted by class and key."""
        labels = {name: label for label, name in enumerate(names)}
        items: list[ImageItem] = []
        for name, folder in sorted(classes.items()):
            contents = self.tree.contents(folder)
            self.image_links += contents.image_links
            prefix = folder.path.relative_to(self.tree.root.path).as_posix()
            items += [
                ImageItem(folder.path / image, f"{prefix}/{image}", labels[name], name.rpartition("/")[2])
                for image in contents.images
            ]
        return tuple(items)
