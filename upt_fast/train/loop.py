"""The training loop: SGD on the prompts, one checkpoint per epoch, a final evaluation.

Every random number of a run is a function of its seed, the epoch and the image (data/dataset.py), and torch's own
generators, which dropout draws from, are seeded anew for each epoch; a checkpoint inside of one has their states. A run
that is resumed from any checkpoint is therefore bit for bit the run that was never stopped, on the same machine and
software.
"""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upt_fast.common import processes
from upt_fast.data.duplicates import Duplicates, find_duplicates
from upt_fast.data.feature_store import open_store
from upt_fast.data.folder import list_folders, scan_folder
from upt_fast.data.listing import FolderListing
from upt_fast.data.sampling import FewShotSplit, few_shot_split
from upt_fast.distributed import ONE_PROCESS, Group
from upt_fast.engine.tuning import choices
from upt_fast.model import FastPromptedCLIP
from upt_fast.steps import MemoryPlan
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
from upt_fast.train.features import FixedFeatures
from upt_fast.train.final import finish
from upt_fast.train.images import GIB, with_cache
from upt_fast.train.routes import take_route
from upt_fast.train.separate_test import with_test_data
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
    describe_split,
    digest,
    load_data,
    log_duplicates,
    log_links,
    plan_steps,
    resolve_device,
)
from upt_fast.train.shared import first_speaks, join_processes, resumed_if_restarted
from upt_fast.train.texts import keep_texts
from upt_fast.train.trainer import Trainer
from upt_fast.train.wandb_log import WandbLog, require_wandb

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
        OtherProcessError: where a run is on several processes, something is wrong on another one.
    """
    group = join_processes(config)
    with first_speaks(group):
        return _train(config, group)


def _train(config: TrainConfig, group: Group) -> dict[str, Any]:
    restarts = max(group.objects(processes.restarts()))

    def settled() -> TrainConfig:
        return with_cache(resumed_if_restarted(config, restarts), Path(config.out) / CONFIG_FILE)

    config = group.by_first(settled)
    if (results := group.by_first(lambda: finished(config))) is not None:
        return results
    run = group.by_first(lambda: Run.prepare(config))
    run.group = group
    if not group.first:
        run.config = config = config.changed(progress=False)
    device = resolve_device(config.device) if group.size == 1 else group.device
    with run.opened():
        run.begin(group.agreed(lambda: build_model(config, run.listing.classnames, run.out, device)))
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
        broken: what to say of the links of test_data that lead nowhere.
        group: the processes that it is on; the first one writes.
    """

    config: TrainConfig
    out: Path
    listing: FolderListing
    split: FewShotSplit
    duplicates: Duplicates
    broken: tuple[str, ...] = ()
    group: Group = ONE_PROCESS
    plan: MemoryPlan | None = None  # None: no limit
    log: WandbLog | None = None
    trainer: Trainer | None = None  # None before it is begun, and where there is nothing to train
    model: FastPromptedCLIP = field(init=False)
    data: RunData = field(init=False)

    @classmethod
    def prepare(
        cls,
        config: TrainConfig,
        scan: Callable[..., FolderListing] | None = None,
        here: bool = True,
        scan_test: Callable[..., FolderListing] = list_folders,
    ) -> Run:
        """List the dataset and draw the images of a run that is not :func:`finished`.

        Args:
            config: the settings.
            scan: :func:`scan_folder`, or what remembers its results.
            here: whether it is to run on this machine, which then must have its device and what it logs to.
            scan_test: :func:`list_folders`, or what remembers its results.
        Raises:
            ValueError: as :func:`train`, but for what only the model or the decoded images show.
        """
        if here:
            resolve_device(config.device)
            require_wandb(config)
        listing = (scan or scan_folder)(config.data, config.classes_from, asked_names(config, Path(config.out)))
        log_links(listing)
        with_test = config.test != "none" and config.test_data is None
        split = few_shot_split(listing, None if config.shots == "all" else config.shots, config.seed, with_test)
        if len(listing.classnames) < 2:
            raise ValueError(f"{config.data} has 1 class, {listing.classnames[0]!r}; wanted at least 2 to tell apart")
        broken: tuple[str, ...] = ()
        if config.test_data is not None:
            split, broken = with_test_data(split, listing, config.test_data, scan_test, config.classes_from)
        duplicates = find_duplicates(split)
        log_duplicates(duplicates, config.duplicates == "drop")
        return cls(config, Path(config.out), listing, split, duplicates, broken)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The folder, locked against other processes; it goes again if nothing was begun in it."""
        made = self.group.first and not self.out.exists()
        try:
            with contextlib.ExitStack() as stack:
                self.group.by_first(lambda: self._lock(stack))
                self.group.agreed(self._look)
                yield
        finally:
            if self.log is not None:
                self.log.close(failed=True)  # unless it was finished
            if made and not is_run(self.out):  # refused before anything was trained: leave nothing behind
                with contextlib.suppress(OSError):
                    (self.out / LOCK_FILE).unlink(missing_ok=True)
                    self.out.rmdir()

    def _lock(self, stack: contextlib.ExitStack) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(self.out))

    def _look(self) -> None:
        """Take over what the folder says of a run that is resumed."""
        if not self.out.is_dir():
            raise ValueError(
                f"out={str(self.out)!r} is not there on {platform.node()}; wanted a folder that all hosts share"
            )
        if not is_run(self.out) or not (self.out / CHOICES_FILE).is_file():  # older runs have none
            return
        recorded = read_json(self.out / CHOICES_FILE)
        choices.restore(recorded)
        if (before := recorded.get("processes", 1)) != self.group.size:
            logger.warning(
                "this run began on %s process(es) and goes on on %d: from here on its numbers may differ in the last "
                "bits from those that it would have had",
                before,
                self.group.size,
            )

    def begin(self, model: FastPromptedCLIP, beside: int = 1, features: dict[Any, FixedFeatures] | None = None) -> None:
        """Decode the images, write the settings down, and make the trainer.

        Args:
            model: that of the run.
            beside: runs that are trained at once, this one with them: each has its share of loader processes.
            features: shared with other runs on the model's CLIP; see :func:`fixed_features`.
        """
        config, out, group = self.config, self.out, self.group
        self.model = model
        take_route(config, model, out, group)
        self.data = data = group.agreed(lambda: self._load(features))
        described = describe_split(data)
        everywhere = group.objects(digest(described))
        group.by_first(lambda: self._write_down(described, everywhere))
        if any(True for _ in model.parameters()):
            self.trainer = Trainer(config, out, model, data, self.plan, beside, group)
        if config.wandb is not None and group.first:
            self.log = WandbLog(config, out)
        if self.trainer is not None:
            self.trainer.log = self.log

    def _load(self, features: dict[Any, FixedFeatures] | None) -> RunData:
        config, model = self.config, self.model
        self.plan = plan_steps(config, model, self.group)
        keep_texts(model, open_store(config.feature_store, config.feature_store_gib))
        found = self.listing, self.split, self.duplicates
        data = load_data(config, model, *found, features, self.broken, self.group)
        if config.patience is not None and data.val is None:
            raise ValueError(
                f"patience={config.patience} wants validation images, and {config.data} has none: add a val folder "
                "with class folders, or leave patience out"
            )
        return data

    def _started(self) -> dict[str, Any]:
        name = processes.started_as()
        return {"processes": self.group.size} | ({} if name is None else {"started_as": name})

    def _write_down(self, described: dict[str, Any], everywhere: list[str]) -> None:
        """Write the settings and the images of a run, or compare them with those that are there."""
        config, out = self.config, self.out
        if differ := [str(place) for place, theirs in enumerate(everywhere) if theirs != everywhere[0]]:
            raise ValueError(
                f"process {', '.join(differ)} can read other images of {config.data} than process 0; wanted the same "
                "images on all hosts"
            )
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
            write_json(out / CHOICES_FILE, choices.record() | self._started())
            write_json(out / CONFIG_FILE, {**config.to_dict(), "resume": False})

    def describe(self) -> None:
        """Say what is going to be trained."""
        config, out, data, trainer = self.config, self.out, self.data, self.trainer
        if trainer is None:
            logger.info("%s has nothing to train; %s", config.method, self._tested())
            return
        if config.resume:
            state = trainer.state
            within = f", step {state.within} of {len(trainer.sampler)} of the next" if state.within else ""
            logger.info("resuming %s after epoch %d of %d%s", out, state.epoch, config.epochs, within)
        logger.info(
            "training on %d images of %d classes, %s; %s",
            len(data.train),
            len(data.classnames),
            f"{len(data.val)} for validation" if data.val else "none for validation",
            self._tested(),
        )
        share = max(self.group.sizes(config.step_size))
        at_once = min(share, config.batch_size)
        if self.group.size > 1:
            logger.info("%d processes: %d of %d images of a step each", self.group.size, share, config.step_size)
        if self.plan is None:
            logger.info(
                "a step of %d images%s needs about %.2f GiB beside the weights",
                share,
                f", {at_once} at once," if at_once < share else "",
                self.model.predict_peak_memory(at_once, trainer.from_features) / GIB,
            )

    def _tested(self) -> str:
        return "no test" if self.data.test is None else f"testing on {len(self.data.test)} images"

    def finish(self) -> dict[str, Any]:
        """Evaluate on the test images and write the results."""
        trainer = self.trainer
        if trainer is None:
            state = self.group.by_first(lambda: _save_untrained(self.out, self.model, self.data))
        else:
            state = trainer.state
        average = None if trainer is None else trainer.average
        results = finish(self.config, self.out, self.model, state, self.data, self.plan, average, self.group)
        if self.log is not None:
            self.log.finish(results)
        return results


def _save_untrained(out: Path, model: FastPromptedCLIP, data: RunData) -> TrainingState:
    """The one checkpoint of a method without parameters, written unless it is there."""
    if restored := read_checkpoint(out):
        return restored[0]
    state = TrainingState(epoch=0, step=0, best_epoch=0, best_metric=0.0)
    write_checkpoint(out, model, {}, state, data.classes.to_dict())
    return state
