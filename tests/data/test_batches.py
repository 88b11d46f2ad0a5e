"""Augmentation of whole batches: the boxes, flips and pixels of single images' augmentation."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from upt_fast.data import (
    AugmentedDataset,
    BatchedAugmentation,
    EpochBatchSampler,
    ImageDataset,
    ImageItem,
    PixelStore,
    build_augmentation,
    cache_images,
    read_scaled,
)
from upt_fast.data.batches import Box, Crops, cut, draw_box, filter_weights
from upt_fast.data.transforms import CROP_RATIO, CROP_SCALE

CFG = {"size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic"}
SIZES = ((40, 50), (32, 32), (90, 60), (20, 31), (45, 200), (150, 30), (64, 64), (33, 47), (5, 4), (100, 101))


def photograph(height: int, width: int, seed: int) -> Image.Image:
    """Amplitudes fall with frequency, as those of photographs do."""
    noise = np.fft.rfft2(np.random.default_rng(seed).standard_normal((height, width, 3)), axes=(0, 1))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    pixels = np.fft.irfft2(noise / np.maximum(frequency, 1 / max(height, width))[..., None], (height, width), (0, 1))
    return Image.fromarray(np.clip(pixels / pixels.std() * 50 + 128, 0, 255).astype(np.uint8))


def make(tmp_path: Path, augment="standard", shorter=1000, sizes=SIZES, cfg=CFG, on_device=False, limit=10**9):
    """The same images by both ways."""
    (tmp_path / "data").mkdir(exist_ok=True)
    items = []
    for i, (height, width) in enumerate(sizes):
        path = tmp_path / "data" / f"{i}.png"
        if not path.exists():
            photograph(height, width, i).save(path)
        items.append(ImageItem(path, path.name, i % 3, "c"))
    load, transform = build_augmentation(cfg, augment)
    store = PixelStore(tmp_path / "stores", {"shorter": shorter}, limit)
    images, _ = cache_images(items, partial(read_scaled, shorter=shorter), store, progress=False)
    single = AugmentedDataset(ImageDataset(items, load), transform, seed=3)
    base = ImageDataset(items, load, images)
    return single, BatchedAugmentation(base, images, cfg, augment, seed=3, on_device=on_device)


def batches(dataset: AugmentedDataset, num_workers: int, epochs: int = 2, batch_size: int = 4):
    sampler = EpochBatchSampler(len(dataset), batch_size, seed=3)
    workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate, **workers)
    found = []
    for epoch in range(epochs):
        sampler.epoch = epoch
        found += [(images.to("cpu"), labels) for images, labels in loader]
    return found


def assert_same(found, wanted) -> None:
    assert len(found) == len(wanted)
    for (images, labels), (other_images, other_labels) in zip(found, wanted, strict=True):
        assert images.is_contiguous()
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("flip", [True, False], ids=["standard", "crop"])
@pytest.mark.parametrize("size", [*SIZES, (375, 500), (1, 7), (3000, 20)])
def test_boxes_are_torchvisions(size, flip):
    crop = v2.RandomResizedCrop(32, scale=CROP_SCALE, ratio=CROP_RATIO)
    for seed in range(30):
        torch.manual_seed(seed)
        wanted = crop.make_params([torch.empty(3, *size)])
        mirrored = flip and bool(torch.rand(1) < 0.5)
        found = draw_box(*size, flip, torch.Generator().manual_seed(seed))
        assert found == Box(wanted["top"], wanted["left"], wanted["height"], wanted["width"], mirrored)


@pytest.mark.parametrize("augment", ["standard", "crop"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("threads", [1, 3])
def test_images_that_are_not_scaled_give_the_same_bits(tmp_path, augment, num_workers, interpolation, threads):
    single, batched = make(tmp_path, augment, cfg={**CFG, "interpolation": interpolation})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(batches(batched, num_workers), batches(single, 0))
    finally:
        torch.set_num_threads(before)


def test_any_size_of_result(tmp_path):
    single, batched = make(tmp_path, cfg={**CFG, "size": (24, 200)})  # copied in pieces
    assert_same(batches(batched, 0), batches(single, 0))
    assert torch.equal(batched[1, 2][0], single[1, 2][0])
    assert batched[1, 2][1] == single[1, 2][1]


def test_the_default_generator_is_left_alone(tmp_path):
    _, batched = make(tmp_path)
    state = torch.get_rng_state()
    batched.__getitems__([(0, 0), (0, 1)])
    assert torch.equal(state, torch.get_rng_state())


def test_images_without_room_in_the_cache_give_the_same_bits(tmp_path):
    _, kept = make(tmp_path, shorter=36)
    wanted = batches(kept, 0)
    shutil.rmtree(tmp_path / "stores")
    _, some = make(tmp_path, shorter=36, limit=0)
    assert some.images.entries == [None] * len(SIZES)
    assert None not in kept.images.entries
    assert_same(batches(some, 0), wanted)


def test_parts_of_scaled_images_lie_where_the_boxes_do():
    image = torch.arange(60 * 80).view(1, 60, 80)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        box = draw_box(751, 1003, True, generator)
        part = cut(image, (751, 1003), box)
        top, left = divmod(int(part.image[0, 0, 0]), 80)
        height, width = part.image.shape[1:]
        for start, span, length, drawn, ratio in (
            (top, part.rows, height, (box.top, box.height), 60 / 751),
            (left, part.cols, width, (box.left, box.width), 80 / 1003),
        ):
            assert start + span[0] == pytest.approx(drawn[0] * ratio)
            assert start + span[1] == pytest.approx(sum(drawn) * ratio)
            assert 0 <= span[0] < 1
            assert length - 1 < span[1] <= length  # no pixel more than is needed
        assert part.flip == box.flip
    whole = cut(image, (751, 1003), Box(0, 0, 751, 1003))
    assert (whole.image.shape, whole.rows, whole.cols) == ((1, 60, 80), (0, 60), (0, 80))


def off(found, wanted) -> torch.Tensor:
    """Differences of pixels, of 255."""
    return torch.cat([(a.int() - b.int()).abs().float() for (a, _), (b, _) in zip(found, wanted, strict=True)])


def test_scaled_images_are_close(tmp_path):
    single, batched = make(tmp_path, shorter=64, sizes=((200, 260), (150, 150), (300, 200), (129, 250)))
    found, wanted = batches(batched, 0, epochs=6), batches(single, 0, epochs=6)
    assert 0 < off(found, wanted).mean() < 3.5
    other = make(tmp_path, shorter=32, sizes=((200, 260), (150, 150), (300, 200), (129, 250)))[1]
    assert off(batches(other, 0, epochs=6), wanted).mean() > off(found, wanted).mean()  # smaller ones are not as close


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shorter", [1000, 40], ids=["whole", "scaled"])
def test_resized_on_a_device(tmp_path, interpolation, num_workers, shorter):
    cfg = {**CFG, "interpolation": interpolation}
    _, single = make(tmp_path, cfg=cfg, shorter=shorter)
    _, batched = make(tmp_path, cfg=cfg, shorter=shorter, on_device=True)
    images, _ = batched.__getitems__([(0, i) for i in range(10)])
    assert isinstance(images, Crops)
    assert images.pixels.numel() == 3 * int(images.sizes.prod(dim=1).sum())
    differences = off(batches(batched, num_workers, epochs=4), batches(single, 0, epochs=4))
    assert differences.mean() < 0.05
    assert differences.max() <= (2 if shorter == 1000 else 8)  # the passes may clip in another order


def test_many_images_are_resized_in_parts(tmp_path, monkeypatch):
    _, batched = make(tmp_path, on_device=True)
    crops, _ = batched.__getitems__([(epoch, i) for epoch in range(2) for i in range(10)])
    whole = crops.to("cpu")
    monkeypatch.setattr("upt_fast.data.batches.PART", 3)
    assert torch.equal(crops.to("cpu"), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_resized_on_a_gpu(tmp_path):
    single, batched = make(tmp_path, on_device=True)
    crops, labels = batched.__getitems__([(0, i) for i in range(10)])
    differences = (crops.pin_memory().to("cuda", non_blocking=True).cpu().int() - crops.to("cpu").int()).abs()
    assert differences.max() <= 1
    assert labels.tolist() == [single[0, i][1] for i in range(10)]


def test_other_interpolations_are_resized_by_the_loader(tmp_path):
    cfg = {**CFG, "interpolation": "nearest"}
    single, batched = make(tmp_path, cfg=cfg, on_device=True)
    assert_same(batches(batched, 0), batches(single, 0))


def test_filter_weights():
    spans = torch.tensor([[0, 5], [0.5, 8.25]], dtype=torch.float64)
    weights = filter_weights(torch.tensor([5, 9]), spans, 9, 4, cubic=True)
    assert weights.shape == (2, 4, 9)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4))
    assert not weights[0, :, 5:].any()
    same = filter_weights(torch.tensor([6]), torch.tensor([[0.0, 6.0]]), 6, 6, cubic=True)[0]
    assert torch.allclose(same, torch.eye(6), atol=1e-6)
    shifted = filter_weights(torch.tensor([6]), torch.tensor([[1.0, 5.0]]), 6, 4, cubic=True)[0]
    assert torch.allclose(shifted, torch.eye(6)[1:5], atol=1e-6)
