"""What a dataset holds: its images by split, its classes and their names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from upt_fast.data.sources import ShardImage

ALL_IMAGES = "all"  # the one split of a dataset without split folders


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One image of a dataset.

    Args:
        path: the file, or its place in a shard.
        key: its path inside the dataset, with "/" on every system: what sampling and records go by.
        label: index of its class.
        classname: name of its class.
    """

    path: Path | ShardImage
    key: str
    label: int
    classname: str


@dataclass(frozen=True)
class FolderListing:
    """The images of a dataset directory.

    Args:
        root: the directory.
        classnames: names of the classes in the order of their folders; the index is the label.
        splits: split name -> images sorted by class and key; names from "train", "val", "test", or only "all".
        folders: the classes' folders, sorted: names, or with classes from leaves paths like "animal/cat".
        folder_links: how many class or split folders, or folders between, are links.
        image_links: how many images are links.
        broken: split name -> what to say of each link that leads nowhere in the place of the split or a folder in it.
        classes_from: which folders are classes.
        named: whether the names were settled before: what shards hold.
    """

    root: Path
    classnames: tuple[str, ...]
    splits: dict[str, tuple[ImageItem, ...]]
    folders: tuple[str, ...] = ()
    folder_links: int = 0
    image_links: int = 0
    broken: dict[str, tuple[str, ...]] = field(default_factory=dict)
    classes_from: str = field(default="top", compare=False)
    named: bool = False

    @property
    def has_split_folders(self) -> bool:
        """Whether the directory holds train/, val/ or test/ rather than class folders."""
        return ALL_IMAGES not in self.splits

    def describe_links(self) -> str | None:
        """How many links there are, in words; None without any."""
        if not self.folder_links + self.image_links:
            return None
        return f"{self.root}: links followed: {self.folder_links} to folders, {self.image_links} to images"
