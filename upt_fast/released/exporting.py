"""Models of this package to released checkpoints, where the released code computes the same."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from upt_fast.common.checks import require_int
from upt_fast.common.files import atomic_path
from upt_fast.config import DEFAULT_TEMPLATE, UPTConfig, ZeroShotConfig
from upt_fast.model import FastPromptedCLIP
from upt_fast.released.file import LEARNER_ONLY, PREFIX, RELEASES
from upt_fast.released.infer import infer_options
from upt_fast.released.options import RELEASED_OPTIONS


def export_checkpoint(model: FastPromptedCLIP, path: str | os.PathLike[str], epoch: int = 1) -> Path:
    """Write the ``.pth.tar`` that the method's released trainer reads, whole or not at all.

    Args:
        model: of one of RELEASES, with values.
        path: the file; its trainer looks for :func:`checkpoint_path`.
        epoch: the number that stands in the file; read by people only.
    Returns:
        path.
    Raises:
        ValueError: their code computes nothing that equals this model; says why.
    """
    require_int("epoch", epoch, 0)
    refuse(model)
    names = {name: name.removeprefix(PREFIX) if model.method in LEARNER_ONLY else name for name in model.state_dict()}
    state = {names[name]: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    values = {"state_dict": state, "epoch": epoch, "optimizer": None, "scheduler": None, "val_result": None}
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        torch.save(values, temporary)
    return file


def checkpoint_path(folder: str | os.PathLike[str], method: str, epoch: int) -> Path:
    """Where the method's released trainer looks for a checkpoint below its --model-dir, with --load-epoch epoch."""
    if method not in RELEASES:
        raise ValueError(f"method={method!r} is not of the released repositories; wanted one of {', '.join(RELEASES)}")
    return Path(folder) / RELEASES[method].registered / f"model.pth.tar-{epoch}"


def refuse(model: FastPromptedCLIP) -> None:
    """A ValueError where the released code cannot compute what the model does."""
    config, why = model.config, None
    if model.method == "zeroshot":
        why = "zero-shot CLIP has no parameters: there is nothing to write"
    elif model.method not in RELEASES:
        why = f"the released repositories have no such method; wanted one of {', '.join(RELEASES)}"
    elif isinstance(config, UPTConfig):
        if config.preset != "released":
            why = "the released code computes something else than preset 'paper'; wanted preset 'released'"
        elif (config.n_text, config.n_visual) != (4, 4):
            counts = f"n_text={config.n_text} and n_visual={config.n_visual}"
            why = f"{counts}, but the released code runs with 4 and 4 only: its 4 is a literal"
    elif isinstance(config, ZeroShotConfig):
        texts = config.template_texts
        if len(texts) > 1:
            why = f"its text features are the mean of {len(texts)} templates, the released code has one"
        elif model.method == "mvpt" and texts != (DEFAULT_TEMPLATE,):
            why = f"its template is {texts[0]!r}, the released code's {DEFAULT_TEMPLATE!r}"
    if why is not None:
        raise ValueError(f"method {model.method!r} cannot be exported: {why}")


def released_settings(model: FastPromptedCLIP) -> list[str]:
    """Lines that say how to configure the released code for an exported model: the file does not hold it."""
    release, config = RELEASES[model.method], model.config
    trained = {name.removeprefix(PREFIX): value for name, value in model.state_dict().items()}
    values = config.to_dict() | infer_options(model.method, trained, {})
    theirs = {key: values[ours] for key, ours in RELEASED_OPTIONS[model.method].items()}
    if model.method == "upt":
        theirs = {"N_CTX": model.prompt_learner.n_text, "CTX_INIT": "", "CSC": False, **theirs}
    if theirs.get("CTX_INIT", "") is None:
        theirs["CTX_INIT"] = ""
    clip = " ".join(name for name in (model.clip_name, model.clip_pretrained) if name) or "of training"
    lines = [f"trainer {release.trainer}, with the CLIP {clip}"]
    lines.append("set " + " ".join(f"TRAINER.{release.section}.{key} {value!r}" for key, value in theirs.items()))
    if model.method in ("vpt_shallow", "vpt_deep"):
        template = config.template_texts[0] if isinstance(config, ZeroShotConfig) else ""
        lines.append(f"its text is CUSTOM_TEMPLATES[DATASET.NAME], which must be {template!r}")
    if model.method == "vpt_shallow":
        lines.append(
            "as released the trainer calls encode_image_prompt_shallow, which is missing; VPT computes the same"
        )
    if model.method == "maple":
        lines.append("its widths 512 and 768 are literals: CLIPs of other widths than ViT-B's do not fit")
    if hasattr(config, "half_prompts") and not config.half_prompts:
        lines.append("the released code rounds prompts to float16, this model does not: logits differ by that rounding")
    return lines
