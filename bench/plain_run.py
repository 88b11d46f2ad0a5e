"""A run as the field's code does it: the plain reference, a loader that decodes each image in each epoch, a test.

``python bench/plain_run.py METHOD DATA SHOTS SEED EPOCHS OUT``

The few-shot draw, recipe and file of results are those of ``upt-fast train`` (SGD, a warm-up epoch and a cosine, crops
and flips), so that a job of such runs and one of ours differ in how they compute; crops are drawn otherwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from upt_fast import ReferencePromptedCLIP
from upt_fast.clip.loading import load_clip
from upt_fast.data import few_shot_split, scan_folder
from upt_fast.data.folder import ImageItem
from upt_fast.train import TrainConfig
from upt_fast.train.schedule import WarmupCosineLR


class Images(Dataset):
    """Files, decoded when they are asked for."""

    def __init__(self, items: Sequence[ImageItem], transform: Callable[[Image.Image], Tensor]) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.items[index].path) as image:
            return self.transform(image.convert("RGB")), self.items[index].label


def main(method: str, data: str, shots: int, seed: int, epochs: int, out: Path) -> None:
    config = TrainConfig(data=data, out=str(out), clip="tiny-digits", method=method, epochs=epochs)
    loaded, listing = load_clip("tiny-digits"), scan_folder(data)
    split = few_shot_split(listing, shots, seed)
    size = loaded.preprocess_cfg["size"]
    size = size if isinstance(size, int) else size[0]
    bicubic = transforms.InterpolationMode.BICUBIC
    last = [transforms.ToTensor(), transforms.Normalize(loaded.preprocess_cfg["mean"], loaded.preprocess_cfg["std"])]
    crop = transforms.Compose([transforms.RandomResizedCrop(size, interpolation=bicubic), *last])
    centre = transforms.Compose([transforms.Resize(size, bicubic), transforms.CenterCrop(size), *last])
    batch = min(config.batch_size, len(split.train))
    loader: DataLoader = DataLoader(Images(split.train, crop), batch, shuffle=True, drop_last=True)
    torch.manual_seed(seed)  # here, as upt-fast train does: both begin with the same prompts
    model = ReferencePromptedCLIP(loaded.model, listing.classnames, method=method, tokenizer=loaded.tokenizer).train()
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    schedule = WarmupCosineLR(optimizer, epochs, config.lr, config.warmup_lr)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        schedule.step()
    model.eval()
    right = 0
    with torch.no_grad():
        for images, labels in DataLoader(Images(split.test, centre), config.test_batch_size):
            right += int((model(images).argmax(1) == labels).sum())
    out.mkdir(parents=True)
    (out / "results.json").write_text(json.dumps({"test": {"accuracy": right / len(split.test)}}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), Path(sys.argv[6]))
