"""Folders as people have them, trained and evaluated on by Python and by the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upt_fast.cli import main
from upt_fast.train import TrainConfig, evaluate_run, train


def write_images(root: Path, folders: dict[str, int]) -> Path:
    """So many images in each folder, all different."""
    for seed, (folder, count) in enumerate(folders.items()):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(100 * seed + i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    return root


SETTINGS = {
    "clip": "tiny-digits",
    "shots": 2,
    "epochs": 1,
    "batch_size": 2,
    "depth_text": 1,
    "depth_vision": 1,
    "device": "cpu",
    "progress": False,
}


def settings(data: Path, out: Path, **changes) -> TrainConfig:
    return TrainConfig.from_dict({**SETTINGS, "data": str(data), "out": str(out), **changes})


def command(data: Path, out: Path, *more: str) -> list[str]:
    values = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value).lower())]
    return ["train", "--data", str(data), "--out", str(out), *values, *more]


def split_of(out: Path) -> dict:
    return json.loads((out / "split.json").read_text())


@pytest.fixture
def linked(tmp_path) -> Path:
    """A subset made of links: the training folder, one of its classes, the images of another."""
    store = write_images(tmp_path / "store", {"cat": 3, "dog": 3, "held_out/cat": 1, "held_out/dog": 1})
    root = tmp_path / "data"
    (root / "train" / "dog").mkdir(parents=True)
    (root / "train" / "cat").symlink_to(store / "cat")
    for i in range(3):
        (root / "train" / "dog" / f"{i}.png").symlink_to(store / "dog" / f"{i}.png")
    (root / "test").symlink_to(store / "held_out")
    return root


def test_links_are_trained_on(linked, tmp_path, capsys):
    assert main(command(linked, tmp_path / "run")) == 0
    assert "links followed: 2 to folders, 3 to images" in capsys.readouterr().err
    assert all(key.startswith("train/") for key in split_of(tmp_path / "run")["train"])
    assert main(["eval", "--checkpoint", str(tmp_path / "run"), "--data", str(linked), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "2 images: test folder" in said.out
    assert "links followed: 2 to folders, 3 to images" in said.err


@pytest.mark.parametrize("place", ["train/bird", "train/dog/9.png"])
def test_links_that_lead_nowhere_are_as_corrupt_images(linked, tmp_path, capsys, place):
    (linked / place).symlink_to(tmp_path / "gone")
    assert main(command(linked, tmp_path / "run", "--shots", "all")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"1 image(s) cannot be read: cannot read {linked / place}: the link leads to" in said
    assert "--on-corrupt skip" in said
    assert not (tmp_path / "run").exists()
    results = train(settings(linked, tmp_path / "run", shots="all", on_corrupt="skip"))
    assert len(results["skipped"]) == 1
    assert place in results["skipped"][0]
    assert results["num_train"] == 6
    if place == "train/bird":
        with pytest.raises(ValueError, match=r"1 image\(s\) cannot be read: .*train/bird: the link leads to"):
            evaluate_run(tmp_path / "run", linked, device="cpu")


def test_groups_of_classes(tmp_path, capsys):
    root = write_images(tmp_path / "data", {"animal/cat": 3, "animal/dog": 3, "car": 3})
    assert main(command(root, tmp_path / "run")) == 2
    assert "--classes-from leaf" in capsys.readouterr().err.splitlines()[-1]
    assert main(command(root, tmp_path / "run", "--classes-from", "leaf")) == 0
    assert split_of(tmp_path / "run")["classnames"] == ["cat", "dog", "car"]
    evaluate = ["eval", "--checkpoint", str(tmp_path / "run"), "--data", str(root), "--device", "cpu", "--json"]
    capsys.readouterr()
    assert main([*evaluate, "--classes-from", "leaf"]) == 0
    assert json.loads(capsys.readouterr().out)["images_from"] == "images that training did not use"
    assert main([*evaluate, "--classes-from", "inner"]) == 2
    assert "classes_from='inner'; wanted" in capsys.readouterr().err


def test_classes_from_is_kept_on_resumption(tmp_path):
    root = write_images(tmp_path / "data", {"cat": 3, "dog": 3})
    train(settings(root, tmp_path / "run"))
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(ValueError, match="classes_from: 'top' there, 'leaf' here"):
        train(settings(root, tmp_path / "run", resume=True, classes_from="leaf"))
    config = tmp_path / "run" / "config.json"
    older = json.loads(config.read_text())
    del older["classes_from"]  # a run of before there was such a setting
    config.write_text(json.dumps(older))
    train(settings(root, tmp_path / "run", resume=True))
