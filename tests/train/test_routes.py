"""Runs that find their route: recorded, resumed, the same to the bit as those that are told it."""

import json

import pytest
import torch
from measured_routes import ROUTES, declare_times, kept, unknown_machine
from runs_on_disk import Killed, assert_same_run, contents, killed_after_epoch, write_dataset

from upt_fast.distributed import Group
from upt_fast.engine.tuning import choices
from upt_fast.engine.tuning.candidates import STEP
from upt_fast.tasks.grid import read_tasks
from upt_fast.tasks.run import train_tasks
from upt_fast.testing import build, random_clip
from upt_fast.train import TrainConfig, train
from upt_fast.train import trainer as trainers
from upt_fast.train.routes import take_known_route, take_route


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), ("blue_thing", "green", "red"), train=4, val=2, test=2)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    with unknown_machine(monkeypatch, tmp_path / "cache"):
        yield


@pytest.fixture
def times(monkeypatch):
    return declare_times(monkeypatch)


SETTINGS = {"clip": "tiny-digits", "shots": 4, "epochs": 5, "batch_size": 4, "lr": 0.02, "device": "cpu"}
METHODS = {"depth_text": 2, "depth_vision": 2, "dropout": 0.1}
SETTINGS |= {"progress": False, **METHODS}


def config(data, out, **changes):
    return TrainConfig.from_dict({**SETTINGS, "data": str(data), "out": str(out), **changes})


def chosen(out):
    found = json.loads((out / "choices.json").read_text())["choices"]
    return [name for key, name in found.items() if key.startswith("step of")]


def weights(out):
    return {name: value for name, value in contents(out)[0].items() if name.startswith("last/prompt_learner")}


def assert_same_weights(out, other):
    found, wanted = weights(out), weights(other)
    assert found.keys() == wanted.keys()
    assert len(found) > 0
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


@pytest.mark.parametrize("winner", ROUTES[1:])
def test_a_run_that_measures_is_one_that_was_told(winner, data, tmp_path, times, caplog):
    times[winner] = 0.9
    caplog.set_level("INFO", "upt_fast")
    train(config(data, tmp_path / "measured"))
    assert chosen(tmp_path / "measured") == [winner]
    (line,) = (record.message for record in caplog.records if record.message.startswith("route "))
    assert line.startswith(f"route {winner}: 900 ms a step, 1.11 times as fast as torch")
    train(config(data, tmp_path / "told", backend=winner))
    assert_same_weights(tmp_path / "measured", tmp_path / "told")
    # the next run knows
    train(config(data, tmp_path / "next"))
    assert_same_run(tmp_path / "next", tmp_path / "told")
    assert chosen(tmp_path / "next") == [winner]


def test_a_run_that_was_stopped_goes_on_by_its_route(data, tmp_path, times, monkeypatch):
    times["xformers"] = 0.9
    train(config(data, tmp_path / "whole"))
    out = tmp_path / "stopped"
    with killed_after_epoch(monkeypatch, 2):
        train(config(data, out))
    assert chosen(out) == ["xformers"]
    (key,) = kept()
    choices.keep(key, {"choice": "torch", "usual": "torch", "ms": {"torch": 1.0}, "refused": {}})  # since then
    choices.forget()
    train(config(data, out, resume=True))
    assert chosen(out) == ["xformers"]
    assert_same_weights(out, tmp_path / "whole")


def test_a_run_that_is_stopped_while_it_measures(data, tmp_path, times, monkeypatch):
    """Before its first checkpoint nothing is chosen; it begins again, and measures again."""
    times["xformers"] = 0.9
    train(config(data, tmp_path / "told", backend="xformers"))
    out, step = tmp_path / "run", trainers.TunedStep.__call__

    def dies(self, images, labels):
        if len(self._batches) == 2:
            raise Killed
        return step(self, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.TunedStep, "__call__", dies)
        with pytest.raises(Killed):
            train(config(data, out))
    assert chosen(out) == []
    assert kept() == {}
    choices.forget()
    train(config(data, out, resume=True))
    assert chosen(out) == ["xformers"]
    assert_same_weights(out, tmp_path / "told")


def test_a_checkpoint_within_the_first_epoch_settles_it(data, tmp_path, times):
    times["torch/xformers"] = 0.9
    train(config(data, tmp_path / "run", checkpoint_steps=1, epochs=2))
    train(config(data, tmp_path / "told", checkpoint_steps=1, epochs=2, backend="torch/xformers"))
    assert chosen(tmp_path / "run") == ["torch/xformers"]
    assert_same_weights(tmp_path / "run", tmp_path / "told")


@pytest.mark.parametrize("changes", [{"tune": False}, {"ema": 0.9}, {"max_memory": "1GB"}, {"epochs": 1}])
def test_runs_that_do_not_measure(changes, data, tmp_path, times, monkeypatch):
    if "epochs" in changes:  # too short to be worth it
        from upt_fast.steps import tuned

        monkeypatch.setattr(tuned, "SHARE", 0.05)
    times["xformers"] = 0.5
    train(config(data, tmp_path / "run", **changes))
    assert kept() == {}
    assert chosen(tmp_path / "run") == ["torch"]


def test_features_of_images_are_of_the_route_that_was_told(data, tmp_path, times):
    """Where steps take them, the image tower stays as it was when they were computed."""
    times["xformers"], times["torch/xformers"] = 0.5, 0.9
    options = {"method": "coop", "augment": "none"}

    def run(out, **changes):
        own = {name: value for name, value in SETTINGS.items() if name not in METHODS}
        train(TrainConfig.from_dict({**own, "data": str(data), "out": str(out), **options, **changes}))

    run(tmp_path / "run")
    assert chosen(tmp_path / "run") == ["torch/xformers"]
    ((key, entry),) = kept().items()
    assert "from features" in key
    assert set(entry["ms"]) == {"torch", "torch/xformers"}
    run(tmp_path / "told", backend="torch/xformers")
    assert_same_weights(tmp_path / "run", tmp_path / "told")


def test_older_runs_go_on_by_the_usual_route(data, tmp_path, times, monkeypatch):
    """A record without a route is of a run that had the usual one, whatever is known by now."""
    with killed_after_epoch(monkeypatch, 2):
        train(config(data, tmp_path / "run", tune=False))
    record = json.loads((tmp_path / "run" / "choices.json").read_text())
    record["choices"] = {}
    (tmp_path / "run" / "choices.json").write_text(json.dumps(record))
    choices.forget()
    times["xformers"] = 0.9
    train(config(data, tmp_path / "other"))
    choices.forget()
    train(config(data, tmp_path / "run", resume=True))
    train(config(data, tmp_path / "told", backend="torch"))
    assert_same_run(tmp_path / "run", tmp_path / "told")


def test_tasks_take_what_is_known_for_all_of_them(data, tmp_path, times, monkeypatch):
    seen = []
    from upt_fast.steps.measured import MeasuredRoutes

    settle = MeasuredRoutes.settle
    monkeypatch.setattr(MeasuredRoutes, "settle", lambda self, key, *a: seen.append(key) or settle(self, key, *a))
    own = {name: value for name, value in SETTINGS.items() if name != "progress"}
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps({**own, "epochs": 2, "data": str(data), "seed": [1, 2]}))

    def run(out):
        return train_tasks(read_tasks(file, str(out)), out, progress=False)

    members = run(tmp_path / "known")
    assert all(member.error is None for member in members)
    (key,) = set(seen)
    assert "classes <=8; batch <=8" in key  # 2 x 3, 2 x 4
    choices.forget()
    choices.keep(key, {"choice": "xformers", "usual": "torch", "ms": {"xformers": 1.0}, "refused": {}})
    for member in run(tmp_path / "again"):
        assert member.error is None
        found = json.loads((tmp_path / "again" / member.task.name / "choices.json").read_text())["choices"]
        assert found[key] == "xformers"


class Second(Group):
    """Process 1 of 2, whose first process has found something."""

    def __init__(self, found):
        super().__init__()
        self.rank, self.size, self.found = 1, 2, found

    def by_first(self, call):
        return self.found


@pytest.mark.parametrize("found", ["xformers", "torch"])
def test_processes_follow_the_first(found, data, tmp_path, times):
    """Whatever they know themselves; nothing is measured by several."""
    torch.manual_seed(0)
    model = build("fast", random_clip(), ["cat", "dog"]).train()
    key = model.route_key(STEP, 4)
    choices.keep(key, {"choice": "torch/xformers", "usual": "torch", "ms": {"torch/xformers": 1.0}, "refused": {}})
    choices.forget()
    take_known_route(model, key, False, False, False, Second(found))
    assert choices.find(key) == found
    assert model.settled
    assert model.backend == ("auto" if found == "torch" else found)


def test_several_processes_do_not_measure(data, tmp_path, times):
    model = build("fast", random_clip(), ["cat", "dog"]).train()
    asked = []

    class First(Group):
        size = 2

        def by_first(self, call):
            asked.append(call())
            return asked[-1]

    take_route(config(data, tmp_path / "run"), model, tmp_path / "run", First())
    assert asked == ["torch"]
    assert model.settled
