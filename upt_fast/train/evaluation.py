"""How good a model is on a dataset, and its answers for single images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from upt_fast.common.checks import require_int
from upt_fast.data.images import ImageDecodeError, corrupt_message, read_rgb
from upt_fast.data.sources import Source
from upt_fast.data.transforms import build_eval_transform, build_normalize
from upt_fast.distributed import ONE_PROCESS, Group
from upt_fast.train.batches import device_of, eval_mode, to_device
from upt_fast.train.features import FeatureDataset, FixedFeatures
from upt_fast.train.metrics import Answers, Evaluation


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first; probabilities are the softmax over all classes."""

    path: str
    classnames: tuple[str, ...]
    probabilities: tuple[float, ...]


@torch.no_grad()
def evaluate(
    model: Any,
    dataset: Dataset[tuple[Tensor, int]],
    batch_size: int = 100,
    num_workers: int = 0,
    description: str = "evaluating",
    progress: bool = True,
    classnames: Sequence[str] | None = None,
    group: Group = ONE_PROCESS,
) -> Evaluation:
    """Evaluate a model; its training mode is kept.

    Args:
        model: FastPromptedCLIP or what has its classnames, preprocess_cfg and forward.
        dataset: items of (3, H, W) uint8 and a label that indexes model.classnames; not empty. Or a FeatureDataset.
        batch_size: images per forward pass.
        num_workers: processes that load images.
        description: of the progress bar.
        progress: whether to show it.
        classnames: what to call the classes, in the model's order; None: as the model does.
        group: processes that share the work by whole batches, so that the result has the bits of one process.
    Raises:
        ValueError: the dataset is empty.
    """
    num_images = len(dataset)  # type: ignore[arg-type]
    if num_images == 0:
        raise ValueError("the dataset has 0 images; wanted at least 1 to evaluate on")
    count = -(-num_images // batch_size)
    ends = [min(sum(group.sizes(count)[: i + 1]) * batch_size, num_images) for i in range(group.size)]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    own = range(ends[group.rank] - sizes[group.rank], ends[group.rank])
    names = model.classnames if classnames is None else classnames
    answers = Answers(len(names))
    with (
        eval_mode(model),
        tqdm(total=len(own), desc=description, unit="image", disable=None if progress else True, leave=False) as bar,
    ):
        for logits, target in _logits(model, dataset, batch_size, num_workers, progress, own, group):
            answers.add(logits, target)
            bar.update(len(target))
    answers.gather(group, sizes, device_of(model))
    return group.by_first(lambda: answers.evaluation(names))


def _logits(
    model: Any,
    dataset: Dataset[tuple[Tensor, int]],
    batch_size: int,
    num_workers: int,
    progress: bool,
    own: range,
    group: Group,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, C) and labels (B,) of the batches of own images; through features where no prompt changes them."""
    device = device_of(model)
    if isinstance(dataset, FeatureDataset) or getattr(model, "images_are_fixed", False):
        if isinstance(dataset, FeatureDataset):
            rows, labels = dataset.tensors()
        else:
            source = FixedFeatures(model, batch_size, num_workers, progress=progress, group=group)
            rows, labels = source.compute(dataset)
        if not own:
            return
        rows, labels = rows[own.start : own.stop], labels[own.start : own.stop]
        for features, target in zip(rows.split(batch_size), labels.split(batch_size), strict=True):
            yield model(image_features=features.to(device)), target.to(device)
        return
    loader: DataLoader[Any] = DataLoader(
        dataset if group.size == 1 else Subset[Any](dataset, own),
        batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or the loader would draw from the default one, which dropout uses
    )
    for images, target in to_device(loader, build_normalize(model.preprocess_cfg), device):
        yield model(images), target


def predict(
    model: Any,
    paths: Sequence[Source],
    top_k: int = 5,
    batch_size: int = 100,
    progress: bool = True,
    classnames: Sequence[str] | None = None,
) -> list[Prediction]:
    """Classify image files.

    Args:
        model: FastPromptedCLIP or what has its classnames, preprocess_cfg and forward.
        paths: N image files, or images in shards (find_images of upt_fast.data.shards).
        top_k: classes per image; all of them if there are fewer.
        batch_size: images per forward pass.
        progress: whether to show a progress bar.
        classnames: what to call the classes, in the model's order; None: as the model does.
    Returns:
        N predictions, in the order of paths.
    Raises:
        ValueError: no path, top_k below 1, class names that are not as many as the model's, or files that cannot be
            read, with their paths.
    """
    if not paths:
        raise ValueError("no image; wanted at least one path")
    require_int("top_k", top_k, 1)
    device = device_of(model)
    load = build_eval_transform(model.preprocess_cfg)
    normalize = build_normalize(model.preprocess_cfg)
    names = model.classnames if classnames is None else tuple(classnames)
    if len(names) != len(model.classnames):
        raise ValueError(f"{len(names)} class names for {len(model.classnames)} classes; wanted as many")
    top_k = min(top_k, len(names))
    predictions: list[Prediction] = []
    failures: list[str] = []
    with (
        torch.no_grad(),
        eval_mode(model),
        tqdm(total=len(paths), desc="predicting", unit="image", disable=None if progress else True, leave=False) as bar,
    ):
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            images = []
            for path in batch:
                try:
                    images.append(load(read_rgb(path)))
                except ImageDecodeError as error:
                    failures.append(str(error))
            bar.update(len(batch))
            if failures:  # only the other files that cannot be read are still of interest
                continue
            probabilities = model(normalize(torch.stack(images).to(device))).float().softmax(dim=1)
            values, indices = probabilities.topk(top_k, dim=1)
            predictions += [
                Prediction(str(path), tuple(names[i] for i in index), tuple(value))
                for path, index, value in zip(batch, indices.tolist(), values.tolist(), strict=True)
            ]
    if failures:
        raise ValueError(corrupt_message(failures))
    return predictions
