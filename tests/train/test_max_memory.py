"""Runs below a limit: the plan that is followed and written down, resumption, and what is refused."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from upt_fast.cli import main
from upt_fast.model import FastPromptedCLIP
from upt_fast.train import TrainConfig, train, trainer

CLASSES = ("red", "green", "blue thing")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                color = [30 * i] * 3
                color[label] = 255
                Image.new("RGB", (20, 16), tuple(color)).save(folder / f"{i}.png")
    return root


def settings(data, out, **changes):
    values = {
        "data": str(data),
        "out": str(out),
        "clip": "tiny-digits",
        "shots": 3,
        "epochs": 3,
        "batch_size": 4,
        "lr": 0.02,
        "label_smoothing": 0.1,
        "device": "cpu",
        "progress": False,
    }
    return {**values, **changes}


def least(data, tmp_path, **changes):
    """Bytes of the smallest plan, as the error says them."""
    with pytest.raises(ValueError, match=r"max_memory=1 MB is too little .*; the smallest that does needs \d+ MB") as e:
        train(TrainConfig.from_dict(settings(data, tmp_path / "refused", max_memory="1MB", **changes)))
    assert not (tmp_path / "refused").exists()
    return int(str(e.value).split(" needs ")[1].split(" MB")[0])


def tensors(run):
    return {str(file.relative_to(run)): load_file(file) for file in (run / "last").glob("*.safetensors")}


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("method", ["upt", "cocoop", "kgcoop"])
def test_a_run_below_a_limit_is_the_run_without(data, tmp_path, method, caplog, monkeypatch):
    """The same steps but for rounding, in parts; the plan is in the log and in the results."""
    own = {"method": method} | ({"dropout": 0.1} if method == "upt" else {})
    limit = f"{least(data, tmp_path, **own)}MB"
    seen = []
    in_parts = FastPromptedCLIP.backward_in_parts

    def watched(self, images, labels, micro_batches, *args):
        seen.append((len(images), micro_batches))
        return in_parts(self, images, labels, micro_batches, *args)

    monkeypatch.setattr(FastPromptedCLIP, "backward_in_parts", watched)
    train(TrainConfig.from_dict(settings(data, tmp_path / "free", **own)))
    assert not seen
    with caplog.at_level("INFO", logger="upt_fast"):
        results = train(TrainConfig.from_dict(settings(data, tmp_path / "limited", max_memory=limit, **own)))
    plan = results["memory_plan"]
    assert json.loads((tmp_path / "limited" / "results.json").read_text())["memory_plan"] == plan
    assert plan["bytes"] <= int(limit[:-2]) * 10**6
    assert {tuple(parts) for _, parts in seen} == {(plan["images"], plan["classes"])}
    assert f"max_memory {limit}: memory={plan['memory']!r}, {plan['images']} of 4 images" in caplog.text
    assert "memory_plan" not in json.loads((tmp_path / "free" / "results.json").read_text())
    assert json.loads((tmp_path / "limited" / "config.json").read_text())["max_memory"] == limit
    for ours, theirs in zip(metrics(tmp_path / "limited"), metrics(tmp_path / "free"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_resumption_is_bit_exact(data, tmp_path, monkeypatch):
    own = {"dropout": 0.1, "depth_text": 2, "depth_vision": 2}
    limit = f"{least(data, tmp_path, **own)}MB"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(TrainConfig.from_dict(settings(data, whole, max_memory=limit, **own)))
    write, written = trainer.write_checkpoint, []

    def killed_behind_the_second(*args):
        write(*args)
        written.append(args)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_checkpoint", killed_behind_the_second)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig.from_dict(settings(data, stopped, max_memory=limit, **own)))
    train(TrainConfig.from_dict(settings(data, stopped, max_memory=limit, resume=True, **own)))
    assert metrics(stopped) == metrics(whole)
    for name, found in tensors(whole).items():
        assert all(torch.equal(value, tensors(stopped)[name][key]) for key, value in found.items())


def test_runs_of_before_the_setting_resume(data, tmp_path):
    """config.json without the key, and a limit that is new on resumption: both go on."""
    out = tmp_path / "run"
    train(TrainConfig.from_dict(settings(data, out)))
    old = json.loads((out / "config.json").read_text())
    assert old.pop("max_memory") is None
    for limit in (None, "8GB"):
        assert TrainConfig.from_dict(settings(data, out, max_memory=limit)).differences(old) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_memory": "lots"}, "max_memory='lots'; wanted a size such as 600MB, 8GB, 8GiB or a number of bytes"),
        ({"max_memory": 0}, "max_memory=0; wanted a size"),
        ({"max_memory": "8GB", "memory": "lean"}, "max_memory='8GB' with memory='lean' .*it chooses these itself"),
        ({"max_memory": "8GB", "text_batch": 2}, "text_batch=2; it chooses these itself"),
    ],
    ids=str,
)
def test_bad_limits(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(settings(data, tmp_path / "run", **changes))


def test_on_the_command_line(data, tmp_path, capsys):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings(data, tmp_path / "run").items()]
    arguments = [argument.replace("False", "false") for argument in arguments]
    assert main(["train", *arguments, "--max-memory", "1MB"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert "error: max_memory=1 MB is too little for a step of 4 images and 3 classes" in errors[-1]
    assert main(["train", *arguments, "--max-memory", "8 sheep"]) == 2
    assert "max_memory='8 sheep'; wanted a size" in capsys.readouterr().err
    assert main(["train", *arguments, "--max-memory", "1GiB", "--epochs", "1"]) == 0
    assert "max_memory 1GiB: memory='fast', 4 of 4 images and 3 of 3 classes at once" in capsys.readouterr().err
