"""The few-shot protocol on the images of a dataset directory.

A few-shot draw ranks the images of a class by a hash of (seed, path inside the dataset) and takes the first K. It is
therefore the same on every machine and Python version, and the draws of one seed are nested: 1 shot is part of 2 shots.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from upt_fast.common.messages import shorten
from upt_fast.data.listing import ALL_IMAGES, FolderListing, ImageItem

VAL_SHOTS = 4  # the field's protocol: validation takes min(shots, 4) images per class


@dataclass(frozen=True)
class FewShotSplit:
    """The images of one run.

    Args:
        train: K per class.
        val: for choosing the best epoch; empty without a val folder.
        test: for the final evaluation.
        test_name: where test comes from: "test", "val" (no test folder), "rest" (what training does not use), "none" or
            "test_data" (another directory).
    """

    train: tuple[ImageItem, ...]
    val: tuple[ImageItem, ...]
    test: tuple[ImageItem, ...]
    test_name: str


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


def few_shot_split(listing: FolderListing, shots: int | None, seed: int, with_test: bool = True) -> FewShotSplit:
    """The training, validation and test images of a run.

    With split folders: shots per class of train/, min(shots, 4) of val/ (all without shots), all of test/, or of val/
    where there is no test/. Without a folder to test on: shots for training and the remaining images for the test.

    Args:
        listing: the dataset.
        shots: images per class; None: all.
        seed: of the draws.
        with_test: False: no test images, so that without a folder to test on shots=None trains on every image.
    Raises:
        ValueError: there is nothing to train on or nothing left to test on.
    """
    if listing.has_split_folders and "train" not in listing.splits:
        why = "; ".join(("nothing to train on", *listing.broken.get("train", ())))
        raise ValueError(f"{listing.root} has {', '.join(listing.splits)} but no train folder; {why}")
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
    if not with_test:
        return FewShotSplit(train, val, (), "none")
    if "test" in listing.splits:
        return FewShotSplit(train, val, listing.splits["test"], "test")
    if val_pool:
        return FewShotSplit(train, val, val_pool, "val")
    used = {item.key for item in train}
    rest = tuple(item for item in pool if item.key not in used)
    if not rest:
        raise ValueError(
            f"{'every image' if shots is None else f'shots={shots}'} of {listing.root} for training leaves none to "
            f"test on; wanted fewer shots than the largest class has images, a test folder, --test-data DIR, or "
            "--test none"
        )
    return FewShotSplit(train, val, rest, "rest")
