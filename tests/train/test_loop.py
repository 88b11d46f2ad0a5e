"""Training runs on a small image folder with the CLIP that ships in the package."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs_on_disk import assert_same_run, contents, write_images

from upt_fast import FastUPT
from upt_fast.data import ImageDataset, ImageItem
from upt_fast.train import TrainConfig, TrainingDivergedError, evaluate, evaluate_run, load_run, predict, train
from upt_fast.train.setup import resolve_device

CLASSES = ("blue_thing", "green", "red")


@pytest.fixture(scope="module")
def split_data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for label, name in enumerate(CLASSES):
            write_images(root / split / name, 2 - label, count, 100 * label)
    return root


@pytest.fixture(scope="module")
def flat_data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("flat")
    for label, name in enumerate(CLASSES):
        write_images(root / name, 2 - label, 4, 100 * label)
    return root


def settings(data: Path, out: Path, **changes) -> dict:
    values = {
        "data": str(data),
        "out": str(out),
        "clip": "tiny-digits",
        "shots": 3,
        "epochs": 8,
        "batch_size": 4,
        "lr": 0.02,
        "depth_text": 2,
        "depth_vision": 2,
        "dropout": 0.1,  # draws random numbers in the forward pass too
        "device": "cpu",
        "progress": False,
    }
    return {**values, **changes}


@pytest.fixture(scope="module")
def finished(split_data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(TrainConfig.from_dict(settings(split_data, out)))
    return out


def test_files_of_a_run(finished):
    tensors, metrics, results = contents(finished)
    assert [record["epoch"] for record in metrics] == list(range(1, 9))
    assert metrics[0]["lr"] == 1e-5
    assert metrics[1]["lr"] == 0.02
    assert set(metrics[0]) == {"epoch", "lr", "loss", "accuracy", "val_loss", "val_accuracy", "best_epoch"}
    assert results["epoch"] == 8
    assert results["evaluated"] == "last"
    assert results["test"]["num_images"] == 9
    assert set(results["test"]["class_accuracy"]) == {"blue thing", "green", "red"}
    assert results["best"]["chosen_by"] == "validation accuracy"
    assert results["best"]["value"] == max(record["val_accuracy"] for record in metrics)
    assert (results["num_train"], results["num_val"]) == (9, 6)
    split = json.loads((finished / "split.json").read_text())
    assert len(split["train"]) == 9
    assert split["test_split"] == "test"
    assert any((finished / "tensorboard").iterdir())
    assert len(list((finished / "checkpoints").iterdir())) <= 2
    assert any("momentum" in key for key in tensors)


def test_training_learns(finished):
    _, metrics, results = contents(finished)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert results["test"]["accuracy"] > 0.5


def test_checkpoint_loads_as_a_model(finished):
    model = FastUPT.load(finished / "last")
    assert model.classnames == ("blue thing", "green", "red")
    evaluation, where = evaluate_run(finished, json.loads((finished / "config.json").read_text())["data"], device="cpu")
    assert where == "test folder"
    assert evaluation.class_accuracy == contents(finished)[2]["test"]["class_accuracy"]


def test_fp8(split_data, tmp_path):
    """A run in fp8 learns, and what reads it computes in fp8 too."""
    train(TrainConfig.from_dict(settings(split_data, tmp_path / "run", precision="fp8", memory="balanced")))
    _, metrics, results = contents(tmp_path / "run")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert results["test"]["accuracy"] > 0.5
    model = load_run(tmp_path / "run", "cpu")
    assert model.quantized
    evaluation, _ = evaluate_run(tmp_path / "run", split_data, device="cpu")
    assert evaluation.class_accuracy == results["test"]["class_accuracy"]


def test_kill_and_resume_is_the_uninterrupted_run(split_data, finished, tmp_path):
    out = tmp_path / "killed"
    options = [
        text
        for name, value in settings(split_data, out).items()
        for text in (f"--{name.replace('_', '-')}", str(value).lower() if isinstance(value, bool) else str(value))
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "upt_fast", "train", *options], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (out / "checkpoints" / "epoch-0003").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert not (out / "results.json").exists()
    # a cut line, and an epoch that was logged but not checkpointed, are what a kill can leave
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 99}\n{"epo')
    train(TrainConfig.from_dict(settings(split_data, out, resume=True, num_workers=1, cache_gib=0.0)))
    assert_same_run(out, finished)


def test_resume_of_a_finished_run_says_so(split_data, finished, caplog):
    before = contents(finished)
    with caplog.at_level("INFO", logger="upt_fast"):
        results = train(TrainConfig.from_dict(settings(split_data, finished, resume=True)))
    assert "is finished: 8 epochs" in caplog.text
    assert results == before[2]


def test_resume_needs_the_same_settings(split_data, finished, tmp_path):
    with pytest.raises(ValueError, match=r"other settings \(lr: 0\.02 there, 0\.1 here\)"):
        train(TrainConfig.from_dict(settings(split_data, finished, resume=True, lr=0.1)))
    with pytest.raises(ValueError, match="nothing to resume"):
        train(TrainConfig.from_dict(settings(split_data, tmp_path / "new", resume=True)))
    assert not (tmp_path / "new").exists()


def test_a_run_is_never_overwritten(split_data, finished, tmp_path):
    before = contents(finished)
    with pytest.raises(ValueError, match="holds a run already; add --resume"):
        train(TrainConfig.from_dict(settings(split_data, finished)))
    assert contents(finished)[1:] == before[1:]
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty"):
        train(TrainConfig.from_dict(settings(split_data, tmp_path)))
    with pytest.raises(ValueError, match="is a file"):
        train(TrainConfig.from_dict(settings(split_data, tmp_path / "thesis.tex")))


def test_what_a_kill_before_the_first_step_leaves_is_no_run(split_data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in (".lock", "split.json", ".config.json.abc.tmp"):
        (out / name).touch()
    assert train(TrainConfig.from_dict(settings(split_data, out, epochs=1)))["epoch"] == 1


def test_divergence_stops_and_keeps_the_last_good_checkpoint(split_data, tmp_path):
    with pytest.raises(TrainingDivergedError, match=r"at step \d+ \(epoch \d+, learning rate .*Try a lower --lr"):
        train(TrainConfig.from_dict(settings(split_data, tmp_path / "run", lr=1e30, depth_text=1)))
    model = FastUPT.load(tmp_path / "run" / "last")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.fixture
def damaged_data(split_data, tmp_path) -> Path:
    root = tmp_path / "damaged"
    shutil.copytree(split_data, root)
    for path in ("test/red/0.jpg", "train/green/1.png"):
        (root / path).write_bytes((root / path).read_bytes()[:200])
    return root


def test_corrupt_images_stop_before_training(damaged_data, tmp_path):
    with pytest.raises(
        ValueError, match=r"2 image\(s\) cannot be read: .*train/green/1.png.*test/red/0.jpg.*--on-corrupt skip"
    ):
        train(TrainConfig.from_dict(settings(damaged_data, tmp_path / "run", shots=4)))
    assert not (tmp_path / "run").exists()


def test_corrupt_images_are_left_out_on_demand(damaged_data, tmp_path, caplog):
    changes = {"shots": 4, "epochs": 1, "on_corrupt": "skip", "final_model": "best"}
    results = train(TrainConfig.from_dict(settings(damaged_data, tmp_path / "run", **changes)))
    assert "left out: 2 image(s) cannot be read" in caplog.text
    assert len(results["skipped"]) == 2
    assert (results["num_train"], results["test"]["num_images"]) == (11, 8)
    assert results["evaluated"] == "best"


def test_without_split_folders(flat_data, tmp_path):
    out = tmp_path / "run"
    changes = {"epochs": 3, "augment": "none", "final_model": "best", "memory": "lean"}
    results = train(TrainConfig.from_dict(settings(flat_data, out, **changes)))
    assert results["test_images_from"] == "images that training does not use"
    assert results["best"]["chosen_by"].startswith("training loss")
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert results["best"]["value"] == min(losses)
    assert results["epoch"] == results["best"]["epoch"]
    evaluation, where = evaluate_run(out / "last", flat_data, device="cpu")
    assert (evaluation.num_images, where) == (3, "images that training did not use")
    Image.new("RGB", (9, 9)).save(flat_data / "red" / "new.png")
    try:
        (out / "results.json").unlink()
        with pytest.raises(ValueError, match=r"images in .* changed"):
            train(TrainConfig.from_dict(settings(flat_data, out, resume=True, **changes)))
    finally:
        (flat_data / "red" / "new.png").unlink()


def test_without_tensorboard(split_data, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level("INFO", logger="upt_fast"):
        train(TrainConfig.from_dict(settings(split_data, tmp_path / "run", epochs=1)))
    assert "no TensorBoard log" in caplog.text
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_one_class_is_no_task(tmp_path):
    write_images(tmp_path / "data" / "only", 2, 2, 0)
    with pytest.raises(ValueError, match="1 class, 'only'; wanted at least 2"):
        train(TrainConfig.from_dict(settings(tmp_path / "data", tmp_path / "run", shots=1)))


def test_evaluation_on_other_data(finished, tmp_path):
    write_images(tmp_path / "a" / "red", 0, 2, 200)
    write_images(tmp_path / "a" / "blue thing", 2, 1, 0)
    evaluation, where = evaluate_run(finished, tmp_path / "a", device="cpu")
    assert (evaluation.num_images, where, set(evaluation.class_accuracy)) == (3, "all images", {"red", "blue thing"})
    write_images(tmp_path / "a" / "violet", 2, 1, 0)
    with pytest.raises(ValueError, match="not trained on: violet; it knows 3 classes: blue thing, green, red"):
        evaluate_run(finished, tmp_path / "a", device="cpu")


def test_predict(finished, split_data):
    model = load_run(finished, device="cpu")
    paths = sorted((split_data / "test").rglob("*.*"))
    predictions = predict(model, paths, top_k=9, batch_size=4, progress=False)
    assert [prediction.path for prediction in predictions] == [str(path) for path in paths]
    for prediction in predictions:
        assert sorted(prediction.classnames) == sorted(model.classnames)
        assert sum(prediction.probabilities) == pytest.approx(1)
        assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)
    right = [path.parent.name.replace("_", " ") == p.classnames[0] for path, p in zip(paths, predictions, strict=True)]
    accuracy = contents(finished)[2]["test"]["accuracy"]
    assert sum(right) / len(right) == pytest.approx(accuracy)
    with pytest.raises(ValueError, match="top_k=0"):
        predict(model, paths, top_k=0)


class Constant(torch.nn.Module):
    """Answers class 0, with every parameter a model needs."""

    def __init__(self) -> None:
        super().__init__()
        self.classnames = ("a", "b", "c")
        self.preprocess_cfg = {"size": 4, "mean": (0.5,) * 3, "std": (0.5,) * 3}
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        logits = torch.zeros(len(images), 3)
        logits[:, 0] = 1.0
        return logits


def test_evaluation_counts():
    items = [ImageItem(Path(f"{i}"), f"{i}", label, "") for i, label in enumerate((0, 0, 0, 1))]
    dataset = ImageDataset(items, lambda image: image, [torch.zeros(3, 4, 4, dtype=torch.uint8)] * 4)
    model = Constant().train()
    evaluation = evaluate(model, dataset, batch_size=3, progress=False)
    assert model.training
    assert evaluation.accuracy == 0.75
    assert evaluation.mean_class_accuracy == 0.5
    assert evaluation.class_accuracy == {"a": 1.0, "b": 0.0}
    right, wrong = np.log(np.e + 2) - 1, np.log(np.e + 2)
    assert evaluation.loss == pytest.approx((3 * right + wrong) / 4)
    with pytest.raises(ValueError, match="0 images"):
        evaluate(model, ImageDataset([], lambda image: image))


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="CUDA device"):
        resolve_device("cuda:99")


@pytest.fixture
def same_accuracy(monkeypatch):
    """Validation accuracies that never become better than the second."""
    from upt_fast.train import trainer

    given, seen = trainer.evaluate, []

    def evaluate_as_told(*args, **kwargs):
        seen.append(given(*args, **kwargs))
        return replace(seen[-1], accuracy=(0.25, 0.5, 0.5, 0.4)[min(len(seen), 4) - 1])

    monkeypatch.setattr(trainer, "evaluate", evaluate_as_told)
    return seen


def test_patience_ends_a_run(split_data, tmp_path, same_accuracy, caplog):
    out = tmp_path / "run"
    values = settings(split_data, out, patience=3, final_model="best")
    with caplog.at_level("INFO"):
        results = train(TrainConfig.from_dict(values))
    assert (results["epochs_done"], results["epoch"], results["best"]["epoch"]) == (5, 2, 2)
    assert len(same_accuracy) == 5
    assert "no better validation accuracy for 3 epochs: the run ends after epoch 5" in caplog.text
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 5
    # it stays ended, also where a kill came before the results
    with caplog.at_level("INFO"):
        assert train(TrainConfig.from_dict({**values, "resume": True})) == results
    assert "is finished: 5 epochs are done" in caplog.text
    (out / "results.json").unlink()
    assert train(TrainConfig.from_dict({**values, "resume": True})) == results
    assert len(same_accuracy) == 5


def test_patience_wants_validation_images(flat_data, tmp_path):
    with pytest.raises(ValueError, match=r"patience=2 wants validation images.*add a val folder"):
        train(TrainConfig.from_dict(settings(flat_data, tmp_path / "run", patience=2)))
    assert not (tmp_path / "run").exists()
