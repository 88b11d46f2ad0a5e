"""A disk that is full: the last good checkpoint stays, the error is one line, and what is resumed has the same bits."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import yaml
from runs_on_disk import assert_same_run, write_images
from safetensors import SafetensorError

from upt_fast.cli import main
from upt_fast.common.files import save_safetensors
from upt_fast.train import checkpoint, load_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for label, name in enumerate(("blue_thing", "green", "red")):
        write_images(root / name, 2 - label, 3, 100 * label)
    return root


def settings(data) -> dict:
    return {
        "data": str(data),
        "clip": "tiny-digits",
        "shots": 2,
        "epochs": 3,
        "batch_size": 2,
        "lr": 0.02,
        "ema": 0.5,
        "dropout": 0.1,
        "depth_text": 1,
        "depth_vision": 1,
        "device": "cpu",
    }


def command(data, out) -> list[str]:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings(data).items()]
    return ["train", "--out", str(out), *words]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(command(data, out)) == 0
    return out


@contextlib.contextmanager
def full_after(monkeypatch, writes: int):
    """A disk with room for so many files, then for none; yields how many were asked for."""
    asked = [0]
    save, fsync = safetensors.torch.save_file, os.fsync

    def saves(tensors, path, metadata=None):
        asked[0] += 1
        if asked[0] > writes:
            with open(path, "wb") as file:  # a part of it
                file.write(b"\0" * 100)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(tensors, path, metadata)

    def syncs(descriptor):
        asked[0] += 1
        if asked[0] > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", saves)
        patch.setattr(os, "fsync", syncs)
        yield asked


def writes_of(monkeypatch, action) -> int:
    """How many writes an action has that meets no full disk."""
    with full_after(monkeypatch, 10**6) as asked:
        action()
    return asked[0]


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97])
def test_a_run(data, whole, tmp_path, monkeypatch, capsys, share):
    total = writes_of(monkeypatch, lambda: main(command(data, tmp_path / "counted")))
    shutil.rmtree(tmp_path / "counted")
    out = tmp_path / "run"
    capsys.readouterr()
    with full_after(monkeypatch, int(share * total)):
        assert main(command(data, out)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("upt-fast: error: No space left on device")
    assert errors[0].endswith("; what was written before is kept: make room, and go on with --resume")
    assert not (out / "results.json").exists()
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    if (out / "last").exists():
        assert load_run(out, "cpu").classnames == ("blue thing", "green", "red")
        state = json.loads((out / "last" / "training_state.json").read_text())
        assert os.readlink(out / "last") == f"checkpoints/epoch-000{state['epoch']}"
    assert main([*command(data, out), *(["--resume"] if checkpoint.is_run(out) else [])]) == 0
    assert_same_run(out, whole)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_job(data, tmp_path, monkeypatch, capsys, share):
    """Each task keeps its own last checkpoint; one that could not write stands in for itself when the job goes on."""
    file = tmp_path / "tasks.yaml"
    file.write_text(yaml.safe_dump({**settings(data), "seed": [1, 2, 3]}))

    def job(out, *more):
        return main(["train", "--tasks", str(file), "--out", str(tmp_path / out), *more])

    total = writes_of(monkeypatch, lambda: job("whole"))
    capsys.readouterr()
    with full_after(monkeypatch, int(share * total)):
        assert job("out") == 1
    lines = capsys.readouterr().err.splitlines()
    assert any("No space left on device" in line for line in lines)
    assert not any("Traceback" in line for line in lines)
    assert job("out", "--resume") == 0
    for seed in (1, 2, 3):
        assert_same_run(tmp_path / "out" / f"seed{seed}", tmp_path / "whole" / f"seed{seed}")


def test_files_that_may_not_grow(data, tmp_path):
    """The system's own refusal: no file may have more than 100 kB, and the learner's has more."""
    done = subprocess.run(
        [sys.executable, "-m", "upt_fast", *command(data, tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("upt-fast: error: File too large: ")
    assert not (tmp_path / "run" / "last").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_other_errors_of_the_library_stay(tmp_path, monkeypatch):
    def fails(*args):
        raise SafetensorError("no such thing")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(SafetensorError, match="no such thing"):
        save_safetensors(tmp_path / "x.safetensors", {}, {})
    assert list(tmp_path.iterdir()) == []
