"""Where a run's decoded images are kept: in memory as their files have them, or in files of pixels on disk."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from upt_fast.common.files import image_cache_folder
from upt_fast.data.batches import BatchedAugmentation
from upt_fast.data.cached import CachedImages, cache_images
from upt_fast.data.dataset import AugmentedDataset, ImageDataset
from upt_fast.data.decoding import decoders, read_scaled, read_transformed
from upt_fast.data.folder import ImageItem
from upt_fast.data.images import decode_images
from upt_fast.data.pixel_store import PixelStore
from upt_fast.data.transforms import build_augmentation, build_eval_transform, image_size
from upt_fast.train.checkpoint import read_json
from upt_fast.train.config import TrainConfig
from upt_fast.train.features import FeatureDataset, FixedFeatures

logger = logging.getLogger("upt_fast")

GIB = 2**30
MEMORY_GIB, DISK_GIB = 1, 16  # without cache_gib


def with_cache(config: TrainConfig, recorded: Path) -> TrainConfig:
    """The config with a kind of cache: its own, else that of the run that it resumes, else scaled.

    Args:
        config: of a run.
        recorded: its config.json, if there is one; runs of before there was a choice are exact.
    """
    if config.cache is not None:
        return config
    resumes = config.resume and recorded.is_file()
    return replace(config, cache=(read_json(recorded).get("cache") or "exact") if resumes else "scaled")


class _Some(Sequence[Any]):
    """Images of which some are not there, because nobody is going to ask for them.

    Args:
        images: those that are there.
        places: of each image among them; None: it is not there.
    """

    def __init__(self, images: Sequence[Tensor | None], places: Sequence[int | None]) -> None:
        self.images, self.places = images, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        place = self.places[index]
        assert place is not None
        return self.images[place]


class RunImages:
    """Decodes the images of a run and keeps them as its config says.

    Args:
        config: of the run.
        preprocess_cfg: open_clip's settings.
        root: of the dataset.
        device: of the model.
        fixed: computes features that no prompt changes, in the place of images as the evaluation prepares them.
    Raises:
        ValueError: cache_size is below the model's image size.
    """

    def __init__(
        self,
        config: TrainConfig,
        preprocess_cfg: dict[str, Any],
        root: Path,
        device: torch.device,
        fixed: FixedFeatures | None = None,
    ) -> None:
        self.fixed = fixed
        self.config, self.preprocess_cfg, self.device = config, preprocess_cfg, device
        self.on_disk = config.cache == "scaled"
        gib = config.cache_gib if config.cache_gib is not None else DISK_GIB if self.on_disk else MEMORY_GIB
        self.limit = int(gib * GIB)
        self.dataset = os.path.realpath(root)
        size = max(image_size(preprocess_cfg))
        self.shorter = config.cache_size if config.cache_size is not None else 2 * size
        if self.shorter < size:
            raise ValueError(f"cache_size={self.shorter}; wanted at least this CLIP's image size, {size}")

    def of(self, root: str | Path) -> RunImages:
        """The same, for images of another directory, within what is left of the memory."""
        other = copy.copy(self)
        other.dataset = os.path.realpath(root)
        return other

    def training(self, items: Sequence[ImageItem]) -> tuple[AugmentedDataset, list[str]]:
        """The training images, and why some of them cannot be read."""
        load, transform = build_augmentation(self.preprocess_cfg, self.config.augment)
        if transform is None:
            base, failures = self.evaluation("training", items)
            return AugmentedDataset(base, transform, self.config.seed), failures
        if not self.on_disk:
            base, failures = self._keep("training", items, load)
            return AugmentedDataset(base, transform, self.config.seed), failures
        decode = functools.partial(read_scaled, shorter=self.shorter)
        images, good, failures = self._on_disk("training", items, decode, {"shorter": self.shorter})
        on_device = self.device.type != "cpu"
        augmented = BatchedAugmentation(
            ImageDataset(good, load, images),
            images,
            self.preprocess_cfg,
            self.config.augment,
            self.config.seed,
            on_device,
        )
        return augmented, failures

    def evaluation(self, name: str, items: Sequence[ImageItem]) -> tuple[ImageDataset, list[str]]:
        """Images as the CLIP's own evaluation prepares them, and why some cannot be read."""
        load = build_eval_transform(self.preprocess_cfg)
        if self.fixed is None:
            return self._keep(name, items, load)
        known = self.fixed.look_up([item.path for item in items])
        left = [i for i, entry in enumerate(known) if entry.row is None]
        there = {items[i].key: entry for i, entry in enumerate(known)}
        found, failures = self._keep(name, [items[i] for i in left], load)
        decoded = {item.key: i for i, item in enumerate(found.items)}
        good = [item for item in items if item.key in decoded or there[item.key].row is not None]
        images = None if found.images is None else _Some(found.images, [decoded.get(item.key) for item in good])
        dataset = ImageDataset(good, load, images)
        return FeatureDataset(dataset, self.fixed, [there[item.key] for item in good]), failures

    def _keep(
        self, name: str, items: Sequence[ImageItem], load: Callable[[Image.Image], Tensor]
    ) -> tuple[ImageDataset, list[str]]:
        if self.on_disk:
            how = {key: self.preprocess_cfg.get(key) for key in ("size", "interpolation", "resize_mode")}
            decode = functools.partial(read_transformed, transform=load)
            images, good, failures = self._on_disk(name, items, decode, {"evaluation": how})
            return ImageDataset(good, load, images), failures
        decoded = decode_images(
            [item.path for item in items],
            load,
            self.limit,
            f"reading {name} images",
            progress=self.config.progress,
        )
        self.limit -= decoded.num_bytes
        if decoded.images is None:
            logger.info("%s images need more than what is left of the memory for them: decoded when used", name)
        good = [item for i, item in enumerate(items) if i not in decoded.failures]
        kept = None if decoded.images is None else [image for image in decoded.images if image is not None]
        return ImageDataset(good, load, kept), list(decoded.failures.values())

    def _on_disk(
        self, name: str, items: Sequence[ImageItem], decode: Callable[[Path], Any], how: dict[str, Any]
    ) -> tuple[CachedImages, list[ImageItem], list[str]]:
        described = {"dataset": self.dataset, **how, "decoders": decoders()}
        store = PixelStore(image_cache_folder(), described, self.limit)
        images, failures = cache_images(items, decode, store, f"reading {name} images", self.config.progress)
        good = [item for i, item in enumerate(items) if i not in failures]
        return images, good, list(failures.values())
