"""Released checkpoints to models of this package."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from upt_fast.clip.loading import LoadedCLIP
from upt_fast.clip.open_clip import frozen_clip
from upt_fast.clip.tokens import clean_classnames
from upt_fast.common.messages import shorten
from upt_fast.methods import list_releases
from upt_fast.model import FastPromptedCLIP
from upt_fast.released.file import PREFIX, ReleasedCheckpoint, read_file
from upt_fast.released.infer import choose_method, describe_options, infer_options
from upt_fast.released.texts import check_texts

HALF_PROMPTS = "the released code rounds prompts to float16 at any precision; half_prompts=true reproduces it"


@dataclass(frozen=True)
class Imported:
    """A checkpoint that was read.

    Args:
        model: with the file's values, in eval mode.
        checkpoint: what the file holds.
        inferred: the options that the file tells.
        unused: tensors that no logits depend on.
        checked: whether the file's token buffers were there and are those of the class names.
    """

    model: FastPromptedCLIP
    checkpoint: ReleasedCheckpoint
    inferred: dict[str, Any]
    unused: tuple[str, ...]
    checked: bool

    def describe(self) -> list[str]:
        """Lines that say what was read."""
        model, found = self.model, self.checkpoint
        values = [found.trained[name] for name in found.trained if name not in self.unused]
        others = {name: value for name, value in model.config.to_dict().items() if name not in self.inferred}
        ignored = [
            *found.tokens,
            *self.unused,
            *([f"{found.frozen} tensor(s) of the frozen CLIP"] if found.frozen else []),
        ]
        lines = [
            f"method {model.method}" + ("" if found.epoch is None else f", epoch {found.epoch}"),
            f"from the file: {describe_options(self.inferred)}",
            f"other options: {describe_options(others) or 'none'}",
            f"read {len(values)} tensor(s), {sum(v.numel() for v in values)} values",
            f"ignored {', '.join(ignored) or 'nothing'}",
        ]
        if self.checked:
            lines.append("the class names are those of the file's token buffers")
        else:
            lines.append("the file holds no token buffers: class names, their order and the CLIP were not checked")
        if hasattr(model.config, "half_prompts") and not model.config.half_prompts:
            lines.append(HALF_PROMPTS)
        return lines


def import_checkpoint(
    path: str | os.PathLike[str],
    clip: LoadedCLIP,
    classnames: Iterable[str],
    method: str | None = None,
    **options: Any,
) -> FastPromptedCLIP:
    """The model of a released repository's checkpoint, in eval mode.

    Args:
        path: ``model.pth.tar-<epoch>``, ``model-best.pth.tar``, or a torch.save'd state dict.
        clip: the CLIP that it was trained on.
        classnames: the C class names in the order of training; underscores become spaces.
        method: one of :func:`upt_fast.methods.list_releases`; None: found from the file's names and shapes.
        options: fields of the method's config that no shape tells: ctx_init, class_token_position, half_prompts,
            templates, attention_heads; n_text of UPT.
    Raises:
        ValueError: no such file, or not one of theirs; objects in it that are not read; several methods possible; an
            option that the file contradicts; other names or shapes; token buffers of other class names, initial words
            or another CLIP.
    """
    return read_released(path, clip, classnames, method, **options).model


def read_released(
    path: str | os.PathLike[str],
    clip: LoadedCLIP,
    classnames: Iterable[str],
    method: str | None = None,
    **options: Any,
) -> Imported:
    """:func:`import_checkpoint`, with what was found in the file."""
    names = clean_classnames(classnames)
    return fit(Path(path), read_file(Path(path)), clip, names, method, options)


def fit(
    path: Path,
    found: ReleasedCheckpoint,
    clip: LoadedCLIP,
    classnames: tuple[str, ...],
    method: str | None,
    options: dict[str, Any],
) -> Imported:
    try:
        return _import(found, clip, classnames, method, options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _import(
    found: ReleasedCheckpoint,
    clip: LoadedCLIP,
    classnames: tuple[str, ...],
    method: str | None,
    options: dict[str, Any],
) -> Imported:
    frozen = frozen_clip(clip.model)
    tensors = found.tensors(frozen.text.context.length, len(frozen.vision.blocks))
    method = choose_method(tensors, method)
    inferred = infer_options(method, tensors, options)
    config, checked = check_texts(found, clip, classnames, method, inferred, options)
    model = FastPromptedCLIP.from_loaded(clip, classnames, method=method, config=config)
    unused = tensors.matching(*list_releases()[method].unused)
    own = {name.removeprefix(PREFIX): value for name, value in model.state_dict().items()}
    _check_names(own, {name: value for name, value in found.trained.items() if name not in unused})
    model.load_state_dict(
        {name: found.trained[name.removeprefix(PREFIX)].to(t) for name, t in model.state_dict().items()}
    )
    return Imported(model.eval(), found, inferred, tuple(unused), checked)


def _check_names(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(found[name].shape)}, wanted {tuple(own[name].shape)}"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    problems = [f"missing: {shorten(missing)}"] if missing else []
    problems += [f"unexpected: {shorten(unexpected)}"] if unexpected else []
    problems += [f"{shorten(shapes, 4)}: another CLIP, or other class names or options"] if shapes else []
    if problems:
        raise ValueError(f"its tensors do not fit: {'; '.join(problems)}")
