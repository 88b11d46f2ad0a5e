"""An exponential moving average of the trained weights, beside them: ``train --ema DECAY``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upt_fast.model import FastPromptedCLIP
from upt_fast.train.checkpoint import CLASSES_FILE, whole_folder, write_json

AVERAGE = "average"  # its folder in a run, and what stands in front of a parameter's name in a checkpoint


class WeightAverage:
    """The average of a model's parameters over the steps.

    After the first step it is the parameters; after each further one decay times itself plus (1 - decay) times these,
    as with ``torch.optim.swa_utils.get_ema_multi_avg_fn``: no initial weights are in it.

    Args:
        decay: in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._of: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: FastPromptedCLIP) -> None:
        """Take the parameters after a step."""
        for name, parameter in model.named_parameters():
            if name in self._of:
                self._of[name].lerp_(parameter, 1 - self.decay)
            else:
                self._of[name] = parameter.detach().clone()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by "average.NAME", NAME being a parameter's."""
        return {f"{AVERAGE}.{name}": value for name, value in self._of.items()}

    def restore(self, model: FastPromptedCLIP, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        for name, parameter in model.named_parameters():
            value = tensors.get(f"{AVERAGE}.{name}")
            if value is not None:
                self._of[name] = value.to(parameter, copy=True)

    @contextmanager
    def in_place(self, model: FastPromptedCLIP) -> Iterator[None]:
        """A context in which the model's parameters are the average."""
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        try:
            _put(model, self._of)
            yield
        finally:
            _put(model, before)


@torch.no_grad()
def _put(model: FastPromptedCLIP, values: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])


def write_average(run_dir: Path, model: FastPromptedCLIP, average: WeightAverage, classes: dict[str, Any]) -> None:
    """Write RUN/average, a saved model with the averaged weights; whole or not at all.

    Args:
        run_dir: the run.
        model: whose parameters are averaged; it stays as it is.
        average: of them.
        classes: what classes.json holds.
    """
    # one may be there, of a run that was stopped before its results were written
    with whole_folder(run_dir / AVERAGE) as temporary:
        with average.in_place(model):
            model.save_pretrained(temporary)
        write_json(temporary / CLASSES_FILE, classes)
