"""Jobs of many tasks against each task alone: results, files, failures, kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from runs_on_disk import Killed, assert_same_run, compute_in_float64, contents, write_images

from upt_fast.cli.app import main
from upt_fast.tasks import run as job
from upt_fast.tasks.grid import read_tasks
from upt_fast.tasks.run import train_tasks
from upt_fast.tasks.table import Row, Table, format_table
from upt_fast.train.features import FixedFeatures
from upt_fast.train.loop import train

DATASETS = {"colours": ("blue_thing", "green", "red"), "tones": ("dark", "light")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for number, (name, classes) in enumerate(DATASETS.items()):
        for part, (split, count) in enumerate((("train", 4), ("val", 2), ("test", 3))):
            for label, classname in enumerate(classes):
                write_images(
                    root / name / split / classname, (label + number) % 3, count, 100 * label + 10 * number + 30 * part
                )
    return root


def write_tasks(path: Path, root: Path, **changes) -> Path:
    values = {
        "clip": "tiny-digits",
        "device": "cpu",
        "batch_size": 4,
        "lr": 0.02,
        "shots": 3,
        "data": [str(root / name) for name in DATASETS],
        "seed": [1, 2],
        "tasks": [{"method": "upt", "epochs": 4, "depth_text": 2, "depth_vision": 2, "dropout": 0.1}],
    }
    path.write_text(yaml.safe_dump(values | changes))
    return path


# of different lengths, two groups, one that validation ends early, one without training
MIXED = [
    {"method": "upt", "epochs": [2, 4], "depth_text": 2, "depth_vision": 2, "dropout": 0.1},
    {"method": "coop", "epochs": 6, "n_ctx": 2, "patience": 1, "seed": 1},
    {"method": "zeroshot", "epochs": 1, "seed": 1},
]


def assert_same_job(out: Path, other: Path, tasks) -> None:
    for task in tasks:
        assert_same_run(out / task.name, other / task.name)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("job")
    tasks = read_tasks(write_tasks(root / "tasks.yaml", data, tasks=MIXED), str(root / "out"))
    members = train_tasks(tasks, root / "out", progress=False)
    assert [member.error for member in members] == [None] * len(tasks)
    return tasks, root / "out"


def test_equals_separate_runs_in_float64(data, tmp_path, monkeypatch):
    compute_in_float64(monkeypatch)
    file = write_tasks(tmp_path / "tasks.yaml", data, tasks=MIXED)
    train_tasks(read_tasks(file, str(tmp_path / "out")), tmp_path / "out", progress=False)
    for task in read_tasks(file, str(tmp_path / "alone")):
        train(task.config.changed(progress=False))
        tensors, metrics, results = contents(tmp_path / "out" / task.name)
        others, other_metrics, other_results = contents(tmp_path / "alone" / task.name)
        assert tensors.keys() == others.keys()
        for key, value in tensors.items():
            assert (value.double() - others[key].double()).abs().max() <= 1e-10, (task.name, key)
        assert [record["epoch"] for record in metrics] == [record["epoch"] for record in other_metrics]
        assert results["test"]["class_accuracy"] == other_results["test"]["class_accuracy"]
        assert results["epochs_done"] == other_results["epochs_done"]


def test_equals_separate_runs(data, finished, tmp_path):
    tasks, out = finished
    for task in tasks[::3]:
        train(task.config.changed(out=str(tmp_path / task.name), progress=False))
        tensors, _, results = contents(out / task.name)
        others, _, other_results = contents(tmp_path / task.name)
        assert results["test"]["accuracy"] == other_results["test"]["accuracy"]
        for key, value in tensors.items():
            assert (value - others[key]).abs().max() <= 1e-4 * others[key].abs().max().clamp(min=1), (task.name, key)


def test_tasks_of_one_shape_share_steps(finished):
    tasks, out = finished
    groups = json.loads((out / "tasks.json").read_text())["groups"]
    assert sorted(map(len, groups)) == [2, 2, 8]
    assert {name for group in groups for name in group} == {task.name for task in tasks}
    summary = json.loads((out / "results.json").read_text())["tasks"]
    assert {entry["status"] for entry in summary.values()} == {"done"}


@pytest.mark.parametrize("moment", range(8))
def test_kill_at_a_random_moment(data, finished, tmp_path, monkeypatch, moment):
    """At a step or any change of the disk; what is left resumes to the uninterrupted job, to the bit."""
    tasks, out = finished
    often = {"checkpoint_steps": 1} if moment % 2 else {}
    count, at = 0, random.Random(moment).randrange(5, 400)

    def dies(real):
        def run(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                raise Killed
            return real(*args, **kwargs)

        return run

    again = read_tasks(write_tasks(tmp_path / "tasks.yaml", data, tasks=MIXED, **often), str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(Row, "update", dies(Row.update))
        patch.setattr(job, "summarise", lambda job: None)  # a kill writes nothing
        for name in ("rename", "replace", "fsync"):
            patch.setattr(os, name, dies(getattr(os, name)))
        with pytest.raises(Killed):
            train_tasks(again, tmp_path / "out", progress=False)
    resume = (tmp_path / "out" / "tasks.json").is_file()
    train_tasks(again, tmp_path / "out", resume=resume, progress=False)
    assert_same_job(tmp_path / "out", out, tasks)


def test_sigkill_and_resume(data, finished, tmp_path):
    tasks, out = finished
    file = write_tasks(tmp_path / "tasks.yaml", data, tasks=MIXED)
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "upt_fast", "train", "--tasks", str(file), "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waited = time.monotonic() + 300
    while not any(folder.glob("*/last")) and process.poll() is None and time.monotonic() < waited:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert main([*command[3:], "--resume"]) == 0
    assert_same_job(folder, out, tasks)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/checkpoints/*/*")}
    assert main([*command[3:], "--resume"]) == 0  # nothing is done again
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/checkpoints/*/*")}


def test_a_task_that_diverges_leaves_the_others(data, finished, tmp_path, capsys):
    """The others are what they are without it, and it stays failed when the job is resumed."""
    entries = [MIXED[0] | {"epochs": 4, "lr": [0.02, 1e30]}]
    file = write_tasks(tmp_path / "tasks.yaml", data, tasks=entries, data=str(data / "colours"), name="lr{lr}-{seed}")
    out = tmp_path / "out"
    assert main(["train", "--tasks", str(file), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert "2 of 4 tasks done" in captured.out
    assert "lr1e+30-1" in captured.out
    assert "step" in next(line for line in captured.out.splitlines() if line.startswith("lr1e+30-1"))
    ended = json.loads((out / "tasks.json").read_text())["ended"]
    assert sorted(ended) == ["lr1e+30-1", "lr1e+30-2"]
    tasks, whole = finished
    for seed in (1, 2):
        (alone,) = (t.name for t in tasks if t.name.startswith(f"upt-colours-seed{seed}-") and "epochs4" in t.name)
        mine, theirs = contents(out / f"lr0.02-{seed}"), contents(whole / alone)
        assert mine[2]["test"]["class_accuracy"] == theirs[2]["test"]["class_accuracy"]
        for key, value in mine[0].items():
            assert (value - theirs[0][key]).abs().max() <= 1e-4 * theirs[0][key].abs().max().clamp(min=1)
    assert main(["train", "--tasks", str(file), "--out", str(out), "--resume"]) == 1
    assert "2 of 4 tasks done" in capsys.readouterr().out


def test_a_task_whose_images_are_damaged_leaves_the_others(data, tmp_path, capsys):
    for label, name in enumerate(("cat", "dog")):
        write_images(tmp_path / "bad" / name, label, 4, 100 * label)
    next((tmp_path / "bad" / "cat").glob("*.png")).write_bytes(b"no image")
    folders = [str(data / "tones"), str(tmp_path / "bad")]
    file = write_tasks(tmp_path / "tasks.yaml", data, data=folders, seed=1)
    assert main(["train", "--tasks", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "1 of 2 tasks done" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert results["tones"]["status"] == "done"
    assert "cannot be read" in results["bad"]["error"] or "damaged" in results["bad"]["error"]
    assert not (tmp_path / "out" / "bad" / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"foo": 1}, "unknown key foo"),
        ({"seed": [1, 1]}, "two tasks are named"),
        ({"data": "/no/such/folder"}, "/no/such/folder"),
        ({"shots": "x"}, "--shots x"),
        ({"method": "nope", "tasks": None}, "method='nope'"),
        ({"resume": True}, "resume: wanted on the command line"),
        ({"seed": []}, "seed: an empty list"),
        ({"name": "{foo}"}, "name has foo"),
        ({"tasks": 3}, "tasks: wanted a list"),
        ({"patience": 0}, "patience=0"),
    ],
)
def test_bad_files(data, tmp_path, capsys, monkeypatch, changes, wanted):
    monkeypatch.setattr(job, "build_model", lambda *args: pytest.fail("the CLIP was loaded"))
    file = write_tasks(tmp_path / "tasks.yaml", data, **changes)
    assert main(["train", "--tasks", str(file), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert wanted in line
    assert not (tmp_path / "out").exists()


def test_bad_folders(data, finished, tmp_path, capsys):
    _, out = finished
    file = str(write_tasks(tmp_path / "tasks.yaml", data, tasks=MIXED))
    assert main(["train", "--tasks", file, "--out", str(out)]) == 2
    assert "holds tasks already; add --resume" in capsys.readouterr().err
    assert main(["train", "--tasks", file, "--out", str(tmp_path / "new"), "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    fewer = str(write_tasks(tmp_path / "fewer.yaml", data, tasks=MIXED[1:]))
    assert main(["train", "--tasks", fewer, "--out", str(out), "--resume"]) == 2
    assert "lacks its tasks" in capsys.readouterr().err
    assert main(["train", "--tasks", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "odd.yaml").write_text("- [")
    assert main(["train", "--tasks", str(tmp_path / "odd.yaml")]) == 2
    assert "is no YAML" in capsys.readouterr().err


def test_dry_run(data, tmp_path, capsys):
    file = write_tasks(tmp_path / "tasks.yaml", data, tasks=MIXED)
    assert main(["train", "--tasks", str(file), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "group 1: 8 task(s) of upt" in printed
    assert "group 3: 2 task(s) of zeroshot" in printed
    assert "12 tasks in 3 group(s)" in printed
    assert not (tmp_path / "out").exists()


def test_a_feature_store_is_opened_once(data, tmp_path, monkeypatch):
    opened, real = [], FixedFeatures._open
    monkeypatch.setattr(FixedFeatures, "_open", lambda self, store: opened.append(store) or real(self, store))
    entries = [{"method": ["coop", "kgcoop"], "epochs": 1, "n_ctx": 2, "augment": "none"}]
    file = write_tasks(tmp_path / "tasks.yaml", data, tasks=entries, feature_store=str(tmp_path / "store"))
    members = train_tasks(read_tasks(file, str(tmp_path / "out")), tmp_path / "out", progress=False)
    assert [member.error for member in members] == [None] * 8
    assert len(opened) == 1


def test_memory_bounds_a_group(data, tmp_path):
    tasks = read_tasks(write_tasks(tmp_path / "tasks.yaml", data), str(tmp_path / "out"))
    train_tasks(tasks, tmp_path / "out", max_memory=1, progress=False)
    assert [len(group) for group in json.loads((tmp_path / "out" / "tasks.json").read_text())["groups"]] == [1] * 4


def test_names_and_settings(tmp_path):
    (tmp_path / "tasks.yaml").write_text(
        "out: job\nclip: tiny-digits\ndata: [x/pets, x/food]\nlr: 1e-3\nshots: [1, 16]\n"
        "tasks:\n- method: [upt, coop]\n- config: maple\n  depth: [2, 3]\n- method: zeroshot\n  templates:\n"
        "  - ['a {}.']\n  - ['a {}.', 'the {}.']\n  shots: 1\n"
    )
    tasks = read_tasks(tmp_path / "tasks.yaml")
    names = [task.name for task in tasks]
    assert names[:5] == ["upt-pets-1shot", "upt-pets-16shot", "upt-food-1shot", "upt-food-16shot", "coop-pets-1shot"]
    assert "maple-food-16shot-depth3" in names
    assert {task.config.lr for task in tasks} == {1e-3}
    given = [task.config.options["templates"] for task in tasks if task.config.method == "zeroshot"]
    assert given[:2] == [("a {}.",), ("a {}.", "the {}.")]
    assert tasks[0].out == Path("job")
    assert Path(tasks[0].config.out) == Path("job/upt-pets-1shot")


def test_table(capsys, monkeypatch):
    rows = [Row("first"), Row("second"), Row("third")]
    rows[0].begin(20, 4)
    rows[0].set_postfix(epoch=2, loss="0.5", accuracy="0.75", lr="1", refresh=False)
    rows[0].update()
    rows[1].ended("failed", "no such thing")
    rows[2].ended("done", accuracy=0.5)
    lines = format_table(rows)
    assert lines[1].split() == ["first", "training", "5/20", "2", "0.5", "0.75"]
    assert lines[2].split() == ["second", "failed", "no", "such", "thing"]
    assert lines[3].split() == ["third", "done", "50.00", "%"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Table(rows) as table:
        table.show()
        table.last = 0
        table.show()
    shown = capsys.readouterr().err
    assert shown.count("first") == 2
    assert "\x1b[5A\x1b[J" in shown
    assert "3 tasks: 1 training, 1 failed, 1 done; step 5 of 20" in shown
