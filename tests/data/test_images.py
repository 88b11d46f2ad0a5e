"""Decoding, transforms and the datasets' randomness."""

import os
import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from upt_fast.data import (
    AUGMENTATIONS,
    AugmentedDataset,
    EpochBatchSampler,
    ImageDataset,
    ImageItem,
    build_augmentation,
    build_eval_transform,
    build_normalize,
    decode_images,
    read_rgb,
)
from upt_fast.data.images import ImageDecodeError

CFG = {"size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic"}
RED = (200, 30, 10)


def noise(height: int = 40, width: int = 50, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def solid(mode: str, colour) -> Image.Image:
    return Image.new(mode, (20, 10), colour)


def pixel(path) -> tuple[int, ...]:
    image = read_rgb(path)
    assert image.mode == "RGB"
    return image.getpixel((2, 2))


@pytest.mark.parametrize(
    ("image", "name", "wanted"),
    [
        (solid("RGB", RED), "a.png", RED),
        (solid("L", 77), "a.jpg", (77, 77, 77)),
        (solid("1", 1), "a.png", (255, 255, 255)),
        (solid("I;16", 0xABCD), "a.png", (0xAB, 0xAB, 0xAB)),
        (solid("RGB", RED).quantize(4), "a.png", RED),
        (solid("RGB", RED).convert("CMYK"), "a.jpg", RED),
        (solid("RGBA", (*RED, 255)), "a.png", RED),
        (solid("RGBA", (0, 0, 0, 0)), "a.png", (255, 255, 255)),
        (solid("LA", (0, 0)), "a.png", (255, 255, 255)),
        (solid("RGB", RED), "a.webp", RED),
        (solid("RGB", RED), "a.bmp", RED),
    ],
    ids=["rgb", "gray", "bit", "gray16", "palette", "cmyk", "opaque", "clear", "gray_clear", "webp", "bmp"],
)
def test_modes(tmp_path, image, name, wanted):
    image.save(tmp_path / name)
    assert pixel(tmp_path / name) == pytest.approx(wanted, abs=6)


def test_transparent_palette_shows_white(tmp_path):
    image = solid("RGB", RED).quantize(4)
    image.save(tmp_path / "a.png", transparency=image.getpixel((0, 0)))
    assert pixel(tmp_path / "a.png") == (255, 255, 255)


def test_exif_orientation(tmp_path):
    image = noise(10, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    image.save(tmp_path / "a.png", exif=exif)
    upright = read_rgb(tmp_path / "a.png")
    assert upright.size == (10, 20)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(image), 3))


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "missing", "folder", "pipe", "float", "broken_link"])
def test_bad_files(tmp_path, kind):
    path = tmp_path / "a.jpg"
    if kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        noise(200, 200).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "float":
        path = tmp_path / "a.tiff"
        solid("F", 0.5).save(path)
    elif kind == "broken_link":
        path.symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(ImageDecodeError, match=f"cannot read .*{path.name}: "):
        read_rgb(path)


def test_decompression_bomb_is_a_failure_of_that_file(tmp_path, monkeypatch):
    noise(100, 100).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageDecodeError, match=r"a\.png"):
        read_rgb(tmp_path / "a.png")


def test_oversized_text_chunk_is_a_failure_of_that_file(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    noise().save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ImageDecodeError, match=r"a\.png"):
        read_rgb(tmp_path / "a.png")


def test_decode_images_keeps_order_and_names_failures(tmp_path):
    paths = []
    for i in range(40):
        paths.append(tmp_path / f"{i:02}.png")
        noise(8, 9, seed=i).save(paths[-1])
    paths[7].write_text("broken")
    load, _ = build_augmentation(CFG)
    decoded = decode_images(paths, load, limit_bytes=10**6, progress=False)
    assert list(decoded.failures) == [7]
    assert decoded.images[7] is None
    assert np.array_equal(decoded.images[39].permute(1, 2, 0), np.asarray(noise(8, 9, seed=39)))
    assert decoded.num_bytes == 39 * 8 * 9 * 3
    small = decode_images(paths, load, limit_bytes=39 * 8 * 9 * 3 - 1, progress=False)
    assert small.images is None
    assert list(small.failures) == [7]


def test_eval_transform_is_open_clips():
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.image_transform(32, is_train=False, mean=CFG["mean"], std=CFG["std"], interpolation="bicubic")
    for size in ((40, 50), (70, 33), (20, 90), (32, 32)):
        ours = build_normalize(CFG)(build_eval_transform(CFG)(noise(*size)))
        torch.testing.assert_close(ours, theirs(noise(*size)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("mode", "size"), [("squash", 32), ("shortest", (24, 48)), ("squash", (24, 48))])
def test_eval_transform_sizes(mode, size):
    transform = build_eval_transform({**CFG, "size": size, "resize_mode": mode})
    assert transform(noise(100, 37)).shape[1:] == ((size, size) if isinstance(size, int) else size)
    with pytest.raises(ValueError, match="resize_mode='longest'"):
        build_eval_transform({**CFG, "resize_mode": "longest"})


def make_dataset(tmp_path, augment: str, count: int = 12) -> AugmentedDataset:
    items = []
    for i in range(count):
        path = tmp_path / f"{i}.png"
        noise(40 + i, 50, seed=i).save(path)
        items.append(ImageItem(path, path.name, i % 3, "c"))
    load, transform = build_augmentation(CFG, augment)
    return AugmentedDataset(ImageDataset(items, load), transform, seed=3)


def batches(dataset: AugmentedDataset, num_workers: int, epochs: int = 2) -> list[torch.Tensor]:
    sampler = EpochBatchSampler(len(dataset), 5, seed=3)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, persistent_workers=num_workers > 0)
    found = []
    for epoch in range(epochs):
        sampler.epoch = epoch
        found += [images for images, _ in loader]
    return found


def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path):
    dataset = make_dataset(tmp_path, "standard")
    torch.manual_seed(0)
    alone = batches(dataset, 0)
    torch.manual_seed(99)
    with_workers = batches(dataset, 2)
    assert len(alone) == 4  # 2 full batches of 5 in 12 images, twice
    assert all(torch.equal(a, b) for a, b in zip(alone, with_workers, strict=True))
    same, other_epoch = dataset[1, 5][0], dataset[2, 5][0]
    assert torch.equal(dataset[1, 5][0], same)
    assert not torch.equal(other_epoch, same)


def test_augmentation_leaves_the_default_generator_alone(tmp_path):
    dataset = make_dataset(tmp_path, "standard", count=1)
    state = torch.get_rng_state()
    dataset[0, 0]
    assert torch.equal(state, torch.get_rng_state())


def test_augmentations(tmp_path):
    assert AUGMENTATIONS == ("standard", "crop", "none")
    none = make_dataset(tmp_path, "none", count=2)
    assert torch.equal(none[0, 1][0], none[5, 1][0])
    assert torch.equal(none[0, 1][0], build_eval_transform(CFG)(noise(41, 50, seed=1)))
    crop = make_dataset(tmp_path, "crop", count=1)
    standard = make_dataset(tmp_path, "standard", count=1)
    same = [torch.equal(crop[e, 0][0], standard[e, 0][0]) for e in range(40)]
    flipped = [torch.equal(crop[e, 0][0], standard[e, 0][0].flip(-1)) for e in range(40)]
    assert all(a or b for a, b in zip(same, flipped, strict=True))
    assert 8 < sum(flipped) < 32
    with pytest.raises(ValueError, match="augment='mixup'"):
        build_augmentation(CFG, "mixup")


def test_batch_order():
    sampler = EpochBatchSampler(10, 4, seed=1)
    first = list(sampler)
    assert [len(batch) for batch in first] == [4, 4]
    assert len(sampler) == 2
    assert first == list(sampler)
    sampler.epoch = 1
    second = list(sampler)
    assert [i for batch in first for _, i in batch] != [i for batch in second for _, i in batch]
    assert {epoch for batch in second for epoch, _ in batch} == {1}
    few = list(EpochBatchSampler(3, 4, seed=1))
    assert len(few) == 1
    assert sorted(index for _, index in few[0]) == [0, 1, 2]


def test_dataset_checks_its_cache(tmp_path):
    with pytest.raises(ValueError, match="1 decoded images for 0 items"):
        ImageDataset([], build_eval_transform(CFG), [torch.zeros(3, 2, 2, dtype=torch.uint8)])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 3, 64, 64), (2, 2, 3, 9, 1), (0, 3, 4, 4)])
def test_normalisation_has_torchvision_s_bits(shape, threads):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    cfgs = [CFG, *({"mean": torch.rand(3).tolist(), "std": (torch.rand(3) + 0.1).tolist()} for _ in range(20))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for cfg in cfgs:
            normalize = build_normalize(cfg)
            steps = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(cfg["mean"]), list(cfg["std"]))]
            wanted = v2.Compose(steps)(images)
            assert normalize.exact
            assert torch.equal(normalize(images), wanted)
            strided = images.transpose(-1, -2).contiguous().transpose(-1, -2)
            assert torch.equal(normalize(strided), wanted)
    finally:
        torch.set_num_threads(before)


def test_normalisation_of_others_is_torchvision_s():
    normalize = build_normalize(CFG)
    images = torch.rand(3, 4, 4)
    assert torch.equal(normalize(images.clone()), normalize.transform(images.clone()))
    meta = torch.empty(2, 3, 4, 4, dtype=torch.uint8, device="meta")
    assert normalize(meta).shape == (2, 3, 4, 4)


def test_memory_of_batches_is_used_again_when_nothing_refers_to_it():
    normalize = build_normalize(CFG)
    images = [torch.full((4, 3, 224, 224), i, dtype=torch.uint8) for i in range(6)]
    wanted = [normalize.transform(batch).clone() for batch in images]
    held = [normalize(batch) for batch in images]  # nothing is used again
    assert all(map(torch.equal, held, wanted))
    assert len(normalize.pool._blocks["batch"]) == 2
    places = [batch.data_ptr() for batch in held]
    view, array = held[4][1, 2], held[5].numpy()
    del held
    assert normalize(images[0]).data_ptr() not in places[4:]
    assert torch.equal(view, wanted[4][1, 2])
    assert (array == wanted[5].numpy()).all()
    del view
    again = normalize(images[1])
    assert torch.equal(again, wanted[1])
    assert torch.equal(normalize(images[2][:2]), wanted[2][:2])
    assert torch.equal(again, wanted[1])
    copied = pickle.loads(pickle.dumps(normalize))
    assert torch.equal(copied(images[3]), wanted[3])
    with torch.inference_mode():
        normalize(images[3])
    assert not normalize(images[3]).is_inference()


class Normalized:
    """Batches that loader processes normalise."""

    def __init__(self) -> None:
        self.normalize = build_normalize(CFG)

    def __getitem__(self, index):
        return self.normalize(torch.full((4, 3, 224, 224), index, dtype=torch.uint8))


def test_loader_processes_do_not_use_shared_memory_again():
    dataset = Normalized()
    loader = DataLoader(dataset, batch_size=None, sampler=range(24), num_workers=2, prefetch_factor=4)
    for index, batch in enumerate(loader):
        time.sleep(0.01)
        wanted = dataset.normalize.transform(torch.full((1, 3, 1, 1), index, dtype=torch.uint8))
        assert torch.equal(batch, wanted.expand_as(batch))
