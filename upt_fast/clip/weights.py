"""A CLIP's weights in a file, and the activation that they were trained with, as far as the file tells.

OpenAI's models have QuickGELU, and open_clip's names of the same architectures (ViT-B-16) mean GELU: the same weights
load under either, and run less accurately under the wrong one. What can be known of a file:

* three numbers that OpenAI's model wrote beside its weights mark a file that comes of it, an archive or a state dict;
* the code of a TorchScript archive calls the one activation or the other;
* a training checkpoint of open_clip was made by a command that named the architecture, as the caller does;
* a bare state dict tells nothing, and neither does half precision.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from upt_fast.clip.torchscript import is_archive, read_archive
from upt_fast.common.files import UnreadableError, load_torch
from upt_fast.common.messages import shorten

OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")
ACTIVATION_TITLES = {True: "QuickGELU", False: "GELU"}


@dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds.

    Args:
        state: the tensors by name, without OpenAI's marks; read lazily where the format allows.
        exact: the names are OpenAI's, each of which the model must have in the same shape.
        quick_gelu: whether the weights were trained with QuickGELU; None: the file does not tell.
        why: what tells it, or why the architecture's own activation is right; empty: nothing does.
    """

    state: dict[str, Tensor]
    exact: bool
    quick_gelu: bool | None
    why: str


def read_weights(path: Path) -> WeightsFile:
    """Read a file that ``pretrained`` names: a TorchScript archive, a torch.save'd state dict or safetensors.

    Raises:
        ValueError: the file is damaged, holds no state dict or more than tensors; nothing of it is run.
    """
    if is_archive(path):
        archive = read_archive(path)
        # a mask is an attribute of OpenAI's blocks, and no weight
        state = {name: t for name, t in archive.tensors.items() if name.rpartition(".")[2] != "attn_mask"}
        return _archive_weights(state, archive.activation)
    values = _load(path)
    state = values.get("state_dict", values) if isinstance(values, Mapping) else values
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} holds {type(state).__name__}; wanted a state dict: names with tensors")
    state = {name.removeprefix("module."): value for name, value in state.items() if isinstance(name, str)}
    strange = [name for name, value in state.items() if not isinstance(value, Tensor) and name not in OPENAI_MARKS]
    if strange:
        raise ValueError(
            f"{path}: {strange[0]!r} is {type(state[strange[0]]).__name__}; wanted a state dict: names with tensors"
        )
    if _marked(state):
        return WeightsFile(_unmarked(state), True, True, "the file is a state dict of OpenAI's model")
    of_open_clip = state is not values and {"epoch", "name", "state_dict"} <= set(values)
    why = (
        "the file is a checkpoint of open_clip's training, and the architecture's name says so" if of_open_clip else ""
    )
    return WeightsFile(state, False, None, why)


def _archive_weights(state: dict[str, Tensor], activation: str | None) -> WeightsFile:
    quick = None if activation is None else activation == "quick_gelu"
    if _marked(state):
        # fine-tuned and traced again, it may compute something else than OpenAI's did
        why = "the file is OpenAI's TorchScript archive" if quick is not False else ""
        return WeightsFile(_unmarked(state), True, True if why else None, why)
    if quick is None:
        return WeightsFile(state, True, True, "the file is a TorchScript archive, as OpenAI's are")
    return WeightsFile(state, True, quick, f"the code in the TorchScript archive calls {ACTIVATION_TITLES[quick]}")


def _marked(state: Mapping[str, Any]) -> bool:
    return all(name in state for name in OPENAI_MARKS)


def _unmarked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in OPENAI_MARKS}


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(4)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(path))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({str(error)[:120]}): copy or download it again") from error
    is_zip = head == b"PK\x03\x04"
    if is_zip and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is cut short: a zip file without its end; copy or download it again")
    try:
        return load_torch(path, mmap=is_zip)
    except UnreadableError as error:
        if error.foreign:
            raise ValueError(
                f"{path} holds more than tensors: {error.foreign}, which is not read, for objects can run code; "
                "wanted a file of the state dict alone"
            ) from error
        reason = f" ({error.reason})" if error.reason else ""
        raise ValueError(
            f"{path} is damaged or no file of weights{reason}; wanted a TorchScript archive of OpenAI's, "
            "a state dict that torch.save wrote, or safetensors"
        ) from error


def load_weights(model: nn.Module, weights: WeightsFile, path: Path, name: str) -> None:
    """Load a file's weights into an open_clip model of an architecture, cast to the model's dtypes.

    Raises:
        ValueError: names or shapes differ, with both shapes.
    """
    from open_clip import load_checkpoint
    from open_clip.model import convert_to_custom_text_state_dict

    if not weights.exact:  # open_clip knows other libraries' names, and fits positions to another image size
        try:
            load_checkpoint(model, str(path), device="cpu")
        except (RuntimeError, KeyError, AttributeError) as error:
            problem = _differences(model.state_dict(), weights.state) or str(error).strip().splitlines()[0]
            raise ValueError(f"{path} does not fit {name}: {problem}") from error
        return
    state = weights.state
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    for scalar in ("logit_scale", "logit_bias"):  # of shape () or (1,)
        if scalar in state and scalar in own and state[scalar].numel() == own[scalar].numel() == 1:
            state = {**state, scalar: state[scalar].reshape(own[scalar].shape)}
    if problem := _differences(own, state):
        raise ValueError(f"{path} does not fit {name}: {problem}")
    model.load_state_dict(state)


def _differences(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How a file's tensors differ from an architecture's, in one line; empty: they do not."""
    shapes = [
        f"{name} is {tuple(found[name].shape)} in the file, {tuple(own[name].shape)} in the architecture"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    problems = [shorten(shapes, 2)] if shapes else []
    if missing := [name for name in own if name not in found]:
        problems.append(f"the file lacks {shorten(missing, 3)}")
    if unexpected := [name for name in found if name not in own]:
        problems.append(f"the architecture has no {shorten(unexpected, 3)}")
    return "; ".join(problems)
