"""The moving average of the weights: its numbers, its place in checkpoints and results, its model."""

import inspect
import json

import pytest
import torch
import yaml
from runs_on_disk import assert_same_run, compute_in_float64, killed_after_epoch, write_dataset
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from upt_fast.cli import main
from upt_fast.tasks.grid import read_tasks
from upt_fast.tasks.run import train_tasks
from upt_fast.train import TrainConfig, evaluate_run, final, load_run, train
from upt_fast.train.averaging import WeightAverage

CLASSES = ("blue_thing", "green", "red")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), CLASSES, train=4, val=2, test=3)


def settings(data, out, **changes):
    values = {
        "data": str(data),
        "out": str(out),
        "clip": "tiny-digits",
        "shots": 4,
        "epochs": 4,
        "batch_size": 4,
        "lr": 0.05,
        "ema": 0.7,
        "depth_text": 2,
        "depth_vision": 2,
        "dropout": 0.1,
        "device": "cpu",
        "progress": False,
    }
    return {**values, **changes}


def run(data, out, **changes):
    return train(TrainConfig.from_dict(settings(data, out, **changes)))


def test_it_is_the_plain_loop_and_pytorch_s():
    model = torch.nn.Linear(3, 2).double()
    average, plain = WeightAverage(0.9), None
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        plain = weights if step == 0 else [0.9 * a + (1 - 0.9) * w for a, w in zip(plain, weights, strict=True)]
        average.update(model)
        theirs.update_parameters(model)
    for ours, a, b in zip(average.tensors().values(), plain, theirs.module.parameters(), strict=True):
        assert (ours - a).abs().max() <= 1e-13
        assert (ours - b).abs().max() <= 1e-13
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with average.in_place(model):
        assert all(map(torch.equal, model.parameters(), average.tensors().values()))
    assert all(map(torch.equal, model.parameters(), before))


def test_of_a_run_in_float64(data, tmp_path, monkeypatch):
    """The saved average is that of the weights after each step."""
    compute_in_float64(monkeypatch)
    seen, update = [], WeightAverage.update

    def watched(self, model):
        seen.append({name: value.detach().clone() for name, value in model.named_parameters()})
        update(self, model)

    monkeypatch.setattr(WeightAverage, "update", watched)
    run(data, tmp_path / "run", epochs=3)
    assert len(seen) == 9
    wanted = seen[0]
    for weights in seen[1:]:
        wanted = {name: 0.7 * wanted[name] + (1 - 0.7) * weights[name] for name in wanted}
    (file,) = (tmp_path / "run" / "average").glob("*.safetensors")
    found = load_file(file)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].double() - value.double()).abs().max() <= 1e-12, name


@pytest.mark.parametrize("final_model", ["last", "best", "average"])
def test_results_tell_of_all_weights(data, tmp_path, monkeypatch, final_model):
    calls, given = [], final.evaluate

    def watched(*args, **kwargs):
        calls.append(inspect.signature(given).bind(*args, **kwargs).arguments["description"])
        return given(*args, **kwargs)

    monkeypatch.setattr(final, "evaluate", watched)
    results = run(data, tmp_path / "run", final_model=final_model)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert set(results["test_of"]) == {"last", "best", "average"}
    assert len(calls) == 3 - (results["best"]["epoch"] == 4)
    assert results["evaluated"] == final_model
    assert results["epoch"] == results["test_of"][final_model]["epoch"]
    for name, found in results["test_of"].items():
        evaluation, _ = evaluate_run(tmp_path / "run" / name, data, device="cpu", progress=False)
        assert (evaluation.accuracy, evaluation.loss) == (found["accuracy"], pytest.approx(found["loss"], rel=1e-5))
    chosen = results["test_of"][final_model]
    assert {key: results["test"][key] for key in chosen if key != "epoch"} == {
        key: value for key, value in chosen.items() if key != "epoch"
    }
    assert results["test_of"]["average"]["loss"] != results["test_of"]["last"]["loss"]
    assert load_run(tmp_path / "run" / "average", "cpu").classnames == ("blue thing", "green", "red")


@pytest.mark.parametrize("own", [{}, {"accumulate": 2, "optimizer": "adamw", "batch_size": 2}], ids=["ema", "all"])
def test_killed_and_resumed(data, tmp_path, monkeypatch, own):
    run(data, tmp_path / "whole", **own)
    with killed_after_epoch(monkeypatch, 2):
        run(data, tmp_path / "killed", **own)
    assert any(key.startswith("average.") for key in load_file(next((tmp_path / "killed/last").glob("training*.s*"))))
    run(data, tmp_path / "killed", resume=True, **own)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    ours, theirs = (next((tmp_path / name / "average").glob("*.safetensors")) for name in ("killed", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(ValueError, match=r"ema: 0\.7 there, 0\.5 here"):
        run(data, tmp_path / "whole", resume=True, ema=0.5, **own)


def test_in_a_job(data, tmp_path, monkeypatch):
    """Tasks have averages of their own, killed and resumed to the bit."""
    tasks = {**settings(data, tmp_path), "ema": [0.5, None], "final_model": ["last"]}
    del tasks["out"], tasks["progress"]
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    whole = read_tasks(tmp_path / "tasks.yaml", str(tmp_path / "whole"))
    assert [member.error for member in train_tasks(whole, tmp_path / "whole", progress=False)] == [None, None]
    again = read_tasks(tmp_path / "tasks.yaml", str(tmp_path / "again"))
    with killed_after_epoch(monkeypatch, 2):
        train_tasks(again, tmp_path / "again", progress=False)
    train_tasks(again, tmp_path / "again", resume=True, progress=False)
    for task in whole:
        assert_same_run(tmp_path / "again" / task.name, tmp_path / "whole" / task.name)
        assert (tmp_path / "again" / task.name / "average").exists() == (task.config.ema is not None)


def test_a_method_without_parameters_has_none(data, tmp_path):
    values = settings(data, tmp_path / "run", method="zeroshot", final_model="average")
    for name in ("depth_text", "depth_vision", "dropout"):
        del values[name]
    results = train(TrainConfig.from_dict(values))
    assert (results["evaluated"], set(results["test_of"])) == ("last", {"last", "best"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ema", "1"], "ema=1.0; wanted a decay between 0 and 1"),
        (["--ema", "0"], "ema=0.0; wanted a decay"),
        (["--ema", "slow"], "--ema slow: wanted float"),
        (["--final-model", "average"], "final_model='average' with ema=None; wanted the decay"),
        (["--final-model", "middle"], "--final-model"),
    ],
)
def test_bad_settings(data, tmp_path, capsys, words, message):
    command = ["train", "--data", str(data), "--out", str(tmp_path / "run"), "--clip", "tiny-digits", *words]
    assert main(command) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
