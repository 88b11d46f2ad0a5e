"""Models of this package to released checkpoints, where the released code computes the same."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from upt_fast.common.checks import require_int
from upt_fast.common.files import atomic_path
from upt_fast.methods import find_method, list_releases
from upt_fast.methods.release import ReleasedTensors
from upt_fast.model import FastPromptedCLIP
from upt_fast.released.file import PREFIX
from upt_fast.released.infer import infer_options


def export_checkpoint(model: FastPromptedCLIP, path: str | os.PathLike[str], epoch: int = 1) -> Path:
    """Write the ``.pth.tar`` that the method's released trainer reads, whole or not at all.

    Args:
        model: of one of :func:`upt_fast.methods.list_releases`, with values.
        path: the file; its trainer looks for :func:`checkpoint_path`.
        epoch: the number that stands in the file; read by people only.
    Returns:
        path.
    Raises:
        ValueError: their code computes nothing that equals this model; says why.
    """
    require_int("epoch", epoch, 0)
    refuse(model)
    prefix = "" if list_releases()[model.method].whole else PREFIX
    state = {name.removeprefix(prefix): value.detach().cpu().clone() for name, value in model.state_dict().items()}
    values = {"state_dict": state, "epoch": epoch, "optimizer": None, "scheduler": None, "val_result": None}
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        torch.save(values, temporary)
    return file


def checkpoint_path(folder: str | os.PathLike[str], method: str, epoch: int) -> Path:
    """Where the method's released trainer looks for a checkpoint below its --model-dir, with --load-epoch epoch."""
    releases = list_releases()
    if method not in releases:
        raise ValueError(f"method={method!r} is not of the released repositories; wanted one of {', '.join(releases)}")
    return Path(folder) / releases[method].registered / f"model.pth.tar-{epoch}"


def refuse(model: FastPromptedCLIP) -> None:
    """A ValueError where the released code cannot compute what the model does."""
    release = list_releases().get(model.method)
    if not any(True for _ in model.parameters()):
        why = f"{find_method(model.method).title} has no parameters: there is nothing to write"
    elif release is None:
        why = f"the released repositories have no such method; wanted one of {', '.join(list_releases())}"
    else:
        why = release.refusal(model.config)
    if why:
        raise ValueError(f"method {model.method!r} cannot be exported: {why}")


def released_settings(model: FastPromptedCLIP) -> list[str]:
    """Lines that say how to configure the released code for an exported model: the file does not hold it."""
    release, config = list_releases()[model.method], model.config
    shapes = {name.removeprefix(PREFIX): tuple(value.shape) for name, value in model.state_dict().items()}
    values = config.to_dict() | infer_options(model.method, ReleasedTensors(shapes), {})
    fixed = release.settings(config)
    theirs = fixed | {key: values[ours] for key, ours in release.options.items()} | fixed
    if theirs.get("CTX_INIT", "") is None:
        theirs["CTX_INIT"] = ""
    clip = " ".join(name for name in (model.clip_name, model.clip_pretrained) if name) or "of training"
    lines = [f"trainer {release.trainer}, with the CLIP {clip}"]
    lines.append("set " + " ".join(f"TRAINER.{release.section}.{key} {value!r}" for key, value in theirs.items()))
    lines += release.notes(config)
    if hasattr(config, "half_prompts") and not config.half_prompts:
        lines.append("the released code rounds prompts to float16, this model does not: logits differ by that rounding")
    return lines
