"""Load a CLIP by name through open_clip (tags, files, Hugging Face), or the small one in the package; or its shapes.

Which activation it gets is decided here and said in the log: QuickGELU and GELU have the same weights.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upt_fast.clip.frozen import FrozenCLIP
from upt_fast.clip.open_clip import frozen_clip, has_quick_gelu, refuse
from upt_fast.clip.tiny_clip import TINY_CLIP_NAME, build_tiny_clip, load_tiny_clip, load_tiny_tokenizer
from upt_fast.clip.tokens import Tokenizer
from upt_fast.clip.weights import ACTIVATION_TITLES, WeightsFile, load_weights, read_weights

logger = logging.getLogger("upt_fast")

PRECISIONS = ("fp32", "fp16", "bf16")
_SCHEMAS = ("hf-hub:", "local-dir:")


@dataclass(frozen=True)
class LoadedCLIP:
    """A CLIP with what belongs to it; preprocess_cfg has open_clip's keys: size, mean, std, interpolation, ..."""

    model: nn.Module
    tokenizer: Tokenizer
    preprocess_cfg: dict[str, Any]
    name: str
    pretrained: str | None


def load_clip(
    name: str,
    pretrained: str | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    cache_dir: str | None = None,
    quick_gelu: bool | None = None,
) -> LoadedCLIP:
    """Load a CLIP with its weights.

    Args:
        name: open_clip's model name ("ViT-B-16"), "hf-hub:org/repo", "local-dir:folder", or "tiny-digits", a 32-pixel
            CLIP of handwritten digits that comes with this package.
        pretrained: open_clip's tag ("openai", "laion2b_s34b_b88k") or the path of a file: a TorchScript archive as
            OpenAI published them, of which the tensors alone are read, or a state dict (upt_fast/clip/weights.py); None
            for names that bring their weights.
        precision: "fp32", "fp16" or "bf16" weights.
        device: where the weights go.
        cache_dir: folder for downloads; None: the hub's default.
        quick_gelu: whether the MLPs have QuickGELU, or GELU; None: as the tag, the file or else the name says. A
            warning is logged where a file does not say and the name has a twin with the other activation.
    Raises:
        ValueError: unknown model, tag or precision; weights that cannot be read or downloaded, or that do not fit.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}; wanted one of {', '.join(PRECISIONS)}")
    if quick_gelu not in (None, True, False):
        raise ValueError(f"quick_gelu={quick_gelu!r}; wanted True, False or None")
    if name == TINY_CLIP_NAME:
        if pretrained is not None:
            raise ValueError(f"pretrained={pretrained!r}; {TINY_CLIP_NAME} brings its own weights: leave it out")
        model, tokenizer, preprocess_cfg = load_tiny_clip(precision=precision, device=device)
        if quick_gelu not in (None, has_quick_gelu(model)):
            raise ValueError(f"quick_gelu={quick_gelu}; {TINY_CLIP_NAME} brings its own activation: leave it out")
        return LoadedCLIP(model, tokenizer, preprocess_cfg, name, None)

    import open_clip

    _check_names(name, pretrained, open_clip)
    try:
        with _quiet_retries():
            model, why = _create(name, pretrained, precision, device, cache_dir, quick_gelu, open_clip)
            tokenizer = open_clip.get_tokenizer(name, cache_dir=cache_dir)
        preprocess_cfg = dict(open_clip.get_model_preprocess_cfg(model))
    except Exception as error:  # hub clients, torch and open_clip raise many kinds; the user needs the one reason
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"could not load {name!r} with pretrained={pretrained!r}: {reason}") from error
    _tell_activation(name, pretrained, model, why, open_clip)
    return LoadedCLIP(model.eval(), tokenizer, preprocess_cfg, name, pretrained)


def clip_without_weights(name: str) -> tuple[FrozenCLIP, Tokenizer | None]:
    """The description of :func:`model_without_weights`, and its tokenizer.

    Raises:
        ValueError: no such name, or a CLIP that the engine does not compute.
    """
    model, tokenizer = model_without_weights(name)
    return frozen_clip(model), tokenizer


def model_without_weights(name: str) -> tuple[nn.Module, Tokenizer | None]:
    """The shapes of a CLIP that open_clip knows by name, or of "tiny-digits"; nothing is downloaded.

    Args:
        name: as for :func:`load_clip`, without names of hubs and folders.
    Returns:
        The CLIP's model, its weights on the meta device; and its tokenizer, None for CLIP's byte-pair tokenizer.
    Raises:
        ValueError: no such name, or a CLIP that the engine does not compute.
    """
    if name == TINY_CLIP_NAME:
        with torch.device("meta"):
            tiny = build_tiny_clip()
        return _with_mask(tiny), load_tiny_tokenizer()

    import open_clip

    config = open_clip.get_model_config(name.replace("/", "-"))
    if config is None:
        raise _unknown_name(name, open_clip.list_models())
    if encoder := config.get("text_cfg", {}).get("hf_model_name"):  # its shapes are on the hub
        refuse("text tower", f"HFTextEncoder ({encoder})")
    with torch.device("meta"), _quiet(logging.root):  # about random weights
        model = open_clip.create_model(name, pretrained=None, load_weights=False, device="meta")
    return _with_mask(model), None


def clip_with_random_weights(name: str) -> tuple[nn.Module, Tokenizer | None]:
    """A CLIP whose numbers mean nothing, to measure with; see :func:`model_without_weights`."""
    model_without_weights(name)  # what it refuses
    if name == TINY_CLIP_NAME:
        return build_tiny_clip().eval(), load_tiny_tokenizer()

    import open_clip

    with _quiet(logging.root):  # about random weights
        return open_clip.create_model(name, pretrained=None, load_weights=False, device="cpu").eval(), None


def _with_mask(model: nn.Module) -> nn.Module:
    """A model on the meta device, but for the mask of its texts."""
    text: Any = getattr(model, "text", model)
    if getattr(text, "attn_mask", None) is not None:  # looked at, to refuse what is not causal
        length = text.attn_mask.shape[0]
        text.attn_mask = torch.full((length, length), float("-inf")).triu_(1)
    return model


def _create(
    name: str,
    pretrained: str | None,
    precision: str,
    device: str,
    cache_dir: str | None,
    quick_gelu: bool | None,
    open_clip: Any,
) -> tuple[nn.Module, str]:
    """The model with its weights, and what its activation goes by; empty: by the architecture's name alone."""
    why = "" if quick_gelu is None else f"quick_gelu={quick_gelu} was given"
    tag = open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained) if pretrained else None
    weights: WeightsFile | None = None
    if pretrained and not tag and Path(pretrained).suffix not in (".npz", ".npy"):
        weights = read_weights(Path(pretrained))
        if quick_gelu is None:
            quick_gelu, why = weights.quick_gelu, weights.why
    elif quick_gelu is None:
        # the tag knows its activation; open_clip only warns where the architecture's default is another
        quick_gelu = True if (tag or {}).get("quick_gelu") else None
        why = f"open_clip's tag {pretrained!r} says" if tag else "its configuration says" if not pretrained else ""
    # given as keywords of open_clip's models, the activation is told for certain, and nothing else changes
    activation = {} if quick_gelu is None else {"quick_gelu": quick_gelu}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "QuickGELU mismatch")  # of the tag: what is used, and why, is logged
        if weights is None:
            arguments = {"pretrained": pretrained, "cache_dir": cache_dir, "require_pretrained": True}
            return open_clip.create_model(name, precision=precision, device=device, **arguments, **activation), why
        with _quiet(logging.root):  # about random weights
            model = open_clip.create_model(name, load_weights=False, precision=precision, device="cpu", **activation)
    load_weights(model, weights, Path(str(pretrained)), name)
    return model.to(device), why


def _tell_activation(name: str, pretrained: str | None, model: nn.Module, why: str, open_clip: Any) -> None:
    used = ACTIVATION_TITLES[bool(has_quick_gelu(model))]
    twin = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name.replace('/', '-')}-quickgelu"
    if why or name.endswith("-quickgelu") or twin not in open_clip.list_models():
        logger.info("%s has %s: %s", name, used, why or "the architecture's name says so")
        return
    logger.warning(
        "%s does not say with which activation it was trained; %s is used, as the name %s means. "
        "If it comes from OpenAI's weights, pass --quick-gelu true (quick_gelu=True), else --quick-gelu false",
        pretrained,
        used,
        name,
    )


@contextlib.contextmanager
def _quiet_retries() -> Iterator[None]:
    """Without the hub client's line for each attempt: one message says what failed in the end."""
    with _quiet(logging.getLogger("huggingface_hub")):
        yield


@contextlib.contextmanager
def _quiet(noisy: logging.Logger) -> Iterator[None]:
    """Without a logger's warnings."""
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(level)


def _check_names(name: str, pretrained: str | None, open_clip: Any) -> None:
    if name.startswith(_SCHEMAS):
        if pretrained is not None:
            raise ValueError(f"pretrained={pretrained!r}; {name!r} brings its own weights: leave it out")
        folder = name.removeprefix("local-dir:")
        if folder != name and not Path(folder).is_dir():
            raise ValueError(f"model folder {folder!r} does not exist")
        return
    models = open_clip.list_models()
    if name.replace("/", "-") not in models:
        raise _unknown_name(name, models)
    _check_architecture(open_clip.get_model_config(name.replace("/", "-")) or {})
    tags = open_clip.list_pretrained_tags_by_model(name.replace("/", "-"))
    if pretrained is None:
        raise ValueError(
            f"{name!r} needs pretrained weights; wanted a checkpoint file or one of {', '.join(tags) or 'no tag'}"
        )
    if pretrained.lower() not in {tag.lower() for tag in tags} and not Path(pretrained).is_file():
        raise ValueError(
            f"pretrained={pretrained!r} is no file and no tag of {name!r}; its tags: {', '.join(tags) or 'none'}"
        )


def _unknown_name(name: str, models: list[str]) -> ValueError:
    close = difflib.get_close_matches(name, models, n=4, cutoff=0.5) or ["ViT-B-32", "ViT-B-16", "ViT-L-14"]
    return ValueError(f"unknown CLIP model {name!r}; did you mean {', '.join(close)} or {TINY_CLIP_NAME}?")


def _check_architecture(config: dict[str, Any]) -> None:
    """Refuse what the adapter would refuse, before its weights are downloaded."""
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    if vision.get("timm_model_name"):
        refuse("image tower", f"TimmModel ({vision['timm_model_name']})")
    if isinstance(vision.get("layers"), (list, tuple)):
        refuse("image tower", "ModifiedResNet")
    if text.get("hf_model_name"):
        refuse("text tower", f"HFTextEncoder ({text['hf_model_name']})")
    if "multimodal_cfg" in config:
        refuse("model", "CoCa")
    if text.get("no_causal_mask"):
        refuse("text tower", "TextTransformer is not causal: its prompts cannot be shared between classes")
