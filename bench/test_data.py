"""Loading 1,000 photographs of 500 x 375 for training, model excluded: ways to keep them take turns in one run.

``exact, when used`` decodes anew each epoch, ``exact, in memory`` keeps decoded files in memory, ``torchvision`` is the
usual loader: ImageFolder, RandomResizedCrop and flip by Pillow, normalisation by image. The first three are measured to
normalised float32 batches where ``normalized`` says so, else to uint8 ones; torchvision's always are normalised.

All but ``scaled`` without loader processes run with one thread of PyTorch's in each process, which is best for them:
more are as fast on a quiet machine and up to ten times as slow on a busy one.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from upt_fast.data import AugmentedDataset, EpochBatchSampler, build_normalize, scan_folder
from upt_fast.train.config import TrainConfig
from upt_fast.train.evaluation import to_device
from upt_fast.train.images import RunImages

CFG = {"size": 224, "mean": (0.481, 0.458, 0.408), "std": (0.269, 0.261, 0.276), "interpolation": "bicubic"}
COUNT, BATCH = 1000, 32
ROUNDS = 3
THREADS = torch.get_num_threads()
WAYS = {
    "scaled": {"cache": "scaled"},
    "exact, when used": {"cache": "exact", "cache_gib": 0.0},
    "exact, in memory": {"cache": "exact", "cache_gib": 2.0},
}


def write_photographs(folder: Path, count: int = COUNT, height: int = 375, width: int = 500) -> None:
    """JPEG files of quality 90 whose amplitudes fall with frequency as those of photographs do, about 110 kB each."""
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = np.maximum(frequency, 1 / width)[..., None] ** -1.05
    pixels = np.empty(0)
    for i in range(count):
        if i % 20 == 0:  # the others are parts of the same, turned and shifted
            noise = np.fft.rfft2(generator.standard_normal((height, width, 3)), axes=(0, 1))
            pixels = np.fft.irfft2(noise * amplitude, s=(height, width), axes=(0, 1))
            pixels = np.clip(pixels / pixels.std() * 50 + 128, 0, 255).astype(np.uint8)
        shifted = np.roll(pixels, generator.integers(0, 300, 2), axis=(0, 1))
        place = folder / f"class {i % 10}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shifted[:, ::-1] if i % 2 else shifted).save(place / f"{i:04}.jpg", quality=90)


@pytest.fixture(scope="module")
def folder() -> Iterable[Path]:
    root = Path(mkdtemp(prefix="upt_fast_bench_"))
    write_photographs(root / "photographs")
    yield root
    shutil.rmtree(root)


class Way:
    """A way to load a folder's images, epoch by epoch."""

    def __init__(self, name: str, data: Path, stores: Path, num_workers: int, normalized: bool) -> None:
        os.environ["UPT_FAST_IMAGE_CACHE"] = str(stores)
        self.threads = THREADS if name == "scaled" and num_workers == 0 else 1
        self.normalize = build_normalize(CFG) if normalized else None
        self.sampler: EpochBatchSampler | None = None
        kept = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
        if name == "torchvision":
            steps = [
                v2.RandomResizedCrop(CFG["size"], interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                build_normalize(CFG),
            ]
            self.normalize = None
            dataset = ImageFolder(str(data), v2.Compose(steps))
            self.loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True, **kept)
            return
        config = TrainConfig(data=str(data), out="unused", clip="unused", progress=False, **WAYS[name])
        listing = scan_folder(data)
        items = [item for items in listing.splits.values() for item in items]
        images, failures = RunImages(config, CFG, data, torch.device("cpu")).training(items)
        assert not failures
        self.images: AugmentedDataset = images
        self.sampler = EpochBatchSampler(len(images), BATCH, config.seed)
        self.loader = DataLoader(images, batch_sampler=self.sampler, collate_fn=images.collate, **kept)

    def epoch(self, number: int) -> int:
        """Load an epoch; returns its number of images."""
        torch.set_num_threads(self.threads)
        if self.sampler is not None:
            self.sampler.epoch = number
        batches = self.loader
        if self.normalize is not None:
            batches = to_device(self.loader, self.normalize, torch.device("cpu"))
        return sum(len(labels) for _, labels in batches)


def rates(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Images/s of each, the median of rounds in which they take turns."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            gc.collect()
            start = time.perf_counter()
            found[name].append(run() / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def record(benchmark, found: dict[str, float], run: Callable[[], int]) -> None:  # type: ignore[no-untyped-def]
    """All rates as extra info; the time that is stored is one more round of our own."""
    benchmark.extra_info.update(
        images_per_second={name: round(rate) for name, rate in found.items()},
        times_as_many={name: round(found["scaled"] / rate, 2) for name, rate in found.items()},
        load=os.getloadavg()[0],
    )
    benchmark.pedantic(run, rounds=1, iterations=1)
    told = (json.dumps(benchmark.extra_info[name]) for name in ("times_as_many", "images_per_second"))
    print(benchmark.group, *told)


@pytest.mark.parametrize("normalized", [False, True], ids=["uint8", "normalized"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_second_epoch(benchmark, folder: Path, num_workers: int, normalized: bool) -> None:  # type: ignore[no-untyped-def]
    """An epoch after the first one; batches are the same to the bit."""
    benchmark.group = f"second epoch of {COUNT} photographs, workers={num_workers}, normalized={normalized}"
    names = [*WAYS, "torchvision"]
    ways = {name: Way(name, folder / "photographs", folder / "stores", num_workers, normalized) for name in names}
    key = (1, 17)
    assert torch.equal(ways["scaled"].images[key][0], ways["exact, when used"].images[key][0])
    for way in ways.values():  # starts the processes that load
        way.epoch(0)
    found = rates({name: lambda way=way: way.epoch(1) for name, way in ways.items()}, ROUNDS)
    record(benchmark, found, lambda: ways["scaled"].epoch(2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_first_epoch(benchmark, folder: Path, num_workers: int) -> None:  # type: ignore[no-untyped-def]
    """From an empty cache to the end of the first epoch, with the pass that finds images that cannot be read."""
    benchmark.group = f"first epoch of {COUNT} photographs, workers={num_workers}"
    new = itertools.count()

    def run(name: str) -> int:
        stores = folder / f"new-{num_workers}-{next(new)}"
        return Way(name, folder / "photographs", stores, num_workers, normalized=False).epoch(0)

    found = rates({name: lambda name=name: run(name) for name in [*WAYS, "torchvision"]}, ROUNDS)
    record(benchmark, found, lambda: run("scaled"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process's memory")
@pytest.mark.parametrize("name", WAYS)
def test_memory(benchmark, folder: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    """Memory of a process of its own after two epochs of a quarter of the photographs and of all."""
    benchmark.group = "memory of the process (see extra_info)"
    found = {}

    def run() -> None:
        for classes in (2, 10):
            data = folder / f"{classes} classes"
            if not data.exists():
                data.mkdir()
                for place in sorted((folder / "photographs").iterdir())[:classes]:
                    (data / place.name).symlink_to(place)
            command = [sys.executable, __file__, name, str(data), str(folder / "stores")]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[f"{classes * COUNT // 10} images"] = json.loads(output.splitlines()[-1])

    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(anonymous_mib=found)
    print(name, found)


def _anonymous_mib() -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(status["RssAnon"].split()[0]) / 1024)


if __name__ == "__main__":
    way = Way(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), num_workers=0, normalized=True)
    for number in range(2):
        way.epoch(number)
    print(_anonymous_mib())
