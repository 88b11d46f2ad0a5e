"""Settings of a training run, as a frozen dataclass that checks itself. Imports no torch: the command line reads it."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from upt_fast.config import UPTConfig, require_choice, require_int

# what may change between a run and its resumption: where things are and how they are computed, not what is computed
FREE_ON_RESUME = frozenset(
    ("data", "out", "device", "num_workers", "cache_gib", "backend", "memory", "progress", "resume")
)


def _option(help: str, default: Any = MISSING) -> Any:
    return field(metadata={"help": help}) if default is MISSING else field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run of UPT on a directory of images; each field's meaning stands in its ``help``.

    Raises:
        ValueError: a value is outside of its range, with the field, the value and the range.
    """

    data: str = _option(
        "directory of images: DIR/<class>/*, or DIR/train, DIR/val, DIR/test with class folders in each"
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
    shots: int | Literal["all"] = _option("training images per class, or all", 16)
    seed: int = _option("of the few-shot draw, the initial prompts, the order of images and their augmentation", 1)
    epochs: int = _option(
        "passes over the training images; the field's recipe: 50 for ImageNet, 200 for most others", 50
    )
    batch_size: int = _option("training images per step", 32)
    test_batch_size: int = _option("images per forward pass of an evaluation", 100)
    lr: float = _option("learning rate of SGD after the warm-up epoch, before the cosine decay", 0.002)
    warmup_lr: float = _option("constant learning rate of the first epoch", 1e-5)
    momentum: float = _option("of SGD", 0.9)
    weight_decay: float = _option("of SGD", 5e-4)
    augment: Literal["standard", "crop", "none"] = _option(
        "training images: standard (random resized crop and flip), crop (without the flip) or none", "standard"
    )
    preset: Literal["paper", "released"] = _option("UPT as in the paper, or as in the authors' released code", "paper")
    n_text: int = _option("prompt tokens of the text tower", 4)
    n_visual: int = _option("prompt tokens of the image tower", 4)
    depth_text: int | None = _option("text layers with prompts of their own; none: the preset's", None)
    depth_vision: int | None = _option("image layers with prompts of their own; none: the preset's", None)
    attention_heads: int = _option("heads of the prompts' self-attention", 1)
    dropout: float | None = _option("inside the prompts' transform; none: the preset's", None)
    class_token_position: Literal["end", "middle", "front"] = _option("of the class name among the text prompts", "end")
    memory: Literal["fast", "balanced", "lean"] = _option(
        "what backward recomputes to save memory: nothing, the MLPs' hidden features, or whole blocks", "fast"
    )
    backend: str = _option("how operations are computed; auto picks the fastest that runs here", "auto")
    precision: Literal["fp32", "bf16"] = _option("of the frozen CLIP; the prompts are trained in float32", "fp32")
    device: str = _option("auto, cpu, cuda or cuda:N; auto takes a GPU where there is one", "auto")
    num_workers: int | None = _option("processes that load images; none: 0 on the CPU, up to 8 for a GPU", None)
    cache_gib: float = _option("GiB of memory for decoded images; sets that need more are decoded when used", 1.0)
    on_corrupt: Literal["error", "skip"] = _option(
        "images that cannot be read: stop, or leave them out and say so", "error"
    )
    final_model: Literal["last", "best"] = _option(
        "which checkpoint the final evaluation takes; the field's is last", "last"
    )
    progress: bool = _option("show progress bars on a terminal", True)
    resume: bool = _option("continue the run in out, after the same settings", False)

    def __post_init__(self) -> None:
        for name in ("data", "out", "clip", "backend"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name}={value!r}; wanted a non-empty string")
        if self.pretrained is not None and not self.pretrained:
            raise ValueError("pretrained=''; wanted a tag, a checkpoint file or none")
        if self.shots != "all" and (isinstance(self.shots, bool) or not isinstance(self.shots, int) or self.shots < 1):
            raise ValueError(f"shots={self.shots!r}; wanted a whole number of at least 1, or 'all'")
        for name, minimum in (("seed", 0), ("epochs", 1), ("batch_size", 1), ("test_batch_size", 1)):
            require_int(name, getattr(self, name), minimum)
        if self.num_workers is not None:
            require_int("num_workers", self.num_workers, 0)
        for name, positive in (("lr", True), ("warmup_lr", True), ("weight_decay", False), ("cache_gib", False)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise ValueError(f"{name}={value!r}; wanted a {'positive' if positive else 'non-negative'} number")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum!r}; wanted a number in [0, 1)")
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                require_choice(name, getattr(self, name), get_args(hint))
        check_device_name(self.device)
        UPTConfig(**self.upt_options())

    def upt_options(self) -> dict[str, Any]:
        """The fields that UPTConfig takes."""
        return {option.name: getattr(self, option.name) for option in fields(UPTConfig)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with data, out and a checkpoint file as absolute paths, so that it holds from any folder."""
        values = asdict(self)
        values["data"] = str(Path(self.data).absolute())
        values["out"] = str(Path(self.out).absolute())
        if self.pretrained is not None and Path(self.pretrained).is_file():
            values["pretrained"] = str(Path(self.pretrained).absolute())
        return values

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Settings of this run that matter and differ from another's (to_dict), as "name: theirs there, ours here"."""
        mine = self.to_dict()
        return [
            f"{name}: {other.get(name)!r} there, {value!r} here"
            for name, value in mine.items()
            if name not in FREE_ON_RESUME and other.get(name) != value
        ]


def check_device_name(name: str) -> None:
    """Raise a ValueError unless name is auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device={name!r}; wanted auto, cpu, cuda or cuda:N")
