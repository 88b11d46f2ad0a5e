"""Jobs on workers that Ray places: what they leave against the same job in one process, workers that are lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from runs_on_disk import assert_same_run, write_images

from upt_fast.cli.app import main
from upt_fast.tasks.cluster import TRIES, train_on_ray
from upt_fast.tasks.grid import read_tasks
from upt_fast.tasks.job import prepare
from upt_fast.tasks.run import train_tasks
from upt_fast.tasks.worker import Worker, settings_of

DEADLY = """
import os
from dataclasses import dataclass
from upt_fast import MethodConfig, PromptLearner, register_method

@dataclass(frozen=True)
class DeadlyConfig(MethodConfig):
    "No options."

@register_method
class Deadly(PromptLearner):
    method, config_class, source = "deadly", DeadlyConfig, "ours"

    def __init__(self, config, setting):
        os._exit(1)  # with the process that makes it
"""


UPT = {"method": "upt", "seed": [1, 2, 3, 4], "lr": 0.02, "epochs": 12, "depth_text": 2, "dropout": 0.1}


def write_tasks(folder: Path, **changes) -> Path:
    if not (folder / "data").exists():
        for part, (split, count) in enumerate((("train", 6), ("test", 3))):
            for label, classname in enumerate(("blue_thing", "green", "red")):
                write_images(folder / "data" / split / classname, label, count, 100 * label + 30 * part)
    values = {"clip": "tiny-digits", "device": "cpu", "batch_size": 4, "shots": 6, "data": str(folder / "data")}
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump(values | {"tasks": [UPT]} | changes))
    return path


def holder_of(lock: Path) -> int | None:
    """The process that has a file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink() == lock:
                return int(link.parts[2])
        except OSError:  # gone, or somebody else's
            continue
    return None


def test_a_worker_is_killed(tmp_path):
    """A task diverges, another kills each of its workers, and one worker is killed: all others end in the same bits."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    bad = UPT | {"seed": 5, "lr": 1e30}
    deadly = {"method": f"{tmp_path}/deadly.py:Deadly", "epochs": 1, "seed": 1}
    changes = dict(name="{method}-{seed}", tasks=[UPT, bad, deadly])
    file, out = write_tasks(tmp_path, **changes), tmp_path / "out"
    command = [sys.executable, "-m", "upt_fast", "train", "--tasks", str(file), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--cpus-per-worker", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    waited, killed = time.monotonic() + 300, None
    while killed is None and process.poll() is None and time.monotonic() < waited:
        time.sleep(0.02)
        if (out / "upt-1" / "last").exists():
            killed = holder_of(out / "upt-1" / ".lock")
    if killed is not None:
        os.kill(killed, signal.SIGKILL)
    printed, errors = process.communicate(timeout=300)
    assert killed is not None, errors
    assert process.returncode == 1, errors
    assert "4 of 6 tasks done" in printed
    assert f"process {killed} on" in errors
    assert "is lost" in errors
    summary = json.loads((out / "results.json").read_text())["tasks"]
    deadly = next(name for name in summary if "deadly" in name)
    assert f"lost {TRIES} times" in summary[deadly]["error"]
    assert "the loss is" in summary["upt-5"]["error"]
    recorded = json.loads((out / "tasks.json").read_text())
    assert list(recorded["ended"]) == ["upt-5"]
    assert sorted(map(len, recorded["groups"])) == [2, 3]

    # the same groups in one process
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "tasks.json").write_text(json.dumps({"groups": recorded["groups"], "ended": {}}))
    members = train_tasks(
        read_tasks(write_tasks(tmp_path, **changes | {"tasks": [UPT, bad]}), str(alone)), alone, True, progress=False
    )
    for member in members[:4]:
        assert_same_run(out / member.task.name, alone / member.task.name)
    assert json.loads((alone / "tasks.json").read_text()) == recorded


def test_what_a_worker_does(tmp_path):
    """Without Ray: groups by memory, outcomes, what is told."""
    tasks = read_tasks(write_tasks(tmp_path), str(tmp_path / "out"))
    settings, told = settings_of(prepare(tasks, tmp_path / "out", False).members), []
    worker = Worker(2, told.append)
    assert worker.describe()[0] == os.getpid()
    assert worker.fit("", settings, 1) == [tasks[0].name]
    assert worker.fit("", settings, None) == [task.name for task in tasks]
    outcome = worker.train("", settings, str(tmp_path / "out"), {})
    assert outcome.results.keys() == {task.name for task in tasks}
    assert not outcome.errors
    assert not outcome.ended
    assert outcome.rows[tasks[0].name].step == outcome.rows[tasks[0].name].steps > 0
    assert told
    assert not (tmp_path / "out" / "tasks.json").exists()  # the driver's
    again = worker.train("", settings, str(tmp_path / "out"), {})
    assert again.results == outcome.results


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--workers", "0"], "workers=0; wanted at least 1"),
        (["--workers", "2", "--cpus-per-worker", "0"], "cpus_per_worker=0; wanted at least 1"),
        (["--ray-address", "here:1"], "wanted --workers N beside them"),
        (["--workers", "x"], "workers"),
        (["--workers", "2", "--resume"], "nothing to resume"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, wanted):
    file = write_tasks(tmp_path)
    assert main(["train", "--tasks", str(file), "--out", str(tmp_path / "out"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert wanted in line
    assert not (tmp_path / "out").exists()


def test_without_ray(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    file = write_tasks(tmp_path)
    assert main(["train", "--tasks", str(file), "--out", str(tmp_path / "out"), "--workers", "2"]) == 2
    assert "pip install upt_fast[cluster]" in capsys.readouterr().err


def test_no_gpu_by_number(tmp_path):
    tasks = read_tasks(write_tasks(tmp_path, device="cuda:1"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"device='cuda:N'.*wanted auto, cpu or cuda"):
        train_on_ray(tasks, tmp_path / "out", 2)
