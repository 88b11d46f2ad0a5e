"""The training loop: SGD on the prompts, one checkpoint per epoch, a final evaluation.

Every random number of a run is a function of its seed, the epoch and the image (data/dataset.py), and torch's own
generators, which dropout draws from, are seeded anew for each epoch. A run that is resumed from the checkpoint of any
epoch is therefore bit for bit the run that was never stopped, on the same machine and software.
"""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import upt_fast
from upt_fast.data.duplicates import Duplicates, find_duplicates
from upt_fast.data.feature_store import open_store
from upt_fast.data.folder import FolderListing, scan_folder
from upt_fast.data.sampling import FewShotSplit, few_shot_split
from upt_fast.engine.cpu import choices
from upt_fast.model import FastPromptedCLIP
from upt_fast.steps import MemoryPlan
from upt_fast.train.batches import device_of
from upt_fast.train.checkpoint import (
    LOCK_FILE,
    TrainingState,
    is_run,
    locked,
    read_checkpoint,
    read_json,
    write_checkpoint,
    write_json,
)
from upt_fast.train.config import TrainConfig
from upt_fast.train.evaluation import evaluate
from upt_fast.train.features import FixedFeatures
from upt_fast.train.images import GIB, with_cache
from upt_fast.train.setup import (
    CHOICES_FILE,
    CONFIG_FILE,
    LATER_KEYS,
    RESULTS_FILE,
    SPLIT_FILE,
    RunData,
    asked_names,
    build_model,
    check_out,
    count_workers,
    describe_split,
    evaluation_batch,
    load_data,
    load_model,
    log_duplicates,
    log_links,
    plan_steps,
    resolve_device,
    without_copies,
)
from upt_fast.train.texts import keep_texts
from upt_fast.train.trainer import Trainer

logger = logging.getLogger("upt_fast")


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, evaluate and write everything into config.out (the files are listed in train/checkpoint.py).

    Args:
        config: the run; with resume it goes on where the run in config.out stopped.
    Returns:
        What results.json holds: the evaluation on the test images, the best epoch, what was trained on.
    Raises:
        ValueError: bad data, model or option; config.out holds a run already, or with resume none or a different one.
        TrainingDivergedError: the loss or a parameter is NaN or infinite; the last checkpoint is good.
    """
    config = with_cache(config, Path(config.out) / CONFIG_FILE)
    if (results := finished(config)) is not None:
        return results
    run = Run.prepare(config)
    with run.opened():
        run.begin(build_model(config, run.listing.classnames, run.out, resolve_device(config.device)))
        run.describe()
        if run.trainer is not None:
            run.trainer.fit()
        return run.finish()


def finished(config: TrainConfig) -> dict[str, Any] | None:
    """Results of the run, where it is resumed and was finished before.

    Raises:
        ValueError: there cannot be such a run in its folder.
    """
    out = Path(config.out)
    check_out(config, out)
    if not config.resume or not (out / RESULTS_FILE).is_file():
        return None
    results: dict[str, Any] = read_json(out / RESULTS_FILE)
    epochs = results.get("epochs_done", config.epochs)  # older runs trained all
    done = f"{epochs} epochs are done" if results["trainable_parameters"] else "nothing was to train"
    logger.info("%s is finished: %s and evaluated", out, done)
    return results


@dataclass
class Run:
    """A run on its way: prepared without decoding an image, begun with a model, finished with an evaluation.

    Args:
        config: the settings.
        out: its folder.
        listing: the dataset.
        split: the images of the run.
        duplicates: images that are there twice.
    """

    config: TrainConfig
    out: Path
    listing: FolderListing
    split: FewShotSplit
    duplicates: Duplicates
    plan: MemoryPlan | None = None  # None: no limit
    trainer: Trainer | None = None  # None before it is begun, and where there is nothing to train
    model: FastPromptedCLIP = field(init=False)
    data: RunData = field(init=False)

    @classmethod
    def prepare(cls, config: TrainConfig, scan: Callable[..., FolderListing] | None = None, here: bool = True) -> Run:
        """List the dataset and draw the images of a run that is not :func:`finished`.

        Args:
            config: the settings.
            scan: :func:`scan_folder`, or what remembers its results.
            here: whether it is to run on this machine, which then must have its device.
        Raises:
            ValueError: as :func:`train`, but for what only the model or the decoded images show.
        """
        if here:
            resolve_device(config.device)
        listing = (scan or scan_folder)(config.data, config.classes_from, asked_names(config, Path(config.out)))
        log_links(listing)
        split = few_shot_split(listing, None if config.shots == "all" else config.shots, config.seed)
        if len(listing.classnames) < 2:
            raise ValueError(f"{config.data} has 1 class, {listing.classnames[0]!r}; wanted at least 2 to tell apart")
        duplicates = find_duplicates(split)
        log_duplicates(duplicates, config.duplicates == "drop")
        return cls(config, Path(config.out), listing, split, duplicates)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The folder, locked against other processes; it goes again if nothing was begun in it."""
        made = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.out):
                if is_run(self.out) and (self.out / CHOICES_FILE).is_file():  # older runs have none
                    choices.restore(read_json(self.out / CHOICES_FILE))
                yield
        finally:
            if made and not is_run(self.out):  # refused before anything was trained: leave nothing behind
                with contextlib.suppress(OSError):
                    (self.out / LOCK_FILE).unlink(missing_ok=True)
                    self.out.rmdir()

    def begin(self, model: FastPromptedCLIP, beside: int = 1, features: dict[Any, FixedFeatures] | None = None) -> None:
        """Decode the images, write the settings down, and make the trainer.

        Args:
            model: that of the run.
            beside: runs that are trained at once, this one with them: each has its share of loader processes.
            features: shared with other runs on the model's CLIP; see :func:`fixed_features`.
        """
        config, out = self.config, self.out
        self.model, self.plan = model, plan_steps(config, model)
        keep_texts(model, open_store(config.feature_store, config.feature_store_gib))
        self.data = data = load_data(config, model, self.listing, self.split, self.duplicates, features)
        if config.patience is not None and data.val is None:
            raise ValueError(
                f"patience={config.patience} wants validation images, and {config.data} has none: add a val folder "
                "with class folders, or leave patience out"
            )
        described = describe_split(data)
        if is_run(out):
            recorded = read_json(out / SPLIT_FILE)
            written = [key for key in described if key in recorded or key not in LATER_KEYS]
            if changed := [key for key in written if recorded.get(key) != described[key]]:
                raise ValueError(
                    f"cannot resume {out}: the images in {config.data} or their class names changed "
                    f"({', '.join(changed)} differ)"
                )
        else:
            write_json(out / SPLIT_FILE, described)
            write_json(out / CHOICES_FILE, choices.record())
            write_json(out / CONFIG_FILE, {**config.to_dict(), "resume": False})
        if not any(True for _ in model.parameters()):
            return
        self.trainer = Trainer(config, out, model, data, self.plan, beside)

    def describe(self) -> None:
        """Say what is going to be trained."""
        config, out, data, trainer = self.config, self.out, self.data, self.trainer
        if trainer is None:
            logger.info("%s has nothing to train; testing on %d images", config.method, len(data.test))
            return
        if config.resume:
            logger.info("resuming %s after epoch %d of %d", out, trainer.state.epoch, config.epochs)
        logger.info(
            "training on %d images of %d classes, %s; testing on %d",
            len(data.train),
            len(data.classnames),
            f"{len(data.val)} for validation" if data.val else "none for validation",
            len(data.test),
        )
        if self.plan is None:
            logger.info(
                "a step of %d images needs about %.2f GiB beside the weights",
                config.batch_size,
                self.model.predict_peak_memory(config.batch_size, trainer.from_features) / GIB,
            )

    def finish(self) -> dict[str, Any]:
        """Evaluate on the test images and write the results."""
        trainer = self.trainer
        state = _save_untrained(self.out, self.model, self.data) if trainer is None else trainer.state
        return _finish(self.config, self.out, self.model, state, self.data, self.plan)


def _save_untrained(out: Path, model: FastPromptedCLIP, data: RunData) -> TrainingState:
    """The one checkpoint of a method without parameters, written unless it is there."""
    if restored := read_checkpoint(out):
        return restored[0]
    state = TrainingState(epoch=0, step=0, best_epoch=0, best_metric=0.0)
    write_checkpoint(out, model, {}, state, data.classes.to_dict())
    return state


def _finish(
    config: TrainConfig,
    out: Path,
    model: FastPromptedCLIP,
    state: TrainingState,
    data: RunData,
    plan: MemoryPlan | None,
) -> dict[str, Any]:
    device, epoch = device_of(model), state.epoch
    if config.final_model == "best" and state.best_epoch != epoch:
        epoch = state.best_epoch
        model = load_model(config, out / "best", device, model)
        keep_texts(model, open_store(config.feature_store, config.feature_store_gib))
        if plan is not None:
            model.follow_plan(plan)
    workers, size = count_workers(config.num_workers, device), evaluation_batch(config, plan)
    test = evaluate(model, data.test, size, workers, description="testing", progress=config.progress)
    chosen_by: str = "validation accuracy"
    value: float | None = state.best_metric
    if epoch == 0:
        chosen_by, value = "nothing: the method has no parameters", None
    elif data.val is None:
        chosen_by, value = "training loss (there are no validation images)", -state.best_metric
    results = {
        "evaluated": config.final_model,
        "epoch": epoch,
        "epochs_done": state.epoch,
        "test_images_from": {"rest": "images that training does not use"}.get(
            data.split.test_name, f"{data.split.test_name} folder"
        )
        + without_copies(len(data.dropped)),
        "test": asdict(test),
        "best": {"epoch": state.best_epoch, "chosen_by": chosen_by, "value": value},
        "num_train": len(data.train),
        "num_val": len(data.val) if data.val else 0,
        "skipped": data.skipped,
        "trainable_parameters": sum(p.numel() for p in model.parameters()),
        "environment": {
            "upt_fast": upt_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
    }
    if plan is not None:
        results["memory_plan"] = plan._asdict()
    write_json(out / RESULTS_FILE, results)
    logger.info(
        "test accuracy %.2f %%, mean over classes %.2f %% (%d images, %s model, epoch %d)",
        100 * test.accuracy,
        100 * test.mean_class_accuracy,
        test.num_images,
        config.final_model,
        epoch,
    )
    return results
