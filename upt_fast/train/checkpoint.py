"""The files of a run, each of them complete or absent whatever kills the process.

    RUN/config.json        the settings
    RUN/split.json         class names and the images of the run
    RUN/choices.json       which of several exact ways computes what (choices.py), for a resumed run to be the same
    RUN/metrics.jsonl      one line per epoch
    RUN/tensorboard/
    RUN/checkpoints/epoch-0007/    the learner (FastPromptedCLIP.load reads it), training_state.safetensors and .json,
                                   classes.json: the class folders of training (classes.py)
    RUN/checkpoints/epoch-0007-step-000120/    the same, 120 steps after epoch 7, where they were asked for
    RUN/last, RUN/best     links to two of those
    RUN/average/           the learner with averaged weights (averaging.py), written before the final evaluation
    RUN/confusion.csv      of the final evaluation: a row for each true class, a column for each answer
    RUN/results.json       of the final evaluation; its presence says that the run is finished

A checkpoint is written beside its place and renamed into it; then ``last`` is replaced by a rename of its own. Learner
and training state are thus always of one epoch. ``best`` is derived from the training state of ``last``, which names
the best epoch, and is set again on resumption, so that the one rename of ``last`` decides.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from upt_fast.common.files import fsync_directory, load_safetensors, save_safetensors, write_text

CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"
TEMPORARY_PREFIX = ".tmp-"
CLASSES_FILE = "classes.json"
STATE_FILE = "training_state.json"
TENSORS_FILE = "training_state.safetensors"


class SavesPretrained(Protocol):
    """A model that writes itself into a directory."""

    def save_pretrained(self, directory: str | Path) -> Any: ...


@dataclass(frozen=True)
class TrainingState:
    """What a run needs beside the learner to go on; random numbers are a function of (seed, epoch) and need no state.

    Inside of an epoch they do: torch's generators are as after a step, which the state's tensors tell.

    Args:
        epoch: epochs done.
        step: optimizer steps done.
        best_epoch: epochs done when the best metric was reached.
        best_metric: its value.
        within: how many of the steps are of the epoch after those.
        sums: of these: loss and hits summed over images, and images.
    """

    epoch: int
    step: int
    best_epoch: int
    best_metric: float
    within: int = 0
    sums: tuple[float, float, int] = (0.0, 0.0, 0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sums", tuple(self.sums))  # a list in JSON

    @property
    def name(self) -> str:
        """Folder of its checkpoint."""
        return checkpoint_name(self.epoch) + (f"-step-{self.within:06d}" if self.within else "")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        ValueError: the file is missing, cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def checkpoint_name(epoch: int) -> str:
    """Folder of the checkpoint after so many epochs."""
    return f"epoch-{epoch:04d}"


def write_checkpoint(
    run_dir: Path,
    model: SavesPretrained,
    optimizer: dict[str, Tensor],
    state: TrainingState,
    classes: dict[str, Any] | None = None,
) -> None:
    """Write the checkpoint of a state, point ``last`` and ``best`` at theirs and remove the others.

    Args:
        run_dir: the run.
        model: what to save.
        optimizer: what it keeps, see train/optimizers.py.
        state: of the training.
        classes: what classes.json holds.
    Raises:
        OSError: it cannot be written, as where the disk is full; ``last`` and ``best`` are as they were.
    """
    checkpoints = run_dir / CHECKPOINTS
    checkpoints.mkdir(exist_ok=True)
    with whole_folder(checkpoints / state.name) as temporary:
        model.save_pretrained(temporary)
        # without tensors and metadata safetensors writes a header that it cannot read
        save_safetensors(temporary / TENSORS_FILE, optimizer, {"format": "pt"})
        write_json(temporary / STATE_FILE, asdict(state))
        if classes is not None:
            write_json(temporary / CLASSES_FILE, classes)
    _point(run_dir, "last", state.name)
    _tidy(run_dir, state)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A path to write a folder at, which is the folder's own at the end, or is gone; one that was there is replaced.

    Args:
        folder: in a folder that exists.
    """
    temporary = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        fsync_directory(temporary)
    except OSError:  # a full disk has then room for what is to be said of it
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    fsync_directory(folder.parent)


def _point(run_dir: Path, link: str, name: str) -> None:
    temporary = run_dir / f"{TEMPORARY_PREFIX}{link}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(Path(CHECKPOINTS) / name)
    os.replace(temporary, run_dir / link)
    fsync_directory(run_dir)


def _tidy(run_dir: Path, state: TrainingState) -> None:
    """Make everything else follow from what ``last`` points at."""
    best = checkpoint_name(state.best_epoch)
    there = (run_dir / CHECKPOINTS / best).is_dir()  # not inside of the first epoch
    if there and os.path.realpath(run_dir / "best") != os.path.realpath(run_dir / CHECKPOINTS / best):
        _point(run_dir, "best", best)
    for folder in (run_dir / CHECKPOINTS).iterdir():
        if folder.name not in (best, state.name):
            shutil.rmtree(folder)


def read_checkpoint(run_dir: Path) -> tuple[TrainingState, dict[str, Tensor]] | None:
    """Training state and optimizer's tensors of ``last``, None before the first checkpoint; removes what a kill left.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    last = run_dir / "last"
    checkpoints = run_dir / CHECKPOINTS
    if not os.path.lexists(last):
        if checkpoints.exists():
            shutil.rmtree(checkpoints)
        return None
    values = read_json(last / STATE_FILE)
    try:
        state = TrainingState(**values)
    except TypeError as error:
        raise ValueError(f"{last / STATE_FILE} is damaged: {error}") from error
    tensors, _ = load_safetensors(last / TENSORS_FILE)
    _tidy(run_dir, state)
    return state, tensors


def is_run(directory: Path) -> bool:
    """Whether a directory holds a training run."""
    return (directory / "config.json").is_file()


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep a second process from training into the same folder.

    Raises:
        ValueError: another process holds the run.
    """
    # a POSIX record lock: the kernel drops it with the process, and forked loader processes do not inherit it
    with open(run_dir / LOCK_FILE, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"another process is training into {run_dir}; wait for it, or pass another out"
                ) from error
            # a file system without locks
        yield
