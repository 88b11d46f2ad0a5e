"""Small folders of images, and what runs on them leave, for the tests of training."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file


def write_images(folder: Path, channel: int, count: int, seed: int) -> None:
    """Images of 40 x 36 pixels, PNG and JPEG, that are told apart by their brightest channel."""
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(seed + i).integers(0, 90, (36, 40, 3), dtype=np.uint8)
        pixels[..., channel] += 150
        Image.fromarray(pixels).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")


def write_dataset(root: Path, classes: Sequence[str], step: int = 0, **counts: int) -> Path:
    """A folder of splits, each with so many images of each class; returns the root.

    Args:
        root: of the dataset.
        classes: up to 3 names, each of one brightest channel.
        step: between the splits' random numbers; 0: their first images are the same.
        counts: images of each class, by the split's name.
    """
    for number, (split, count) in enumerate(counts.items()):
        for label, name in enumerate(classes):
            write_images(root / split / name, 2 - label, count, step * number + 100 * label)
    return root


def contents(run: Path) -> tuple[dict[str, torch.Tensor], list[dict], dict]:
    """Everything of a run that must not depend on whether it was interrupted: tensors, metrics, results."""
    tensors = {}
    for name in ("last", "best"):
        for file in (run / name).glob("*.safetensors"):
            tensors |= {f"{name}/{file.stem}/{key}": value for key, value in load_file(file).items()}
    metrics = []
    if (run / "metrics.jsonl").exists():  # not where nothing is trained
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in metrics:
        del record["seconds"]
    return tensors, metrics, json.loads((run / "results.json").read_text())


def assert_same_run(run: Path, other: Path) -> None:
    """Two runs are one, to the bit."""
    (tensors, metrics, results), (other_tensors, other_metrics, other_results) = contents(run), contents(other)
    assert metrics == other_metrics, run.name
    assert results == other_results, run.name
    assert tensors.keys() == other_tensors.keys(), run.name
    assert all(torch.equal(value, other_tensors[key]) for key, value in tensors.items()), run.name


def image_passes(monkeypatch) -> list[int]:
    """A list that fills with the sizes of the batches that image towers run, the feature store's own trial aside."""
    from upt_fast.engine.towers.vision import VisionTower
    from upt_fast.train.features import FixedFeatures

    seen, run, opened = [], VisionTower._features, FixedFeatures._open

    def counted(self, images, *args, **kwargs):
        seen.append(len(images))
        return run(self, images, *args, **kwargs)

    def uncounted(self, store):
        before = len(seen)
        section = opened(self, store)
        del seen[before:]
        return section

    monkeypatch.setattr(VisionTower, "_features", counted)
    monkeypatch.setattr(FixedFeatures, "_open", uncounted)
    return seen


def compute_in_float64(monkeypatch) -> None:
    """Runs from here on are in float64, which no option of theirs asks for."""
    from upt_fast.train import setup

    load_for = setup.load_for

    def load(*args):
        clip, options = load_for(*args)
        return clip, options | {"dtype": "fp64"}

    monkeypatch.setattr(setup, "load_for", load)


class Killed(BaseException):
    """In the place of a kill."""


@contextlib.contextmanager
def killed_after_epoch(monkeypatch, epoch: int):
    """Training inside dies once the checkpoint of an epoch is written."""
    from upt_fast.train import trainer

    write = trainer.write_checkpoint

    def dies(run_dir, model, optimizer, state, classes):
        write(run_dir, model, optimizer, state, classes)
        if state.epoch == epoch:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_checkpoint", dies)
        with pytest.raises(Killed):
            yield
