"""Load a CLIP by name through open_clip (tags, files, Hugging Face), or the small one in the package."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from upt_fast.clip.open_clip import refuse
from upt_fast.clip.tokens import Tokenizer

TINY_CLIP_NAME = "tiny-digits"
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
) -> LoadedCLIP:
    """Load a CLIP with its weights.

    Args:
        name: open_clip's model name ("ViT-B-16"), "hf-hub:org/repo", "local-dir:folder", or "tiny-digits", a 32-pixel
            CLIP of handwritten digits that comes with this package.
        pretrained: open_clip's tag ("openai", "laion2b_s34b_b88k") or the path of a checkpoint file; None for names
            that bring their weights.
        precision: "fp32", "fp16" or "bf16" weights.
        device: where the weights go.
        cache_dir: folder for downloads; None: the hub's default.
    Raises:
        ValueError: unknown model, tag or precision; weights that cannot be read or downloaded.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}; wanted one of {', '.join(PRECISIONS)}")
    if name == TINY_CLIP_NAME:
        if pretrained is not None:
            raise ValueError(f"pretrained={pretrained!r}; {TINY_CLIP_NAME} brings its own weights: leave it out")
        from upt_fast.demo.tiny_clip import load_tiny_clip

        model, tokenizer, preprocess_cfg = load_tiny_clip(precision=precision, device=device)
        return LoadedCLIP(model, tokenizer, preprocess_cfg, name, None)

    import open_clip

    _check_names(name, pretrained, open_clip)
    try:
        # the tag knows its activation; open_clip only warns where the architecture's default is another
        tag = open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained) if pretrained else None
        with _quiet_retries():
            model = open_clip.create_model(
                name,
                pretrained=pretrained,
                precision=precision,
                device=device,
                force_quick_gelu=bool((tag or {}).get("quick_gelu")),
                cache_dir=cache_dir,
                require_pretrained=True,
            )
            tokenizer = open_clip.get_tokenizer(name, cache_dir=cache_dir)
        preprocess_cfg = dict(open_clip.get_model_preprocess_cfg(model))
    except Exception as error:  # hub clients, torch and open_clip raise many kinds; the user needs the one reason
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"could not load {name!r} with pretrained={pretrained!r}: {reason}") from error
    return LoadedCLIP(model.eval(), tokenizer, preprocess_cfg, name, pretrained)


@contextlib.contextmanager
def _quiet_retries() -> Iterator[None]:
    """Without the hub client's line for each attempt: one message says what failed in the end."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
        close = difflib.get_close_matches(name, models, n=4, cutoff=0.5) or ["ViT-B-32", "ViT-B-16", "ViT-L-14"]
        raise ValueError(f"unknown CLIP model {name!r}; did you mean {', '.join(close)} or {TINY_CLIP_NAME}?")
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
