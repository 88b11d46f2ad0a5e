"""Epochs over shards: each image once, front to back within a window, in memory that does not grow."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs_on_disk import write_images
from torch.utils.data import DataLoader

from upt_fast.data import ShardBatchSampler, scan_folder, write_shards
from upt_fast.data.streaming import shuffled
from upt_fast.train import TrainConfig
from upt_fast.train.images import RunImages

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    for label, name in enumerate(CLASSES):
        write_images(root / "train" / name, 2 - label, 12, 100 * label)
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "shards"
    write_shards(folder, out, images_per_shard=10, progress=False)
    return out


class Indices:
    """A dataset of keys."""

    def __getitem__(self, key):
        return key


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [6, 5])
def test_each_image_comes_once_in_an_epoch(shards, num_workers, batch_size):
    items = scan_folder(shards).splits["train"]
    sampler = ShardBatchSampler(items, batch_size, seed=3, window=8)
    loader = DataLoader(Indices(), batch_sampler=sampler, num_workers=num_workers, collate_fn=list)
    orders = []
    for epoch in (0, 1):
        sampler.epoch, sampler.start = epoch, 0
        batches = list(loader)
        assert [len(batch) for batch in batches] == [batch_size] * (36 // batch_size)
        assert {key[0] for batch in batches for key in batch} == {epoch}
        orders.append([key[1] for batch in batches for key in batch])
        assert len(set(orders[-1])) == len(orders[-1])
        sampler.start = 2  # a resumed run goes on with the same batches
        assert list(loader) == batches[2:]
    assert orders[0] != orders[1]
    sampler.seed = 4
    assert [index for batch in loader for _, index in batch] != orders[1][2 * batch_size :]


def test_an_epoch_reads_shards_front_to_back_within_a_window(shards):
    items = scan_folder(shards).splits["train"]
    sampler = ShardBatchSampler(items, 6, seed=3, window=4)
    order = list(sampler.order())
    assert sorted(order) == list(range(36))
    places, shard_order = {}, list(dict.fromkeys(items[index].path.shard for index in order))
    for shard in sampler.shards:
        for at, index in enumerate(shard):
            places[index] = at
    # as if read in the order of shards and offsets, no image is taken before those a window ahead of it came in
    starts, total = {}, 0
    for shard in sorted(shard_order, key=shard_order.index):
        starts[shard] = total
        total += sum(item.path.shard == shard for item in items)
    for at, index in enumerate(order):
        assert starts[items[index].path.shard] + places[index] <= at + 4


def test_a_window_holds_back_no_more_than_it_says():
    taken = []
    for given, _ in enumerate(shuffled(iter(range(1000)), 50, torch.Generator().manual_seed(0), taken.append)):
        assert len(taken) - given <= 51
    assert taken == list(range(1000))


def test_files_of_their_own_are_not_streamed(folder):
    with pytest.raises(ValueError, match="cannot be streamed; wanted shards"):
        ShardBatchSampler(scan_folder(folder).splits["train"], 4, seed=1)


def anonymous() -> int:
    """Bytes of memory that are the process's own, not a file's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["RssAnon"].split()[0])


def stream_and_measure(root: Path, results) -> None:
    config = TrainConfig(data=str(root), out="unused", clip="unused", shots="all", cache="stream", progress=False)
    items = scan_folder(root).splits["all"]
    images, _ = RunImages(config, {"size": 32}, root, torch.device("cpu")).training(items)
    sampler = ShardBatchSampler(items, 8, seed=1)
    images.__getitems__([(0, i) for i in range(8)])
    before = anonymous()
    for sampler.epoch in range(2):
        for batch in sampler:
            images.__getitems__(batch)
    results.put((before, anonymous()))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process's memory")
def test_memory_of_a_stream_does_not_grow_with_the_set(tmp_path):
    pixels, found = np.zeros((500, 1000, 3), dtype=np.uint8), {}
    for count in (8, 64):  # 12 and 96 MB of pixels
        for i in range(count):
            pixels[:] = i
            place = tmp_path / str(count) / CLASSES[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{i}.png", compress_level=1)
        write_shards(tmp_path / str(count), tmp_path / f"shards-{count}", images_per_shard=20, progress=False)
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        process = context.Process(target=stream_and_measure, args=(tmp_path / f"shards-{count}", results))
        process.start()
        before, found[count] = results.get(timeout=60)
        process.join()
        assert found[count] - before < 10e6
    assert found[64] - found[8] < 10e6
