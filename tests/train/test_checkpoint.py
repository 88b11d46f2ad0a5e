"""A checkpoint is complete or absent, wherever the process is killed."""

import json
import os
import subprocess
import sys

import pytest
import torch

from upt_fast.train.checkpoint import TrainingState, locked, read_checkpoint, write_checkpoint


class Killed(BaseException):
    pass


class Learner:
    """Stands for a model: its weights are the number of the epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def save_pretrained(self, directory) -> None:
        directory.mkdir()
        (directory / "learner").write_text(str(self.epoch))


METRICS = [0.1, 0.5, 0.3, 0.7]


def write_epochs(run_dir, first: int, state: TrainingState) -> TrainingState:
    for epoch in range(first, len(METRICS) + 1):
        better = METRICS[epoch - 1] > state.best_metric
        best_epoch, best = (epoch, METRICS[epoch - 1]) if better else (state.best_epoch, state.best_metric)
        state = TrainingState(epoch, epoch * 10, best_epoch, best)
        write_checkpoint(run_dir, Learner(epoch), {"momentum.w": torch.full((3,), float(epoch))}, state)
    return state


def check(run_dir) -> TrainingState:
    restored = read_checkpoint(run_dir)
    if restored is None:
        assert not (run_dir / "last").exists()
        return TrainingState(0, 0, 0, -1.0)
    state, tensors = restored
    assert (run_dir / "last" / "learner").read_text() == str(state.epoch)
    assert (run_dir / "best" / "learner").read_text() == str(state.best_epoch)
    assert torch.equal(tensors["momentum.w"], torch.full((3,), float(state.epoch)))
    assert state.best_metric == max(METRICS[: state.epoch])
    assert len(list((run_dir / "checkpoints").iterdir())) == len({state.epoch, state.best_epoch})
    return state


def test_kill_at_every_change_of_the_disk(tmp_path, monkeypatch):
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "symlink", "mkdir", "rmdir", "unlink")}
    real["fsync"] = lambda descriptor: None  # a kill is no power cut
    left = 0

    def counted(name):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real[name](*args, **kwargs)

        return call

    kills = 0
    for after in range(10_000):
        run_dir = tmp_path / str(after)
        run_dir.mkdir()
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, counted(name))
            left = after
            try:
                write_epochs(run_dir, 1, TrainingState(0, 0, 0, -1.0))
                finished = True
            except Killed:
                finished = False
        state = check(run_dir)
        if finished:
            break
        kills += 1
        end = write_epochs(run_dir, state.epoch + 1, state)
        assert (end.epoch, end.best_epoch) == (4, 4)
        assert check(run_dir) == end
    assert finished
    assert kills > 50


def test_damaged_checkpoint(tmp_path):
    write_epochs(tmp_path, 4, TrainingState(3, 30, 2, 0.5))
    state_file = tmp_path / "last" / "training_state.json"
    state_file.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_checkpoint(tmp_path)
    state_file.write_text(json.dumps({"epoch": 1}))
    with pytest.raises(ValueError, match="is damaged"):
        read_checkpoint(tmp_path)


def test_a_second_process_is_kept_out(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom upt_fast.train.checkpoint import locked\n"
        "try:\n    with locked(Path(sys.argv[1])): print('in')\nexcept ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with locked(tmp_path):
        assert "another process is training" in subprocess.check_output(command, text=True)
    assert subprocess.check_output(command, text=True) == "in\n"
