"""Training, evaluation and prediction. Names load when asked for, so that reading the settings imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upt_fast.train.config import TrainConfig
    from upt_fast.train.evaluation import Prediction, evaluate, predict
    from upt_fast.train.loop import train
    from upt_fast.train.metrics import Evaluation
    from upt_fast.train.recording import TrainingDivergedError
    from upt_fast.train.runs import class_names, evaluate_run, load_run
    from upt_fast.train.schedule import WarmupCosineLR, lr_at_epoch

__all__ = [
    "Evaluation",
    "Prediction",
    "TrainConfig",
    "TrainingDivergedError",
    "WarmupCosineLR",
    "class_names",
    "evaluate",
    "evaluate_run",
    "load_run",
    "lr_at_epoch",
    "predict",
    "train",
]

_MODULES = {
    "TrainConfig": "config",
    "Evaluation": "metrics",
    "Prediction": "evaluation",
    "evaluate": "evaluation",
    "predict": "evaluation",
    "TrainingDivergedError": "recording",
    "class_names": "runs",
    "evaluate_run": "runs",
    "load_run": "runs",
    "train": "loop",
    "WarmupCosineLR": "schedule",
    "lr_at_epoch": "schedule",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
