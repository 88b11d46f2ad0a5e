"""Epochs: steps, validation, a checkpoint after each, and inside of one where asked for."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from upt_fast.data.dataset import EpochBatchSampler, derive_seed
from upt_fast.data.streaming import ShardBatchSampler
from upt_fast.data.transforms import build_normalize
from upt_fast.distributed import ONE_PROCESS, DistributedStep, Group
from upt_fast.engine.graphs import NOT_YET
from upt_fast.model import FastPromptedCLIP
from upt_fast.steps import MemoryPlan
from upt_fast.steps.tuned import TunedStep
from upt_fast.train.averaging import WeightAverage
from upt_fast.train.batches import device_of, to_device
from upt_fast.train.checkpoint import (
    TrainingState,
    read_checkpoint,
    write_checkpoint,
)
from upt_fast.train.config import TrainConfig
from upt_fast.train.evaluation import evaluate
from upt_fast.train.features import FeatureDataset
from upt_fast.train.interrupt import InterruptBetweenSteps
from upt_fast.train.metrics import Evaluation
from upt_fast.train.optimizers import build_optimizer, restore_state, state_tensors
from upt_fast.train.randomness import get_randomness, randomness_in, set_randomness
from upt_fast.train.recording import (
    Meter,
    TrainingDivergedError,
    diverged,
    in_short,
    open_tensorboard,
    record_epoch,
    truncate_metrics,
)
from upt_fast.train.routes import may_measure, record_choices
from upt_fast.train.schedule import WarmupCosineLR, lr_at_epoch
from upt_fast.train.setup import RunData, count_workers, evaluation_batch, parts_of, preprocess_cfg
from upt_fast.train.shared import InterruptTogether, OwnImages, with_all_labels
from upt_fast.train.wandb_log import WandbLog

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("upt_fast")

# (B, 3, H, W) images, normalised, and (B,) labels, on the device; on several processes own images (b, 3, H, W)
Batch = tuple[Tensor, Tensor]
Result = tuple[Tensor, Tensor]  # the loss () and the logits (B, C) of a step, without gradients
Steps = Generator[Batch, Result, None]


def drive(steps: Steps, step: Callable[[Tensor, Tensor], Result]) -> None:
    """Take all steps of a trainer, each batch by step(images, labels)."""
    try:
        batch = next(steps)
        while True:
            batch = steps.send(step(*batch))
    except StopIteration:
        return


class Trainer:
    """Model, optimizer and the files of a run, at the state of its last checkpoint."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        model: FastPromptedCLIP,
        data: RunData,
        plan: MemoryPlan | None = None,
        beside: int = 1,
        group: Group = ONE_PROCESS,
    ) -> None:
        self.config, self.out, self.model, self.data, self.plan, self.group = config, out, model, data, plan, group
        self.device = device_of(model)
        self.num_workers = count_workers(config.num_workers, self.device) // beside
        self.from_features = isinstance(data.train.base, FeatureDataset)
        if isinstance(data.train.base, FeatureDataset):
            data.train.base.tensors()  # now, in this process; the loader then has nothing to do
        loaders = 0 if self.from_features else self.num_workers
        self.optimizer = build_optimizer(config, model, fused=self.device.type == "cuda" and config.cuda_graph)
        self.loss = functools.partial(F.cross_entropy, label_smoothing=config.label_smoothing)
        self.state = TrainingState(epoch=0, step=0, best_epoch=0, best_metric=-math.inf)
        self.log: WandbLog | None = None  # beside metrics.jsonl
        self.average = None if config.ema is None else WeightAverage(config.ema)
        self.randomness: dict[str, Tensor] = {}  # of torch's generators, inside of an epoch
        self._settle: Callable[[], None] = lambda: None  # the route, before the model is looked at
        if restored := group.by_first(lambda: read_checkpoint(out)):
            self.state, tensors = restored
            restore_state(model, self.optimizer, tensors)
            self.randomness = randomness_in(tensors)
            if self.average is not None:
                self.average.restore(model, tensors)
        self.schedule = WarmupCosineLR(
            self.optimizer, config.epochs, config.lr, config.warmup_lr, start_epoch=self.state.epoch
        )
        self.sampler = (
            ShardBatchSampler(data.train.base.items, config.batch_size, config.seed, config.accumulate)
            if config.cache == "stream"
            else EpochBatchSampler(len(data.train), config.batch_size, config.seed, config.accumulate)
        )
        self.loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            data.train,  # type: ignore[arg-type]
            batch_sampler=self.sampler if group.size == 1 else OwnImages(self.sampler, group),  # type: ignore[arg-type]
            collate_fn=data.train.collate,
            num_workers=loaders,
            persistent_workers=loaders > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or the loader would draw from the default one, which dropout uses
        )
        self.normalize = nn.Identity() if self.from_features else build_normalize(preprocess_cfg(model))

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.state.epoch >= self.config.epochs or self._out_of_patience()

    def fit(self) -> None:
        """Train the epochs that are left."""
        config = self.config
        if self.done:
            return
        per_epoch = len(self.sampler)
        total, initial = config.epochs * per_epoch, self.state.step
        shown = None if config.progress else True
        bar = tqdm(total=total, initial=initial, unit="step", disable=shown, smoothing=0.05)
        alone = self.group.size == 1
        step = self._step() if alone else self._divided_step()
        with InterruptBetweenSteps() if alone else InterruptTogether(self.group) as interrupt, bar:
            drive(self.steps(bar, interrupt), step)

    def _step(self) -> Callable[[Tensor, Tensor], Result]:
        """A step of one process."""
        config = self.config
        step = self.model.make_graphed_step(
            self.optimizer,
            config.step_size,
            loss=self.loss,
            capture=config.cuda_graph,
            micro_batches=parts_of(config, self.model, self.plan),
            from_features=self.from_features,
            tune=may_measure(config, self.model),
            steps=config.epochs * len(self.sampler) - self.state.step,
            decided=lambda: record_choices(self.out),
        )
        if isinstance(step, TunedStep):
            self._settle = step.settle
        said = NOT_YET  # of why steps run eagerly

        def tell(images: Tensor, labels: Tensor) -> Result:
            nonlocal said
            result = step(images, labels)
            if self.device.type == "cuda" and step.reason != said:
                said = step.reason
                logger.info("steps run %s", f"eagerly: {said}" if said else "as a CUDA graph")
            return result

        return tell

    def _divided_step(self) -> Callable[[Tensor, Tensor], Result]:
        """A step of several processes, of own images and the labels of the whole batch."""
        divided = DistributedStep(self.model, parts_of(self.config, self.model, self.plan), self.group)

        def step(images: Tensor, labels: Tensor) -> Result:
            self.optimizer.zero_grad(set_to_none=True)
            given = (None, images) if self.from_features else (images, None)
            sizes = self.group.sizes(len(labels))
            result = divided.backward(given[0], labels, self.loss, image_features=given[1], sizes=sizes)
            self.optimizer.step()
            return result

        return step

    def _batches(self) -> Iterable[Batch]:
        """The batches of an epoch on the device; on several processes own images, and the labels of the whole batch."""
        batches = to_device(self.loader, self.normalize, self.device)
        if self.group.size == 1:
            return batches
        shape = (self.model.embed_dim,) if self.from_features else (3, *self.model.vision_tower.image_size)
        nothing = torch.zeros(0, *shape, device=self.device)
        return with_all_labels(batches, self.sampler, self.data.train.base.items, self.group, nothing)

    def steps(self, bar: Any, interrupt: InterruptBetweenSteps) -> Steps:
        """The steps that are left: yields each one's batch, and is sent its result once the parameters are updated.

        Args:
            bar: a tqdm, or what has its set_postfix, update and disable.
            interrupt: checked between steps.

        Random numbers are drawn from torch's default generators, between a batch and the next and by the learner.
        """
        self.group.by_first(lambda: truncate_metrics(self.out, self.state.epoch))
        steps = len(self.sampler)
        writer = open_tensorboard(self.out / "tensorboard", self.state.epoch) if self.group.first else None
        with writer or contextlib.nullcontext():
            for epoch in range(self.state.epoch, self.config.epochs):
                started = time.perf_counter()
                lr = lr_at_epoch(epoch, self.config.epochs, self.config.lr, self.config.warmup_lr)
                loss, accuracy = yield from self._train_epoch(epoch, lr, bar, interrupt)
                self._settle()
                record: dict[str, Any] = {"epoch": epoch + 1, "lr": lr, "loss": loss, "accuracy": accuracy}
                metric = -loss
                if self.data.val is not None:
                    val = self._validate()
                    record |= {"val_loss": val.loss, "val_accuracy": val.accuracy}
                    metric = val.accuracy
                self._end_epoch(record, metric, steps, started, writer)
                self.schedule.step()
                interrupt.check()
                if bar.disable:
                    logger.info("epoch %s", ", ".join(f"{key} {in_short(value)}" for key, value in record.items())[6:])
                if self._out_of_patience():
                    break

    def _out_of_patience(self) -> bool:
        """Whether validation has not become better for as many epochs as the settings allow."""
        patience, waited = self.config.patience, self.state.epoch - self.state.best_epoch
        if patience is None or waited < patience:
            return False
        logger.info(
            "no better validation accuracy for %d epochs: the run ends after epoch %d", waited, self.state.epoch
        )
        return True

    def _train_epoch(
        self, epoch: int, lr: float, bar: Any, interrupt: InterruptBetweenSteps
    ) -> Generator[Batch, Result, tuple[float, float]]:
        """One pass over the images; returns mean loss and accuracy of the images seen."""
        torch.manual_seed(derive_seed(self.config.seed, epoch))
        self.sampler.epoch, self.sampler.start = epoch, self.state.within
        meter = Meter(epoch, lr, bar, self.device)
        if self.state.within:
            meter.sums = self.state.sums
            set_randomness(self.randomness, self.device)
        self.model.train()
        done = epoch * len(self.sampler) + self.state.within
        for images, labels in self._batches():
            loss, logits = yield images, labels
            if self.average is not None:
                self.average.update(self.model)
            meter.add(done, loss, logits, labels)
            done += 1
            every, within = self.config.checkpoint_steps, done - epoch * len(self.sampler)
            if every is not None and done % every == 0 and within < len(self.sampler):
                self._checkpoint_within(epoch, within, lr, meter)
            interrupt.check()
        meter.flush()
        self._check_finite(done, epoch, lr)
        return meter.mean_loss, meter.accuracy

    def _check_finite(self, done: int, epoch: int, lr: float) -> None:
        if bad := [name for name, parameter in self.model.named_parameters() if not parameter.isfinite().all()]:
            raise TrainingDivergedError(diverged(done - 1, epoch, lr, f"{bad[0]} is not finite"))

    def _checkpoint_within(self, epoch: int, within: int, lr: float, meter: Meter) -> None:
        """A checkpoint between two steps of an epoch."""
        self._settle()
        randomness = get_randomness(self.device)
        meter.flush()
        step = epoch * len(self.sampler) + within
        self._check_finite(step, epoch, lr)
        state = replace(self.state, epoch=epoch, step=step, within=within, sums=meter.sums)
        tensors = self._tensors() | randomness

        def write() -> TrainingState:
            write_checkpoint(self.out, self.model, tensors, state, self.data.classes.to_dict())
            return state

        self.state = self.group.by_first(write)

    def _tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the learner."""
        average = {} if self.average is None else self.average.tensors()
        return state_tensors(self.model, self.optimizer) | average

    def _validate(self) -> Evaluation:
        assert self.data.val is not None
        size, progress = evaluation_batch(self.config, self.plan), self.config.progress
        workers, group = self.num_workers, self.group
        return evaluate(self.model, self.data.val, size, workers, "validating", progress=progress, group=group)

    def _end_epoch(
        self, record: dict[str, Any], metric: float, steps: int, started: float, writer: SummaryWriter | None
    ) -> None:
        epoch = self.state.epoch + 1
        improved = metric > self.state.best_metric
        state = TrainingState(
            epoch=epoch,
            step=epoch * steps,
            best_epoch=epoch if improved else self.state.best_epoch,
            best_metric=metric if improved else self.state.best_metric,
        )
        record["best_epoch"] = state.best_epoch
        record["seconds"] = round(time.perf_counter() - started, 3)

        def write() -> TrainingState:
            # metrics first: a kill between the two leaves a line too many, which resumption removes
            record_epoch(self.out, record, writer)
            if self.log is not None:
                self.log.log(record)
            write_checkpoint(self.out, self.model, self._tensors(), state, self.data.classes.to_dict())
            return state

        self.state = self.group.by_first(write)
