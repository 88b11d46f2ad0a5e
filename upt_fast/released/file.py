"""A released checkpoint's file: which repository it is of, its tensors, and nothing run of what it names.

Files are read with torch's weights_only. Dassl's schedulers keep their optimizer, so that ordinary checkpoints hold a
few objects of known classes: each is read as an empty placeholder, and nothing that a file names is imported or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from upt_fast.common.files import UnreadableError, load_torch
from upt_fast.methods.release import ReleasedTensors

PREFIX = "prompt_learner."
TOKEN_NAMES = ("token_prefix", "token_suffix", "tokenized_prompts")
FROZEN = ("image_encoder.", "text_encoder.", "clip_model.")


class _Placeholder:
    """Stands for an object of an optimizer's, scheduler's or number's class; keeps nothing."""

    def __new__(cls, *_: Any) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


_OPTIMIZERS = ("torch.optim.sgd.SGD", "torch.optim.adam.Adam", "torch.optim.adamw.AdamW", "torch.optim.rmsprop.RMSprop")


_SCHEDULERS = (
    *(f"torch.optim.lr_scheduler.{name}" for name in ("CosineAnnealingLR", "MultiStepLR", "StepLR")),
    *(f"dassl.optim.lr_scheduler.{name}" for name in ("ConstantWarmupScheduler", "LinearWarmupScheduler")),
)


_NUMBERS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")


_SAFE: list[Any] = [
    *((_Placeholder, name) for name in (*_OPTIMIZERS, "dassl.optim.radam.RAdam", *_SCHEDULERS, *_NUMBERS)),
    (_empty_dict, "collections.defaultdict"),
    (dict, "builtins.dict"),
]


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """What a file holds.

    Args:
        trained: by name without ``prompt_learner.``.
        tokens: of TOKEN_NAMES, what there is.
        frozen: number of tensors of the frozen CLIP.
        whole: the registered object was the whole model.
        epoch: epochs done, if the file says so.
    """

    trained: dict[str, Tensor]
    tokens: dict[str, Tensor]
    frozen: int
    whole: bool
    epoch: int | None

    def tensors(self, context_length: int, vision_layers: int) -> ReleasedTensors:
        """The shapes, with those of the CLIP at hand that they are to be read with."""
        shapes, tokens = (
            {name: tuple(value.shape) for name, value in kind.items()} for kind in (self.trained, self.tokens)
        )
        return ReleasedTensors(shapes, tokens, self.whole, context_length, vision_layers)


def read_file(path: Path) -> ReleasedCheckpoint:
    """Read and sort a checkpoint file, with torch's weights_only.

    Raises:
        ValueError: no file, another format, a damaged file, or objects in it that are not read.
    """
    values = _load(path)
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds {type(values).__name__}; wanted a dict with 'state_dict', or a state dict")
    state, epoch = values.get("state_dict", values), values.get("epoch")
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path}: state_dict is {state!r:.80}; wanted a dict of tensors")
    trained: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    frozen, whole = 0, False
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: {key!r} is {type(value).__name__}; wanted names with tensors: a state dict")
        name = key
        while name.startswith("module."):  # of DataParallel
            name = name.removeprefix("module.")
        whole |= name.startswith(PREFIX)
        short = name.removeprefix(PREFIX)
        is_prompt = short.rpartition(".")[2] in ("VPT", "VPT_shallow")
        if not is_prompt and (short.startswith(FROZEN) or short == "logit_scale"):
            frozen += 1
            continue
        kind = tokens if short in TOKEN_NAMES else trained
        if short in kind:
            raise ValueError(f"{path} holds {short!r} twice, as {key!r} too; wanted one state dict")
        kind[short] = value.detach()
    for name, value in trained.items():
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name} is {value.dtype} or holds NaN or infinity; wanted finite numbers")
    whole |= frozen > 0
    return ReleasedCheckpoint(trained, tokens, frozen, whole, epoch if isinstance(epoch, int) else None)


def _load(path: Path) -> Any:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; wanted the file in it, such as prompt_learner/model-best.pth.tar")
    if not path.is_file():
        raise ValueError(f"no file {path}")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        raise ValueError(
            f"{path} is a safetensors file; wanted a released repository's .pth.tar (what this package saved is read "
            "as it is: pass its folder as the checkpoint)"
        )
    try:
        return load_torch(path, placeholders=_SAFE)
    except UnreadableError as error:
        if error.foreign:
            raise ValueError(
                f"{path} holds more than tensors: {error.foreign}, which weights_only refuses, for objects can run "
                "code; have whoever trained it save the tensors alone: "
                "torch.save({'state_dict': checkpoint['state_dict'], 'epoch': checkpoint['epoch']}, FILE)"
            ) from error
        raise ValueError(
            f"{path} is damaged or was not written by torch.save ({error.reason}); wanted a .pth.tar of a released "
            "repository: copy or download it again"
        ) from error
