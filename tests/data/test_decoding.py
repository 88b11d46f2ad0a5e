"""Pixels for the cache: read_rgb's where nothing is scaled, close to them where it is."""

import numpy as np
import pytest
import torch
from PIL import Image

from upt_fast.data import read_rgb, read_scaled
from upt_fast.data.decoding import scaled_size
from upt_fast.data.images import ImageDecodeError


def smooth(height: int, width: int) -> Image.Image:
    """An image with detail of all sizes, as photographs have."""
    generator = np.random.default_rng(height)
    pixels = np.zeros((height, width, 3))
    for size in (2, 8, 32, 128):
        noise = Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8))
        pixels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) / size**0.5
    return Image.fromarray((pixels * (255 / pixels.max())).astype(np.uint8))


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("RGB", "webp")],
)
@pytest.mark.parametrize("orientation", [1, 6], ids=["upright", "turned"])
def test_what_is_not_scaled_has_the_files_own_pixels(tmp_path, mode, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    smooth(40, 61).convert(mode).save(path, exif=exif)
    wanted = array(read_rgb(path))
    for shorter in (40, 1000):
        found = read_scaled(path, shorter)
        assert np.array_equal(found.image, wanted)
        assert found.full_size == wanted.shape[1:] == ((40, 61) if orientation == 1 else (61, 40))


@pytest.mark.parametrize("orientation", [1, 6], ids=["upright", "turned"])
@pytest.mark.parametrize(("mode", "suffix"), [("RGB", "jpg"), ("L", "jpg"), ("RGB", "png")])
def test_large_images_are_scaled_down(tmp_path, mode, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    smooth(600, 801).convert(mode).save(path, exif=exif, **({"quality": 90} if suffix == "jpg" else {}))
    found = read_scaled(path, 60)
    height, width = (60, 80) if orientation == 1 else (80, 60)
    assert found.image.shape == (3, height, width)
    assert found.full_size == ((600, 801) if orientation == 1 else (801, 600))
    wanted = array(read_rgb(path).resize((width, height), Image.Resampling.BICUBIC))
    off = np.abs(found.image.numpy().astype(int) - wanted)
    assert off.mean() < 1  # noise of all sizes is harder than photographs: 0.2
    assert off.max() <= 12


def test_a_large_jpeg_is_decoded_smaller(tmp_path, monkeypatch):
    smooth(600, 800).save(tmp_path / "a.jpg")
    sizes = []
    resize = Image.Image.resize

    def spy(image, *args, **kwargs):
        sizes.append(image.size)
        return resize(image, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", spy)
    read_scaled(tmp_path / "a.jpg", 60)
    assert sizes == [(200, 150)]  # a quarter: an eighth is less than twice the wanted size


@pytest.mark.parametrize(
    ("size", "shorter", "wanted"),
    [((375, 500), 448, (375, 500)), ((896, 1000), 448, (448, 500)), ((1000, 10), 4, (400, 4)), ((3, 2), 1, (2, 1))],
)
def test_scaled_sizes(size, shorter, wanted):
    assert scaled_size(*size, shorter) == wanted


def test_bad_files(tmp_path):
    truncated = tmp_path / "a.jpg"
    smooth(200, 200).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:2000])
    for path in (truncated, tmp_path / "missing.jpg", tmp_path):
        with pytest.raises(ImageDecodeError, match="cannot read "):
            read_scaled(path, 448)


def test_pixels_are_a_tensor_of_their_own(tmp_path):
    smooth(20, 30).save(tmp_path / "a.png")
    image = read_scaled(tmp_path / "a.png", 448).image
    assert image.dtype == torch.uint8
    image += 1  # no warning, no shared memory
    assert not torch.equal(image, read_scaled(tmp_path / "a.png", 448).image)
