"""Runs on shards: the folder's where the order is the sampler's, and the uninterrupted ones where they were killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs_on_disk import Killed, assert_same_run, write_dataset

from upt_fast.cli import main
from upt_fast.data import AugmentedDataset, EpochBatchSampler, write_shards
from upt_fast.train import TrainConfig, evaluate_run, train, trainer

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("folder"), CLASSES, step=50, train=7, val=2, test=3)


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "shards"
    write_shards(folder, out, images_per_shard=6, progress=False)
    return out


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch) -> None:
    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("UPT_FAST_IMAGE_CACHE", str(folder / "images"))
    monkeypatch.setenv("UPT_FAST_FEATURE_STORE", str(folder / "features"))


def settings(data: Path, out: Path, **changes) -> dict:
    values = {
        "data": str(data),
        "out": str(out),
        "clip": "tiny-digits",
        "method": "vpt_deep",
        "shots": "all",
        "epochs": 3,
        "batch_size": 4,
        "lr": 0.02,
        "device": "cpu",
        "progress": False,
    }
    return {**values, **changes}


def run(data: Path, out: Path, **changes) -> Path:
    train(TrainConfig.from_dict(settings(data, out, **changes)))
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {"shots": 3},
        {"shots": 3, "cache": "exact"},
        {"shots": 3, "method": "coop", "augment": "none"},
        {"cache": "scaled"},
    ],
    ids=["shots", "exact", "features", "all"],
)
def test_a_run_on_shards_is_that_on_the_folder(folder, shards, tmp_path, changes):
    runs = [run(data, tmp_path / name, epochs=2, **changes) for name, data in (("a", folder), ("b", shards))]
    assert_same_run(*runs)
    assert json.loads((runs[1] / "config.json").read_text())["cache"] == changes.get("cache", "scaled")


def test_a_stream_in_the_sampler_s_order_is_the_run_on_the_folder(folder, shards, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            trainer,
            "ShardBatchSampler",
            lambda items, *settings: EpochBatchSampler(len(items), *settings),
        )
        stream = run(shards, tmp_path / "stream", epochs=2)
    assert json.loads((stream / "config.json").read_text())["cache"] == "stream"
    assert_same_run(run(folder, tmp_path / "folder", epochs=2), stream)
    in_order = run(shards, tmp_path / "in-order", epochs=2)
    first = [json.loads((path / "metrics.jsonl").read_text().splitlines()[0])["loss"] for path in (stream, in_order)]
    assert first[0] != first[1]


def test_workers_change_nothing_and_images_are_read_when_used(shards, tmp_path, monkeypatch):
    wanted = run(shards, tmp_path / "a", epochs=2)
    assert_same_run(wanted, run(shards, tmp_path / "b", epochs=2, num_workers=2))
    seen = []
    base = AugmentedDataset.__init__

    def count(self, *args):
        seen.append(opened[0])
        base(self, *args)

    opened, real = [0], Image.open
    monkeypatch.setattr(Image, "open", lambda file: (opened.__setitem__(0, opened[0] + 1), real(file))[1])
    monkeypatch.setattr(AugmentedDataset, "__init__", count)
    run(shards, tmp_path / "c", epochs=2)
    assert seen == [0]  # nothing is decoded before the first epoch
    assert opened[0] == 2 * 20 + 2 * 6 + 9
    images = Path(os.environ["UPT_FAST_IMAGE_CACHE"])
    assert not images.exists()  # and nothing is kept


KILLED = """
import json, os, sys
from upt_fast.train import TrainConfig, train, trainer

write = trainer.write_checkpoint
def kill(run_dir, model, optimizer, state, classes):
    write(run_dir, model, optimizer, state, classes)
    if state.step == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
trainer.write_checkpoint = kill
train(TrainConfig.from_dict(json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize(("at", "name"), [(2, "epoch-0000-step-000002"), (8, "epoch-0001-step-000003"), (10, "")])
def test_kill_and_resume_inside_of_an_epoch(shards, tmp_path, at, name):
    changes = {"checkpoint_steps": 2, "num_workers": 2}
    arguments = json.dumps(settings(shards, tmp_path / "run", **changes))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, arguments, str(at)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    last = os.path.basename(os.path.realpath(tmp_path / "run" / "last"))
    assert last == (name or "epoch-0002")
    if name.startswith("epoch-0000"):
        assert not os.path.lexists(tmp_path / "run" / "best")
    run(shards, tmp_path / "run", resume=True)
    assert_same_run(run(shards, tmp_path / "whole"), tmp_path / "run")


DROPOUT = {"method": "upt", "dropout": 0.3, "depth_text": 1, "depth_vision": 1}


@pytest.mark.parametrize(
    "changes",
    [{"optimizer": "adamw"}, DROPOUT, {"accumulate": 2, "ema": 0.9}],
    ids=["adamw", "dropout", "average"],
)
def test_checkpoints_inside_of_an_epoch_on_a_folder(folder, tmp_path, monkeypatch, changes):
    options = {"method": "ivlp", "shots": 5, **changes}
    whole = run(folder, tmp_path / "whole", **options)
    write = trainer.write_checkpoint

    def dies(run_dir, model, optimizer, state, classes):
        write(run_dir, model, optimizer, state, classes)
        if state.step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_checkpoint", dies)
        with pytest.raises(Killed):
            run(folder, tmp_path / "run", checkpoint_steps=5, **options)
    assert_same_run(whole, run(folder, tmp_path / "run", resume=True, **options))


def test_a_run_on_the_folder_goes_on_with_its_shards(folder, shards, tmp_path, monkeypatch):
    whole = run(folder, tmp_path / "whole", shots=3)
    write = trainer.write_checkpoint

    def dies(run_dir, model, optimizer, state, classes):
        write(run_dir, model, optimizer, state, classes)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_checkpoint", dies)
        with pytest.raises(Killed):
            run(folder, tmp_path / "run", shots=3)
    assert_same_run(whole, run(shards, tmp_path / "run", shots=3, resume=True))


def test_eval_and_predict(folder, shards, tmp_path, capsys):
    out = run(shards, tmp_path / "run", epochs=1)
    tested = json.loads((out / "results.json").read_text())["test"]
    for data in (shards, folder):
        evaluation, where = evaluate_run(out, data, progress=False)
        assert where == "test folder"
        assert evaluation.accuracy == tested["accuracy"]
        assert evaluation.loss == tested["loss"]
    answers = []
    for path in (folder / "test/red/0.jpg", shards / "test/red/0.jpg"):
        assert main(["predict", "--checkpoint", str(out), str(path), "--json", "--device", "cpu"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0][0]["probabilities"] == answers[1][0]["probabilities"]
    assert answers[1][0]["path"] == str(shards / "test/red/0.jpg")
    assert main(["predict", "--checkpoint", str(out), str(shards), "--json", "--device", "cpu"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 36


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_bytes_end_a_run_in_one_line(shards, tmp_path, capfd, num_workers):
    data = tmp_path / "shards"
    shutil.copytree(shards, data)
    for path in data.glob("train-*.tar"):
        content = bytearray(path.read_bytes())
        content[1000::50] = bytes(len(content[1000::50]))
        path.write_bytes(content)
    command = ["train", "--data", str(data), "--out", str(tmp_path / "run"), "--clip", "tiny-digits", "--shots", "all"]
    command += ["--epochs", "1", "--batch-size", "4", "--device", "cpu", "--num-workers", str(num_workers)]
    assert main(command) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    assert "has other bytes there than were written" in error[0]
    few = ["--shots", "2", "--cache", "scaled", "--out", str(tmp_path / "few")]
    assert main([*command, *few]) == 2
    assert "image(s) cannot be read" in capfd.readouterr().err


def test_only_shards_are_streamed(folder, shards, tmp_path, capfd):
    with pytest.raises(ValueError, match=r"cache='stream', but .* is no folder of shards"):
        run(folder, tmp_path / "run", cache="stream")
    out = run(shards, tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match="is no folder of shards"):
        run(folder, out, epochs=1, resume=True, cache="stream", num_workers=0)
    with pytest.raises(ValueError, match="is no folder of shards"):
        evaluate_run(out, folder, cache="stream")
    with pytest.raises(ValueError, match="cache: 'stream' there, 'scaled' here"):
        run(shards, out, epochs=1, resume=True, cache="scaled")
    with pytest.raises(ValueError, match="checkpoint_steps=0"):
        run(shards, tmp_path / "zero", checkpoint_steps=0)
