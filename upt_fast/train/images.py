"""Where decoded images are kept: in memory as their files have them, in files of pixels on disk, or nowhere."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from upt_fast.common.files import image_cache_folder
from upt_fast.data.batches import BatchedAugmentation
from upt_fast.data.cached import CachedImages, Decode, cache_images
from upt_fast.data.dataset import AugmentedDataset, ImageDataset
from upt_fast.data.decoding import decoders, read_scaled, read_transformed
from upt_fast.data.images import decode_images
from upt_fast.data.listing import ImageItem
from upt_fast.data.pixel_store import PixelStore
from upt_fast.data.shards import is_sharded
from upt_fast.data.sources import ShardImage
from upt_fast.data.transforms import build_augmentation, build_eval_transform, image_size
from upt_fast.train.checkpoint import read_json
from upt_fast.train.config import TrainConfig
from upt_fast.train.features import FeatureDataset, FeatureViews, FixedFeatures

logger = logging.getLogger("upt_fast")

GIB = 2**30
MEMORY_GIB, DISK_GIB = 1, 16  # without cache_gib


def with_cache(config: TrainConfig, recorded: Path) -> TrainConfig:
    """The config with a kind of cache: its own, else that of the run that it resumes, else what fits the data.

    Args:
        config: of a run.
        recorded: its config.json, if there is one; runs of before there was a choice are exact.
    Raises:
        ValueError: a folder of images is to be streamed.
    """
    sharded = is_sharded(config.data)
    if config.cache is None:
        fitting = "stream" if sharded and config.shots == "all" else "scaled"
        resumes = config.resume and recorded.is_file()
        config = config.changed(cache=recorded_cache(recorded) if resumes else fitting)
    if config.cache == "stream":
        check_stream(config.data)
    return config


def recorded_cache(config: Path) -> str:
    """The kind of cache in a config.json; runs of before there was a choice are exact."""
    return str(read_json(config).get("cache") or "exact")


def check_stream(data: str | Path) -> None:
    """Raise a ValueError unless the data is what can be streamed."""
    if not is_sharded(data):
        raise ValueError(
            f"cache='stream', but {str(data)!r} is no folder of shards; wanted scaled or exact, or what upt-fast shard "
            "wrote"
        )


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


class KeptImages:
    """Decodes images as an evaluation wants them and keeps them as asked.

    Args:
        kind: "scaled": in files of pixels on disk; "exact": in memory; "stream": nowhere, and none is looked at before.
        gib: for them; None: 16 of disk for all datasets together, 1 of memory.
        preprocess_cfg: open_clip's settings.
        root: of the dataset.
        fixed: computes features that no prompt changes, in the place of images.
        progress: whether to show progress bars.
    """

    def __init__(
        self,
        kind: str | None,
        gib: float | None,
        preprocess_cfg: dict[str, Any],
        root: str | Path,
        fixed: FixedFeatures | None = None,
        progress: bool = True,
    ) -> None:
        self.kind, self.preprocess_cfg, self.fixed, self.progress = kind, preprocess_cfg, fixed, progress
        most = MEMORY_GIB if kind == "exact" else DISK_GIB
        self.limit = int((most if gib is None else gib) * GIB)
        self.dataset = os.path.realpath(root)

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
        # of files of their own, as those of another directory for the test, nobody has decoded each before
        if self.kind == "stream" and all(isinstance(item.path, ShardImage) for item in items):
            return ImageDataset(items, load), []
        if self.kind != "exact":
            how = {key: self.preprocess_cfg.get(key) for key in ("size", "interpolation", "resize_mode")}
            decode = functools.partial(read_transformed, transform=load)
            images, good, failures = self._on_disk(name, items, decode, {"evaluation": how})
            return ImageDataset(good, load, images), failures
        paths = [item.path for item in items]
        decoded = decode_images(paths, load, self.limit, f"reading {name} images", progress=self.progress)
        self.limit -= decoded.num_bytes
        if decoded.images is None:
            logger.info("%s images need more than what is left of the memory for them: decoded when used", name)
        good = [item for i, item in enumerate(items) if i not in decoded.failures]
        kept = None if decoded.images is None else [image for image in decoded.images if image is not None]
        return ImageDataset(good, load, kept), list(decoded.failures.values())

    def _on_disk(
        self, name: str, items: Sequence[ImageItem], decode: Decode, how: dict[str, Any]
    ) -> tuple[CachedImages, list[ImageItem], list[str]]:
        described = {"dataset": self.dataset, **how, "decoders": decoders()}
        store = PixelStore(image_cache_folder(), described, self.limit)
        images, failures = cache_images(items, decode, store, f"reading {name} images", self.progress)
        good = [item for i, item in enumerate(items) if i not in failures]
        return images, good, list(failures.values())


class RunImages(KeptImages):
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
        super().__init__(config.cache, config.cache_gib, preprocess_cfg, root, fixed, config.progress)
        self.config, self.device = config, device
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
        """The training images, or the features of their views, and why some of them cannot be read."""
        images, failures = self._augmented(items)
        if self.config.views is None or self.fixed is None:
            return images, failures
        shorter = None if self.kind == "exact" else self.shorter
        how = {"augment": self.config.augment, "decoders": decoders(), "shorter": shorter}
        return FeatureViews(images, self.fixed, how), failures

    def _augmented(self, items: Sequence[ImageItem]) -> tuple[AugmentedDataset, list[str]]:
        load, transform = build_augmentation(self.preprocess_cfg, self.config.augment)
        if transform is None:
            base, failures = self.evaluation("training", items)
            return AugmentedDataset(base, transform, self.config.seed), failures
        if self.kind == "exact":
            base, failures = self._keep("training", items, load)
            return AugmentedDataset(base, transform, self.config.seed, self.config.views), failures
        decode = functools.partial(read_scaled, shorter=self.shorter)
        if self.kind == "stream":
            paths = [item.path for item in items]
            images, good, failures = CachedImages(paths, decode, [None] * len(paths), None), list(items), []
        else:
            images, good, failures = self._on_disk("training", items, decode, {"shorter": self.shorter})
        augmented = BatchedAugmentation(
            ImageDataset(good, load, images),
            images,
            self.preprocess_cfg,
            self.config.augment,
            self.config.seed,
            on_device=self.device.type != "cpu",
            views=self.config.views,
        )
        return augmented, failures
