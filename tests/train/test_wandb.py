"""Weights & Biases: what a run logs there, by the real package without a network and by stand-ins that fail."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from runs_on_disk import contents, killed_after_epoch, write_dataset

from upt_fast.cli import main
from upt_fast.train import TrainConfig, loop, train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), ("blue_thing", "green", "red"), train=3, test=2)


def settings(data, out, **changes):
    values = {
        "data": str(data),
        "out": str(out),
        "clip": "tiny-digits",
        "shots": 2,
        "epochs": 3,
        "batch_size": 2,
        "depth_text": 1,
        "depth_vision": 1,
        "device": "cpu",
        "wandb": "prompts",
        "progress": False,
    }
    return {**values, **changes}


def run(data, out, **changes):
    return train(TrainConfig.from_dict(settings(data, out, **changes)))


class Service:
    """In the place of the package: keeps what it is told, and fails when it is asked to."""

    def __init__(self, fails: str = "", error: Exception | None = None) -> None:
        self.fails, self.error = fails, error or RuntimeError("no network")
        self.runs = []

    def init(self, **options):
        self._fail("init")
        run = SimpleNamespace(
            options=options, logged=[], summary={}, exit_code=None, url="https://somewhere", offline=False
        )
        run.define_metric = lambda *args, **kwargs: None

        def log(record):
            if len(run.logged) == 1:
                self._fail("log")
            run.logged.append(record)

        def finish(exit_code):
            self._fail("finish")
            run.exit_code = exit_code

        run.log, run.finish = log, finish
        self.runs.append(run)
        return run

    def _fail(self, what):
        if what == self.fails:
            raise self.error


def stand_in(monkeypatch, service: Service) -> Service:
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.init, module.Settings = service.init, lambda **options: options
    monkeypatch.setitem(sys.modules, "wandb", module)
    return service


def test_what_is_logged(data, tmp_path, monkeypatch, caplog):
    service = stand_in(monkeypatch, Service())
    with caplog.at_level("INFO", logger="upt_fast"):
        results = run(data, tmp_path / "run")
    assert "Weights & Biases: https://somewhere" in caplog.text
    (logged,) = service.runs
    assert logged.options["project"] == "prompts"
    assert logged.options["name"] == "run"
    assert logged.options["config"] == json.loads((tmp_path / "run" / "config.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged.logged == lines
    assert logged.summary["test.accuracy"] == results["test"]["accuracy"]
    assert logged.summary["test_of.last.top5_accuracy"] == 1.0
    assert logged.exit_code == 0


def test_a_resumed_run_is_the_same_there(data, tmp_path, monkeypatch):
    service = stand_in(monkeypatch, Service())
    with killed_after_epoch(monkeypatch, 2):
        run(data, tmp_path / "run", wandb_name="mine")
    run(data, tmp_path / "run", wandb_name="mine", resume=True)
    first, second = service.runs
    assert first.options["id"] == second.options["id"]
    assert {first.options["name"], second.options["name"]} == {"mine"}
    assert (first.options["resume"], first.exit_code, second.exit_code) == ("allow", 1, 0)
    assert [record["epoch"] for record in first.logged] == [1, 2]
    assert [record["epoch"] for record in second.logged] == [3]
    (tmp_path / "run" / "results.json").unlink()
    run(data, tmp_path / "run", resume=True, wandb="elsewhere")
    assert service.runs[2].options["id"] != first.options["id"]
    (tmp_path / "run" / "results.json").unlink()
    run(data, tmp_path / "run", resume=True, wandb=None)
    assert len(service.runs) == 3


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_failure_loses_no_run(data, tmp_path, monkeypatch, caplog, fails):
    run(data, tmp_path / "plain", wandb=None)
    stand_in(monkeypatch, Service(fails))
    results = run(data, tmp_path / "run")
    (said,) = [record.message for record in caplog.records if "Biases" in record.message and record.levelname != "INFO"]
    assert said == "nothing more is logged to Weights & Biases (no network); the run goes on"
    ours, metrics, found = contents(tmp_path / "run")
    theirs, other_metrics, _ = contents(tmp_path / "plain")
    assert found == results
    assert metrics == other_metrics
    assert all((ours[key] == theirs[key]).all() for key in theirs)


def test_not_installed(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(loop, "scan_folder", lambda *args: pytest.fail("the data was read"))
    words = [
        "train",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "run"),
        "--clip",
        "tiny-digits",
        "--wandb",
        "prompts",
    ]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "wandb='prompts', and wandb is not installed; install it (pip install upt_fast[wandb])" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--wandb", " "], "wandb=' '"), (["--wandb-name", "mine"], "wandb_name='mine' with wandb=None")],
    ids=["empty", "alone"],
)
def test_bad_settings(data, tmp_path, capsys, words, message):
    command = ["train", "--data", str(data), "--out", str(tmp_path / "run"), "--clip", "tiny-digits", *words]
    assert main(command) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_tasks_are_runs_of_their_own(data, tmp_path, monkeypatch):
    service = stand_in(monkeypatch, Service())
    tasks = {**settings(data, tmp_path), "seed": [1, 2], "lr": [0.01, 1e30]}
    del tasks["out"], tasks["progress"]
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    assert main(["train", "--tasks", str(tmp_path / "tasks.yaml"), "--out", str(tmp_path / "out")]) == 1
    found = {logged.options["name"]: logged for logged in service.runs}
    assert set(found) == {"seed1-lr0.01", "seed2-lr0.01", "seed1-lr1e+30", "seed2-lr1e+30"}
    assert {name: logged.exit_code for name, logged in found.items()} == {name: int("1e" in name) for name in found}
    assert [record["epoch"] for record in found["seed1-lr0.01"].logged] == [1, 2, 3]


@pytest.mark.slow
def test_the_real_package_offline(data, tmp_path, monkeypatch, capfd):
    """Two processes' worth of one run: a part that dies, and its resumption with the same id."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    out = tmp_path / "run"
    with killed_after_epoch(monkeypatch, 2):
        run(data, out)
    run(data, out, resume=True)
    wandb.teardown()
    name = json.loads((out / "wandb.json").read_text())["id"]
    files = sorted(out.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) >= 1
    written = b"".join(file.read_bytes() for file in files)
    for word in (b"accuracy", b"test.top5_accuracy", b"tiny-digits"):
        assert word in written
    assert "Traceback" not in capfd.readouterr().err
