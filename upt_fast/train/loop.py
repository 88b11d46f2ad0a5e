"""The training loop: SGD on the prompts, one checkpoint per epoch, a final evaluation.

Every random number of a run is a function of its seed, the epoch and the image (data/dataset.py), and torch's own
generators, which dropout draws from, are seeded anew for each epoch. A run that is resumed from the checkpoint of any
epoch is therefore bit for bit the run that was never stopped, on the same machine and software.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import upt_fast
from upt_fast.config import FOLDER_NAMES
from upt_fast.data.dataset import AugmentedDataset, EpochBatchSampler, ImageDataset, derive_seed
from upt_fast.data.duplicates import Duplicates, drop_test_copies, find_duplicates
from upt_fast.data.folder import ALL_IMAGES, FolderListing, ImageItem, list_folders, scan_folder
from upt_fast.data.images import corrupt_message, decode_images
from upt_fast.data.sampling import FewShotSplit, few_shot_split
from upt_fast.data.transforms import build_augmentation, build_eval_transform, build_normalize
from upt_fast.data.tree import shorten
from upt_fast.engine.backends import choices
from upt_fast.engine.graphs import NOT_YET
from upt_fast.files import write_text
from upt_fast.model import FastPromptedCLIP
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
from upt_fast.train.classes import TrainedClasses, match_images, read_classes, shown_names
from upt_fast.train.config import TrainConfig, check_device_name
from upt_fast.train.evaluation import Evaluation, device_of, evaluate, to_device
from upt_fast.train.interrupt import InterruptBetweenSteps
from upt_fast.train.schedule import WarmupCosineLR, lr_at_epoch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("upt_fast")

GIB = 2**30
CONFIG_FILE, SPLIT_FILE, METRICS_FILE, RESULTS_FILE = "config.json", "split.json", "metrics.jsonl", "results.json"
CHOICES_FILE = "choices.json"
LATER_KEYS = ("folders", "duplicates")  # of split.json, which runs of earlier versions do not have


class TrainingDivergedError(RuntimeError):
    """The loss or a parameter became NaN or infinite."""


def resolve_device(name: str) -> torch.device:
    """The device that auto, cpu, cuda or cuda:N means here.

    Raises:
        ValueError: no such name, or no such device.
    """
    check_device_name(name)
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(("cuda" if available else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= available:
        raise ValueError(f"device={name!r}; {available} CUDA device(s) here: wanted auto, cpu or one of those")
    return device


@dataclass
class RunData:
    """The datasets of a run and what was left out of them."""

    classnames: tuple[str, ...]
    classes: TrainedClasses
    split: FewShotSplit
    duplicates: Duplicates
    dropped: tuple[ImageItem, ...]
    train: AugmentedDataset
    val: ImageDataset | None
    test: ImageDataset
    skipped: list[str]


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
    out = Path(config.out)
    _check_out(config, out)
    if config.resume and (out / RESULTS_FILE).is_file():
        results: dict[str, Any] = read_json(out / RESULTS_FILE)
        done = f"{config.epochs} epochs are done" if results["trainable_parameters"] else "nothing was to train"
        logger.info("%s is finished: %s and evaluated", out, done)
        return results
    device = resolve_device(config.device)
    listing = scan_folder(config.data, config.classes_from, _asked_names(config, out))
    _log_links(listing)
    split = few_shot_split(listing, None if config.shots == "all" else config.shots, config.seed)
    if len(listing.classnames) < 2:
        raise ValueError(f"{config.data} has 1 class, {listing.classnames[0]!r}; wanted at least 2 to tell apart")
    duplicates = find_duplicates(split)
    _log_duplicates(duplicates, config.duplicates == "drop")
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out):
            if is_run(out) and (out / CHOICES_FILE).is_file():  # older runs have none
                choices.restore(read_json(out / CHOICES_FILE))
            model = _build_model(config, listing.classnames, out, device)
            data = _load_data(config, model, listing, split, duplicates)
            return _run(config, out, model, data)
    finally:
        if made and not is_run(out):  # refused before anything was trained: leave nothing behind
            with contextlib.suppress(OSError):
                (out / LOCK_FILE).unlink(missing_ok=True)
                out.rmdir()


def _log_duplicates(found: Duplicates, drop: bool) -> None:
    advice = {
        "two_classes": "one of the classes is wrong",
        "train_test": "they are left out of the test" if drop else "--duplicates drop leaves them out of the test",
    }
    for kind, said in found.describe().items():
        logger.warning("%s; %s", said, advice[kind])


def _asked_names(config: TrainConfig, out: Path) -> str | None:
    """The config's classnames; runs of before there was such a setting go on with their folders' names."""
    if config.resume and config.classnames is None and "folders" not in read_json(out / SPLIT_FILE):
        return FOLDER_NAMES
    return config.classnames


def _log_links(listing: FolderListing) -> None:
    if said := listing.describe_links():
        logger.info("%s", said)


def _check_out(config: TrainConfig, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file; wanted a folder")
    if config.resume:
        if not is_run(out):
            raise ValueError(f"nothing to resume: out={str(out)!r} holds no run; leave out --resume to start one")
        if differences := config.differences(read_json(out / CONFIG_FILE)):
            raise ValueError(
                f"cannot resume {out} with other settings ({'; '.join(differences)}); "
                f"wanted its own: pass --config {out / CONFIG_FILE} --resume, or another out"
            )
    elif is_run(out):
        raise ValueError(f"out={str(out)!r} holds a run already; add --resume to continue it, or pass another out")
    elif out.exists() and any(not _is_leftover(entry.name) for entry in out.iterdir()):
        raise ValueError(f"out={str(out)!r} is not empty; wanted a new or empty folder")


def _is_leftover(name: str) -> bool:
    """Whether a file is what a run leaves that was killed before it had written its settings."""
    return name in (LOCK_FILE, SPLIT_FILE, CHOICES_FILE) or (name.startswith(".") and name.endswith(".tmp"))


def _build_model(config: TrainConfig, classnames: Sequence[str], out: Path, device: torch.device) -> FastPromptedCLIP:
    if os.path.lexists(out / "last"):
        model = _load_model(config, out / "last", device)
    else:
        torch.manual_seed(config.seed)
        model = FastPromptedCLIP.from_pretrained(
            config.clip,
            config.to_dict()["pretrained"],
            classnames=classnames,
            method=config.method,
            config=config.method_config(),
            precision=config.precision,
            device=str(device),
            quick_gelu=config.quick_gelu,
            memory=config.memory,
            backend=config.backend,
            text_batch=config.text_batch,
        )
    model.train()
    return model


def _load_model(config: TrainConfig, folder: Path, device: torch.device) -> FastPromptedCLIP:
    return FastPromptedCLIP.load(
        folder,
        method=config.method,
        precision=config.precision,
        device=str(device),
        memory=config.memory,
        backend=config.backend,
        text_batch=config.text_batch,
    )


def _load_data(
    config: TrainConfig,
    model: FastPromptedCLIP,
    listing: FolderListing,
    split: FewShotSplit,
    duplicates: Duplicates,
) -> RunData:
    """Decode every image that the run reads, and keep in memory what fits."""
    dropped = duplicates.test_copies if config.duplicates == "drop" else ()
    if dropped:
        split = drop_test_copies(split, duplicates)
    load_train, transform = build_augmentation(_preprocess_cfg(model), config.augment)
    load_eval = build_eval_transform(_preprocess_cfg(model))
    limit = int(config.cache_gib * GIB)
    failures = [reason for reasons in listing.broken.values() for reason in reasons]
    datasets: list[ImageDataset] = []
    for name, items, load in (
        ("training", split.train, load_train),
        ("validation", split.val, load_eval),
        ("test", split.test, load_eval),
    ):
        decoded = decode_images(
            [item.path for item in items], load, limit, f"reading {name} images", progress=config.progress
        )
        failures += decoded.failures.values()
        limit -= decoded.num_bytes
        if decoded.images is None:
            logger.info("%s images need more than what is left of %s GiB: decoded when used", name, config.cache_gib)
        good = [i for i in range(len(items)) if i not in decoded.failures]
        images = None if decoded.images is None else [image for image in decoded.images if image is not None]
        datasets.append(ImageDataset([items[i] for i in good], load, images))
    if failures:
        if config.on_corrupt == "error":
            raise ValueError(f"{corrupt_message(failures)}; remove them, or leave them out with --on-corrupt skip")
        logger.warning("left out: %s", corrupt_message(failures))
        trained = {item.label for item in datasets[0].items}
        if lost := [name for label, name in enumerate(listing.classnames) if label not in trained]:
            raise ValueError(f"no training image is left of {len(lost)} class(es): {shorten(lost)}")
        if not len(datasets[2]):
            raise ValueError("no test image is left; wanted at least one that can be read")
    return RunData(
        classnames=listing.classnames,
        classes=TrainedClasses(listing.folders, config.classes_from),
        split=split,
        duplicates=duplicates,
        dropped=dropped,
        train=AugmentedDataset(datasets[0], transform, config.seed),
        val=datasets[1] if len(datasets[1]) else None,
        test=datasets[2],
        skipped=failures,
    )


def _preprocess_cfg(model: FastPromptedCLIP) -> dict[str, Any]:
    if model.preprocess_cfg is None:
        raise ValueError("this CLIP does not say how its images are prepared (preprocess_cfg); load it by name")
    return model.preprocess_cfg


def _describe_split(data: RunData) -> dict[str, Any]:
    return {
        "classnames": list(data.classnames),
        "folders": list(data.classes.folders),
        "train": [item.key for item in data.train.base.items],
        "val": [] if data.val is None else [item.key for item in data.val.items],
        "test_split": data.split.test_name,
        "num_test": len(data.test),
        "duplicates": {**data.duplicates.keys(), "dropped": [item.key for item in data.dropped]},
    }


def _run(config: TrainConfig, out: Path, model: FastPromptedCLIP, data: RunData) -> dict[str, Any]:
    described = _describe_split(data)
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
        logger.info("%s has nothing to train; testing on %d images", config.method, len(data.test))
        return _finish(config, out, model, _save_untrained(out, model, data), data)
    trainer = _Trainer(config, out, model, data)
    if config.resume:
        logger.info("resuming %s after epoch %d of %d", out, trainer.state.epoch, config.epochs)
    logger.info(
        "training on %d images of %d classes, %s; testing on %d",
        len(data.train),
        len(data.classnames),
        f"{len(data.val)} for validation" if data.val else "none for validation",
        len(data.test),
    )
    logger.info(
        "a step of %d images needs about %.2f GiB beside the weights",
        config.batch_size,
        model.predict_peak_memory(config.batch_size) / GIB,
    )
    trainer.fit()
    return _finish(config, out, model, trainer.state, data)


def _save_untrained(out: Path, model: FastPromptedCLIP, data: RunData) -> TrainingState:
    """The one checkpoint of a method without parameters, written unless it is there."""
    if restored := read_checkpoint(out):
        return restored[0]
    state = TrainingState(epoch=0, step=0, best_epoch=0, best_metric=0.0)
    write_checkpoint(out, model, {}, state, data.classes.to_dict())
    return state


def _finish(
    config: TrainConfig, out: Path, model: FastPromptedCLIP, state: TrainingState, data: RunData
) -> dict[str, Any]:
    device, epoch = device_of(model), state.epoch
    if config.final_model == "best" and state.best_epoch != epoch:
        epoch = state.best_epoch
        model = _load_model(config, out / "best", device)
    workers = _num_workers(config.num_workers, device)
    test = evaluate(model, data.test, config.test_batch_size, workers, description="testing", progress=config.progress)
    chosen_by: str = "validation accuracy"
    value: float | None = state.best_metric
    if epoch == 0:
        chosen_by, value = "nothing: the method has no parameters", None
    elif data.val is None:
        chosen_by, value = "training loss (there are no validation images)", -state.best_metric
    results = {
        "evaluated": config.final_model,
        "epoch": epoch,
        "test_images_from": {"rest": "images that training does not use"}.get(
            data.split.test_name, f"{data.split.test_name} folder"
        )
        + _without(len(data.dropped)),
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


class _Trainer:
    """Model, optimizer and the files of a run, at the state of its last checkpoint."""

    def __init__(self, config: TrainConfig, out: Path, model: FastPromptedCLIP, data: RunData) -> None:
        self.config, self.out, self.model, self.data = config, out, model, data
        self.device = device_of(model)
        self.num_workers = _num_workers(config.num_workers, self.device)
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda" and config.cuda_graph,  # which a graph can hold
        )
        self.step = model.make_graphed_step(self.optimizer, config.batch_size, capture=config.cuda_graph)
        self.said = NOT_YET  # of why steps run eagerly
        self.state = TrainingState(epoch=0, step=0, best_epoch=0, best_metric=-math.inf)
        if restored := read_checkpoint(out):
            self.state, momentum = restored
            for name, parameter in model.named_parameters():
                if name in momentum:
                    self.optimizer.state[parameter]["momentum_buffer"] = momentum[name].to(parameter)
        self.schedule = WarmupCosineLR(
            self.optimizer, config.epochs, config.lr, config.warmup_lr, start_epoch=self.state.epoch
        )
        self.sampler = EpochBatchSampler(len(data.train), config.batch_size, config.seed)
        self.loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            data.train,  # type: ignore[arg-type]
            batch_sampler=self.sampler,  # type: ignore[arg-type]
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or the loader would draw from the default one, which dropout uses
        )
        self.normalize = build_normalize(_preprocess_cfg(model))

    def fit(self) -> None:
        """Train the epochs that are left."""
        if self.state.epoch >= self.config.epochs:
            return
        self._truncate_metrics()
        steps = len(self.sampler)
        shown = None if self.config.progress else True
        writer = _tensorboard(self.out / "tensorboard", self.state.epoch)
        bar = tqdm(
            total=self.config.epochs * steps,
            initial=self.state.epoch * steps,
            unit="step",
            disable=shown,
            smoothing=0.05,
        )
        with InterruptBetweenSteps() as interrupt, writer or contextlib.nullcontext(), bar:
            for epoch in range(self.state.epoch, self.config.epochs):
                started = time.perf_counter()
                lr = lr_at_epoch(epoch, self.config.epochs, self.config.lr, self.config.warmup_lr)
                loss, accuracy = self._train_epoch(epoch, lr, bar, interrupt)
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
                    logger.info("epoch %s", ", ".join(f"{key} {_short(value)}" for key, value in record.items())[6:])

    def _train_epoch(
        self, epoch: int, lr: float, bar: tqdm[Any], interrupt: InterruptBetweenSteps
    ) -> tuple[float, float]:
        """One pass over the images; returns mean loss and accuracy of the images seen."""
        torch.manual_seed(derive_seed(self.config.seed, epoch))
        self.sampler.epoch = epoch
        meter = _Meter(epoch, lr, bar, self.device)
        self.model.train()
        for step, (images, labels) in enumerate(to_device(self.loader, self.normalize, self.device)):
            loss, logits = self.step(images, labels)
            if self.device.type == "cuda" and self.step.reason != self.said:
                self.said = self.step.reason
                logger.info("steps run %s", f"eagerly: {self.said}" if self.said else "as a CUDA graph")
            meter.add(epoch * len(self.sampler) + step, loss, logits, labels)
            interrupt.check()
        meter.flush()
        if bad := [name for name, parameter in self.model.named_parameters() if not parameter.isfinite().all()]:
            raise TrainingDivergedError(
                _diverged((epoch + 1) * len(self.sampler) - 1, epoch, lr, f"{bad[0]} is not finite")
            )
        return meter.mean_loss, meter.accuracy

    def _validate(self) -> Evaluation:
        assert self.data.val is not None
        config = self.config
        return evaluate(
            self.model, self.data.val, config.test_batch_size, self.num_workers, "validating", progress=config.progress
        )

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
        # metrics first: a kill between the two leaves a line too many, which resumption removes
        with open(self.out / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if writer is not None:
            for key, value in record.items():
                if key not in ("epoch", "best_epoch"):
                    writer.add_scalar(key, value, epoch)
            writer.flush()
        momentum = {
            name: buffer
            for name, parameter in self.model.named_parameters()
            if (buffer := self.optimizer.state[parameter].get("momentum_buffer")) is not None
        }
        write_checkpoint(self.out, self.model, momentum, state, self.data.classes.to_dict())
        self.state = state

    def _truncate_metrics(self) -> None:
        """Drop the lines of epochs after the last checkpoint, and a line that a kill cut short."""
        path = self.out / METRICS_FILE
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                if json.loads(line)["epoch"] <= self.state.epoch:
                    lines.append(line + "\n")
            except ValueError:
                break
        write_text(path, "".join(lines))


def _tensorboard(folder: Path, epochs_done: int) -> SummaryWriter | None:
    """A TensorBoard log, or None where that package is not installed; metrics.jsonl holds the same numbers."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("tensorboard is not installed: no TensorBoard log (pip install upt_fast[train])")
        return None
    # what a killed run logged after its last checkpoint is hidden
    return SummaryWriter(str(folder), purge_step=epochs_done + 1)


class _Meter:
    """Loss and accuracy of an epoch, read one step late on a GPU: the host never waits for the step in flight."""

    def __init__(self, epoch: int, lr: float, bar: tqdm[Any], device: torch.device) -> None:
        self.epoch, self.lr, self.bar = epoch, lr, bar
        self.late = 1 if device.type == "cuda" else 0
        self.pending: deque[tuple[int, int, Tensor, torch.cuda.Event | None]] = deque()
        self.loss_sum, self.correct, self.count = 0.0, 0.0, 0

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
            raise TrainingDivergedError(_diverged(step, self.epoch, self.lr, f"the loss is {loss}"))
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


def _diverged(step: int, epoch: int, lr: float, what: str) -> str:
    return (
        f"{what} at step {step + 1} (epoch {epoch + 1}, learning rate {lr:g}); the last good checkpoint is kept. "
        "Try a lower --lr, and --precision fp32 where it is lower"
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _num_workers(asked: int | None, device: torch.device) -> int:
    if asked is not None:
        return asked
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """The learner's folder that a RUN, RUN/last, RUN/best or a folder written by save_pretrained means.

    Raises:
        ValueError: there is no such folder, or the run has no checkpoint yet.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise ValueError(f"checkpoint {str(path)!r} does not exist; wanted the folder of a run or of a saved model")
    if is_run(path):
        if not (path / "last").exists():
            raise ValueError(f"run {str(path)!r} has no checkpoint yet; wanted at least one epoch of training")
        return path / "last"
    return path


def load_run(
    checkpoint: str | Path, device: str = "auto", backend: str = "auto", method: str | None = None
) -> FastPromptedCLIP:
    """The model of a run or of a saved learner, in eval mode, at the precision that the run had.

    Args:
        checkpoint: RUN, RUN/last, RUN/best or a folder written by save_pretrained.
        device: auto, cpu, cuda or cuda:N.
        backend: of the model's operations.
        method: FILE.py:CLASS of a method from outside, which a checkpoint never imports by itself.
    Raises:
        ValueError: no checkpoint there, or one of another method; its CLIP cannot be loaded; no such device.
    """
    folder = checkpoint_folder(checkpoint)
    run = _run_of(folder)
    precision = "fp32" if run is None else str(read_json(run / CONFIG_FILE).get("precision", "fp32"))
    device = str(resolve_device(device))
    return FastPromptedCLIP.load(folder, method=method, precision=precision, device=device, backend=backend)


def _run_of(folder: Path) -> Path | None:
    for parent in (folder.parent, Path(os.path.realpath(folder)).parent.parent):
        if is_run(parent):
            return parent
    return None


def evaluate_run(
    checkpoint: str | Path,
    data: str | Path,
    split: str | None = None,
    batch_size: int = 100,
    num_workers: int | None = None,
    device: str = "auto",
    backend: str = "auto",
    progress: bool = True,
    method: str | None = None,
    classes_from: str | None = None,
    classnames: str | Path | Mapping[str, str] | None = None,
) -> tuple[Evaluation, str]:
    """Evaluate a trained model on a directory of images.

    Args:
        checkpoint: RUN, RUN/last, RUN/best or a folder written by save_pretrained.
        data: directory of images; its class folders are matched to the model's classes by the folders of training and
            by name, see :func:`upt_fast.train.classes.match_images`.
        split: "train", "val" or "test"; None: test, else val, else train; without split folders all images. Where this
            is the directory that the run was trained on, images are left out that it was trained on, where there are
            no split folders, and copies of them that the run left out of its test.
        batch_size: images per forward pass.
        num_workers: processes that load images; None: 0 on the CPU, up to 8 for a GPU.
        device: auto, cpu, cuda or cuda:N.
        backend: of the model's operations.
        progress: whether to show progress bars.
        method: see :func:`load_run`.
        classes_from: "top" or "leaf", see :func:`upt_fast.data.scan_folder`; None: as in training.
        classnames: a JSON or CSV file or a mapping, folder -> name: which class of the model a folder means, and what
            to call it; see :func:`upt_fast.train.classes.match_images`.
    Returns:
        The evaluation, and which images it is on, in words.
    Raises:
        ValueError: bad data or checkpoint; images that cannot be read; classes that the model does not know.
    """
    folder = checkpoint_folder(checkpoint)
    classes = read_classes(folder)
    listing = list_folders(data, classes_from or (classes.classes_from if classes else "top"))
    _log_links(listing)
    items, where = _eval_items(listing, split, folder)
    model = load_run(folder, device, backend, method)
    matched = match_images(items, listing, classes, model.classnames, classnames)
    load = build_eval_transform(_preprocess_cfg(model))
    decoded = decode_images([item.path for item in matched.items], load, GIB, "reading images", progress)
    if decoded.failures:
        raise ValueError(corrupt_message(list(decoded.failures.values())))
    images = None if decoded.images is None else [image for image in decoded.images if image is not None]
    workers = _num_workers(num_workers, device_of(model))
    dataset = ImageDataset(matched.items, load, images)
    evaluation = evaluate(model, dataset, batch_size, workers, progress=progress, classnames=matched.classnames)
    return evaluation, where


def class_names(
    checkpoint: str | Path, model: FastPromptedCLIP, classnames: str | Path | Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """What to call a model's classes, in its order.

    Args:
        checkpoint: that the model is of: RUN, RUN/last, RUN/best or a folder written by save_pretrained.
        model: of load_run.
        classnames: a JSON or CSV file or a mapping, class folder of training -> name; None: the model's own names.
    Raises:
        ValueError: classnames does not fit the folders of training.
    """
    return shown_names(read_classes(checkpoint_folder(checkpoint)), model.classnames, classnames)


def _eval_items(listing: FolderListing, split: str | None, folder: Path) -> tuple[Sequence[ImageItem], str]:
    splits, data = listing.splits, listing.root
    run = _run_of(folder)
    recorded: dict[str, Any] | None = None
    if run is not None and os.path.realpath(read_json(run / CONFIG_FILE)["data"]) == os.path.realpath(data):
        recorded = read_json(run / SPLIT_FILE)
    if ALL_IMAGES not in splits:
        chosen = split or next(name for name in ("test", "val", "train") if name in splits or name in listing.broken)
        _refuse_broken(listing, chosen)
        if chosen not in splits:
            raise ValueError(f"{data} has no {chosen} folder; wanted one of {', '.join(splits)}")
        items, where = splits[chosen], f"{chosen} folder"
    elif split is not None:
        raise ValueError(f"{data} has no split folders, so there is no {split}; leave split out")
    else:
        _refuse_broken(listing, ALL_IMAGES)
        items, where = splits[ALL_IMAGES], "all images"
        if recorded is not None:
            trained = set(recorded["train"])
            items = tuple(item for item in items if item.key not in trained)
            where = "images that training did not use"
    # older runs have looked for none
    dropped = set(recorded.get("duplicates", {}).get("dropped", ())) if recorded else set()
    kept = [item for item in items if item.key not in dropped]
    return kept, where + _without(len(items) - len(kept))


def _refuse_broken(listing: FolderListing, split: str) -> None:
    if reasons := listing.broken.get(split):
        raise ValueError(corrupt_message(reasons))


def _without(copies: int) -> str:
    return f", without {copies} that are copies of training images" if copies else ""
