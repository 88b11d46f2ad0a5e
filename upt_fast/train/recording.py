"""What a run writes down on its way: metrics.jsonl, TensorBoard, the progress bar."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upt_fast.common.files import write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("upt_fast")

METRICS_FILE = "metrics.jsonl"


class TrainingDivergedError(RuntimeError):
    """The loss or a parameter became NaN or infinite."""


def open_tensorboard(folder: Path, epochs_done: int) -> SummaryWriter | None:
    """A TensorBoard log, or None where that package is not installed; metrics.jsonl holds the same numbers."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("tensorboard is not installed: no TensorBoard log (pip install upt_fast[train])")
        return None
    # what a killed run logged after its last checkpoint is hidden
    return SummaryWriter(str(folder), purge_step=epochs_done + 1)


class Meter:
    """Loss and accuracy of an epoch, read one step late on a GPU: the host never waits for the step in flight."""

    def __init__(self, epoch: int, lr: float, bar: Any, device: torch.device) -> None:
        self.epoch, self.lr, self.bar = epoch, lr, bar
        self.late = 1 if device.type == "cuda" else 0
        self.pending: deque[tuple[int, int, Tensor, torch.cuda.Event | None]] = deque()
        self.loss_sum, self.correct, self.count = 0.0, 0.0, 0

    @property
    def sums(self) -> tuple[float, float, int]:
        """Loss and hits summed over images, and images."""
        return self.loss_sum, self.correct, self.count

    @sums.setter
    def sums(self, values: Sequence[float]) -> None:
        self.loss_sum, self.correct, self.count = values[0], values[1], int(values[2])

    def add(self, step: int, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        correct = (logits.detach().argmax(dim=1) == labels).sum()
        values = torch.stack((loss.detach().double(), correct.double())).to("cpu", non_blocking=True)
        event = None
        if self.late:
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, len(labels), values, event))
        while len(self.pending) > self.late:
            self._read()

    def flush(self) -> None:
        while self.pending:
            self._read()

    def _read(self) -> None:
        step, count, values, event = self.pending.popleft()
        if event is not None:
            event.synchronize()
        loss, correct = values.tolist()
        if not math.isfinite(loss):
            raise TrainingDivergedError(diverged(step, self.epoch, self.lr, f"the loss is {loss}"))
        self.loss_sum += loss * count
        self.correct += correct
        self.count += count
        self.bar.set_postfix(
            epoch=self.epoch + 1,
            loss=f"{self.mean_loss:.3f}",
            accuracy=f"{self.accuracy:.3f}",
            lr=f"{self.lr:.2g}",
            refresh=False,
        )
        self.bar.update()

    @property
    def mean_loss(self) -> float:
        return self.loss_sum / self.count

    @property
    def accuracy(self) -> float:
        return self.correct / self.count


def diverged(step: int, epoch: int, lr: float, what: str) -> str:
    """What to say of a step after which a number is not finite."""
    return (
        f"{what} at step {step + 1} (epoch {epoch + 1}, learning rate {lr:g}); the last good checkpoint is kept. "
        "Try a lower --lr, and --precision fp32 where it is lower"
    )


def in_short(value: Any) -> str:
    """A value as log lines show it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def record_epoch(out: Path, record: Mapping[str, Any], writer: SummaryWriter | None) -> None:
    """Add a line to metrics.jsonl, on the disk when this returns, and the same to TensorBoard."""
    with open(out / METRICS_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if writer is not None:
        for key, value in record.items():
            if key not in ("epoch", "best_epoch"):
                writer.add_scalar(key, value, record["epoch"])
        writer.flush()


def truncate_metrics(out: Path, epochs_done: int) -> None:
    """Drop the lines of epochs after the last checkpoint, and a line that a kill cut short."""
    path = out / METRICS_FILE
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            if json.loads(line)["epoch"] <= epochs_done:
                lines.append(line + "\n")
        except ValueError:
            break
    write_text(path, "".join(lines))
