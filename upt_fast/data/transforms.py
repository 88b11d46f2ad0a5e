"""Transforms of the field's recipe, built with torchvision from a CLIP's preprocessing settings.

Images stay uint8 until they are a batch on the device: a loader moves a quarter of the bytes, and a decoded few-shot
set fits in memory. The evaluation pipeline resizes with Pillow, as the preprocessing that CLIPs were trained with does;
the training pipeline works on tensors, whose uint8 kernels are faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from upt_fast.common.memory_pool import MemoryPool

AUGMENTATIONS = ("standard", "crop", "none")
RESIZE_MODES = ("shortest", "squash")
CROP_SCALE = (0.08, 1.0)  # share of the image's area
CROP_RATIO = (3 / 4, 4 / 3)  # width over height
SCALE = np.float32(1 / 255)
LARGE = 1 << 18  # numbers: a megabyte, above which memory comes from the kernel
FLOAT32 = torch.empty(0, device="cpu")


def image_size(preprocess_cfg: dict[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels of the images that a CLIP takes.

    Args:
        preprocess_cfg: open_clip's settings: size, mean, std, interpolation, resize_mode.
    """
    size = preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def interpolation_mode(preprocess_cfg: dict[str, Any]) -> v2.InterpolationMode:
    """How a CLIP's images are resized, by its settings."""
    name = preprocess_cfg.get("interpolation", "bicubic")
    return v2.InterpolationMode.BICUBIC if name == "random" else v2.InterpolationMode(name)


def build_eval_transform(preprocess_cfg: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """RGB image -> (3, height, width) uint8: resize and centre crop, as the CLIP's own evaluation does.

    Raises:
        ValueError: resize_mode is not supported.
    """
    height, width = image_size(preprocess_cfg)
    interpolation = interpolation_mode(preprocess_cfg)
    mode = preprocess_cfg.get("resize_mode", "shortest")
    if mode not in RESIZE_MODES:
        raise ValueError(f"resize_mode={mode!r} of this CLIP; wanted one of {', '.join(RESIZE_MODES)}")
    steps: list[Any] = []
    if mode == "squash":
        steps.append(v2.Resize((height, width), interpolation))
    elif height == width:
        steps.append(v2.Resize(height, interpolation))
    else:
        steps.append(_ResizeToCover((height, width), interpolation))
    return v2.Compose([*steps, v2.CenterCrop((height, width)), v2.PILToTensor()])


class _ResizeToCover(torch.nn.Module):
    """Resize, keeping the aspect ratio, to the smallest size that covers (height, width)."""

    def __init__(self, size: tuple[int, int], interpolation: v2.InterpolationMode) -> None:
        super().__init__()
        self.size = size
        self.interpolation = interpolation

    def forward(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        ratio = max(height / image.height, width / image.width)
        size = [round(image.height * ratio), round(image.width * ratio)]
        return F.resize(image, size, self.interpolation)


def build_augmentation(
    preprocess_cfg: dict[str, Any], augment: str = "standard"
) -> tuple[Callable[[Image.Image], Tensor], Callable[[Tensor], Tensor] | None]:
    """The training pipeline, in the part that is done once per image and the part that is drawn anew every epoch.

    Args:
        preprocess_cfg: open_clip's settings.
        augment: "standard": random resized crop (area 0.08 to 1, aspect 3/4 to 4/3) and horizontal flip; "crop":
            without the flip, for what a mirror image would change (text, digits); "none": the evaluation transform.
    Returns:
        load: RGB image -> (3, H, W) uint8, H and W of the file.
        transform: that -> (3, height, width) uint8, drawing from torch's default generator; None: load does it all.
    Raises:
        ValueError: augment is unknown.
    """
    if augment not in AUGMENTATIONS:
        raise ValueError(f"augment={augment!r}; wanted one of {', '.join(AUGMENTATIONS)}")
    if augment == "none":
        return build_eval_transform(preprocess_cfg), None
    steps: list[Any] = [
        v2.RandomResizedCrop(
            image_size(preprocess_cfg),
            scale=CROP_SCALE,
            ratio=CROP_RATIO,
            interpolation=interpolation_mode(preprocess_cfg),
            antialias=True,
        )
    ]
    if augment == "standard":
        steps.append(v2.RandomHorizontalFlip())
    return v2.PILToTensor(), v2.Compose(steps)


def build_normalize(preprocess_cfg: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """(..., 3, H, W) uint8 on any device -> float32, scaled to 0..1, minus the CLIP's mean, over its std."""
    return Normalize(list(preprocess_cfg["mean"]), list(preprocess_cfg["std"]))


class Normalize:
    """torchvision's ToDtype and Normalize; on a CPU to the same bits without PyTorch's threads.

    These wait for each other actively, also for one that has no core: beside whatever else loads images, a batch then
    took ten times as long. The numbers pass a core's cache once, image by image, into memory of batches before.

    Args:
        mean: of each channel.
        std: of each channel.
    """

    def __init__(self, mean: list[float], std: list[float]) -> None:
        steps = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std, inplace=True)]  # of the new one
        self.transform = v2.Compose(steps)
        self.mean, self.std = np.array(mean, np.float32), np.array(std, np.float32)
        values = torch.arange(256, dtype=torch.uint8).expand(len(mean), 1, 256)
        self.pool = MemoryPool(most=2)  # so that what holds many batches holds no more
        self.exact = torch.equal(self._normalize(values), self.transform(values))  # of all that there can be

    def __call__(self, images: Tensor) -> Tensor:
        plain = type(images) is Tensor and images.device.type == "cpu" and images.dtype == torch.uint8
        if not (self.exact and plain and images.ndim >= 3 and images.shape[-3] == len(self.mean)):
            return self.transform(images)  # type: ignore[no-any-return]
        return self._normalize(images)

    def _normalize(self, images: Tensor) -> Tensor:
        if images.numel() < LARGE:
            normalized = torch.empty(images.shape)
        else:
            normalized = self.pool.take("batch", FLOAT32, *images.shape)
        height_width = images.shape[-2:]
        pixels = images.numpy().reshape(-1, len(self.mean), *height_width)
        for source, result in zip(pixels, normalized.view(pixels.shape).numpy(), strict=True):
            for values, numbers, mean, std in zip(source, result, self.mean, self.std, strict=True):
                np.multiply(values, SCALE, out=numbers)
                np.subtract(numbers, mean, out=numbers)
                np.divide(numbers, std, out=numbers)
        return normalized
