"""Image features that no prompt can change: computed once for an image, whatever is learned beside it.

They are computed in batches of one shape, the last one filled up, so that an image's feature does not hang on how many
images there are; and by :meth:`VisionTower.alone`, so that it does not hang on its place and its neighbours. That is
the libraries' doing, hence tried for every key of the store before anything is kept. Evaluation with a store and
without one has thus the same bits, and so has training on images without augmentation.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
import torchvision
from PIL import Image, features
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from upt_fast.data.dataset import AugmentedDataset, ImageDataset
from upt_fast.data.feature_store import FeatureStore, Section
from upt_fast.data.images import digest_file
from upt_fast.data.sources import ShardImage
from upt_fast.data.transforms import build_eval_transform, build_normalize, image_size
from upt_fast.distributed import ONE_PROCESS, Group
from upt_fast.engine.towers.text import TextTower
from upt_fast.engine.towers.vision import VisionTower
from upt_fast.engine.tuning.machine import processor
from upt_fast.model import FastPromptedCLIP
from upt_fast.train.batches import device_of, eval_mode, to_device
from upt_fast.version import __version__

logger = logging.getLogger("upt_fast")

# images of a pass, and on a CPU their rows, where an evaluation's batch is not smaller: more is no faster there
MOST_IMAGES, CPU_ROWS = 64, 2048
PACK_ROWS = 4096  # features that are written together
ALONE = "independent of the batch"  # a fact of a key


class Known(NamedTuple):
    """What the store has of an image file.

    Args:
        digest: the name of its feature: that of the file and of the mark; None: unknown.
        row: its feature (e,); None: it is not there.
        mark: what else the feature hangs on.
    """

    digest: bytes | None = None
    row: Tensor | None = None
    mark: str = ""


class FixedFeatures:
    """The image features of a model whose ``images_are_fixed``.

    Args:
        model: the model; any other on the same CLIP, precision and machine has the same.
        batch_size: of an evaluation, images of a pass at most.
        num_workers: processes that load images.
        store: keeps the features; None: they are computed.
        progress: whether to show a progress bar.
        group: the processes of a run, each of which computes its share.
    """

    def __init__(
        self,
        model: FastPromptedCLIP,
        batch_size: int,
        num_workers: int = 0,
        store: FeatureStore | None = None,
        progress: bool = True,
        group: Group = ONE_PROCESS,
    ) -> None:
        self.model, self.num_workers, self.progress, self.group = model, num_workers, progress, group
        self.device = device_of(model)
        most = MOST_IMAGES
        if self.device.type == "cpu":
            most = min(most, max(1, CPU_ROWS // (1 + len(model.vision_tower.positions))))
        self.batch_size = min(batch_size, most)
        assert model.preprocess_cfg is not None
        self.preprocess_cfg: dict[str, Any] = model.preprocess_cfg
        self.normalize: Callable[[Tensor], Tensor] = build_normalize(self.preprocess_cfg)
        self.section = None if store is None else self._open(store)

    def look_up(self, paths: Sequence[Path | ShardImage], marks: Sequence[str] | None = None) -> list[Known]:
        """What the store has of image files.

        Args:
            paths: of the files.
            marks: of each what else its feature hangs on; None: nothing.
        """
        marks = [""] * len(paths) if marks is None else marks
        if self.section is None:
            return [Known(mark=mark) for mark in marks]
        digests = _digests(paths, marks)
        rows = self.section.read([digest for digest in digests if digest is not None])
        return [
            Known(digest, None if digest is None else rows.get(digest), mark)
            for digest, mark in zip(digests, marks, strict=True)
        ]

    @torch.no_grad()
    def compute(
        self, dataset: Dataset[tuple[Tensor, int]], known: Sequence[Known] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features (N, e) in the tower's dtype and labels (N,) of a dataset, on the CPU.

        Args:
            dataset: items of (3, H, W) uint8 and a label; an ImageDataset where known is given.
            known: what the store has of each image; the others' features are put there.
        """
        total = len(dataset)  # type: ignore[arg-type]
        known = [Known()] * total if known is None else known
        everywhere = self.group.objects([i for i, entry in enumerate(known) if entry.row is None])
        lacking = sorted(set().union(*everywhere))  # another process may have found less in the store
        missing = lacking[self.group.share(len(lacking))]
        rows: list[Tensor | None] = [entry.row for entry in known]
        labels = [dataset.items[i].label if rows[i] is not None else 0 for i in range(total)]  # type: ignore[attr-defined]
        loader: DataLoader[Any] = DataLoader(
            Subset[Any](dataset, missing),
            self.batch_size,
            num_workers=self.num_workers if missing else 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or the loader would draw from the default one, which dropout uses
        )
        hidden = None if self.progress and missing else True
        done, written = 0, 0
        with (
            eval_mode(self.model),
            tqdm(total=len(missing), desc="image features", unit="image", disable=hidden, leave=False) as bar,
        ):
            for images, target in to_device(loader, self.normalize, self.device):
                batch = missing[done : done + len(images)]
                for i, row, label in zip(batch, self._alone(images).cpu(), target.tolist(), strict=True):
                    rows[i], labels[i] = row, label
                done += len(batch)
                if done - written >= PACK_ROWS or done == len(missing):
                    self._keep(dataset, known, rows, missing[written:done])
                    written = done
                bar.update(len(batch))
        if self.group.size > 1:
            self._exchange(rows, labels, lacking, missing)
        return torch.stack([row for row in rows if row is not None]), torch.tensor(labels)

    def _exchange(
        self, rows: list[Tensor | None], labels: list[int], lacking: Sequence[int], own: Sequence[int]
    ) -> None:
        """Put in what the other processes have computed."""
        sizes, tower = self.group.sizes(len(lacking)), self.model.vision_tower
        none = torch.zeros(0, self.model.embed_dim, dtype=tower.class_row.dtype)
        mine = [row[None] for i in own if (row := rows[i]) is not None]
        found = self.group.gather(torch.cat([none, *mine]), sizes)
        theirs = self.group.gather(torch.tensor([labels[i] for i in own], dtype=torch.int64), sizes)
        for i, row, label in zip(lacking, found, theirs.tolist(), strict=True):
            rows[i], labels[i] = row, label

    def _alone(self, images: Tensor) -> Tensor:
        """(B, e) of at most a batch of images, which is filled up to a whole one."""
        filled = torch.cat([images, images[-1:].expand(self.batch_size - len(images), -1, -1, -1)])
        return self.model.vision_tower.alone(filled)[: len(images)]

    def _keep(
        self, dataset: Any, known: Sequence[Known], rows: Sequence[Tensor | None], indices: Sequence[int]
    ) -> None:
        if self.section is None:
            return
        # a file that was changed between its digest and its decoding has another feature
        now = _digests([dataset.items[i].path for i in indices], [known[i].mark for i in indices])
        kept = {
            digest: row
            for i, digest in zip(indices, now, strict=True)
            if digest is not None and digest == known[i].digest and (row := rows[i]) is not None
        }
        if kept:
            self.section.write(list(kept), torch.stack(list(kept.values())))

    @torch.no_grad()
    def _open(self, store: FeatureStore) -> Section | None:
        """Where the store keeps these features; None where they would hang on the batch that they are computed in."""
        generator = torch.Generator().manual_seed(0)
        size = (self.batch_size, 3, *image_size(self.preprocess_cfg))
        images = self.normalize(torch.randint(256, size, generator=generator, dtype=torch.uint8).to(self.device))
        with eval_mode(self.model):
            found = self._alone(images)
            section = store.section(self._about(found))
            independent = section.fact(ALONE)
            if not isinstance(independent, bool):
                independent = self._is_independent(images, found)
                section.note(ALONE, independent)
        if not independent:
            logger.info("image features are not kept: here their last bits depend on the images beside them")
            return None
        return section

    def _is_independent(self, images: Tensor, found: Tensor) -> bool:
        """Whether images have the same features, to the bit, in other places and beside others."""
        size = len(images)
        orders = [torch.arange(size).roll(shift) for shift in sorted({1, size // 2, size - 1})]
        orders += [torch.arange(size).flip(0), torch.zeros(size, dtype=torch.long)]
        return all(torch.equal(self._alone(images[order]), found[order]) for order in orders)

    def _about(self, found: Tensor) -> dict[str, Any]:
        """All that the bits of a feature hang on beside the image; found: those of the images that are tried."""
        model, tower = self.model, self.model.vision_tower
        load = build_eval_transform(self.preprocess_cfg)
        pattern = Image.frombytes("RGB", (61, 47), bytes(i * i % 251 for i in range(61 * 47 * 3)))
        return {
            **computed_with(model, tower),
            "weights": model.vision_digest(),
            "preprocess": {name: str(value) for name, value in self.preprocess_cfg.items()},
            "preprocessed": _digest(load(pattern)),
            "batch": self.batch_size,
            "libraries": {
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "pillow": PIL.__version__,
                "jpeg": str(features.version("jpg")),
            },
            # whatever else decides on bits, choices among exact ways first of all, shows here
            "bits": _digest(found),
        }


def computed_with(model: FastPromptedCLIP, tower: TextTower | VisionTower) -> dict[str, Any]:
    """What a feature's bits hang on beside weights, input and libraries: precision, route, machine."""
    device, blocks = device_of(model), tower.blocks
    machine = (
        {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
        if device.type == "cuda"
        else {**processor(), "threads": torch.get_num_threads()}
    )
    return {
        "upt_fast": __version__,
        "dtype": f"{blocks.qkv_bias.dtype}{' fp8' if model.quantized else ''}",
        "route": [model.backend, blocks.memory, type(blocks.stack).__name__],
        "machine": machine,
    }


class FeatureDataset(ImageDataset):
    """The features of images in their place, (e,) each; they are computed when they are first asked for.

    Args:
        images: the images.
        source: computes their features.
        known: what the store has of them.
    """

    def __init__(self, images: ImageDataset, source: FixedFeatures, known: Sequence[Known]) -> None:
        super().__init__(images.items, images.load)
        self._source: FixedFeatures | None = source
        self._from: tuple[ImageDataset, Sequence[Known]] | None = (images, known)
        self._found: tuple[Tensor, Tensor] | None = None

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Features (N, e), not normalised, and labels (N,)."""
        if self._found is None:
            assert self._source is not None
            assert self._from is not None
            self._found = self._source.compute(*self._from)
            self._source = self._from = None  # the decoded images are needed no more
        return self._found

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rows, labels = self.tensors()
        return rows[index], int(labels[index])


class _Views(ImageDataset):
    """Every view of every image, view by view: item v N + i is view v of image i."""

    def __init__(self, images: AugmentedDataset) -> None:
        assert images.views is not None
        super().__init__(list(images.base.items) * images.views, images.base.load)
        self.of = images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.of[divmod(index, len(self.of))]


class ViewFeatures(FeatureDataset):
    """The features of all views of images, (K N, e), view by view; items are the N images.

    Args:
        images: with a fixed number of views.
        source: computes their features.
        how: what a view's pixels hang on, beside the image and the view's number.
    """

    def __init__(self, images: AugmentedDataset, source: FixedFeatures, how: dict[str, Any]) -> None:
        views = _Views(images)
        marks = [
            json.dumps({"view": i // len(images), "of": item.key, **how}, sort_keys=True)
            for i, item in enumerate(views.items)
        ]
        super().__init__(views, source, source.look_up([item.path for item in views.items], marks))
        self.items = images.base.items


class FeatureViews(AugmentedDataset):
    """The features of images' views, gone through epoch by epoch.

    Args:
        images: with a fixed number of views.
        source: computes their features.
        how: see :class:`ViewFeatures`.
    """

    def __init__(self, images: AugmentedDataset, source: FixedFeatures, how: dict[str, Any]) -> None:
        super().__init__(ViewFeatures(images, source, how), None, images.seed, images.views)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        assert self.views is not None
        return self.base[epoch % self.views * len(self.base) + index]


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def _digests(paths: Sequence[Path | ShardImage], marks: Sequence[str]) -> list[bytes | None]:
    """Of the files, and of what is marked on them."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(digest_file, paths))
    return [
        hashlib.sha256(digest + mark.encode()).digest() if digest is not None and mark else digest
        for digest, mark in zip(found, marks, strict=True)
    ]
