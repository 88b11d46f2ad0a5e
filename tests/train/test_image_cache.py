"""Runs with decoded images on disk are, to the bit, those without."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs_on_disk import contents

from upt_fast.train import TrainConfig, train
from upt_fast.train.trainer import Trainer

CLASSES = ("blue", "green", "red")


def write_data(root: Path, size: tuple[int, int]) -> Path:
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                generator = np.random.default_rng([label, i, len(split)])
                pixels = generator.integers(0, 90, (*size, 3), dtype=np.uint8)
                pixels[..., 2 - label] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Images that are smaller than twice the CLIP's size, 32."""
    return write_data(tmp_path_factory.mktemp("small"), (50, 70))


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("large"), (90, 120))


@pytest.fixture(autouse=True)
def stores(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "images"
    monkeypatch.setenv("UPT_FAST_IMAGE_CACHE", str(folder))
    return folder


def settings(data: Path, out: Path, **changes) -> dict:
    values = {
        "data": str(data),
        "out": str(out),
        "clip": "tiny-digits",
        "method": "coop",
        "shots": 3,
        "epochs": 4,
        "batch_size": 4,
        "lr": 0.02,
        "device": "cpu",
        "progress": False,
    }
    return {**values, **changes}


def run(data: Path, out: Path, **changes) -> dict:
    """What a run leaves that must not hang on how images were kept."""
    train(TrainConfig.from_dict(settings(data, out, **changes)))
    return left(out)


def left(out: Path) -> dict:
    tensors, metrics, results = contents(out)
    return {"metrics": metrics, "results": results, **{name: t.numpy().tobytes() for name, t in tensors.items()}}


def pixel_files(stores: Path) -> list[Path]:
    return sorted(stores.glob("*/pixels-*"))


@pytest.mark.parametrize("augment", ["standard", "crop", "none"])
def test_images_that_are_not_scaled_train_as_exact_ones(small, tmp_path, stores, augment):
    scaled = run(small, tmp_path / "scaled", epochs=2, augment=augment)
    assert json.loads((tmp_path / "scaled" / "config.json").read_text())["cache"] == "scaled"
    assert len(pixel_files(stores)) == (1 if augment == "none" else 2)  # training, evaluation
    exact = run(small, tmp_path / "exact", epochs=2, augment=augment, cache="exact")
    assert scaled == exact


def test_evaluations_are_exact_and_crops_are_of_smaller_copies(large, tmp_path, stores):
    scaled, exact = (run(large, tmp_path / kind, epochs=1, cache=kind) for kind in ("scaled", "exact"))
    assert scaled["metrics"][0]["loss"] != exact["metrics"][0]["loss"]
    assert scaled["metrics"][0]["loss"] == pytest.approx(exact["metrics"][0]["loss"], rel=0.1)
    sizes = {path.stat().st_size for path in pixel_files(stores)}
    assert sizes == {9 * 3 * 64 * 85, 12 * 3 * 32 * 32}  # training images; validation and test
    none = [run(large, tmp_path / f"none-{kind}", epochs=1, cache=kind, augment="none") for kind in ("scaled", "exact")]
    assert none[0] == none[1]


def test_the_second_run_decodes_nothing(large, tmp_path, monkeypatch):
    first = run(large, tmp_path / "first", epochs=1)
    monkeypatch.setattr(Image, "open", None)
    assert run(large, tmp_path / "second", epochs=1) == first


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("room", [16, 1e-4, 0.0], ids=["all", "some", "none"])
def test_room_and_workers_change_nothing(large, tmp_path, stores, monkeypatch, num_workers, room):
    wanted = run(large, tmp_path / "a", epochs=2)
    monkeypatch.setenv("UPT_FAST_IMAGE_CACHE", f"{stores}-2")
    assert run(large, tmp_path / "b", epochs=2, num_workers=num_workers, cache_gib=room) == wanted


KILLED = """
import json, os, sys
from upt_fast.train import TrainConfig, train
from upt_fast.train.trainer import Trainer

step = Trainer._end_epoch
def kill(self, *args):
    if self.state.epoch == 2:
        os.kill(os.getpid(), 9)
    step(self, *args)
Trainer._end_epoch = kill
train(TrainConfig.from_dict(json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def killed(large, tmp_path_factory) -> tuple[Path, Path, dict]:
    """A run that was killed in its third epoch, its images, and what it would have left."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {
        **os.environ,
        "UPT_FAST_IMAGE_CACHE": str(folder / "images"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    arguments = json.dumps(settings(large, folder / "run", num_workers=2))
    done = subprocess.run([sys.executable, "-c", KILLED, arguments], env=environment, capture_output=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "run" / "results.json").exists()
    return folder / "run", folder / "images", run(large, folder / "whole")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("how", ["kept", "removed", "damaged", "unwritable"])
def test_kill_and_resume_is_the_uninterrupted_run(large, killed, tmp_path, stores, how, num_workers):
    out, images, wanted = killed
    shutil.copytree(out, tmp_path / "run", symlinks=True)
    if how == "unwritable":
        stores.write_text("a file in the way")
    elif how != "removed":
        shutil.copytree(images, stores)
    if how == "damaged":
        for path in pixel_files(stores):
            content = bytearray(path.read_bytes())
            content[1000] ^= 255
            path.write_bytes(content[:-20])
    assert run(large, tmp_path / "run", resume=True, num_workers=num_workers) == wanted


def test_a_run_of_before_there_was_a_choice_is_resumed_exact(large, tmp_path, monkeypatch):
    wanted = run(large, tmp_path / "whole", cache="exact")

    train_epoch = Trainer._train_epoch

    def stop(self, epoch, *args):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(self, epoch, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            run(large, tmp_path / "old", cache="exact")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    for name in ("cache", "cache_size"):
        del config[name]
    path.write_text(json.dumps({**config, "cache_gib": 1.0}))
    with pytest.raises(ValueError, match="cache: 'exact' there, 'scaled' here"):
        run(large, tmp_path / "old", cache="scaled", resume=True)
    train(TrainConfig.from_dict({**json.loads(path.read_text()), "resume": True}))
    assert left(tmp_path / "old") == wanted


def test_cache_size(large, tmp_path, stores):
    with pytest.raises(ValueError, match="cache_size=31; wanted at least this CLIP's image size, 32"):
        run(large, tmp_path / "a", cache_size=31)
    run(large, tmp_path / "b", epochs=1, cache_size=32)
    assert 9 * 3 * 32 * 43 in [path.stat().st_size for path in pixel_files(stores)]
    with pytest.raises(ValueError, match="cache_size: 32 there, None here"):
        run(large, tmp_path / "b", epochs=1, resume=True)


def test_images_that_cannot_be_read(large, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(large, data)
    for path in ("test/red/0.jpg", "train/green/1.png"):
        (data / path).write_bytes((data / path).read_bytes()[:200])
    with pytest.raises(ValueError, match=r"2 image\(s\) cannot be read"):
        run(data, tmp_path / "a", shots=4)
    skipped = run(data, tmp_path / "b", shots=4, epochs=1, on_corrupt="skip")
    assert len(skipped["results"]["skipped"]) == 2
    assert skipped["results"]["num_train"] == 11
