"""The final evaluation of a run: test accuracy of each set of weights that it has, written into results.json."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import upt_fast
from upt_fast.distributed import ONE_PROCESS, Group
from upt_fast.model import FastPromptedCLIP
from upt_fast.steps import MemoryPlan
from upt_fast.train.averaging import AVERAGE, WeightAverage, write_average
from upt_fast.train.batches import device_of
from upt_fast.train.checkpoint import TrainingState, write_json
from upt_fast.train.config import TrainConfig
from upt_fast.train.evaluation import evaluate
from upt_fast.train.metrics import Evaluation, write_confusion
from upt_fast.train.setup import (
    RESULTS_FILE,
    RunData,
    count_workers,
    describe_test,
    evaluation_batch,
    load_model,
)

CONFUSION_FILE = "confusion.csv"

logger = logging.getLogger("upt_fast")

# of an evaluation, what results.json has of each set of weights
BRIEFLY = ("accuracy", "mean_class_accuracy", "loss", "top5_accuracy", "calibration_error")


def finish(
    config: TrainConfig,
    out: Path,
    model: FastPromptedCLIP,
    state: TrainingState,
    data: RunData,
    plan: MemoryPlan | None,
    average: WeightAverage | None = None,
    group: Group = ONE_PROCESS,
) -> dict[str, Any]:
    """Evaluate on the test images, if there are any, and write results.json.

    Args:
        config: of the run.
        out: its folder.
        model: with the weights of its last checkpoint.
        state: of that checkpoint.
        data: the run's images.
        plan: how its passes stay below a limit of memory; None: no limit.
        average: of the weights, which is saved as a model of its own; None: there is none.
        group: the processes of the run, which share the work; the first one writes.
    Returns:
        What the file holds.
    """
    epochs = {"last": state.epoch, "best": state.best_epoch}
    if average is not None:
        averaged = average
        group.by_first(lambda: write_average(out, model, averaged, data.classes.to_dict()))
        epochs[AVERAGE] = state.epoch
    final = config.final_model if config.final_model in epochs else "last"  # nothing to train has no average
    tests = {} if data.test is None else dict(_evaluations(config, out, model, epochs, data, plan, group))
    test = tests.get(final)
    device = device_of(model)
    results: dict[str, Any] = {
        "evaluated": final,
        "epoch": epochs[final],
        "epochs_done": state.epoch,
        "test_images_from": describe_test(data, config),
        "test": None if test is None else test.to_dict(),
        "test_of": {
            name: {"epoch": epochs[name], **{key: getattr(found, key) for key in BRIEFLY}}
            for name, found in tests.items()
        },
        "best": _describe_best(state, data),
        "num_train": len(data.train),
        "num_val": len(data.val) if data.val else 0,
        "skipped": data.skipped,
        "trainable_parameters": sum(p.numel() for p in model.parameters()),
        "environment": {
            "upt_fast": upt_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processes": group.size,
        },
    }
    if plan is not None:
        results["memory_plan"] = plan._asdict()

    def write() -> None:
        if test is not None and test.confusion is not None:
            write_confusion(out / CONFUSION_FILE, test)
        write_json(out / RESULTS_FILE, results)

    group.by_first(write)
    if test is not None:
        logger.info(
            "test accuracy %.2f %%, mean over classes %.2f %% (%d images, %s model, epoch %d)",
            100 * test.accuracy,
            100 * test.mean_class_accuracy,
            test.num_images,
            final,
            results["epoch"],
        )
    return results


def _evaluations(
    config: TrainConfig,
    out: Path,
    model: FastPromptedCLIP,
    epochs: dict[str, int],
    data: RunData,
    plan: MemoryPlan | None,
    group: Group,
) -> Iterator[tuple[str, Evaluation]]:
    """Each set of weights with its evaluation; those that are the same are evaluated once."""
    assert data.test is not None
    device = device_of(model)
    how = evaluation_batch(config, plan), count_workers(config.num_workers, device)
    options: dict[str, Any] = {"progress": config.progress, "group": group}
    last = evaluate(model, data.test, *how, "testing", **options)
    yield "last", last
    for name in epochs:
        if name == "last":
            continue
        if name == "best" and epochs["best"] == epochs["last"]:
            yield name, last
            continue
        folder = out / name
        other = group.agreed(lambda folder=folder: load_model(config, folder, device, model))  # type: ignore[misc]
        if plan is not None:
            other.follow_plan(plan)
        yield name, evaluate(other, data.test, *how, f"testing {name}", **options)


def _describe_best(state: TrainingState, data: RunData) -> dict[str, Any]:
    chosen_by: str = "validation accuracy"
    value: float | None = state.best_metric
    if state.epoch == 0:
        chosen_by, value = "nothing: the method has no parameters", None
    elif data.val is None:
        chosen_by, value = "training loss (there are no validation images)", -state.best_metric
    return {"epoch": state.best_epoch, "chosen_by": chosen_by, "value": value}
