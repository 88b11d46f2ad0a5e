"""Handwritten digits as 32x32 RGB images in two domains, from the 1797 digits that scikit-learn ships.

``paper``: dark ink on plain light paper, nearly upright. The tiny CLIP is pretrained on this domain.
``notes``: faded ink on coloured, squared notes, tilted, in grainy photographs. Pretraining never sees it.

The 1797 digits are split once, class by class, with a fixed seed:

* ``pretrain``: half of each class, for the contrastive pretraining and for choosing the demo's learning rate;
* ``train``: 20 per class of the other half, the pool that shots are drawn from;
* ``test``: the rest of the other half.

A domain is drawn whole from one seeded stream, so an image does not depend on which others are asked for.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from upt_fast.common.files import atomic_path

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DOMAINS = ("paper", "notes")
SPLITS = ("pretrain", "train", "test")
IMAGE_SIZE = 32
SPLIT_SEED = 0
TRAIN_PER_CLASS = 20

INK_COLOURS = {  # RGB in 0..1
    "black": (0.10, 0.10, 0.12),
    "blue": (0.10, 0.18, 0.55),
    "red": (0.60, 0.10, 0.12),
    "green": (0.08, 0.38, 0.16),
    "purple": (0.36, 0.12, 0.48),
}
NOTE_COLOURS = ((0.93, 0.85, 0.55), (0.95, 0.72, 0.75), (0.62, 0.82, 0.95), (0.70, 0.90, 0.65))  # RGB in 0..1


class Rendered(NamedTuple):
    """Images of one domain."""

    images: Tensor  # (N, 3, 32, 32) uint8
    ink: np.ndarray  # (N,) index of the ink in INK_COLOURS


@lru_cache(maxsize=1)
def _raw() -> tuple[Tensor, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32) / 16, bunch.target.astype(np.int64)


def raw_digits() -> tuple[Tensor, np.ndarray]:
    """The digits as scikit-learn has them.

    Returns:
        (1797, 8, 8) ink in 0..1, and (1797,) labels.
    """
    strokes, labels = _raw()
    return strokes.clone(), labels.copy()


def split_indices(seed: int = SPLIT_SEED) -> dict[str, np.ndarray]:
    """Indices into the 1797 digits of the splits ``pretrain``, ``train`` and ``test``, disjoint and sorted."""
    labels = _raw()[1]
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for label in range(len(CLASS_NAMES)):
        members = rng.permutation(np.flatnonzero(labels == label))
        half = len(members) // 2
        parts["pretrain"].append(members[:half])
        parts["train"].append(members[half : half + TRAIN_PER_CLASS])
        parts["test"].append(members[half + TRAIN_PER_CLASS :])
    return {split: np.sort(np.concatenate(members)) for split, members in parts.items()}


def render(strokes: Tensor, domain: str, rng: np.random.Generator) -> Rendered:
    """Draw digits in a domain.

    Args:
        strokes: (N, 8, 8) ink in 0..1.
        domain: ``paper`` or ``notes``.
        rng: source of every random choice (colours, pose, texture).
    Returns:
        ``images`` (N, 3, 32, 32) uint8 and ``ink`` (N,) colour indices.
    Raises:
        ValueError: unknown domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain: got {domain!r}, wanted one of {', '.join(DOMAINS)}")
    if domain == "paper":
        return _draw_paper(strokes, rng)
    return _draw_notes(strokes, rng)


def load_domain(domain: str, seed: int = SPLIT_SEED) -> tuple[Tensor, np.ndarray]:
    """All digits drawn in one domain, always the same for the same seed.

    Args:
        domain: ``paper`` or ``notes``.
        seed: of the colours, poses and textures.
    Returns:
        (1797, 3, 32, 32) uint8 images and (1797,) labels, in scikit-learn's order.
    Raises:
        ValueError: unknown domain.
    """
    strokes, labels = raw_digits()
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain: got {domain!r}, wanted one of {', '.join(DOMAINS)}")
    rng = np.random.default_rng([seed, DOMAINS.index(domain)])
    return render(strokes, domain, rng).images, labels


def load_split(split: str, domain: str, seed: int = SPLIT_SEED) -> tuple[Tensor, Tensor]:
    """One split in one domain.

    Args:
        split: ``pretrain``, ``train`` or ``test``.
        domain: ``paper`` or ``notes``.
        seed: of the split and of the drawing.
    Returns:
        (N, 3, 32, 32) uint8 images and (N,) int64 labels.
    Raises:
        ValueError: unknown split or domain.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split: got {split!r}, wanted one of {', '.join(SPLITS)}")
    images, labels = load_domain(domain, seed)
    index = split_indices(seed)[split]
    return images[torch.from_numpy(index)], torch.from_numpy(labels[index])


def sample_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Pick ``shots`` images of every class; fewer shots with the same seed are a subset of more.

    Args:
        labels: (N,) class of each image in the pool.
        shots: images per class.
        seed: of the choice.
    Returns:
        (classes * shots,) indices into the pool, class by class.
    Raises:
        ValueError: a class has fewer than ``shots`` images, or ``shots`` is not positive.
    """
    if shots < 1:
        raise ValueError(f"shots: got {shots}, wanted at least 1")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        if len(members) < shots:
            raise ValueError(
                f"shots of class {label}: got {shots}, wanted at most {len(members)} (the size of the pool)"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    return torch.cat(chosen)


def to_model_input(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalise uint8 images.

    Args:
        images: (N, 3, H, W) uint8.
        mean: 3 channel means of images in 0..1.
        std: 3 channel standard deviations.
    Returns:
        (N, 3, H, W) float32.
    """
    shift = torch.tensor(mean).view(1, 3, 1, 1)
    scale = torch.tensor(std).view(1, 3, 1, 1)
    return (images.float() / 255 - shift) / scale


def write_image_folder(directory: str | os.PathLike[str], split: str, domain: str, seed: int = SPLIT_SEED) -> Path:
    """Write a split as PNG files, ``directory/<class name>/<index>.png``, the layout of torchvision's ImageFolder.

    Args:
        directory: made if absent; existing files of the same name are replaced.
        split: ``pretrain``, ``train`` or ``test``.
        domain: ``paper`` or ``notes``.
        seed: of the split and of the drawing.
    Returns:
        The directory.
    Raises:
        ValueError: unknown split or domain.
    """
    from PIL import Image

    images, labels = load_split(split, domain, seed)
    index = split_indices(seed)[split]
    root = Path(directory)
    for name in CLASS_NAMES:
        (root / name).mkdir(parents=True, exist_ok=True)
    for image, label, number in zip(images, labels.tolist(), index.tolist(), strict=True):
        target = root / CLASS_NAMES[label] / f"{number:04d}.png"
        with atomic_path(target) as part:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(part, format="PNG")
    return root


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def _stroke_mask(strokes: Tensor, degrees: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(N, 8, 8) ink enlarged, turned by (N,) degrees, scaled by (N,), moved by (N, 2): (N, 1, 32, 32) in 0..1."""
    angle = torch.deg2rad(degrees)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    matrix = torch.stack(
        [torch.stack([cos, sin, shift[:, 0]], 1), torch.stack([-sin, cos, shift[:, 1]], 1)], 1
    )  # (N, 2, 3)
    grid = F.affine_grid(matrix, [len(strokes), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    ink = F.grid_sample(strokes.unsqueeze(1), grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return torch.sigmoid(9 * (ink - 0.45))  # a crisp edge, as a pen leaves


def _blend(background: Tensor, colour: Tensor, mask: Tensor) -> Tensor:
    """(N, 3, 32, 32) background, (N, 3, 1, 1) colour, (N, 1, 32, 32) mask -> (N, 3, 32, 32) uint8."""
    image = background * (1 - mask) + colour * mask
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _draw_paper(strokes: Tensor, rng: np.random.Generator) -> Rendered:
    n = len(strokes)
    mask = _stroke_mask(
        strokes, _uniform(rng, -12, 12, n), _uniform(rng, 0.8, 1.0, n), _uniform(rng, -0.12, 0.12, n, 2)
    )
    ink = rng.integers(len(INK_COLOURS), size=n)
    colour = torch.tensor(list(INK_COLOURS.values()))[torch.from_numpy(ink)] + 0.05 * _normal(rng, n, 3)
    paper = _uniform(rng, 0.86, 0.98, n, 1, 1, 1) + 0.02 * _normal(rng, n, 3, 1, 1)
    paper = paper + 0.02 * _normal(rng, n, 1, IMAGE_SIZE, IMAGE_SIZE)
    return Rendered(_blend(paper, colour.view(n, 3, 1, 1), mask), ink)


def _draw_notes(strokes: Tensor, rng: np.random.Generator) -> Rendered:
    n = len(strokes)
    mask = _stroke_mask(strokes, _uniform(rng, 20, 40, n), _uniform(rng, 0.8, 1.0, n), _uniform(rng, -0.12, 0.12, n, 2))
    ink = rng.integers(len(INK_COLOURS), size=n)
    note = torch.tensor(NOTE_COLOURS)[torch.from_numpy(rng.integers(len(NOTE_COLOURS), size=n))]  # (N, 3)
    phase = torch.from_numpy(rng.integers(8, size=(2, n))).view(2, n, 1, 1, 1)
    rows, columns = torch.arange(IMAGE_SIZE).view(1, 1, -1, 1), torch.arange(IMAGE_SIZE).view(1, 1, 1, -1)
    squares = ((rows + phase[0]) % 8 == 0) | ((columns + phase[1]) % 8 == 0)  # (N, 1, 32, 32)
    background = note.view(n, 3, 1, 1) - 0.3 * squares + 0.1 * _normal(rng, n, 3, IMAGE_SIZE, IMAGE_SIZE)
    colour = 0.8 * torch.tensor(list(INK_COLOURS.values()))[torch.from_numpy(ink)] + 0.2 * note
    return Rendered(_blend(background, colour.view(n, 3, 1, 1), mask), ink)
