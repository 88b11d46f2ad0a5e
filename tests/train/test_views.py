"""A fixed number of augmented views of each image: what they are, and their features, computed once."""

import json
from pathlib import Path

import pytest
import torch
from runs_on_disk import assert_same_run, contents, image_passes, killed_after_epoch, write_dataset

from upt_fast.cli import main
from upt_fast.clip.loading import load_clip
from upt_fast.data import AugmentedDataset, BatchedAugmentation, ImageDataset, build_augmentation
from upt_fast.data.feature_store import FeatureStore
from upt_fast.data.folder import scan_folder
from upt_fast.model import FastPromptedCLIP
from upt_fast.tasks.grid import read_tasks
from upt_fast.tasks.run import train_tasks
from upt_fast.train import TrainConfig, setup, train
from upt_fast.train.features import FeatureViews, FixedFeatures

NAMES = ["one", "three", "two"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), NAMES, step=1000, train=5, test=3)


def settings(data: Path, out: Path, store: Path | str, **changes) -> TrainConfig:
    values = {"data": str(data), "out": str(out), "clip": "tiny-digits", "method": "coop", "n_ctx": 3, "shots": 4}
    values |= {"epochs": 5, "batch_size": 4, "lr": 0.02, "augment": "standard", "views": 2, "device": "cpu"}
    return TrainConfig.from_dict(values | {"progress": False, "feature_store": str(store)} | changes)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    return image_passes(monkeypatch)


def make_images(data: Path, seed: int, views: int | None) -> AugmentedDataset:
    load, transform = build_augmentation(load_clip("tiny-digits").preprocess_cfg, "standard")
    return AugmentedDataset(ImageDataset(scan_folder(data).splits["train"], load), transform, seed, views)


def test_views_are_gone_through_in_turn(data):
    images = make_images(data, 1, 3)
    shown = [images[epoch, 4][0] for epoch in range(7)]
    assert all(torch.equal(shown[epoch], shown[epoch % 3]) for epoch in range(7))
    assert not torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[1], shown[2])
    assert torch.equal(make_images(data, 9, 3)[1, 4][0], shown[1])  # of the image, not of the run
    assert not torch.equal(make_images(data, 9, None)[1, 4][0], make_images(data, 1, None)[1, 4][0])


def test_features_are_the_views_own(data):
    images = make_images(data, 1, 2)
    model = FastPromptedCLIP.from_loaded(load_clip("tiny-digits"), NAMES, method="coop")
    source = FixedFeatures(model, 4, progress=False)
    features = FeatureViews(images, source, {})
    assert len(features) == len(images) == 15
    assert features.base.tensors()[0].shape[0] == 30
    for epoch, index in ((0, 0), (1, 0), (2, 7), (3, 14)):
        image, label = images[epoch, index]
        row, its_label = features[epoch, index]
        assert its_label == label
        with torch.no_grad():
            wanted = model.encode_image(source.normalize(image[None]), normalize=False)[0]
        assert (row - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("cache", ["scaled", "exact"])
def test_runs_from_features_equal_runs_from_images(data, tmp_path, monkeypatch, cache):
    train(settings(data, tmp_path / "features", "off", cache=cache))
    with monkeypatch.context() as patch:
        patch.setattr(setup, "has_fixed_features", lambda config, model: False)
        train(settings(data, tmp_path / "images", "off", cache=cache))
    (mine, metrics, results), (theirs, others, other_results) = map(
        contents, (tmp_path / "features", tmp_path / "images")
    )
    assert results["test"]["class_accuracy"] == other_results["test"]["class_accuracy"]
    assert [record["accuracy"] for record in metrics] == [record["accuracy"] for record in others]
    for key, value in mine.items():
        assert (value - theirs[key]).abs().max() <= 1e-4 * theirs[key].abs().max().clamp(min=1), key


def test_they_are_computed_once(data, tmp_path, passes):
    """By all methods, seeds and processes; other views are others."""
    store = tmp_path / "store"
    model = FastPromptedCLIP.from_loaded(load_clip("tiny-digits"), NAMES, method="coop")
    if FixedFeatures(model, 4, store=FeatureStore(tmp_path / "trial", 2**20)).section is None:
        pytest.skip("features depend on the batch here")
    passes.clear()
    train(settings(data, tmp_path / "off", "off"))
    computed = len(passes)
    for run, changes, wanted in (
        ("first", {}, True),
        ("second", {}, False),
        ("kgcoop", {"method": "kgcoop", "n_ctx": 4}, False),
        ("crop", {"augment": "crop"}, True),
        ("more", {"views": 3}, True),
        ("fewer", {"views": 1}, False),
        ("exact", {"cache": "exact"}, True),
    ):
        passes.clear()
        train(settings(data, tmp_path / run, store, **changes))
        assert (len(passes) > 0) == wanted, run
        assert len(passes) <= computed
    for run in ("first", "second"):
        assert_same_run(tmp_path / run, tmp_path / "off")


def test_resume_is_bit_exact(data, tmp_path, monkeypatch):
    train(settings(data, tmp_path / "whole", "off"))
    with killed_after_epoch(monkeypatch, 3):
        train(settings(data, tmp_path / "cut", tmp_path / "store"))
    train(settings(data, tmp_path / "cut", tmp_path / "store", resume=True))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["views"] == 2


def test_methods_that_prompt_images_see_the_views(data, tmp_path, monkeypatch):
    """Epochs that are a cycle apart have the same images, in another order."""
    seen, draw = {}, BatchedAugmentation._draw

    def noted(self, key):
        part = draw(self, key)
        seen.setdefault(key[0], {})[key[1]] = part.image.sum().item(), part.rows, part.cols, part.flip
        return part

    monkeypatch.setattr(BatchedAugmentation, "_draw", noted)
    config = settings(data, tmp_path / "run", "off", method="vpt_deep", epochs=4)
    assert train(config)["epochs_done"] == 4
    assert seen[0] == seen[2] != seen[1] == seen[3]


def test_tasks_from_views(data, tmp_path):
    """Of a job, one of them ending before the other, as alone."""
    shared = {"clip": "tiny-digits", "method": "coop", "n_ctx": 3, "shots": 4, "batch_size": 4, "lr": 0.02, "views": 2}
    shared |= {"device": "cpu", "data": str(data), "seed": 1, "epochs": [2, 5]}
    (tmp_path / "tasks.yaml").write_text(json.dumps(shared))
    tasks = read_tasks(tmp_path / "tasks.yaml", str(tmp_path / "job"))
    assert [member.error for member in train_tasks(tasks, tmp_path / "job", progress=False)] == [None, None]
    for task in tasks:
        train(task.config.changed(out=str(tmp_path / task.name), progress=False))
        (mine, _, results), (theirs, _, others) = contents(tmp_path / "job" / task.name), contents(tmp_path / task.name)
        assert results["test"]["class_accuracy"] == others["test"]["class_accuracy"]
        for key, value in mine.items():
            assert (value - theirs[key]).abs().max() <= 1e-4 * theirs[key].abs().max().clamp(min=1), key


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [(["--views", "0"], "views=0"), (["--views", "2", "--augment", "none"], "views=2 with augment='none'")],
)
def test_bad_settings(data, tmp_path, capsys, arguments, wanted):
    command = ["train", "--data", str(data), "--out", str(tmp_path / "run"), "--clip", "tiny-digits", *arguments]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert wanted in line
    assert not (tmp_path / "run").exists()
