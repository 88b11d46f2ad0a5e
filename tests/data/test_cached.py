"""Decoded images on disk: found again, decoded anew where they are damaged, bounded, shared by processes."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from upt_fast.data import BatchedAugmentation, ImageDataset, ImageItem, PixelStore, cache_images, read_scaled
from upt_fast.data import pixel_store as store_module
from upt_fast.data.pixel_store import KEEP_FREE

DECODE = partial(read_scaled, shorter=1000)


def write_image(path: Path, seed: int, height: int = 20, width: int = 30) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def items(tmp_path) -> list[ImageItem]:
    (tmp_path / "data").mkdir()
    found = []
    for i in range(6):
        path = tmp_path / "data" / f"{i}.png"
        write_image(path, i, 20 + i)
        found.append(ImageItem(path, path.name, 0, "c"))
    return found


def make_store(tmp_path: Path, name: str = "a", limit: int = 10**6) -> PixelStore:
    return PixelStore(tmp_path / "stores", {"dataset": name}, limit)


class Counted:
    """A decoder that says which files it has read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, path):
        self.read.append(path.name)
        return DECODE(path)


def fill(tmp_path: Path, items: list[ImageItem], **changes):
    decode = Counted()
    images, failures = cache_images(items, decode, make_store(tmp_path, **changes), progress=False)
    assert not failures
    for item, image in zip(items, images, strict=True):
        assert torch.equal(image, DECODE(item.path).image)
    return images, sorted(decode.read)


def pixel_file(tmp_path: Path, name: str = "a") -> Path:
    (found,) = make_store(tmp_path, name).folder.glob("pixels-*")
    return found


def test_the_second_time_nothing_is_decoded(tmp_path, items):
    images, read = fill(tmp_path, items)
    assert len(read) == 6
    assert pixel_file(tmp_path).stat().st_size == sum(3 * 30 * (20 + i) for i in range(6))
    _, read = fill(tmp_path, items)
    assert read == []
    _, read = fill(tmp_path, items, name="b")
    assert len(read) == 6
    assert [images.read(i).full_size for i in range(6)] == [(20 + i, 30) for i in range(6)]


def test_a_changed_file_is_decoded_anew(tmp_path, items):
    fill(tmp_path, items)
    before = items[2].path.stat()
    write_image(items[2].path, 99, 22)
    os.utime(items[2].path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert fill(tmp_path, items)[1] == ["2.png"]
    assert fill(tmp_path, items)[1] == []


def damage(path: Path, kind: str) -> None:
    index = path.parent / "index.jsonl"
    lines = index.read_text().splitlines()
    rows = [json.loads(line) for line in lines if line]
    offset = rows[3][3]  # of the third image; the first row is the header
    if kind == "pixel":
        with path.open("r+b") as file:
            file.seek(offset + 100)
            value = file.read(1)[0]
            file.seek(offset + 100)
            file.write(bytes([value ^ 1]))
    elif kind == "cut_off":
        with path.open("r+b") as file:
            file.truncate(offset + 10)
    elif kind == "lost":
        path.unlink()
    elif kind == "index_lost":
        index.unlink()
    elif kind == "index_cut_off":
        index.write_text(index.read_text()[:-30])
    elif kind == "bytes":
        index.write_bytes(index.read_bytes().replace(b'"2.png"', b'"2\xff\xfe.png"'))
    else:
        if kind == "header":
            rows[0]["dataset"] = "b"
        elif kind == "other_image":  # the pixels are whole, but another image's
            rows[3][3:] = rows[4][3:]
        elif kind == "sizes":  # as many pixels
            rows[3][4:6] = rows[3][4:6][::-1]
        elif kind == "full_size":
            rows[3][6] += 1
        elif kind == "huge":
            rows[3][3] = 10**30
        elif kind == "negative":
            rows[3][3] = -5
        elif kind == "types":
            rows[3][5] = None
        elif kind == "elsewhere":
            rows[0]["pixels"] = "../../data/0.png"
        index.write_text("\n".join(map(json.dumps, rows)) + "\n")


DAMAGES = {
    "pixel": 1,
    "cut_off": 4,
    "lost": 6,
    "index_lost": 6,
    "index_cut_off": 1,
    "bytes": 1,
    "header": 6,
    "other_image": 1,
    "sizes": 1,
    "full_size": 1,
    "huge": 1,
    "negative": 1,
    "types": 1,
    "elsewhere": 6,
}


@pytest.mark.parametrize(("kind", "count"), DAMAGES.items(), ids=DAMAGES)
def test_what_is_damaged_is_decoded_anew(tmp_path, items, kind, count):
    fill(tmp_path, items)
    damage(pixel_file(tmp_path), kind)
    assert len(fill(tmp_path, items)[1]) == count
    assert fill(tmp_path, items)[1] == []


def test_an_unreadable_image_is_left_out_and_told_each_time(tmp_path, items):
    items[1].path.write_text("no image")
    for wanted in (6, 1):
        decode = Counted()
        images, failures = cache_images(items, decode, make_store(tmp_path), progress=False)
        assert len(decode.read) == wanted
        assert list(failures) == [1]
        assert len(images) == 5
        assert torch.equal(images[1], DECODE(items[2].path).image)


@pytest.mark.parametrize("how", ["removed", "pickled", "pickled_and_removed"])
def test_images_outlive_their_file(tmp_path, items, how):
    images, _ = fill(tmp_path, items)
    if "removed" in how:
        shutil.rmtree(tmp_path / "stores")
    if "pickled" in how:
        images.decode = DECODE
        images = pickle.loads(pickle.dumps(images))
    assert all(torch.equal(image, DECODE(item.path).image) for item, image in zip(items, images, strict=True))


def test_writing_into_an_image_leaves_the_file_alone(tmp_path, items):
    images, _ = fill(tmp_path, items)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images[0].zero_()
    assert fill(tmp_path, items)[1] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of mappings")
def test_files_may_be_larger_than_memory(tmp_path, items):
    images, _ = fill(tmp_path, items)
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    flags = [text.rsplit("VmFlags:", 1)[1].split() for text in mappings if str(images.pixels) in text]
    assert flags
    assert all("nr" in found and "ac" not in found for found in flags)  # no reserve, not accounted


def test_no_folder(tmp_path, items, caplog):
    (tmp_path / "stores").write_text("a file in the way")
    images, _ = fill(tmp_path, items)
    assert images.entries == [None] * 6
    assert "cannot keep decoded images in" in caplog.text


def test_a_full_disk(tmp_path, items, caplog, monkeypatch):
    written = []

    def write(file, content):
        written.append(len(content))
        if len(written) > 4:  # pixels and a line of the index for each image
            file.write(content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        file.write(content)

    monkeypatch.setattr(store_module, "_write", write)
    images, _ = fill(tmp_path, items)
    assert [entry is None for entry in images.entries] == [False, False, True, True, True, True]
    assert "No space left on device" in caplog.text
    monkeypatch.undo()
    assert fill(tmp_path, items)[1] == ["2.png", "3.png", "4.png", "5.png"]
    assert fill(tmp_path, items)[1] == []


def test_some_of_the_disk_is_left_to_others(tmp_path, items, caplog, monkeypatch):
    usage = SimpleNamespace(free=KEEP_FREE + 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    images, _ = fill(tmp_path, items)
    assert images.entries == [None] * 6
    assert "no room in" in caplog.text
    usage.free = KEEP_FREE + 10**6
    assert None not in fill(tmp_path, items)[0].entries


def test_bytes_are_bounded(tmp_path, items, caplog):
    images, read = fill(tmp_path, items, limit=5000)
    assert [entry is None for entry in images.entries] == [False, False, True, True, True, True]
    assert len(read) == 6 + 4  # fill has asked for each once more
    assert "up to 4 of 6 are decoded when used" in caplog.text
    assert pixel_file(tmp_path).stat().st_size <= 5000


def test_a_limit_of_zero_writes_nothing(tmp_path, items, caplog):
    fill(tmp_path, items, limit=0)
    assert not (tmp_path / "stores").exists()
    assert not caplog.records


def test_room_is_made_of_what_was_not_used_longest(tmp_path, items):
    size = sum(3 * 30 * (20 + i) for i in range(6))
    for age, name in enumerate("cba"):
        fill(tmp_path, items, name=name)
        os.utime(make_store(tmp_path, name).folder / "index.jsonl", (age, age))
    images, _ = fill(tmp_path, items, name="new", limit=3 * size)
    assert None not in images.entries
    left = [name for name in "cba" if list(make_store(tmp_path, name).folder.glob("pixels-*"))]
    assert left == ["b", "a"]
    with make_store(tmp_path, "b").writing():  # is in use
        os.utime(make_store(tmp_path, "b").folder / "index.jsonl", (1, 1))
        fill(tmp_path, items, name="newer", limit=3 * size)
    left = [name for name in ("b", "a", "new") if list(make_store(tmp_path, name).folder.glob("pixels-*"))]
    assert left == ["b", "new"]


def test_a_store_that_was_used_is_kept_over_one_that_was_not(tmp_path, items):
    for name in "ab":
        fill(tmp_path, items, name=name)
        os.utime(make_store(tmp_path, name).folder / "index.jsonl", (1, 1))
    fill(tmp_path, items, name="a")
    fill(tmp_path, items, name="c", limit=30_000)
    assert list(make_store(tmp_path, "a").folder.glob("pixels-*"))
    assert not list(make_store(tmp_path, "b").folder.glob("pixels-*"))


def test_waste_is_removed(tmp_path, items):
    fill(tmp_path, items)
    first = pixel_file(tmp_path)
    for round_ in range(1, 4):
        for item in items:
            os.utime(item.path, ns=(1, round_))
        fill(tmp_path, items)
    size = sum(3 * 30 * (20 + i) for i in range(6))
    assert pixel_file(tmp_path).stat().st_size <= 3 * size
    assert not first.exists()


def forked(function, *args) -> int:
    """Call a function in a process of its own; returns its exit status."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(timeout=100)
    return process.exitcode


def fill_in_process(tmp_path: Path, items: list[ImageItem], start, results) -> None:
    start.wait()
    decode = Counted()
    cache_images(items, decode, make_store(tmp_path), progress=False)
    results.put(decode.read)


def test_processes_that_begin_together_decode_once(tmp_path, items):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=fill_in_process, args=(tmp_path, items, start, results)) for _ in range(3)]
    for process in processes:
        process.start()
    read = [name for _ in processes for name in results.get(timeout=60)]
    for process in processes:
        process.join()
    assert sorted(read) == [item.path.name for item in items]
    assert fill(tmp_path, items)[1] == []


def fill_and_die(tmp_path: Path, items: list[ImageItem], writes: int) -> None:
    left = [writes]
    write = store_module._write

    def write_or_die(file, content) -> None:
        left[0] -= 1
        if left[0] < 0:
            write(file, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, content)

    store_module._write = write_or_die
    cache_images(items, DECODE, make_store(tmp_path), progress=False)


@pytest.mark.parametrize("writes", [4, 5], ids=["in_pixels", "in_index"])
def test_after_a_kill_what_was_whole_is_found(tmp_path, items, writes):
    assert forked(fill_and_die, tmp_path, items, writes) == -signal.SIGKILL
    assert fill(tmp_path, items)[1] == ["2.png", "3.png", "4.png", "5.png"]
    assert fill(tmp_path, items)[1] == []


def anonymous() -> int:
    """Bytes of memory that are the process's own, not a file's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["RssAnon"].split()[0])


def train_and_measure(tmp_path: Path, items: list[ImageItem], results) -> None:
    torch.set_num_threads(1)  # as in a loader's processes: OpenMP's threads do not live on in a fork
    store = PixelStore(tmp_path / "stores", {"images": len(items)}, 10**9)
    images, _ = cache_images(items, DECODE, store, progress=False)
    cfg = {"size": 32, "interpolation": "bicubic"}
    augmented = BatchedAugmentation(ImageDataset(items, None, images), images, cfg, "standard", 1)
    augmented.__getitems__([(0, i) for i in range(8)])
    before = anonymous()
    for epoch in range(2):
        for first in range(0, len(items), 8):
            augmented.__getitems__([(epoch, i) for i in range(first, first + 8)])
    results.put((before, anonymous()))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process's memory")
def test_memory_does_not_grow_with_the_set(tmp_path):
    pixels = np.zeros((500, 1000, 3), dtype=np.uint8)
    items = []
    for i in range(64):
        pixels[:] = i
        items.append(ImageItem(tmp_path / f"{i:02}.png", f"{i:02}.png", 0, "c"))
        Image.fromarray(pixels).save(items[-1].path, compress_level=1)
    found = {}
    for count in (8, 64):  # 12 and 96 MB of pixels
        results = multiprocessing.get_context("fork").Queue()
        assert forked(train_and_measure, tmp_path, items[:count], results) == 0
        before, found[count] = results.get(timeout=10)
        assert found[count] - before < 10e6  # of two epochs
    assert found[64] - found[8] < 30e6  # the pass that decodes has a few images in flight
