"""CoOp on the small CLIP, whose images no prompt changes: its features from a store, computed once, or in every step.

The images are JPEG files of 10 classes. Accuracies and losses are compared before anything is timed: with a store and
without one to the bit, with the image tower in every step to what float32 explains.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from common import measure
from PIL import Image

from upt_fast import FastPromptedCLIP
from upt_fast.train import Evaluation, TrainConfig, evaluate_run, train

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHOTS, SEEDS = (1, 2, 4, 8, 16), (1, 2, 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 16), ("test", 40)):
        for label, name in enumerate(DIGITS):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng((label, i, count)).integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((320, 240)).save(root / split / name / f"{i}.jpg")
    return root


def config(data: Path, out: Path, store: Path | str, **changes: object) -> TrainConfig:
    values = {
        **{"data": str(data), "out": str(out), "clip": "tiny-digits", "method": "coop", "augment": "none"},
        **{"device": "cpu", "progress": False, "feature_store": str(store), **changes},
    }
    return TrainConfig.from_dict(values)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> list[Path]:  # type: ignore[no-untyped-def]
    """15 runs, as a table of few-shot results has them."""
    folder = tmp_path_factory.mktemp("runs")
    for shots in SHOTS:
        for seed in SEEDS:
            train(config(data, folder / f"{shots}-{seed}", folder / "store", shots=shots, seed=seed, epochs=1))
    return sorted(path for path in folder.iterdir() if path.name != "store")


def images_in_every_step(patch: pytest.MonkeyPatch) -> None:
    """As if prompts changed the images."""
    patch.setattr(FastPromptedCLIP, "images_are_fixed", False)


def each(runs: list[Path], data: Path, store: Path | str) -> list[Evaluation]:
    return [evaluate_run(run, data, device="cpu", progress=False, feature_store=str(store))[0] for run in runs]


@pytest.mark.parametrize("provider", ["images", "off", "new store", "store"])
def test_evaluations(benchmark, runs, data, tmp_path, monkeypatch, provider: str) -> None:  # type: ignore[no-untyped-def]
    """15 runs evaluated on 400 images: without a store, with one that is empty at first, with one that has them."""
    benchmark.group = "evaluate 15 CoOp runs"
    wanted, store = each(runs[:2], data, "off"), tmp_path / "store"
    if provider == "images":
        images_in_every_step(monkeypatch)
        for a, b in zip(each(runs[:2], data, "off"), wanted, strict=True):
            assert abs(a.loss - b.loss) < 1e-5 * b.loss
    elif provider != "off":
        assert each(runs[:2], data, store) == wanted
    where = store if "store" in provider else "off"

    def run() -> None:
        if provider == "new store":
            shutil.rmtree(store, ignore_errors=True)
        each(runs, data, where)

    measure(benchmark, run, rounds=3, provider=provider)


@pytest.mark.parametrize("provider", ["images", "off", "store"])
def test_training(benchmark, data, tmp_path, monkeypatch, provider: str) -> None:  # type: ignore[no-untyped-def]
    """20 epochs of 16 images per class, the run's evaluation with it: 100 steps of 32 images."""
    benchmark.group = "train CoOp with augment none"
    count = iter(range(99))

    def run(store: Path | str, **changes: object) -> Callable[[], float]:
        out = tmp_path / str(next(count))
        return lambda: train(config(data, out, store, **{"epochs": 20, **changes}))["test"]["loss"]

    wanted, store = run("off", epochs=2)(), tmp_path / "store"
    if provider == "images":
        images_in_every_step(monkeypatch)
        assert abs(run("off", epochs=2)() - wanted) < 1e-3 * wanted
    elif provider == "store":
        assert run(store, epochs=2)() == wanted
    where = store if provider == "store" else "off"
    measure(benchmark, lambda: run(where)(), rounds=3, provider=provider)
