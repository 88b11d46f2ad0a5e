"""Steps of several batches: the gradient of all their images, in runs, with features, below a limit, and in jobs."""

import json

import pytest
import torch
import yaml
from runs_on_disk import assert_same_run, compute_in_float64, contents, killed_after_epoch, write_dataset

from upt_fast import FastPromptedCLIP
from upt_fast.cli import main
from upt_fast.data.dataset import EpochBatchSampler
from upt_fast.steps import MicroBatches
from upt_fast.tasks.grid import read_tasks
from upt_fast.tasks.run import train_tasks
from upt_fast.testing import random_clip
from upt_fast.train import TrainConfig, train, trainer

CLASSES = ("blue_thing", "green", "red")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), CLASSES, train=5, val=2, test=2)


@pytest.fixture
def in_float64(monkeypatch):
    compute_in_float64(monkeypatch)


def settings(data, out, **changes):
    values = {
        "data": str(data),
        "out": str(out),
        "clip": "tiny-digits",
        "shots": "all",
        "epochs": 3,
        "batch_size": 2,
        "accumulate": 3,
        "lr": 0.02,
        "label_smoothing": 0.1,
        "device": "cpu",
        "progress": False,
    }
    own = {} if "method" in changes else {"depth_text": 2, "depth_vision": 2, "dropout": 0.1}
    return {**values, **own, **changes}


def run(data, out, **changes):
    return train(TrainConfig.from_dict(settings(data, out, **changes)))


@pytest.mark.parametrize(
    ("num", "size", "accumulate", "steps"),
    [(15, 2, 3, [6, 6, 2]), (16, 2, 4, [8, 8]), (15, 4, 2, [8, 4]), (3, 4, 2, [3]), (8, 4, 9, [8]), (9, 2, 1, [2] * 4)],
)
def test_steps_have_the_images_of_their_batches(num, size, accumulate, steps):
    """Those that accumulation takes are those of the batches one by one, in their order."""
    sampler, plain = EpochBatchSampler(num, size, 7, accumulate), EpochBatchSampler(num, size, 7)
    sampler.epoch = plain.epoch = 2
    found = list(sampler)
    assert [len(step) for step in found] == steps
    assert len(sampler) == len(steps)
    assert [key for step in found for key in step] == [key for batch in plain for key in batch]


def gradients(model, step):
    model.zero_grad()
    torch.manual_seed(0)
    loss, logits = step()
    return [loss.detach(), logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("method", ["coop", "cocoop", "kgcoop"])
@pytest.mark.parametrize("at_once", [MicroBatches(2), MicroBatches(2, 2), MicroBatches()], ids=str)
def test_features_in_the_place_of_images(tokenizer, method, at_once):
    """In parts, given features have the gradients of one pass over all, to 1e-12 in float64."""
    model = FastPromptedCLIP(
        random_clip(vision_layers=2, text_layers=2).double(),
        ["cat", "dog", "snow leopard"],
        method=method,
        tokenizer=tokenizer,
    ).train()
    features, labels = torch.randn(5, model.embed_dim, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])

    def whole():
        loss, logits = model.loss_and_logits(None, labels, image_features=features)
        loss.backward()
        return loss, logits

    wanted = gradients(model, whole)
    found = gradients(model, lambda: model.backward_in_parts(features, labels, at_once))
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max().clamp(min=1)


# an epoch of 15 images in batches of 2: 7 batches, as steps of 6, 6 and 2 images
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adamw", "num_workers": 1},
        {"method": "cocoop"},
        {"method": "kgcoop"},
        {"method": "coop", "augment": "none"},
        {"method": "cocoop", "augment": "none"},
    ],
    ids=str,
)
def test_a_run_is_that_of_large_batches(data, tmp_path, in_float64, monkeypatch, changes):
    """In float64 a run with accumulation is the run whose batches are whole steps, to 1e-12."""
    seen = []
    in_parts = FastPromptedCLIP.backward_in_parts

    def watched(self, images, labels, micro_batches, *args):
        seen.append((len(images), micro_batches.images))
        return in_parts(self, images, labels, micro_batches, *args)

    monkeypatch.setattr(FastPromptedCLIP, "backward_in_parts", watched)
    run(data, tmp_path / "parts", **changes)
    assert seen == [(6, 2), (6, 2), (2, 2)] * 3
    monkeypatch.setattr(trainer, "parts_of", lambda *args: None)
    run(data, tmp_path / "whole", **changes)
    assert len(seen) == 9
    (ours, metrics, results), (theirs, other_metrics, other_results) = (
        contents(tmp_path / name) for name in ("parts", "whole")
    )
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert (value.double() - theirs[key].double()).abs().max() <= 1e-12 * theirs[key].abs().max().clamp(min=1), key
    for line, other in zip(metrics, other_metrics, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-12)
    assert results["test"]["class_accuracy"] == other_results["test"]["class_accuracy"]
    state = json.loads((tmp_path / "parts" / "last" / "training_state.json").read_text())
    assert state["step"] == 9


def test_killed_and_resumed(data, tmp_path, monkeypatch):
    run(data, tmp_path / "whole")
    with killed_after_epoch(monkeypatch, 2):
        run(data, tmp_path / "killed")
    run(data, tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    with pytest.raises(ValueError, match="accumulate: 3 there, 2 here"):
        run(data, tmp_path / "killed", resume=True, accumulate=2)


def test_below_a_limit_of_memory(data, tmp_path, caplog):
    """The plan is that of the whole step."""
    with caplog.at_level("INFO", logger="upt_fast"):
        results = run(data, tmp_path / "limited", max_memory="8GiB", epochs=1)
    assert results["memory_plan"]["batch_size"] == 6
    assert "6 of 6 images" in caplog.text


def test_a_job_s_tasks_are_their_runs(data, tmp_path, capsys, monkeypatch):
    """To the bit: a task whose steps are of several batches takes them as it would alone."""
    tasks = {**settings(data, tmp_path), "accumulate": [1, 3], "seed": [1, 2]}
    del tasks["out"], tasks["progress"]
    file = tmp_path / "tasks.yaml"
    file.write_text(yaml.safe_dump(tasks))
    command = ["train", "--tasks", str(file), "--out", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "21 steps of up to 4 images" in printed
    assert "9 steps of up to 12 images" in printed
    job = read_tasks(file, str(tmp_path / "out"))
    with killed_after_epoch(monkeypatch, 2):
        train_tasks(job, tmp_path / "out", progress=False)
    assert main([*command, "--resume"]) == 0
    groups = json.loads((tmp_path / "out" / "tasks.json").read_text())["groups"]
    assert [len(group) for group in groups] == [2, 2]
    for seed in (1, 2):
        run(data, tmp_path / f"alone{seed}", seed=seed)
        assert_same_run(tmp_path / "out" / f"seed{seed}-accumulate3", tmp_path / f"alone{seed}")


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_bad_values(data, tmp_path, capsys, value):
    words = ["train", "--data", str(data), "--out", str(tmp_path / "run"), "--clip", "tiny-digits"]
    assert main([*words, "--accumulate", value]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "accumulate" in line
    assert not (tmp_path / "run").exists()
