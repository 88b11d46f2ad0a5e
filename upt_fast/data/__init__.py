"""Image folders, few-shot sampling, decoding and transforms."""

from upt_fast.data.dataset import AugmentedDataset, EpochBatchSampler, ImageDataset
from upt_fast.data.duplicates import Duplicates, drop_test_copies, find_duplicates
from upt_fast.data.folder import FolderListing, ImageItem, scan_folder
from upt_fast.data.images import DecodedImages, decode_images, read_rgb
from upt_fast.data.sampling import FewShotSplit, few_shot_split, sample_few_shot
from upt_fast.data.transforms import AUGMENTATIONS, build_augmentation, build_eval_transform, build_normalize

__all__ = [
    "AUGMENTATIONS",
    "AugmentedDataset",
    "DecodedImages",
    "Duplicates",
    "EpochBatchSampler",
    "FewShotSplit",
    "FolderListing",
    "ImageDataset",
    "ImageItem",
    "build_augmentation",
    "build_eval_transform",
    "build_normalize",
    "decode_images",
    "drop_test_copies",
    "few_shot_split",
    "find_duplicates",
    "read_rgb",
    "sample_few_shot",
    "scan_folder",
]
