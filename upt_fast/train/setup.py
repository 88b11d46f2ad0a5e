"""What a run needs before it trains: its folder, its device, its model, its images."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upt_fast.common import processes
from upt_fast.common.messages import shorten
from upt_fast.common.sizes import parse_bytes
from upt_fast.data.classnames import FOLDER_NAMES
from upt_fast.data.dataset import AugmentedDataset, ImageDataset
from upt_fast.data.duplicates import Duplicates, drop_test_copies
from upt_fast.data.feature_store import open_store
from upt_fast.data.images import corrupt_message
from upt_fast.data.listing import FolderListing, ImageItem
from upt_fast.data.sampling import FewShotSplit
from upt_fast.distributed import ONE_PROCESS, Group
from upt_fast.engine.workspace import keep_heap_small
from upt_fast.model import FastPromptedCLIP
from upt_fast.saving import load_for
from upt_fast.steps import MemoryPlan, MicroBatches
from upt_fast.train.batches import device_of, eval_mode
from upt_fast.train.checkpoint import LOCK_FILE, is_run, read_json
from upt_fast.train.classes import TrainedClasses
from upt_fast.train.config import TrainConfig, check_device_name
from upt_fast.train.features import FixedFeatures
from upt_fast.train.images import RunImages
from upt_fast.train.separate_test import TEST_DATA

logger = logging.getLogger("upt_fast")

CONFIG_FILE, SPLIT_FILE, RESULTS_FILE = "config.json", "split.json", "results.json"
CHOICES_FILE = "choices.json"
LATER_KEYS = ("folders", "duplicates")  # of split.json, which runs of earlier versions do not have


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
    test: ImageDataset | None
    skipped: list[str]


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


def check_out(config: TrainConfig, out: Path) -> None:
    """Raise a ValueError unless the folder is such that the run can begin, or be resumed, in it."""
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


def asked_names(config: TrainConfig, out: Path) -> str | None:
    """The config's classnames; runs of before there was such a setting go on with their folders' names."""
    if config.resume and config.classnames is None and "folders" not in read_json(out / SPLIT_FILE):
        return FOLDER_NAMES
    return config.classnames


def build_model(
    config: TrainConfig,
    classnames: Sequence[str],
    out: Path,
    device: torch.device,
    beside: FastPromptedCLIP | None = None,
) -> FastPromptedCLIP:
    """The model that the run trains: as in its last checkpoint, else new.

    Args:
        config: the run's.
        classnames: of its classes.
        out: its folder.
        device: where the model goes.
        beside: a model on the same CLIP, whose sibling it becomes; None: the CLIP is loaded.
    """
    if config.max_memory is not None and device.type == "cpu":
        keep_heap_small()
    method: dict[str, Any] = {"method": config.method, "config": config.method_config()}
    if os.path.lexists(out / "last"):
        model = load_model(config, out / "last", device, beside)
    elif beside is not None:
        torch.manual_seed(config.seed)
        model = beside.sibling(classnames, **method)
    else:
        name, pretrained, quick_gelu = config.clip, config.to_dict()["pretrained"], config.quick_gelu
        clip, options = load_for(name, pretrained, config.precision, str(device), None, quick_gelu, method)
        options |= {"memory": config.memory, "backend": config.backend, "text_batch": config.text_batch}
        torch.manual_seed(config.seed)  # behind the loading, which may draw: a sibling has the same prompts
        model = FastPromptedCLIP.from_loaded(clip, classnames, **options)
    model.train()
    return model


def load_model(
    config: TrainConfig, folder: Path, device: torch.device, beside: FastPromptedCLIP | None = None
) -> FastPromptedCLIP:
    """A checkpoint's model with the run's options; see :func:`build_model`."""
    if beside is not None:
        return FastPromptedCLIP.load(folder, beside, method=config.method)
    return FastPromptedCLIP.load(
        folder,
        method=config.method,
        precision=config.precision,
        device=str(device),
        memory=config.memory,
        backend=config.backend,
        text_batch=config.text_batch,
    )


def plan_steps(config: TrainConfig, model: FastPromptedCLIP, group: Group = ONE_PROCESS) -> MemoryPlan | None:
    """How steps run where the settings limit their memory; a ValueError where nothing fits. Says it, and sets it up.

    Of several processes each has a limit of its own, and its images of a step.
    """
    if config.max_memory is None:
        return None
    size = max(group.sizes(config.step_size))
    plan = model.plan_memory(size, parse_bytes("max_memory", config.max_memory))
    model.follow_plan(plan)
    logger.info("max_memory %s: %s", config.max_memory, plan.describe())
    return plan


def load_data(
    config: TrainConfig,
    model: FastPromptedCLIP,
    listing: FolderListing,
    split: FewShotSplit,
    duplicates: Duplicates,
    features: dict[Any, FixedFeatures] | None = None,
    broken: Sequence[str] = (),
    group: Group = ONE_PROCESS,
) -> RunData:
    """Decode every image that the run reads, and keep what fits where the config says.

    Args:
        broken: what to say of the links of test_data that lead nowhere.
    """
    dropped = duplicates.test_copies if config.duplicates == "drop" else ()
    if dropped:
        split = drop_test_copies(split, duplicates)
    fixed = fixed_features(config, model, features, group)
    kept = RunImages(config, preprocess_cfg(model), listing.root, device_of(model), fixed)
    unread = ("test",) if split.test_name in ("none", TEST_DATA) else ()
    failures = [reason for name, reasons in listing.broken.items() if name not in unread for reason in reasons]
    failures += broken
    train, failed = kept.training(split.train)
    val, failed_val = kept.evaluation("validation", split.val)
    if config.test_data is not None:
        kept = kept.of(config.test_data)
    test, failed_test = kept.evaluation("test", split.test)
    failures += [*failed, *failed_val, *failed_test]
    if failures:
        if config.on_corrupt == "error":
            raise ValueError(f"{corrupt_message(failures)}; remove them, or leave them out with --on-corrupt skip")
        logger.warning("left out: %s", corrupt_message(failures))
        trained = {item.label for item in train.base.items}
        if lost := [name for label, name in enumerate(listing.classnames) if label not in trained]:
            raise ValueError(f"no training image is left of {len(lost)} class(es): {shorten(lost)}")
        if split.test and not len(test):
            raise ValueError("no test image is left; wanted at least one that can be read")
    return RunData(
        classnames=listing.classnames,
        classes=TrainedClasses(listing.folders, listing.classes_from),
        split=split,
        duplicates=duplicates,
        dropped=dropped,
        train=train,
        val=val if len(val) else None,
        test=test if len(test) else None,
        skipped=failures,
    )


def has_fixed_features(config: TrainConfig, model: FastPromptedCLIP) -> bool:
    """Whether image features stand in for images where no augmentation changes these; not below a limit of memory."""
    with eval_mode(model):  # where a learner draws no random numbers
        return config.max_memory is None and model.images_are_fixed


def trains_on_features(config: TrainConfig, model: FastPromptedCLIP) -> bool:
    """Whether steps take image features: of images as they are, or of a fixed number of views."""
    return (config.augment == "none" or config.views is not None) and has_fixed_features(config, model)


def fixed_features(
    config: TrainConfig,
    model: FastPromptedCLIP,
    shared: dict[Any, FixedFeatures] | None = None,
    group: Group = ONE_PROCESS,
) -> FixedFeatures | None:
    """What computes the run's image features, where it :func:`has_fixed_features`.

    Args:
        config: the run's.
        model: the run's.
        shared: those of other runs on the model's CLIP, by their settings: opening a store takes a trial.
        group: the processes of the run, which share the work.
    """
    if not has_fixed_features(config, model):
        return None
    settings = config.feature_store, config.feature_store_gib, config.test_batch_size, config.num_workers
    shared = {} if shared is None else shared
    if settings not in shared:
        store = open_store(config.feature_store, config.feature_store_gib)
        workers = count_workers(config.num_workers, device_of(model))
        shared[settings] = FixedFeatures(model, config.test_batch_size, workers, store, config.progress, group)
    return shared[settings]


def parts_of(config: TrainConfig, model: FastPromptedCLIP, plan: MemoryPlan | None = None) -> MicroBatches | None:
    """What runs at once in a step: as a plan says, else a batch where a step has several; None: the whole step."""
    if plan is not None:
        return plan.micro_batches
    if config.accumulate == 1:
        return None
    size = config.batch_size
    return MicroBatches(images=min(size, model._group(size)) if model.texts_by_image else size)


def preprocess_cfg(model: FastPromptedCLIP) -> dict[str, Any]:
    """How the CLIP wants its images; a ValueError where that is not known."""
    if model.preprocess_cfg is None:
        raise ValueError("this CLIP does not say how its images are prepared (preprocess_cfg); load it by name")
    return model.preprocess_cfg


def describe_split(data: RunData) -> dict[str, Any]:
    """What split.json holds."""
    return {
        "classnames": list(data.classnames),
        "folders": list(data.classes.folders),
        "train": [item.key for item in data.train.base.items],
        "val": [] if data.val is None else [item.key for item in data.val.items],
        "test_split": data.split.test_name,
        "num_test": 0 if data.test is None else len(data.test),
        **({"test": [item.key for item in data.test.items]} if data.test and data.split.test_name == TEST_DATA else {}),
        "duplicates": {**data.duplicates.keys(), "dropped": [item.key for item in data.dropped]},
    }


def describe_test(data: RunData, config: TrainConfig) -> str:
    """Where the test images come from, in words."""
    named = {"rest": "images that training does not use", "none": "none", TEST_DATA: config.to_dict()["test_data"]}
    return named.get(data.split.test_name, f"{data.split.test_name} folder") + without_copies(len(data.dropped))


def digest(described: dict[str, Any]) -> str:
    """Of what split.json holds."""
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def log_duplicates(found: Duplicates, drop: bool) -> None:
    """Say which images are there twice."""
    advice = {
        "two_classes": "one of the classes is wrong",
        "train_test": "they are left out of the test" if drop else "--duplicates drop leaves them out of the test",
    }
    for kind, said in found.describe().items():
        logger.warning("%s; %s", said, advice[kind])


def log_links(listing: FolderListing) -> None:
    """Say how many links were followed."""
    if said := listing.describe_links():
        logger.info("%s", said)


def count_workers(asked: int | None, device: torch.device) -> int:
    """Processes that load images: as asked, else none on a CPU and up to 8 for a GPU, of the cores that are its own."""
    if asked is not None:
        return asked
    return 0 if device.type == "cpu" else max(1, min(8, (os.cpu_count() or 1) // processes.on_this_host()))


def evaluation_batch(config: TrainConfig, plan: MemoryPlan | None) -> int:
    """Images per forward pass of an evaluation: as asked, but no more than a plan has room for."""
    return config.test_batch_size if plan is None else min(config.test_batch_size, plan.test_images)


def without_copies(copies: int) -> str:
    """What to add to the words for test images of which copies were left out."""
    return f", without {copies} that are copies of training images" if copies else ""
