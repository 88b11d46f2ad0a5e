"""``upt-fast import-checkpoint`` and ``export-checkpoint``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upt_fast.clip.loading import load_clip
from upt_fast.clip.tokens import clean_classnames
from upt_fast.model import FastPromptedCLIP
from upt_fast.released.exporting import checkpoint_path, export_checkpoint, refuse, released_settings
from upt_fast.released.file import read_file
from upt_fast.released.importing import Imported, fit
from upt_fast.saving import LEARNER_FILE
from upt_fast.train.checkpoint import STATE_FILE, is_run, read_json
from upt_fast.train.runs import checkpoint_folder


def run_import(
    file: str,
    classnames: str,
    out: str,
    *,
    clip: str,
    pretrained: str | None = None,
    quick_gelu: bool | None = None,
    method: str | None = None,
    options: Sequence[str] = (),
) -> Imported:
    """``upt-fast import-checkpoint``: read a released checkpoint, save it as this package does, say what was read.

    Args:
        file: the checkpoint.
        classnames: a file of class names: one a line, or a JSON list.
        out: folder for the model.
        clip: open_clip's name of the CLIP, or "tiny-digits".
        pretrained: its tag, or a file.
        quick_gelu: its activation; None: as the tag, the file or else the name says.
        method: one of :func:`upt_fast.methods.list_releases`; None: found from the file.
        options: "KEY=VALUE", values as in JSON, anything else a text.
    Raises:
        ValueError: as :func:`import_checkpoint`; a folder that holds a model or a run already; bad class names.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={out!r} is a file; wanted a folder")
    if (folder / LEARNER_FILE).exists() or is_run(folder):
        raise ValueError(f"out={out!r} holds a model already; wanted a new folder")
    names, given = clean_classnames(read_classnames(Path(classnames))), parse_options(options)
    checkpoint = read_file(Path(file))  # before a CLIP is loaded, so that a bad file is told at once
    found = fit(Path(file), checkpoint, load_clip(clip, pretrained, quick_gelu=quick_gelu), names, method, given)
    written = found.model.save_pretrained(folder)
    print("\n".join([*found.describe(), f"written to {written}"]))
    return found


def run_export(
    checkpoint: str,
    out: str,
    *,
    epoch: int | None = None,
    clip: str | None = None,
    pretrained: str | None = None,
    quick_gelu: bool | None = None,
) -> Path:
    """``upt-fast export-checkpoint``: write a run's or saved model's checkpoint for a released trainer.

    Args:
        checkpoint: RUN, RUN/last, RUN/best or a folder written by save_pretrained.
        out: the trainer's --model-dir.
        epoch: its --load-epoch; None: the run's, or 1.
        clip: open_clip's name of the CLIP; None: the one in the checkpoint.
        pretrained: with clip: its tag, or a file.
        quick_gelu: with clip: its activation; None: as the tag, the file or else the name says.
    Raises:
        ValueError: as :func:`export_checkpoint`; no checkpoint there; the file exists.
    """
    if pretrained is not None and clip is None:
        raise ValueError(f"pretrained={pretrained!r} without a CLIP's name; wanted --clip too")
    if quick_gelu is not None and clip is None:
        raise ValueError(
            f"quick_gelu={quick_gelu} without a CLIP's name; wanted --clip too, or the one in the checkpoint"
        )
    folder = checkpoint_folder(checkpoint)
    if epoch is None:
        state = folder / STATE_FILE if folder.is_dir() else folder.parent / STATE_FILE
        epoch = int(read_json(state)["epoch"]) if state.is_file() else 1
    if clip is None:
        model = FastPromptedCLIP.load(folder)
    else:
        loaded = load_clip(clip, pretrained, quick_gelu=quick_gelu)
        model = FastPromptedCLIP.load(folder, loaded.model, tokenizer=loaded.tokenizer)
    refuse(model)
    path = checkpoint_path(out, model.method, epoch)
    if path.exists():
        raise ValueError(f"{path} exists; wanted another --out or --epoch")
    export_checkpoint(model, path, epoch)
    print(
        "\n".join(
            [f"written to {path}", *released_settings(model), f"load it with --model-dir {out} --load-epoch {epoch}"]
        )
    )
    return path


def read_classnames(path: Path) -> list[str]:
    """Class names of a file: a JSON list, or one a line.

    Raises:
        ValueError: no such file, not text, or no list of names.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"class names: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"class names: {path} is not UTF-8 text; wanted one name a line, or a JSON list") from error
    if not text.lstrip().startswith("["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names = json.loads(text)
    except ValueError as error:
        raise ValueError(f"class names: {path} starts as JSON, but is none: {error}") from error
    return [str(name) if isinstance(name, int) else name for name in names]


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Options of "KEY=VALUE" texts; values are JSON (true, 4, null, lists), anything else a text."""
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"option {text!r}; wanted KEY=VALUE, for example half_prompts=true")
        if name in options:
            raise ValueError(f"option {name} is given twice")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
