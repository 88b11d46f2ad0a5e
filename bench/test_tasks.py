"""Twelve runs as one job, one after another, and in plain PyTorch: 3 renderings of digits, 2 shots, 2 seeds.

All are command lines, with all that a user waits for: Python, the CLIP, images, steps, checkpoints, the test. Test
accuracies of the first two are equal; the plain loop (plain_run.py) draws other crops and is held to the mean accuracy.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from upt_fast.demo.digits import write_image_folder

RENDERINGS = {"paper": ("paper", 0), "notes": ("notes", 0), "shuffled": ("notes", 7)}
SETTINGS = {"clip": "tiny-digits", "epochs": 10, "augment": "crop", "progress": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    root = tmp_path_factory.mktemp("digits")
    for name, (domain, seed) in RENDERINGS.items():
        for split in ("train", "test"):
            write_image_folder(root / name / split, split, domain, seed)
    return root


def grid(data: Path) -> list[dict[str, object]]:
    """The twelve runs' own settings."""
    return [
        {"data": str(data / name), "shots": shots, "seed": seed}
        for name in RENDERINGS
        for shots in (1, 4)
        for seed in (1, 2)
    ]


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "upt_fast", "train", *arguments], check=True, capture_output=True)


def one_job(method: str, data: Path, out: Path) -> None:
    settings = {key: value for key, value in SETTINGS.items() if key != "progress"}
    tasks = [{**run, "method": method} for run in grid(data)]
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**settings, "tasks": tasks}))
    command("--tasks", str(file), "--out", str(out))


def one_after_another(method: str, data: Path, out: Path) -> None:
    for run in grid(data):
        name = f"{Path(str(run['data'])).name}-{run['shots']}shot-seed{run['seed']}"
        settings = {**SETTINGS, **run, "method": method, "out": str(out / name)}
        command(*(f"--{key}={str(value).lower() if value is False else value}" for key, value in settings.items()))


def plain(method: str, data: Path, out: Path) -> None:
    script = str(Path(__file__).with_name("plain_run.py"))
    for run in grid(data):
        folder = out / f"{Path(str(run['data'])).name}-{run['shots']}shot-seed{run['seed']}"
        arguments = method, run["data"], run["shots"], run["seed"], SETTINGS["epochs"], folder
        subprocess.run([sys.executable, script, *map(str, arguments)], check=True, capture_output=True)


WAYS = {"one-after-another": one_after_another, "one-job": one_job, "plain": plain}
ACCURACIES: dict[str, dict[str, float]] = {}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["upt", "coop"])
def test_twelve_runs(benchmark, data: Path, tmp_path: Path, method: str, way: str) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"12 runs of {method} on tiny-digits"
    benchmark.extra_info["way"] = way
    benchmark.pedantic(WAYS[way], args=(method, data, tmp_path / "out"), rounds=1, iterations=1)
    found = {
        path.parent.name: json.loads(path.read_text())["test"]["accuracy"]
        for path in sorted((tmp_path / "out").glob("*/results.json"))
    }
    assert len(found) == 12
    benchmark.extra_info["runs_per_hour"] = round(12 * 3600 / benchmark.stats.stats.mean)
    mean = sum(found.values()) / len(found)
    benchmark.extra_info["mean_accuracy"] = round(mean, 4)
    if way == "plain":
        ours = ACCURACIES[method].values()
        assert abs(mean - sum(ours) / len(ours)) < 0.05
    else:
        assert ACCURACIES.setdefault(method, found) == found
