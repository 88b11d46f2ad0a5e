"""Settings of a training run, as a frozen dataclass that checks itself. Imports no torch: the command line reads it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from upt_fast.common.checks import require_choice, require_int
from upt_fast.common.sizes import parse_bytes
from upt_fast.data.classnames import FOLDER_NAMES
from upt_fast.methods import MAIN_METHOD, Method, MethodConfig, find_method

# what may change between a run and its resumption: where things are and how they are computed, not what is computed
FREE_ON_RESUME = frozenset(
    (
        "data",
        "test_data",
        "classnames",  # what matters are the names: split.json has them
        "out",
        "device",
        "cuda_graph",
        "tune",
        "num_workers",
        "cache_gib",
        "checkpoint_steps",
        "feature_store",
        "feature_store_gib",
        "backend",
        "memory",
        "text_batch",
        "max_memory",
        "wandb",
        "wandb_name",
        "progress",
        "resume",
    )
)
# further names that the command line gives a meaning of its own
COMMAND_LINE_NAMES = frozenset(("config", "print_config", "help", "debug"))


def _option(help: str, default: Any = MISSING) -> Any:
    return field(metadata={"help": help}) if default is MISSING else field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run of a method on a directory of images; each field's meaning stands in its ``help``.

    Raises:
        ValueError: a value is outside of its range, with the field, the value and the range; no such method, or an
            option that it does not have.
    """

    data: str = _option(
        "directory of images: DIR/<class>/*, or DIR/train, DIR/val, DIR/test with class folders in each, links "
        "followed; or what upt-fast shard wrote"
    )
    out: str = _option(
        "folder of the run: checkpoints, metrics and results; must not hold a run unless resume is given"
    )
    clip: str = _option(
        "CLIP model: open_clip's name (ViT-B-16-quickgelu), hf-hub:ORG/REPO, local-dir:DIR or tiny-digits"
    )
    pretrained: str | None = _option(
        "open_clip's tag (openai) or a checkpoint file; none for names that bring weights", None
    )
    quick_gelu: bool | None = _option(
        "whether the CLIP has QuickGELU (true) or GELU (false); none: as the tag, the file or else the name says", None
    )
    method: str = _option(
        "what is learned: a name that upt-fast methods lists, or FILE.py:CLASS of your own; --method NAME --help shows "
        "the options of that method",
        MAIN_METHOD,
    )
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "the method's own options by name; those left out have their defaults"}
    )
    classes_from: Literal["top", "leaf"] = _option(
        "which folders are classes: those directly in DIR or its splits, or the innermost ones (animal/cat)", "top"
    )
    classnames: str | None = _option(
        "JSON or CSV file, folder -> class name; folders: the folders' names; none: these, WordNet ids by their names",
        None,
    )
    shots: int | Literal["all"] = _option("training images per class, or all", 16)
    test: Literal["data", "none"] = _option(
        "test images: those that data has for it, or none: nothing is set aside, and with shots all every image trains",
        "data",
    )
    test_data: str | None = _option(
        "directory of the test images, with the classes of data by their folders' names; none: they are in data", None
    )
    seed: int = _option("of the few-shot draw, the initial prompts, the order of images and their augmentation", 1)
    epochs: int = _option(
        "passes over the training images; UPT's recipe: 50 for ImageNet, 200 for others; others' by --config",
        50,
    )
    patience: int | None = _option(
        "end after so many epochs without a better validation accuracy; none: train all epochs", None
    )
    checkpoint_steps: int | None = _option(
        "write a checkpoint after every so many steps too, from which a killed run goes on; none: after each epoch",
        None,
    )
    batch_size: int = _option("training images per batch; a step takes one, or more with accumulate", 32)
    accumulate: int = _option(
        "batches per step: its gradient is that of the mean over all their images, of which batch_size run at once", 1
    )
    test_batch_size: int = _option("images per forward pass of an evaluation", 100)
    optimizer: Literal["sgd", "adamw"] = _option("sgd, the field's, or adamw with PyTorch's betas", "sgd")
    lr: float = _option("learning rate after the warm-up epoch, before the cosine decay", 0.002)
    warmup_lr: float = _option("constant learning rate of the first epoch", 1e-5)
    momentum: float = _option("of SGD", 0.9)
    weight_decay: float = _option("of the optimizer; AdamW's is apart from the gradient", 5e-4)
    label_smoothing: float = _option("share of each label's probability that all classes get alike, in [0, 1)", 0.0)
    augment: Literal["standard", "crop", "none"] = _option(
        "training images: standard (random resized crop and flip), crop (without the flip) or none", "standard"
    )
    memory: Literal["fast", "balanced", "lean"] = _option(
        "what backward recomputes to save memory: nothing, the MLPs' hidden features, or whole blocks", "fast"
    )
    text_batch: int | None = _option(
        "methods whose texts depend on the image: images whose texts run at once; none: as many as need 512 MiB", None
    )
    max_memory: str | int | None = _option(
        "most memory of a step, or of a pass of an evaluation, beside the weights and the cached images: 600MB, 8GB, "
        "8GiB or bytes. Chooses memory, and how many images and classes run at once; none: no limit",
        None,
    )
    backend: str = _option("how operations are computed; auto picks the fastest that runs here", "auto")
    precision: Literal["fp32", "bf16", "fp8"] = _option(
        "of the frozen CLIP; the prompts are trained in float32. fp8 is inexact: bf16 with products in float8", "fp32"
    )
    device: str = _option("auto, cpu, cuda or cuda:N; auto takes a GPU where there is one", "auto")
    cuda_graph: bool = _option("on a GPU, replay steps from a CUDA graph where they can be captured", True)
    tune: bool = _option(
        "with backend auto, measure in the first steps which route through the towers is the fastest here, where that "
        "is not known yet; takes at most a twentieth of the run",
        True,
    )
    num_workers: int | None = _option("processes that load images; none: 0 on the CPU, up to 8 for a GPU", None)
    cache: Literal["scaled", "exact", "stream"] | None = _option(
        "decoded images: scaled (on disk, training images no larger than crops need), exact (in memory, training "
        "images as their files have them) or stream (nowhere: decoded when used, training images in the order of their "
        "shards); none: scaled, stream for shards with shots all, or as the run that is resumed",
        None,
    )
    cache_size: int | None = _option(
        "of scaled: pixels of a training image's shorter side at most; none: twice the CLIP's image size", None
    )
    cache_gib: float | None = _option(
        "GiB for decoded images, beyond which they are decoded when used: scaled, of disk for all datasets together "
        "(none: 16); exact, of memory (none: 1)",
        None,
    )
    feature_store: str | None = _option(
        "folder that keeps image features that no prompt changes (zero-shot, CoOp, CoCoOp, KgCoOp), for evaluation and "
        "training with augment none, or off; none: $UPT_FAST_FEATURE_STORE, else in the cache folder",
        None,
    )
    feature_store_gib: float = _option("GiB that the feature store may take on disk", 1.0)
    on_corrupt: Literal["error", "skip"] = _option(
        "images that cannot be read: stop, or leave them out and say so", "error"
    )
    duplicates: Literal["keep", "drop"] = _option(
        "test images that are copies of training images: test on them all the same, or leave them out", "keep"
    )
    views: int | None = _option(
        "augmented views that each image has, gone through epoch by epoch, so that features that no prompt changes are "
        "computed once: another protocol than the field's; none: a new view in each epoch",
        None,
    )
    ema: float | None = _option(
        "decay of a moving average of the weights over steps, such as 0.999: kept beside them, tested and saved at the "
        "end; none: no average",
        None,
    )
    final_model: Literal["last", "best", "average"] = _option(
        "which weights the final evaluation is of: the last (the field's), the best by validation, or the average that "
        "ema keeps",
        "last",
    )
    wandb: str | None = _option(
        "Weights & Biases project that settings, epochs and results are logged to; none: no log there", None
    )
    wandb_name: str | None = _option("name of the run in that project; none: that of its folder", None)
    progress: bool = _option("show progress bars on a terminal", True)
    resume: bool = _option("continue the run in out, after the same settings", False)

    def __post_init__(self) -> None:
        for name in ("data", "out", "clip", "method", "backend"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name}={value!r}; wanted a non-empty string")
        if self.pretrained is not None and not self.pretrained:
            raise ValueError("pretrained=''; wanted a tag, a checkpoint file or none")
        if self.quick_gelu not in (None, True, False):
            raise ValueError(f"quick_gelu={self.quick_gelu!r}; wanted true, false or none")
        if self.feature_store is not None and not self.feature_store:
            raise ValueError("feature_store=''; wanted a folder, 'off' or none")
        if self.classnames is not None and not self.classnames:
            raise ValueError("classnames=''; wanted a JSON or CSV file, 'folders' or none")
        if self.test_data is not None and (not self.test_data or self.test == "none"):
            raise ValueError(
                f"test_data={self.test_data!r} with test={self.test!r}; wanted a directory with test='data', or none"
            )
        for name in ("wandb", "wandb_name"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ValueError(f"{name}={getattr(self, name)!r}; wanted a name or none")
        if self.wandb_name is not None and self.wandb is None:
            raise ValueError(f"wandb_name={self.wandb_name!r} with wandb=None; wanted the project, too")
        if self.shots != "all" and (isinstance(self.shots, bool) or not isinstance(self.shots, int) or self.shots < 1):
            raise ValueError(f"shots={self.shots!r}; wanted a whole number of at least 1, or 'all'")
        for name, minimum in (("seed", 0), ("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("test_batch_size", 1)):
            require_int(name, getattr(self, name), minimum)
        least_one = ("text_batch", "patience", "cache_size", "checkpoint_steps")
        for name, minimum in (("num_workers", 0), *((name, 1) for name in least_one)):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), minimum)
        for name, positive in (
            ("lr", True),
            ("warmup_lr", True),
            ("weight_decay", False),
            ("cache_gib", False),
            ("feature_store_gib", False),
        ):
            value = getattr(self, name)
            if value is None and name == "cache_gib":
                continue
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise ValueError(f"{name}={value!r}; wanted a {'positive' if positive else 'non-negative'} number")
        if self.views is not None:
            require_int("views", self.views, 1)
            if self.augment == "none":
                raise ValueError(f"views={self.views} with augment='none'; wanted standard or crop, or no views")
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}; wanted a number in [0, 1)")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema={self.ema!r}; wanted a decay between 0 and 1, such as 0.999, or none")
        if self.final_model == "average" and self.ema is None:
            raise ValueError("final_model='average' with ema=None; wanted the decay of the average, such as ema=0.999")
        if self.cache is not None:
            require_choice("cache", self.cache, ("scaled", "exact", "stream"))
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                require_choice(name, getattr(self, name), get_args(hint))
        check_device_name(self.device)
        if self.max_memory is not None:
            parse_bytes("max_memory", self.max_memory)
            if self.memory != "fast" or self.text_batch is not None:
                raise ValueError(
                    f"max_memory={self.max_memory!r} with memory={self.memory!r} and text_batch={self.text_batch!r}; "
                    "it chooses these itself: leave them out, or leave max_memory out"
                )
        _plain(self.method_config(), self.method)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A run from the flat form of :meth:`to_dict`: what is no field of a run is an option of the method.

        Raises:
            ValueError: as the class.
        """
        own = train_fields()
        options = {name: value for name, value in values.items() if name not in own}
        return cls(**{name: value for name, value in values.items() if name in own}, options=options)

    def method_config(self) -> MethodConfig:
        """The method's options, those left out at their defaults.

        Raises:
            ValueError: no such method, no such option, or a value that the method does not take.
        """
        method = find_method(self.method)
        check_option_names(method)
        known = fields(method.config)
        names = ", ".join(option.name for option in known) or "none"
        if unknown := [name for name in self.options if name not in {option.name for option in known}]:
            raise ValueError(f"unknown option {', '.join(unknown)}; the options of method {method.name!r}: {names}")
        required = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING]
        if missing := [name for name in required if name not in self.options]:
            raise ValueError(f"method {method.name!r} needs a value for {', '.join(missing)}")
        return method.config.from_options(self.options)

    @property
    def step_size(self) -> int:
        """Images of an optimizer step."""
        return self.batch_size * self.accumulate

    def changed(self, **values: Any) -> TrainConfig:
        """This run with other settings."""
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, flat: the run's settings and, by their names, all of the method's options.

        data, test_data, out, files of a checkpoint and of class names and the file of a method are absolute paths, so
        that it holds from any folder.
        """
        values = {name: getattr(self, name) for name in train_fields()}
        values["data"] = str(Path(self.data).absolute())
        values["out"] = str(Path(self.out).absolute())
        if self.test_data is not None:
            values["test_data"] = str(Path(self.test_data).absolute())
        if self.pretrained is not None and Path(self.pretrained).is_file():
            values["pretrained"] = str(Path(self.pretrained).absolute())
        if self.classnames not in (None, FOLDER_NAMES):
            values["classnames"] = str(Path(str(self.classnames)).absolute())
        if self.feature_store not in (None, "off"):
            values["feature_store"] = str(Path(str(self.feature_store)).absolute())
        file, _, name = self.method.rpartition(":")
        if file.endswith(".py"):
            values["method"] = f"{Path(file).absolute()}:{name}"
        return values | _plain(self.method_config(), self.method)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Settings of this run that matter and differ from another's (to_dict), as "name: theirs there, ours here".

        cache=None is what the other has.
        """
        mine = self.to_dict()
        # what a run of an older version did not ask has its default, which is what that version did
        defaults = {option.name: option.default for option in fields(self) if option.default is not MISSING}
        other = defaults | {"cache": "exact"} | dict(other)
        if other.get("method") != mine["method"]:  # then the options differ in kind
            mine = {name: mine[name] for name in train_fields()}
        return [
            f"{name}: {other.get(name)!r} there, {value!r} here"
            for name, value in mine.items()
            if (name not in FREE_ON_RESUME or _turned(name, other.get(name), value))
            and other.get(name) != value
            and (name, value) != ("cache", None)
        ]


def _turned(name: str, there: Any, here: Any) -> bool:
    """Whether a setting that may be another one on resumption was given where there was none, or the other way."""
    return name == "test_data" and (there is None) != (here is None)


def train_fields() -> tuple[str, ...]:
    """Names of what every run has, whatever its method."""
    return tuple(option.name for option in fields(TrainConfig) if option.name != "options")


def check_option_names(method: Method) -> None:
    """Raise a ValueError where a method's option has a name that a run or the command line uses already."""
    taken = {*train_fields(), "options", *COMMAND_LINE_NAMES}
    if clash := [option.name for option in fields(method.config) if option.name in taken]:
        raise ValueError(
            f"method {method.name!r} has options that every run has already: {', '.join(clash)}; "
            f"give them other names in {method.config.__name__}"
        )


def _plain(config: MethodConfig, method: str) -> dict[str, Any]:
    """A config's options as JSON holds them, tuples as lists."""
    plain = {}
    for name, value in config.to_dict().items():
        try:
            plain[name] = json.loads(json.dumps(value))
        except TypeError as error:
            raise ValueError(
                f"{name}={value!r} of method {method!r} is {type(value).__name__}; wanted what JSON holds: "
                "text, numbers, booleans, None, lists or dictionaries of these"
            ) from error
    return plain


def check_device_name(name: str) -> None:
    """Raise a ValueError unless name is auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device={name!r}; wanted auto, cpu, cuda or cuda:N")
