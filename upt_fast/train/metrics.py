"""What an evaluation measures, by torchmetrics, of answers that come batch by batch: no logits are kept.

torchmetrics is imported when something is measured, not with the package.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upt_fast.common.files import write_text
from upt_fast.distributed import Group

if TYPE_CHECKING:
    from torchmetrics.classification import MulticlassCalibrationError

TOP = 5  # likeliest classes that may hold the right one
BINS = 15  # of confidence, equally wide
MOST_CLASSES = 4096  # of a confusion matrix, 128 MiB


@dataclass(frozen=True)
class Evaluation:
    """Results on one dataset; accuracies are shares between 0 and 1.

    Args:
        accuracy: top-1, over images.
        mean_class_accuracy: mean of the classes' accuracies, over the classes that have images.
        loss: mean cross-entropy.
        num_images: N.
        class_accuracy: of each class that has images.
        top5_accuracy: share of images whose class is among the five likeliest, or among all where there are fewer.
        calibration_error: expected calibration error: mean distance of confidence and accuracy over 15 bins of
            confidence, weighted by their images.
        classnames: C names of the classes, in the model's order.
        confusion: (C, C) int64 counts, rows the true class, columns the answer; None beyond 4096 classes.
    """

    accuracy: float
    mean_class_accuracy: float
    loss: float
    num_images: int
    class_accuracy: dict[str, float]
    top5_accuracy: float
    calibration_error: float
    classnames: tuple[str, ...] = field(repr=False)
    confusion: Tensor | None = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All but names and confusion, as JSON holds it."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("classnames", "confusion")}

    def confusions(self) -> dict[str, dict[str, int]]:
        """The confusion matrix without its zeros: true class -> answer -> images."""
        if self.confusion is None:
            return {}
        found: dict[str, dict[str, int]] = {}
        for true, answer in self.confusion.nonzero().tolist():
            row = found.setdefault(self.classnames[true], {})
            row[self.classnames[answer]] = int(self.confusion[true, answer])
        return found


class Answers:
    """Collects the answers of a model.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.losses: list[Tensor] = []
        self.predicted: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.in_top: list[Tensor] = []
        self._calibration: MulticlassCalibrationError | None = None

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take the logits (B, C) and the labels (B,) of a batch, on one device."""
        from torchmetrics.classification import MulticlassCalibrationError
        from torchmetrics.functional.classification import multiclass_stat_scores

        if self._calibration is None:
            # what it is given is checked here, and each process measures its own images
            options: dict[str, Any] = {"validate_args": False, "sync_on_compute": False}
            found = MulticlassCalibrationError(self.num_classes, n_bins=BINS, norm="l1", **options)
            self._calibration = found.to(logits.device)
        self.losses.append(F.cross_entropy(logits.float(), labels, reduction="none"))
        self.predicted.append(logits.argmax(dim=1))
        self.labels.append(labels)
        top = min(TOP, self.num_classes)
        scores = multiclass_stat_scores(
            logits, labels, self.num_classes, average="micro", top_k=top, validate_args=False
        )
        self.in_top.append(scores[0])
        # as probabilities: logits that all lie within [0, 1] would be taken for these
        self._calibration.update(logits.float().softmax(dim=1).clamp(max=1.0), labels)

    def gather(self, group: Group, sizes: Sequence[int], device: torch.device) -> None:
        """Take in what the other processes have collected, in their order.

        Args:
            group: the processes.
            sizes: images of each.
            device: of the answers.
        """
        if group.size == 1:
            return

        def joined(rows: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
            own = [torch.zeros(0, dtype=dtype, device=device), *(row.to(dtype) for row in rows)]
            return [group.gather(torch.cat(own), sizes)]

        self.losses = joined(self.losses)
        self.predicted, self.labels = joined(self.predicted, torch.int64), joined(self.labels, torch.int64)
        top = torch.stack([torch.zeros((), dtype=torch.int64, device=device), *(n.long() for n in self.in_top)]).sum()
        group.sum(top)
        self.in_top = [top]
        state: Any = self._calibration
        confidences = joined([] if state is None else state.confidences)
        accuracies = joined([] if state is None else state.accuracies)
        if state is not None:  # the first process has images, and it measures
            state.confidences, state.accuracies = confidences, accuracies

    def evaluation(self, classnames: Sequence[str]) -> Evaluation:
        """What they amount to; classnames: C names."""
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        assert self._calibration is not None
        predicted, label = torch.cat(self.predicted).cpu(), torch.cat(self.labels).cpu()
        hit = predicted == label
        counts = torch.bincount(label, minlength=self.num_classes)
        correct = torch.bincount(label[hit], minlength=self.num_classes)
        class_accuracy = {
            name: int(right) / int(count)
            for name, right, count in zip(classnames, correct, counts, strict=True)
            if int(count) > 0
        }
        confusion = None
        if self.num_classes <= MOST_CLASSES:
            confusion = multiclass_confusion_matrix(predicted, label, self.num_classes, validate_args=False)
        return Evaluation(
            accuracy=int(hit.sum()) / len(label),
            mean_class_accuracy=sum(class_accuracy.values()) / len(class_accuracy),
            loss=float(torch.cat(self.losses).double().mean()),
            num_images=len(label),
            class_accuracy=class_accuracy,
            top5_accuracy=int(torch.stack(self.in_top).sum()) / len(label),
            calibration_error=float(self._calibration.compute()),
            classnames=tuple(classnames),
            confusion=confusion,
        )


def write_confusion(path: Path, evaluation: Evaluation) -> None:
    """Write a confusion matrix as CSV: a row for each true class, a column for each answer, named in the header.

    Raises:
        ValueError: there is none, for there are too many classes.
    """
    if evaluation.confusion is None:
        raise ValueError(f"{len(evaluation.classnames)} classes; a confusion matrix is made of up to {MOST_CLASSES}")
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["true class", *evaluation.classnames])
    for name, counts in zip(evaluation.classnames, evaluation.confusion.tolist(), strict=True):
        rows.writerow([name, *counts])
    write_text(path, text.getvalue())
