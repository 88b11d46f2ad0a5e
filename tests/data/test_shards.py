"""Shards hold what the folder does, read as it does, and say what is wrong with them."""

import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import webdataset
from PIL import Image
from runs_on_disk import write_dataset

from upt_fast.cli import main
from upt_fast.data import (
    few_shot_split,
    find_duplicates,
    read_rgb,
    read_scaled,
    scan_folder,
    sharding,
    write_shards,
)
from upt_fast.data.images import digest_file
from upt_fast.data.pixel_store import FileKey
from upt_fast.data.shards import find_images
from upt_fast.data.sources import read_source

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("folder"), CLASSES, step=50, train=12, val=2, test=3)


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "50%d"  # a name that a pattern of names could trip over
    write_shards(folder, out, images_per_shard=10, progress=False)
    return out


def copy(shards: Path, out: Path) -> Path:
    shutil.copytree(shards, out)
    return out


def test_contents_and_order_are_the_folder_s(folder, shards):
    listing, wanted = scan_folder(shards), scan_folder(folder)
    assert (listing.classnames, listing.folders) == (wanted.classnames, wanted.folders)
    assert listing.splits.keys() == wanted.splits.keys()
    for split, items in wanted.splits.items():
        found = listing.splits[split]
        assert [(i.key, i.label, i.classname) for i in found] == [(i.key, i.label, i.classname) for i in items]
        for item, there in zip(items, found, strict=True):
            assert read_source(there.path) == item.path.read_bytes()
            assert digest_file(there.path) == digest_file(item.path)
            assert read_rgb(there.path).tobytes() == read_rgb(item.path).tobytes()
            assert torch.equal(read_scaled(there.path, 20).image, read_scaled(item.path, 20).image)
            assert FileKey.of(there.key, there.path)[:2] == FileKey.of(item.key, item.path)[:2]
    for shots in (3, None):
        keys = [[item.key for item in few_shot_split(x, shots, 1).train] for x in (listing, wanted)]
        assert keys[0] == keys[1]


def test_the_index_counts_images(shards):
    index = json.loads((shards / "shards.json").read_text())
    assert index["splits"] == {"train": 36, "val": 6, "test": 9}
    assert [shard["images"] for shard in index["shards"]] == [10, 10, 10, 6, 6, 9]
    assert all(sum(shard["images_of_class"]) == shard["images"] for shard in index["shards"])
    assert all(min(shard["images_of_class"]) > 0 for shard in index["shards"])  # classes are mixed
    assert sorted(path.name for path in shards.glob("*.tar")) == sorted(shard["name"] for shard in index["shards"])


def test_webdataset_reads_them(folder, shards):
    samples = list(webdataset.WebDataset([str(path) for path in sorted(shards.glob("train-*"))], shardshuffle=False))
    assert len(samples) == 36
    for sample in samples:
        about, label = json.loads(sample["json"]), int(sample["cls"])
        path = folder / about["path"]
        assert (about["class"], about["folder"]) == (CLASSES[label], CLASSES[label])
        assert sample[path.suffix[1:]] == path.read_bytes()


def test_the_same_folder_gives_the_same_bytes_and_shards_can_be_written_anew(folder, shards, tmp_path):
    for name, data in (("again", folder), ("anew", shards)):
        write_shards(data, tmp_path / name, images_per_shard=10, progress=False)
        for path in shards.iterdir():
            assert (tmp_path / name / path.name).read_bytes() == path.read_bytes(), path.name


def test_shard_size(folder, tmp_path):
    written = write_shards(folder, tmp_path / "out", shard_bytes=20_000, progress=False)
    index = json.loads((tmp_path / "out" / "shards.json").read_text())
    assert written.shards == len(index["shards"]) > 5
    assert all(shard["bytes"] < 20_000 + 60_000 for shard in index["shards"])


def test_one_tree_and_leaves_and_names(folder, tmp_path):
    write_shards(folder / "train", tmp_path / "one", progress=False)
    listing = scan_folder(tmp_path / "one")
    assert not listing.has_split_folders
    split, wanted = (few_shot_split(x, 2, 1) for x in (listing, scan_folder(folder / "train")))
    assert [i.key for i in split.test] == [i.key for i in wanted.test]

    shutil.copytree(folder / "train", tmp_path / "data" / "colours")
    names = tmp_path / "names.csv"
    names.write_text("blue,sky\ngreen,grass\nred,rose\n")
    write_shards(tmp_path / "data", tmp_path / "out", classes_from="leaf", classnames=names, progress=False)
    listing = scan_folder(tmp_path / "out")
    assert listing.folders == ("colours/blue", "colours/green", "colours/red")
    assert listing.classnames == ("sky", "grass", "rose")
    assert listing.splits["all"][0].classname == "sky"
    assert scan_folder(tmp_path / "out", "leaf", "folders").classnames == CLASSES
    assert listing.classes_from == "leaf"
    with pytest.raises(ValueError, match=r"classes_from='leaf', but the classes of .* are its top folders"):
        scan_folder(tmp_path / "one", "leaf")


def test_duplicates_are_found_without_reading(folder, tmp_path, monkeypatch):
    data = copy(folder, tmp_path / "data")
    shutil.copy(data / "train/red/0.jpg", data / "test/red/copy.jpg")
    shutil.copy(data / "train/red/1.png", data / "train/blue/copy.png")
    wanted = find_duplicates(few_shot_split(scan_folder(data), None, 1)).keys()
    write_shards(data, tmp_path / "out", progress=False)
    listing = scan_folder(tmp_path / "out")
    shutil.rmtree(tmp_path / "data")
    for path in (tmp_path / "out").glob("*.tar"):
        path.unlink()
    found = find_duplicates(few_shot_split(listing, None, 1)).keys()
    assert found == wanted
    assert len(found["two_classes"]) == len(found["train_test"]) == 1


def test_images_that_cannot_be_read(folder, tmp_path, caplog):
    data = copy(folder, tmp_path / "data")
    (data / "train/red/0.jpg").write_bytes((data / "train/red/0.jpg").read_bytes()[:300])
    (data / "test/red/9.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"image\(s\) cannot be read: .*; remove them, or .*--on-corrupt skip"):
        write_shards(data, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    written = write_shards(data, tmp_path / "out", on_corrupt="skip", progress=False)
    assert written.images == {"train": 35, "val": 6, "test": 9}
    assert len(written.left_out) == 2
    assert "left out: 1 image(s) cannot be read" in caplog.text or "left out: 2 image(s)" in caplog.text
    assert json.loads((tmp_path / "out" / "shards.json").read_text())["left_out"] == list(written.left_out)
    assert len(scan_folder(tmp_path / "out").splits["train"]) == 35
    for path in (data / "val").rglob("*.*"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no image of val of .* can be read"):
        write_shards(data, tmp_path / "none", on_corrupt="skip", progress=False)
    assert not (tmp_path / "none").exists()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2000:40000:50] = bytes(value ^ 255 for value in content[2000:40000:50])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda out: (out / "train-000001.tar").unlink(), r"1 of 6 shard\(s\) of .* cannot be read: train-000001.tar"),
        (lambda out: os.truncate(out / "val-000000.tar", 5000), r"val-000000.tar has 5000 bytes, not \d+; copy"),
        (lambda out: damage(out / "images.jsonl"), "images.jsonl is damaged: its checksum is not that in shards.json"),
        (lambda out: (out / "images.jsonl").unlink(), "cannot read .*images.jsonl: No such file"),
        (lambda out: (out / "shards.json").write_text("{"), "shards.json is damaged, or no index of shards"),
        (lambda out: (out / "shards.json").write_text('{"format": "x", "version": 1}'), "is of 'x', version 1; wanted"),
        (
            lambda out: (out / "shards.json").write_text('{"format": "upt_fast shards", "version": 1}'),
            "shards.json is damaged: KeyError",
        ),
    ],
    ids=["missing", "cut", "images", "no-images", "json", "format", "keys"],
)
def test_damaged_folders(shards, tmp_path, do, message, capfd):
    out = copy(shards, tmp_path / "out")
    do(out)
    with pytest.raises(ValueError, match=message):
        scan_folder(out)
    assert main(["train", "--data", str(out), "--out", str(tmp_path / "r"), "--clip", "tiny-digits"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("upt-fast: error: ")


def test_damaged_bytes_are_told_when_they_are_read(shards, tmp_path):
    out = copy(shards, tmp_path / "out")
    item = scan_folder(out).splits["train"][0]
    damage(item.path.shard)
    with pytest.raises(ValueError, match=r"cannot read .*train/blue/0.jpg: shard train-\d+.tar has other bytes there"):
        read_rgb(item.path)
    item.path.shard.unlink()
    with pytest.raises(ValueError, match=r"shard train-\d+.tar: No such file"):
        read_rgb(item.path)


def test_out_that_holds_something(folder, shards, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("")
    for out, message in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "full", "is not empty"),
        (shards, "holds shards already"),
        (folder / "out", "is in the dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            write_shards(folder, out, progress=False)
    (tmp_path / "empty").mkdir()
    write_shards(folder, tmp_path / "empty", progress=False)
    assert len(scan_folder(tmp_path / "empty").splits["train"]) == 36


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard-size", "1MB", "--images-per-shard", "3"], "both given"),
        (["--shard-size", "many"], "shard_size='many'; wanted a size"),
        (["--images-per-shard", "0"], "images_per_shard=0"),
        (["--on-corrupt", "ignore"], "on_corrupt='ignore'"),
        (["--classes-from", "middle"], "classes_from='middle'"),
        (["--classnames", "nowhere.csv"], "cannot read it: No such file"),
    ],
)
def test_bad_options(folder, tmp_path, capfd, options, message):
    assert main(["shard", str(folder), str(tmp_path / "out"), *options]) == 2
    assert message in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_webdataset(folder, tmp_path, monkeypatch, capfd):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "webdataset":
            raise ImportError("No module named 'webdataset'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["shard", str(folder), str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "pip install upt_fast[shards]" in said


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(folder, tmp_path, monkeypatch, error):
    load, calls = sharding._load, []

    def fails(source):
        calls.append(source)
        if len(calls) == 20:
            raise error
        return load(source)

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "_load", fails)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            write_shards(folder, tmp_path / "out", images_per_shard=4, progress=False)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from upt_fast.data import sharding
close, closed = sharding._Writer._close, []
def kill(self, name):
    close(self, name)
    closed.append(name)
    if len(closed) == 2:
        if sys.argv[3] == "kill":
            os.kill(os.getpid(), 9)
        print("ready", flush=True)
        __import__("time").sleep(60)
sharding._Writer._close = kill
sharding.write_shards(sys.argv[1], sys.argv[2], images_per_shard=4, progress=False)
"""


def test_a_killed_run_is_begun_anew_and_two_do_not_meet(folder, tmp_path):
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "out")]
    assert subprocess.run([*command, "kill"], capture_output=True, timeout=100).returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert left == [".out.shards.tmp"]
    with pytest.raises(ValueError, match="does not exist"):
        scan_folder(tmp_path / "out")
    with subprocess.Popen([*command, "wait"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(ValueError, match="another process is writing shards"):
            write_shards(folder, tmp_path / "out", progress=False)
        other.kill()
    time.sleep(0.1)
    write_shards(folder, tmp_path / "out", images_per_shard=10, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(scan_folder(tmp_path / "out").splits["train"]) == 36


def test_find_images(folder, shards, tmp_path, monkeypatch):
    assert len(find_images([shards, shards / "test"])) == 51 + 9
    assert [str(path) for path in find_images([shards / "test/red/0.jpg"])] == [str(shards / "test/red/0.jpg")]
    assert find_images([folder / "test/red/0.jpg", "nowhere.jpg"]) == [folder / "test/red/0.jpg", Path("nowhere.jpg")]
    monkeypatch.chdir(shards.parent)
    assert len(find_images([f"{shards.name}/val"])) == 6
    with pytest.raises(ValueError, match="hold no image test/re; wanted one of"):
        find_images([shards / "test/re"])


def test_an_image_is_opened_from_its_bytes_alone(shards, monkeypatch):
    item = scan_folder(shards).splits["train"][0]
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file: (opened.append(type(file).__name__), real(file))[1])
    read_rgb(item.path)
    assert opened == ["BytesIO"]
