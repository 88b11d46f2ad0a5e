"""``upt-fast train`` under torchrun: the run of one process, whatever happens to the processes."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed
from runs_on_disk import assert_same_run, contents, killed_after_epoch, write_images

from upt_fast.cli import main
from upt_fast.common.closeness import relative_rms
from upt_fast.distributed.rendezvous import start_name
from upt_fast.train import TrainConfig, train

WORKER = Path(__file__).with_name("runs_worker.py")
CLASSES = 7
SECONDS = 300  # after which something hangs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for seed, (split, count) in enumerate({"train": 3, "val": 2, "test": 3}.items()):
        for label in range(CLASSES):
            write_images(root / split / f"thing_{label}", label % 3, count, 1000 * seed + 100 * label)
    return root


def settings(data: Path, out: Path, **changes) -> dict:
    values = {
        "data": str(data),
        "out": str(out),
        "clip": "tiny-digits",
        "shots": 3,
        "epochs": 6,
        "batch_size": 5,
        "lr": 0.02,
        "depth_text": 2,
        "depth_vision": 2,
        "dropout": 0.1,
        "test_batch_size": 4,
        "device": "cpu",
        "progress": False,
    }
    values.update(changes)
    return values


def train_arguments(values: dict) -> list[str]:
    resume = ["--resume"] if values.pop("resume", False) else []
    given = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}
    return ["-m", "upt_fast", "train", *(f"--{name.replace('_', '-')}={text}" for name, text in given.items()), *resume]


def launch(count: int, *arguments: str, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.Popen(
        [*command, f"--max-restarts={restarts}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(process: subprocess.Popen) -> str:
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return output


def of_rank(launcher: subprocess.Popen, rank: int) -> int:
    """The process of a rank that a launcher has started."""
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except (OSError, ValueError, IndexError):
            continue
    raise AssertionError(f"no process of rank {rank}")


def wait_for_epoch(launcher: subprocess.Popen, out: Path, epoch: int) -> None:
    deadline = time.monotonic() + SECONDS
    while not (out / "checkpoints" / f"epoch-{epoch:04d}").exists() and launcher.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """By the command line on two processes, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    process = launch(2, *train_arguments(settings(data, out)))
    output = said(process)
    assert process.returncode == 0, output
    lines = [line for line in output.splitlines() if "epoch 6" in line]
    assert len([line for line in lines if line.startswith("upt-fast: epoch 6")]) == 1, output
    assert output.count("accuracy") > 0
    assert sum(line.startswith("accuracy ") for line in output.splitlines()) == 1
    return out


@pytest.mark.slow
def test_the_command_line_is_the_run_of_one_process(data, finished, tmp_path):
    alone = tmp_path / "alone"
    train(TrainConfig.from_dict(settings(data, alone)))
    (tensors, metrics, results), (wanted, wanted_metrics, wanted_results) = contents(finished), contents(alone)
    assert results["environment"] == {**wanted_results["environment"], "processes": 2}
    assert wanted_results["environment"]["processes"] == 1
    assert results["test"]["class_accuracy"] == wanted_results["test"]["class_accuracy"]
    assert [record["val_accuracy"] for record in metrics] == [record["val_accuracy"] for record in wanted_metrics]
    assert tensors.keys() == wanted.keys()
    # in float32, where another order of sums is amplified step by step
    joined = [torch.cat([found[name].double().flatten() for name in wanted]) for found in (tensors, wanted)]
    assert relative_rms(*joined) <= 1e-3


@pytest.mark.slow
def test_in_float64(data, tmp_path):
    """Whole runs, with validation and test: 7 classes, batches of 5 and of 1, and three processes: nothing divides."""
    changes = {
        "upt": {"label_smoothing": 0.1, "accumulate": 3, "ema": 0.9},
        "one": {"batch_size": 1, "epochs": 1},
        "coop": {"method": "coop", "augment": "none", "feature_store": "off"},
        "views": {"method": "coop", "views": 2, "checkpoint_steps": 3},
        "cocoop": {"method": "cocoop"},
        "kgcoop": {"method": "kgcoop", "max_memory": "40MB", "optimizer": "adamw", "lr": 0.002},
        "zeroshot": {"method": "zeroshot"},
    }
    own = ("depth_text", "depth_vision", "dropout")  # UPT's

    def all_runs(out: Path) -> Path:
        runs = []
        for name, change in changes.items():
            values = settings(data, out / name, **{"epochs": 2, **change})
            runs.append({key: value for key, value in values.items() if "method" not in change or key not in own})
        file = tmp_path / f"{out.name}.json"
        file.write_text(json.dumps(runs))
        return file

    process = launch(3, str(WORKER), str(all_runs(tmp_path / "shared")))
    subprocess.run([sys.executable, str(WORKER), str(all_runs(tmp_path / "alone"))], check=True, timeout=SECONDS)
    output = said(process)
    assert process.returncode == 0, output
    for name in changes:
        tensors, metrics, results = contents(tmp_path / "shared" / name)
        wanted, wanted_metrics, wanted_results = contents(tmp_path / "alone" / name)
        for found, other in zip([*metrics, results["test"]], [*wanted_metrics, wanted_results["test"]], strict=True):
            assert found.keys() == other.keys()
            for key, value in found.items():
                assert value == pytest.approx(other[key], rel=1e-6), (name, key)  # losses of an evaluation are float32
        assert tensors.keys() == wanted.keys()
        for key, value in tensors.items():
            limit = 1e-10 * (1 + wanted[key].abs().max())
            assert (value - wanted[key]).abs().max() <= limit, (name, key)


@pytest.mark.slow
def test_processes_are_killed_and_all_begin_anew(data, finished, tmp_path):
    out = tmp_path / "run"
    process = launch(2, *train_arguments(settings(data, out)), restarts=2)
    for rank, epoch in ((1, 2), (0, 4)):
        wait_for_epoch(process, out, epoch)
        os.kill(of_rank(process, rank), signal.SIGKILL)
    output = said(process)
    assert process.returncode == 0, output
    assert output.count("upt-fast: resuming") == 2, output
    assert_same_run(out, finished)


@pytest.mark.slow
def test_interrupts_end_all_together(data, tmp_path):
    out = tmp_path / "run"
    told = f"torchrun --nproc-per-node 2 -m upt_fast train --config {out / 'config.json'} --resume"
    for kind, epoch in ((signal.SIGINT, 2), (signal.SIGTERM, 4)):
        process = launch(2, *train_arguments(settings(data, out, epochs=40, resume=epoch > 2)))
        wait_for_epoch(process, out, epoch)
        process.send_signal(kind)
        output = said(process)
        assert process.returncode != 0
        assert output.count(f"interrupted; continue with: {told}") == 1, output
        assert "lost another process" not in output
    assert "upt-fast: resuming" in output
    assert not (out / "results.json").exists()


METHOD = """
import os
import torch
from upt_fast import MethodConfig, PromptLearner, Prompts

class Failing(PromptLearner):
    method, config_class = "failing", MethodConfig
    calls = 0

    def __init__(self, config, setting):
        super().__init__(config, setting)
        self.n_text = 2
        self.ctx = torch.nn.Parameter(setting.initial_context(2))

    def forward(self):
        Failing.calls += self.training
        if os.environ.get("RANK") == "1" and Failing.calls > 9:
            raise ValueError("the second process has had enough")
        return Prompts(text=self.ctx[None, None])
"""


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(data, tmp_path):
    (tmp_path / "failing.py").write_text(METHOD)
    values = settings(data, tmp_path / "run", method=f"{tmp_path / 'failing.py'}:Failing", augment="crop")
    own = {key: value for key, value in values.items() if key not in ("depth_text", "depth_vision", "dropout")}
    process = launch(2, *train_arguments(own))
    output = said(process)
    assert process.returncode != 0
    assert output.count("process 1: the second process has had enough") == 1, output


@pytest.mark.slow
def test_bad_data_is_told_once(tmp_path):
    process = launch(2, *train_arguments(settings(tmp_path / "nowhere", tmp_path / "run")))
    output = said(process)
    assert process.returncode != 0
    assert output.count("upt-fast: error: ") == 1, output
    assert "does not exist" in output
    assert not (tmp_path / "run").exists()


@pytest.fixture
def two_processes(monkeypatch):
    """The environment of a launcher's first process, without a launcher."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def refusal(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_no_launcher(two_processes, data, tmp_path, capsys):
    given = train_arguments(settings(data, tmp_path / "run"))[2:]
    assert "no MASTER_ADDR, MASTER_PORT: start the processes with torchrun" in refusal(capsys, *given)


def test_without_accelerate(two_processes, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    error = refusal(capsys, *train_arguments(settings(data, tmp_path / "run"))[2:])
    assert "needs Accelerate: pip install upt_fast[distributed]" in error


def test_jobs_of_many_runs(two_processes, capsys):
    assert "--tasks on 2 processes" in refusal(capsys, "train", "--tasks", "grid.yaml")


def test_the_others_keep_silent(two_processes, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("upt_fast.cli.app.QUIET_SECONDS", 0)
    assert refusal(capsys, "train", "--tasks", "grid.yaml") == ""


def test_another_number_of_processes_is_told(data, tmp_path, monkeypatch, caplog):
    out = tmp_path / "run"
    with killed_after_epoch(monkeypatch, 1):
        train(TrainConfig.from_dict(settings(data, out, epochs=2)))
    recorded = json.loads((out / "choices.json").read_text())
    assert recorded["processes"] == 1
    (out / "choices.json").write_text(json.dumps(recorded | {"processes": 2}))
    train(TrainConfig.from_dict(settings(data, out, epochs=2, resume=True)))
    assert "this run began on 2 process(es) and goes on on 1" in caplog.text


def test_only_a_restart_resumes_by_itself(data, tmp_path, monkeypatch):
    from upt_fast.train.shared import resumed_if_restarted

    config = TrainConfig.from_dict(settings(data, tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not resumed_if_restarted(config, 1).resume  # nothing is there
    (tmp_path / "config.json").write_text("{}")
    assert not resumed_if_restarted(config, 0).resume
    assert resumed_if_restarted(config, 1).resume
    # a host was lost: its launcher is a new one, and the others count failures of their own
    (tmp_path / "choices.json").write_text('{"started_as": "job-7"}')
    assert not resumed_if_restarted(config, 0).resume
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    assert resumed_if_restarted(config, 0).resume
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert not resumed_if_restarted(config, 0).resume
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not resumed_if_restarted(config, 1).resume


def test_a_name_for_each_start():
    """Also where the store has the words and names of processes that are dead."""
    store = torch.distributed.HashStore()
    names = set()
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda rank: start_name(store, rank, 3, timedelta(seconds=20)), (2, 0, 1)))
        assert len(set(found)) == 1
        names |= set(found)
    assert len(names) == 3
    with pytest.raises(ValueError, match="process 1 of 2 did not come within"):
        start_name(store, 0, 2, timedelta(seconds=0.1))
