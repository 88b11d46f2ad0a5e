"""Which folder each class of a checkpoint comes from: classes.json beside the learner, for data to be matched to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upt_fast.common.messages import shorten
from upt_fast.data.classnames import FOLDER_NAMES, given_names, plain_name
from upt_fast.data.folder import CLASSES_FROM
from upt_fast.data.listing import FolderListing, ImageItem
from upt_fast.data.wordnet import lemmas_of
from upt_fast.train.checkpoint import CLASSES_FILE, read_json


@dataclass(frozen=True)
class TrainedClasses:
    """The classes of a checkpoint.

    Args:
        folders: the class folders of training, in the model's order.
        classes_from: which folders were classes.
    """

    folders: tuple[str, ...]
    classes_from: str

    def to_dict(self) -> dict[str, Any]:
        """What classes.json holds."""
        return {"classes_from": self.classes_from, "folders": list(self.folders)}


def read_classes(checkpoint: Path) -> TrainedClasses | None:
    """The classes of a checkpoint; None for one without classes.json: of an earlier version, or saved by hand.

    Raises:
        ValueError: the file is damaged.
    """
    path = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / CLASSES_FILE
    if not path.is_file():
        return None
    values = read_json(path)
    try:
        folders, classes_from = values["folders"], values["classes_from"]
    except (TypeError, LookupError) as error:
        raise ValueError(f"{path} is damaged: wanted folders and classes_from") from error
    if classes_from not in CLASSES_FROM or not isinstance(folders, list) or any(type(f) is not str for f in folders):
        raise ValueError(f"{path} is damaged: wanted a list of folders, and classes_from {' or '.join(CLASSES_FROM)}")
    return TrainedClasses(tuple(folders), classes_from)


def trained_folders(classes: TrainedClasses | None, classnames: Sequence[str]) -> tuple[str, ...]:
    """The folders of a model's classes; for a checkpoint that does not tell, they are its class names.

    Raises:
        ValueError: as many folders as class names were wanted.
    """
    if classes is None:
        return tuple(classnames)
    if len(classes.folders) != len(classnames):
        raise ValueError(f"{CLASSES_FILE} has {len(classes.folders)} folders; the model has {len(classnames)} classes")
    return classes.folders


@dataclass(frozen=True)
class MatchedImages:
    """Images of a directory for a model.

    Args:
        items: the images; labels index the model's classes.
        classnames: what to call the model's classes.
    """

    items: list[ImageItem]
    classnames: tuple[str, ...]


def class_finder(
    listing: FolderListing, trained: Sequence[str], model_names: Sequence[str], given: Sequence[str] | None = None
) -> Callable[[int], int | None]:
    """What gives the label of the class that a folder of a listing means, by its index; see :func:`match_images`.

    Args:
        listing: by its folders' own names.
        trained: the class folders of training.
        model_names: what the model calls them.
        given: names of the listing's folders.
    """
    by_folder = {folder: label for label, folder in enumerate(trained)}
    by_name = {plain_name(name): label for label, name in enumerate(model_names)}

    def find(index: int) -> int | None:
        folder = listing.folders[index]
        if given is not None and (label := by_name.get(plain_name(given[index]))) is not None:
            return label
        own = listing.classnames[index]
        for label in (by_folder.get(folder), by_name.get(plain_name(own))):
            if label is not None:
                return label
        named = {by_name[name] for lemma in lemmas_of(own) if (name := plain_name(lemma)) in by_name}
        return named.pop() if len(named) == 1 else None

    return find


def match_images(
    items: Sequence[ImageItem],
    listing: FolderListing,
    classes: TrainedClasses | None,
    model_names: Sequence[str],
    classnames: str | Path | Mapping[str, str] | None = None,
) -> MatchedImages:
    """Give images the labels of a model's classes.

    A class folder means the class that was trained from a folder of this name, else the class that is called as the
    folder is, underscores read as spaces, else one that is called as WordNet calls the folder's id. With classnames the
    class that is called as the folder is there comes before all of these.

    Args:
        items: images of the listing.
        listing: of the directory, by its folders' own names.
        classes: of the model's checkpoint.
        model_names: of the model.
        classnames: a file or mapping, folder of the directory (or of training) -> name. It changes nothing of the
            model, whose prompts were trained with its own names.
    Raises:
        ValueError: a folder means no class, or two folders mean the same; classnames does not fit.
    """
    trained = trained_folders(classes, model_names)
    given: tuple[str, ...] | None = None
    if classnames is not None and classnames != FOLDER_NAMES:
        given = given_names(classnames, listing.folders, also=trained, where=str(listing.root))
    find = class_finder(listing, trained, model_names, given)
    shown = list(model_names)
    labels: dict[int, int] = {}
    folders: dict[int, str] = {}
    unknown = []
    for index in sorted({item.label for item in items}):
        label, folder = find(index), listing.folders[index]
        if label is None:
            unknown.append(folder if given is None else f"{folder} ({given[index]})")
            continue
        if label in folders:
            raise ValueError(
                f"class folders {folders[label]!r} and {folder!r} of {listing.root} both mean class "
                f"{model_names[label]!r} of the model; wanted one of them, or --classnames FILE that tells them apart"
            )
        labels[index], folders[label] = label, folder
        if given is not None:
            shown[label] = given[index]
    if unknown:
        raise ValueError(
            f"class folders that the model was not trained on: {shorten(unknown)}; it knows {len(model_names)} "
            f"classes: {shorten(model_names)}. Where these are called otherwise, say how with --classnames FILE "
            "(folder, name)"
        )
    matched = [replace(item, label=labels[item.label], classname=shown[labels[item.label]]) for item in items]
    return MatchedImages(matched, tuple(shown))


def shown_names(
    classes: TrainedClasses | None, model_names: Sequence[str], classnames: str | Path | Mapping[str, str] | None
) -> tuple[str, ...]:
    """What to call a model's classes: as a file or mapping of training folder -> name does, else as the model does.

    Raises:
        ValueError: classnames does not fit.
    """
    if classnames is None or classnames == FOLDER_NAMES:
        return tuple(model_names)
    return given_names(classnames, trained_folders(classes, model_names), where="the checkpoint")
