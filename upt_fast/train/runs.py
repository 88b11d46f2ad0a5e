"""Runs and saved models read back: loaded, evaluated on a directory of images, their classes' names."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upt_fast.common.checks import require_choice
from upt_fast.data.feature_store import open_store
from upt_fast.data.folder import list_folders
from upt_fast.data.images import corrupt_message
from upt_fast.data.listing import ALL_IMAGES, FolderListing, ImageItem
from upt_fast.data.shards import is_sharded
from upt_fast.model import FastPromptedCLIP
from upt_fast.train.batches import device_of
from upt_fast.train.checkpoint import is_run, read_json
from upt_fast.train.classes import match_images, read_classes, shown_names
from upt_fast.train.evaluation import evaluate
from upt_fast.train.features import FixedFeatures
from upt_fast.train.images import KeptImages, check_stream, recorded_cache
from upt_fast.train.metrics import Evaluation
from upt_fast.train.separate_test import choose_split, key_of
from upt_fast.train.setup import (
    CONFIG_FILE,
    SPLIT_FILE,
    count_workers,
    log_links,
    preprocess_cfg,
    resolve_device,
    without_copies,
)
from upt_fast.train.texts import keep_texts


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """The learner's folder that a RUN, RUN/last, RUN/best, RUN/average or one written by save_pretrained means.

    Raises:
        ValueError: there is no such folder, or the run has no checkpoint yet.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise ValueError(f"checkpoint {str(path)!r} does not exist; wanted the folder of a run or of a saved model")
    if is_run(path):
        if not (path / "last").exists():
            raise ValueError(f"run {str(path)!r} has no checkpoint yet; wanted at least one epoch of training")
        return path / "last"
    return path


def load_run(
    checkpoint: str | Path, device: str = "auto", backend: str = "auto", method: str | None = None
) -> FastPromptedCLIP:
    """The model of a run or of a saved learner, in eval mode, at the precision that the run had.

    Args:
        checkpoint: RUN, RUN/last, RUN/best, RUN/average or a folder written by save_pretrained.
        device: auto, cpu, cuda or cuda:N.
        backend: of the model's operations.
        method: FILE.py:CLASS of a method from outside, which a checkpoint never imports by itself.
    Raises:
        ValueError: no checkpoint there, or one of another method; its CLIP cannot be loaded; no such device.
    """
    folder = checkpoint_folder(checkpoint)
    run = _run_of(folder)
    precision = "fp32" if run is None else str(read_json(run / CONFIG_FILE).get("precision", "fp32"))
    device = str(resolve_device(device))
    return FastPromptedCLIP.load(folder, method=method, precision=precision, device=device, backend=backend)


def _run_of(folder: Path) -> Path | None:
    for parent in (folder.parent, Path(os.path.realpath(folder)).parent.parent):
        if is_run(parent):
            return parent
    return None


def evaluate_run(
    checkpoint: str | Path,
    data: str | Path,
    split: str | None = None,
    batch_size: int = 100,
    num_workers: int | None = None,
    device: str = "auto",
    backend: str = "auto",
    progress: bool = True,
    method: str | None = None,
    classes_from: str | None = None,
    classnames: str | Path | Mapping[str, str] | None = None,
    feature_store: str | None = None,
    feature_store_gib: float = 1.0,
    cache: str | None = None,
    cache_gib: float | None = None,
) -> tuple[Evaluation, str]:
    """Evaluate a trained model on a directory of images.

    Args:
        checkpoint: RUN, RUN/last, RUN/best or a folder written by save_pretrained.
        data: directory of images; its class folders are matched to the model's classes by the folders of training and
            by name, see :func:`upt_fast.train.classes.match_images`.
        split: "train", "val" or "test"; None: test, else val, else train; without split folders all images. Where this
            is the directory that the run was trained on, images are left out that it was trained on, where there are
            no split folders, and copies of them that the run left out of its test.
        batch_size: images per forward pass.
        num_workers: processes that load images; None: 0 on the CPU, up to 8 for a GPU.
        device: auto, cpu, cuda or cuda:N.
        backend: of the model's operations.
        progress: whether to show progress bars.
        method: see :func:`load_run`.
        classes_from: "top" or "leaf", see :func:`upt_fast.data.scan_folder`; None: as in training.
        classnames: a JSON or CSV file or a mapping, folder -> name: which class of the model a folder means, and what
            to call it; see :func:`upt_fast.train.classes.match_images`.
        feature_store: a folder that keeps image features that no prompt changes, or "off"; None: as for training.
        feature_store_gib: what it may take on disk.
        cache: where decoded images are kept, see KeptImages; results are the same. None: as the run did, without one
            "scaled".
        cache_gib: for them; None: as the run did, if it had this kind, else as for training.
    Returns:
        The evaluation, and which images it is on, in words.
    Raises:
        ValueError: bad data or checkpoint; images that cannot be read; classes that the model does not know.
    """
    folder = checkpoint_folder(checkpoint)
    classes = read_classes(folder)
    listing = list_folders(data, classes_from or (classes.classes_from if classes else "top"))
    log_links(listing)
    items, where = _eval_items(listing, split, folder)
    model = load_run(folder, device, backend, method)
    matched = match_images(items, listing, classes, model.classnames, classnames)
    workers = count_workers(num_workers, device_of(model))
    store = open_store(feature_store, feature_store_gib)
    keep_texts(model, store)
    source = FixedFeatures(model, batch_size, workers, store, progress) if model.images_are_fixed else None
    kind, gib = _cache_of(_run_of(folder), data, cache, cache_gib)
    images = KeptImages(kind, gib, preprocess_cfg(model), listing.root, source, progress)
    dataset, failures = images.evaluation("test", matched.items)
    if failures:
        raise ValueError(corrupt_message(failures))
    evaluation = evaluate(model, dataset, batch_size, workers, progress=progress, classnames=matched.classnames)
    return evaluation, where


def _cache_of(run: Path | None, data: str | Path, cache: str | None, gib: float | None) -> tuple[str, float | None]:
    """Kind and size of the cache that an evaluation has."""
    if gib is not None and not 0 <= gib < math.inf:
        raise ValueError(f"cache_gib={gib!r}; wanted a non-negative number")
    if cache is not None:
        require_choice("cache", cache, ("scaled", "exact", "stream"))
        if cache == "stream":
            check_stream(data)
    recorded = None if run is None else recorded_cache(run / CONFIG_FILE)
    # other data need not be shards, though the run's were
    fitting = "scaled" if recorded is None or (recorded == "stream" and not is_sharded(data)) else recorded
    kind = cache or fitting
    if gib is None and run is not None and kind == recorded:
        gib = read_json(run / CONFIG_FILE).get("cache_gib")
    return kind, gib


def class_names(
    checkpoint: str | Path, model: FastPromptedCLIP, classnames: str | Path | Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """What to call a model's classes, in its order.

    Args:
        checkpoint: that the model is of: RUN, RUN/last, RUN/best or a folder written by save_pretrained.
        model: of load_run.
        classnames: a JSON or CSV file or a mapping, class folder of training -> name; None: the model's own names.
    Raises:
        ValueError: classnames does not fit the folders of training.
    """
    return shown_names(read_classes(checkpoint_folder(checkpoint)), model.classnames, classnames)


def _eval_items(listing: FolderListing, split: str | None, folder: Path) -> tuple[Sequence[ImageItem], str]:
    splits, data = listing.splits, listing.root
    run = _run_of(folder)
    recorded: dict[str, Any] | None = None
    dropped: set[str] = set()
    if run is not None:
        config, split_of_run = read_json(run / CONFIG_FILE), read_json(run / SPLIT_FILE)
        left_out = split_of_run.get("duplicates", {}).get("dropped", ())  # older runs have looked for none
        if os.path.realpath(config["data"]) == os.path.realpath(data):
            recorded, dropped = split_of_run, set(left_out)
        if config.get("test_data") and os.path.realpath(config["test_data"]) == os.path.realpath(data):
            dropped = {key.removeprefix(key_of("")) for key in left_out}
    if ALL_IMAGES not in splits:
        chosen = split or choose_split(listing)
        _refuse_broken(listing, chosen)
        if chosen not in splits:
            raise ValueError(f"{data} has no {chosen} folder; wanted one of {', '.join(splits)}")
        items, where = splits[chosen], f"{chosen} folder"
    elif split is not None:
        raise ValueError(f"{data} has no split folders, so there is no {split}; leave split out")
    else:
        _refuse_broken(listing, ALL_IMAGES)
        items, where = splits[ALL_IMAGES], "all images"
        if recorded is not None:
            trained = set(recorded["train"])
            items = tuple(item for item in items if item.key not in trained)
            where = "images that training did not use"
            if not items:
                raise ValueError(f"{data} has no image that the run was not trained on; wanted others to evaluate on")
    kept = [item for item in items if item.key not in dropped]
    return kept, where + without_copies(len(items) - len(kept))


def _refuse_broken(listing: FolderListing, split: str) -> None:
    if reasons := listing.broken.get(split):
        raise ValueError(corrupt_message(reasons))
