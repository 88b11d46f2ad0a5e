"""Folders as they are read: sub-folders, images and links, each folder once.

Links are followed wherever they lead, but for those that lead back to a folder they are in.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
)


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder and the way to it.

    Args:
        path: of the folder, links in it not resolved.
        way: real paths of the folders from the root down to this one.
        is_link: whether the folder itself is a link.
    """

    path: Path
    way: tuple[Path, ...]
    is_link: bool = False


@dataclass(frozen=True, slots=True)
class Contents:
    """What is directly in a folder; hidden names and files that are no images are passed over.

    Args:
        folders: name -> sub-folder, sorted by name.
        images: names of image files, sorted; links among them may lead nowhere.
        image_links: how many of them are links.
        broken: links that lead nowhere and might have been folders.
        circles: links that lead back to a folder on the way here, which are not followed.
    """

    folders: dict[str, Folder]
    images: tuple[str, ...]
    image_links: int
    broken: tuple[Path, ...]
    circles: tuple[Path, ...]


class FolderTree:
    """Reads the folders below a root when asked for them, each once."""

    def __init__(self, root: Path) -> None:
        self.root = Folder(root, (Path(os.path.realpath(root)),))
        self._contents: dict[Path, Contents] = {}
        self._images_below: dict[Path, bool] = {}

    def contents(self, folder: Folder) -> Contents:
        """What is directly in a folder."""
        if folder.path not in self._contents:
            self._contents[folder.path] = _read(folder)
        return self._contents[folder.path]

    def images_below(self, folder: Folder) -> bool:
        """Whether any folder below this one holds an image."""
        real = folder.way[-1]
        if real not in self._images_below:
            self._images_below[real] = any(
                bool(self.contents(sub).images) or self.images_below(sub)
                for sub in self.contents(folder).folders.values()
            )
        return self._images_below[real]

    def circles(self) -> list[Path]:
        """The links that were not followed, of all folders read so far."""
        return sorted(link for contents in self._contents.values() for link in contents.circles)


def _read(folder: Folder) -> Contents:
    folders, images, image_links, broken, circles = {}, [], 0, [], []
    with os.scandir(folder.path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_link = entry.is_symlink()
            if _is_dir(entry):
                path = folder.path / entry.name
                real = Path(os.path.realpath(path)) if is_link else folder.way[-1] / entry.name
                if is_link and any(above.is_relative_to(real) for above in folder.way):
                    circles.append(path)
                else:
                    folders[entry.name] = Folder(path, (*folder.way, real), is_link)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                images.append(entry.name)
                image_links += is_link
            elif is_link and not os.path.exists(entry.path):
                broken.append(folder.path / entry.name)
    return Contents(
        dict(sorted(folders.items())), tuple(sorted(images)), image_links, tuple(sorted(broken)), tuple(circles)
    )


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead to each other
        return False


def link_target(path: str | Path) -> str:
    """What to say of a link that leads nowhere."""
    return f"the link leads to {os.readlink(path)}, which is not there"
