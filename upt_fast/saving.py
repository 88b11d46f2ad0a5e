"""Models from a CLIP's name, and their learners in a file: what is saved is the learner, not the CLIP."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import nn

from upt_fast.clip.loading import LoadedCLIP, load_clip
from upt_fast.clip.tokens import Tokenizer
from upt_fast.clip.weights import ACTIVATION_TITLES
from upt_fast.common.files import load_safetensors, save_safetensors
from upt_fast.methods import Method, MethodConfig, find_method, list_methods, make_config
from upt_fast.prompts.base import PromptLearner

logger = logging.getLogger("upt_fast")

LEARNER_FILE = "prompt_learner.safetensors"
FORMAT_VERSION = 1
DESCRIPTION_KEYS = ("method", "config", "classnames", "clip_name", "clip_pretrained", "preprocess_cfg")
T = TypeVar("T")
Self = TypeVar("Self", bound="SavedWithCLIP")


class SavedWithCLIP(nn.Module):
    """What FastPromptedCLIP has of names, files and folders."""

    only_method: ClassVar[str | None] = None  # the only one that a class loads

    method: str
    config: MethodConfig
    classnames: tuple[str, ...]
    prompt_learner: PromptLearner
    clip_name: str | None
    clip_pretrained: str | None
    clip_quick_gelu: bool | None
    preprocess_cfg: dict[str, Any] | None
    sibling: Callable[..., SavedWithCLIP]

    @classmethod
    def from_loaded(cls: type[Self], clip: LoadedCLIP, classnames: Iterable[str], **options: Any) -> Self:
        """Like the constructor, from :func:`upt_fast.clip.load_clip`; remembers the name, so that checkpoints do."""
        model = cls(clip.model, classnames, tokenizer=clip.tokenizer, **options)
        model.clip_name, model.clip_pretrained = clip.name, clip.pretrained
        model.preprocess_cfg = clip.preprocess_cfg
        return model

    @classmethod
    def from_pretrained(
        cls: type[Self],
        name: str,
        pretrained: str | None = None,
        *,
        classnames: Iterable[str],
        precision: str = "fp32",
        device: str = "cpu",
        cache_dir: str | None = None,
        quick_gelu: bool | None = None,
        **options: Any,
    ) -> Self:
        """Build on a CLIP that open_clip knows by name, or the small one in this package.

        Args:
            name: "ViT-B-16", "hf-hub:org/repo", "local-dir:folder" or "tiny-digits".
            pretrained: open_clip's tag ("openai") or a file's path: OpenAI's TorchScript archive or a state dict.
            classnames: C class names.
            precision: "fp32", "fp16" or "bf16" weights of the frozen CLIP; "fp8": fp32 weights, and dtype="fp8".
            device: where the model goes.
            cache_dir: folder for downloads.
            quick_gelu: whether the CLIP has QuickGELU, or GELU; None: as the tag, the file or else the name says.
            options: see the class.
        Raises:
            ValueError: unknown model or tag, weights that cannot be had, bad option or class name.
        """
        clip, options = load_for(name, pretrained, precision, device, cache_dir, quick_gelu, options)
        return cls.from_loaded(clip, classnames, **options)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write directory/prompt_learner.safetensors, whole or not at all: the learner, its options, the class names.

        The CLIP's weights are not in it, only the name they load by.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "config": self.config.to_dict(),
            "classnames": self.classnames,
            "clip_name": self.clip_name,
            "clip_pretrained": self.clip_pretrained,
            "clip_quick_gelu": self.clip_quick_gelu,
            "preprocess_cfg": self.preprocess_cfg,
        }
        save_safetensors(folder / LEARNER_FILE, self.state_dict(), {"upt_fast": json.dumps(description)})
        return folder / LEARNER_FILE

    @classmethod
    def load(
        cls: type[Self],
        directory: str | os.PathLike[str],
        clip_model: nn.Module | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        classnames: Iterable[str] | None = None,
        method: str | type[PromptLearner] | None = None,
        precision: str = "fp32",
        device: str = "cpu",
        cache_dir: str | None = None,
        **options: Any,
    ) -> Self:
        """Read what :meth:`save_pretrained` wrote.

        Args:
            directory: the folder, or the file in it.
            clip_model: the CLIP it was trained on, or a model whose sibling it becomes; None: loaded by the name in
                the file.
            tokenizer: the tokenizer of clip_model.
            classnames: other classes than the saved ones.
            method: the method, where the file's is none of :func:`upt_fast.list_methods`: a file never imports code.
            precision: of the frozen CLIP, where it is loaded by name; see :meth:`from_pretrained`.
            device: where the model goes.
            cache_dir: folder for downloads.
            options: dtype, memory, backend.
        Raises:
            ValueError: no checkpoint there, or one of another CLIP or method; says which keys or shapes differ.
        """
        path = Path(directory)
        path = path / LEARNER_FILE if path.is_dir() else path
        state, metadata = load_safetensors(path)
        description = read_description(metadata, path)
        names = description["classnames"] if classnames is None else classnames
        if cls.only_method not in (None, description["method"]):
            raise ValueError(
                f"{path}: method {description['method']!r}; wanted {cls.only_method!r}: FastPromptedCLIP.load takes any"
            )
        found = _in_file(path, lambda: _method_of(description, method))
        options["config"] = _in_file(path, lambda: make_config(found, None, description["config"]))
        options["method"] = found.name
        if clip_model is None:
            if description["clip_name"] is None:
                raise ValueError(f"{path} does not say which CLIP it was trained on: pass clip_model and tokenizer")
            name, pretrained = description["clip_name"], description["clip_pretrained"]
            quick_gelu = description.get("clip_quick_gelu")  # older files do not say: the name decides, as it did
            clip, options = load_for(name, pretrained, precision, device, cache_dir, quick_gelu, options)
            model = cls.from_loaded(clip, names, **options)
        else:
            if isinstance(clip_model, SavedWithCLIP):
                model = clip_model.sibling(names, **options)  # type: ignore[assignment]
            else:
                model = cls(clip_model, names, tokenizer=tokenizer, **options).to(device)
            _check_activation(path, description.get("clip_quick_gelu"), model.clip_quick_gelu)
            model.clip_name, model.clip_pretrained = description["clip_name"], description["clip_pretrained"]
            model.preprocess_cfg = description["preprocess_cfg"]
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            message = str(error).replace('"prompt_learner.', f'"{model.prompt_learner.state_prefix}')
            raise ValueError(f"{path} does not fit this CLIP: {message}") from error
        return model.eval()


def load_for(
    name: str,
    pretrained: str | None,
    precision: str,
    device: str,
    cache_dir: str | None,
    quick_gelu: bool | None,
    options: dict[str, Any],
) -> tuple[LoadedCLIP, dict[str, Any]]:
    """A CLIP by name, and the options of a model on it: for fp8 it is loaded in fp32, from which towers quantise."""
    if precision == "fp8":
        precision, options = "fp32", {"dtype": "fp8"} | options
    return load_clip(name, pretrained, precision, device, cache_dir, quick_gelu), options


def _check_activation(path: Path, recorded: bool | None, used: bool | None) -> None:
    """Warn where prompts meet a CLIP with another activation than the one they were trained on."""
    if None not in (recorded, used) and recorded != used:
        titles = ACTIVATION_TITLES[bool(recorded)], ACTIVATION_TITLES[bool(used)]
        logger.warning("%s was trained on a CLIP with %s; the one given has %s: expect lower accuracy", path, *titles)


def read_description(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """The JSON description in a learner file's metadata; a ValueError if it is not ours or of another format."""
    try:
        description = json.loads(metadata["upt_fast"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a learner saved by upt_fast (no description in its metadata)") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path} is not a learner saved by upt_fast (its description is no JSON object)")
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {description.get('format_version')!r}; this version reads {FORMAT_VERSION}"
        )
    missing = [key for key in DESCRIPTION_KEYS if key not in description]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)} in its description")
    return description


def _method_of(description: dict[str, Any], given: str | type[PromptLearner] | None) -> Method:
    """The method of a learner file."""
    name = description["method"]
    if given is None:
        if not isinstance(name, str) or name not in list_methods():
            raise ValueError(
                f"method {name!r} is not known here; wanted one of {', '.join(map(repr, list_methods()))}, or the "
                "class that it was trained with as method (--method FILE.py:CLASS)"
            )
        return find_method(name)
    method = find_method(given)
    if method.name != name:
        raise ValueError(f"method {name!r}; method={given!r} was given")
    return method


def _in_file(path: Path, read: Callable[[], T]) -> T:
    """read(), its ValueError prefixed by the file it speaks of."""
    try:
        return read()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def use_released_names(model: SavedWithCLIP) -> None:
    """Give a model's state dict the names of the released code, where those have no ``prompt_learner.`` in front."""
    if model.prompt_learner.state_prefix != "prompt_learner.":
        model.register_state_dict_post_hook(_to_released_names)
        model.register_load_state_dict_pre_hook(_from_released_names)


def _to_released_names(model: SavedWithCLIP, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Take the learner's own place out of the names in a state dict."""
    ours, theirs = prefix + "prompt_learner.", prefix + model.prompt_learner.state_prefix
    for name in [name for name in state if name.startswith(ours)]:
        state[theirs + name.removeprefix(ours)] = state.pop(name)


def _from_released_names(model: SavedWithCLIP, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The inverse, for the names that the learner has; others stay, to be reported."""
    ours, theirs = prefix + "prompt_learner.", prefix + model.prompt_learner.state_prefix
    found = {
        ours + name: state.pop(theirs + name) for name in model.prompt_learner.state_dict() if theirs + name in state
    }
    state.update(found)
