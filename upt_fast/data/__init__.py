"""Image folders, few-shot sampling, decoding, transforms. Names load when asked for: reading options needs no torch.

A dataset becomes a FolderListing (folder.py) with names for its classes (classnames.py, wordnet.py); sampling.py draws
few-shot splits of it, images.py decodes, transforms.py and dataset.py make batches. Or decoding.py decodes to what
crops need, pixel_store.py and cached.py keep that on disk, and batches.py makes batches of it. sharding.py writes a
dataset into tar files, shards.py lists these as if they were a folder, streaming.py orders an epoch over them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upt_fast.data.batches import BatchedAugmentation
    from upt_fast.data.cached import CachedImages, cache_images
    from upt_fast.data.dataset import AugmentedDataset, EpochBatchSampler, ImageDataset
    from upt_fast.data.decoding import read_scaled
    from upt_fast.data.duplicates import Duplicates, drop_test_copies, find_duplicates
    from upt_fast.data.folder import scan_folder
    from upt_fast.data.images import DecodedImages, decode_images, read_rgb
    from upt_fast.data.listing import FolderListing, ImageItem
    from upt_fast.data.pixel_store import PixelStore
    from upt_fast.data.sampling import FewShotSplit, few_shot_split, sample_few_shot
    from upt_fast.data.sharding import write_shards
    from upt_fast.data.sources import ShardImage
    from upt_fast.data.streaming import ShardBatchSampler
    from upt_fast.data.transforms import AUGMENTATIONS, build_augmentation, build_eval_transform, build_normalize

__all__ = [
    "AUGMENTATIONS",
    "AugmentedDataset",
    "BatchedAugmentation",
    "CachedImages",
    "DecodedImages",
    "Duplicates",
    "EpochBatchSampler",
    "FewShotSplit",
    "FolderListing",
    "ImageDataset",
    "ImageItem",
    "PixelStore",
    "ShardBatchSampler",
    "ShardImage",
    "build_augmentation",
    "build_eval_transform",
    "build_normalize",
    "cache_images",
    "decode_images",
    "drop_test_copies",
    "few_shot_split",
    "find_duplicates",
    "read_rgb",
    "read_scaled",
    "sample_few_shot",
    "scan_folder",
    "write_shards",
]

_MODULES = {
    "BatchedAugmentation": "batches",
    "CachedImages": "cached",
    "cache_images": "cached",
    "AugmentedDataset": "dataset",
    "EpochBatchSampler": "dataset",
    "ImageDataset": "dataset",
    "read_scaled": "decoding",
    "Duplicates": "duplicates",
    "drop_test_copies": "duplicates",
    "find_duplicates": "duplicates",
    "FolderListing": "listing",
    "ImageItem": "listing",
    "scan_folder": "folder",
    "DecodedImages": "images",
    "decode_images": "images",
    "read_rgb": "images",
    "FewShotSplit": "sampling",
    "few_shot_split": "sampling",
    "sample_few_shot": "sampling",
    "PixelStore": "pixel_store",
    "write_shards": "sharding",
    "ShardImage": "sources",
    "ShardBatchSampler": "streaming",
    "AUGMENTATIONS": "transforms",
    "build_augmentation": "transforms",
    "build_eval_transform": "transforms",
    "build_normalize": "transforms",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
