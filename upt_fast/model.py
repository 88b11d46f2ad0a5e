"""FastPromptedCLIP: a prompt learner and two prompted frozen towers; FastUPT is its Unified Prompt Tuning."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast import dispatch, ops
from upt_fast.clip.frozen import FrozenCLIP
from upt_fast.clip.loading import LoadedCLIP, load_clip
from upt_fast.clip.open_clip import frozen_clip
from upt_fast.clip.tokens import Tokenizer, clean_classnames, tokenize_classnames
from upt_fast.config import UPTAblationConfig, UPTConfig, require_choice
from upt_fast.prompts.unified import Prompts, UnifiedPromptLearner
from upt_fast.towers.blocks import MEMORY_LEVELS
from upt_fast.towers.text import TextTower
from upt_fast.towers.vision import VisionTower

LEARNER_FILE = "prompt_learner.safetensors"
FORMAT_VERSION = 1
DESCRIPTION_KEYS = ("config", "classnames", "clip_name", "clip_pretrained", "preprocess_cfg")
T = TypeVar("T")
Self = TypeVar("Self", bound="FastUPT")


class FastPromptedCLIP(nn.Module):
    """A frozen CLIP prompted by a learner: logits of images over class names.

    Only the learner has parameters and a state dict; the CLIP's weights are constants that follow ``.to()``.

    Args:
        clip: the frozen CLIP.
        prompt_learner: module whose forward gives :class:`Prompts`; its parameters become float32 (float64 in a float64
            CLIP) on the CLIP's device.
        classnames: C class names; underscores become spaces.
        n_text: prompt tokens in each text.
        class_token_position: where the class name stands among them: "end", "middle" or "front".
        tokenizer: open_clip's tokenizer of this CLIP; None: CLIP's byte-pair tokenizer.
        dtype: dtype of the frozen towers; None: the CLIP's own.
        memory: "fast", "balanced" or "lean": what backward keeps and what it recomputes (towers/blocks.py).
        backend: "auto": per op the fastest that was measured on this kind of device; or "torch", "triton", "xformers",
            "triton,xformers", which never fall back (upt_fast/dispatch.py).
    Raises:
        ValueError: bad option, class name or model.
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        prompt_learner: nn.Module,
        classnames: Sequence[str],
        *,
        n_text: int,
        class_token_position: str = "end",
        tokenizer: Tokenizer | None = None,
        dtype: torch.dtype | None = None,
        memory: str = "fast",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        require_choice("memory", memory, MEMORY_LEVELS)
        dtype = clip.dtype if dtype is None else dtype
        if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype={dtype}; wanted torch.float64, float32, bfloat16 or float16")
        self.backend = dispatch.resolve(backend)
        self.tokenizer, self.n_text, self.class_token_position = tokenizer, n_text, class_token_position
        self.text_context = clip.text.context
        self.text_tower = TextTower(clip.text, dtype, memory, self.backend)
        self.vision_tower = VisionTower(clip.vision, dtype, memory, self.backend)
        # scalars stay in single precision beside half-precision towers, as the learner does
        scalars = torch.float64 if dtype == torch.float64 else torch.float32
        self.register_buffer("logit_scale", clip.logit_scale.to(scalars, copy=True), persistent=False)
        logit_bias = None if clip.logit_bias is None else clip.logit_bias.to(scalars, copy=True)
        self.register_buffer("logit_bias", logit_bias, persistent=False)
        self.prompt_learner = prompt_learner
        if hasattr(prompt_learner, "backend"):
            object.__setattr__(prompt_learner, "backend", self.backend)  # a plain attribute, past nn.Module's types
        self.prompt_learner.to(clip.device, torch.float64 if dtype == torch.float64 else torch.float32)
        self._text_cache: tuple[list[Tensor], Tensor] | None = None
        self.set_classnames(classnames)

    logit_scale: Tensor  # ()
    logit_bias: Tensor | None  # ()

    def set_classnames(self, classnames: Sequence[str]) -> None:
        """Replace the classes; the prompts stay as they are.

        Args:
            classnames: C names, each short enough for the CLIP's context.
        Raises:
            ValueError: no names, an empty name, or one that is too long; the classes stay as they were.
        """
        tokens = tokenize_classnames(classnames, self.n_text, self.text_context, self.tokenizer)
        self.packed = self.text_tower.pack(tokens, self.n_text, self.class_token_position)
        self.classnames = clean_classnames(classnames)
        self._text_cache = None

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self._text_cache = None
        return super()._apply(fn, recurse)

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Image features.

        Args:
            images: (B, 3, H, W), normalised with the CLIP's mean and standard deviation.
            normalize: whether to scale each feature to L2 norm 1.
        Returns:
            (B, e)
        """
        return self._encode_image(images, self.prompt_learner(), normalize)

    def encode_text(self, normalize: bool = True) -> Tensor:
        """Features (C, e) of the classes; in eval mode without gradients they are kept until a parameter changes."""
        features = self._class_features(None)
        return F.normalize(features, dim=-1) if normalize else features.clone()  # the cache stays ours

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Args:
            images: (B, 3, H, W), normalised with the CLIP's mean and standard deviation.
        Returns:
            (B, C): exp(logit_scale) times the cosine of image and class features, plus the CLIP's logit_bias if any.
        """
        prompts = self.prompt_learner()
        text_features = F.normalize(self._class_features(prompts), dim=-1)
        logits = self.logit_scale.exp() * self._encode_image(images, prompts) @ text_features.t()
        return logits if self.logit_bias is None else logits + self.logit_bias

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of :meth:`forward`'s logits, without storing them where a kernel computes it.

        Args:
            images: (B, 3, H, W), normalised with the CLIP's mean and standard deviation.
            labels: (B,) int64, indices of the class names.
        Returns:
            (), float32 (float64 in a float64 CLIP).
        """
        prompts = self.prompt_learner()
        classes = self._class_features(prompts)
        features = self._encode_image(images, prompts, normalize=False)
        return ops.contrastive_loss(features, classes, self.logit_scale.exp(), labels, backend=self.backend).mean()

    def _encode_image(self, images: Tensor, prompts: Prompts, normalize: bool = True) -> Tensor:
        features = self.vision_tower(images, prompts.visual)
        return F.normalize(features, dim=-1) if normalize else features

    def _class_features(self, prompts: Prompts | None) -> Tensor:
        """(C, e) class features, from the cache in eval mode without gradients."""
        if self.training or torch.is_grad_enabled() or torch.is_autocast_enabled(self.logit_scale.device.type):
            return self.text_tower((self.prompt_learner() if prompts is None else prompts).text, self.packed)
        # compared by value: a write through .data, which leaves no trace in version counters, is seen too
        parameters = list(self.prompt_learner.parameters())
        if self._text_cache is not None:
            seen, features = self._text_cache
            if len(seen) == len(parameters) and all(map(_same, seen, parameters)):
                return features
        features = self.text_tower((self.prompt_learner() if prompts is None else prompts).text, self.packed)
        self._text_cache = ([p.detach().clone() for p in parameters], features)
        return features


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class FastUPT(FastPromptedCLIP):
    """Unified Prompt Tuning (arXiv 2210.07225) on the fast engine; swaps in for :class:`ReferenceUPT`.

    Args:
        clip_model: open_clip ``CLIP`` or ``CustomTextCLIP`` with a ViT and a causal text tower. Left untouched; its
            weights are copied where folding changes them.
        classnames: C class names; underscores become spaces.
        tokenizer: the tokenizer of clip_model; None: CLIP's byte-pair tokenizer.
        config: all of UPT's options at once, instead of the keywords.
        dtype: dtype of the frozen towers; None: clip_model's.
        memory: "fast", "balanced" or "lean": backward recomputes nothing, the MLPs' hidden features, whole blocks.
        backend: "auto", "torch", "triton", "xformers" or "triton,xformers" (upt_fast/dispatch.py).
        options: the fields of :class:`UPTConfig`: preset, n_text, n_visual, depth_text, depth_vision,
            class_token_position, attention_heads, dropout.
    Raises:
        ValueError: unsupported model, bad option or class name; the message says what was wanted.

    Example:
        >>> model = FastUPT.from_pretrained("ViT-B-16", "openai", classnames=["cat", "dog"])
        >>> loss = F.cross_entropy(model(images), labels)  # images (B, 3, 224, 224), labels (B,)
        >>> loss.backward()  # gradients of model.parameters(): the prompts and their transform
    """

    def __init__(
        self,
        clip_model: nn.Module,
        classnames: Sequence[str],
        *,
        tokenizer: Tokenizer | None = None,
        config: UPTConfig | None = None,
        dtype: torch.dtype | None = None,
        memory: str = "fast",
        backend: str = "auto",
        **options: Any,
    ) -> None:
        config = make_config(config, options)
        clip = frozen_clip(clip_model)
        depths = config.depths(len(clip.text.blocks), len(clip.vision.blocks))
        learner = UnifiedPromptLearner(config, *depths, clip.text.width, clip.vision.width)
        super().__init__(
            clip,
            learner,
            classnames,
            n_text=config.n_text,
            class_token_position=config.class_token_position,
            tokenizer=tokenizer,
            dtype=dtype,
            memory=memory,
            backend=backend,
        )
        self.config = config
        self.clip_name: str | None = None
        self.clip_pretrained: str | None = None
        self.preprocess_cfg: dict[str, Any] | None = getattr(
            getattr(clip_model, "visual", None), "preprocess_cfg", None
        )

    @classmethod
    def from_loaded(cls: type[Self], clip: LoadedCLIP, classnames: Sequence[str], **options: Any) -> Self:
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
        classnames: Sequence[str],
        precision: str = "fp32",
        device: str = "cpu",
        cache_dir: str | None = None,
        **options: Any,
    ) -> Self:
        """Build on a CLIP that open_clip knows by name, or the small one in this package.

        Args:
            name: "ViT-B-16", "hf-hub:org/repo", "local-dir:folder" or "tiny-digits".
            pretrained: open_clip's tag ("openai") or a checkpoint's path.
            classnames: C class names.
            precision: "fp32", "fp16" or "bf16" weights of the frozen CLIP.
            device: where the model goes.
            cache_dir: folder for downloads.
            options: see the class.
        Raises:
            ValueError: unknown model or tag, weights that cannot be had, bad option or class name.
        """
        return cls.from_loaded(load_clip(name, pretrained, precision, device, cache_dir), classnames, **options)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write directory/prompt_learner.safetensors, whole or not at all: the learner, its options, the class names.

        The CLIP's weights are not in it, only the name they load by.
        """
        from upt_fast.files import save_safetensors

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "format_version": FORMAT_VERSION,
            "method": "upt",
            "config": self.config.to_dict(),
            "classnames": self.classnames,
            "clip_name": self.clip_name,
            "clip_pretrained": self.clip_pretrained,
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
        classnames: Sequence[str] | None = None,
        precision: str = "fp32",
        device: str = "cpu",
        cache_dir: str | None = None,
        **options: Any,
    ) -> Self:
        """Read what :meth:`save_pretrained` wrote.

        Args:
            directory: the folder, or the file in it.
            clip_model: the CLIP it was trained on; None: loaded by the name in the file.
            tokenizer: the tokenizer of clip_model.
            classnames: other classes than the saved ones.
            precision: of the frozen CLIP, where it is loaded by name.
            device: where the model goes.
            cache_dir: folder for downloads.
            options: dtype, memory, backend.
        Raises:
            ValueError: no checkpoint there, or one of another CLIP or method; says which keys or shapes differ.
        """
        from upt_fast.files import load_safetensors

        path = Path(directory)
        path = path / LEARNER_FILE if path.is_dir() else path
        state, metadata = load_safetensors(path)
        description = read_description(metadata, path)
        names = description["classnames"] if classnames is None else classnames
        config = _in_file(path, lambda: make_config(None, description["config"]))
        if clip_model is None:
            if description["clip_name"] is None:
                raise ValueError(f"{path} does not say which CLIP it was trained on: pass clip_model and tokenizer")
            clip = load_clip(description["clip_name"], description["clip_pretrained"], precision, device, cache_dir)
            model = cls.from_loaded(clip, names, config=config, **options)
        else:
            model = cls(clip_model, names, tokenizer=tokenizer, config=config, **options).to(device)
            model.clip_name, model.clip_pretrained = description["clip_name"], description["clip_pretrained"]
            model.preprocess_cfg = description["preprocess_cfg"]
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit this CLIP: {error}") from error
        return model.eval()


def make_config(config: UPTConfig | None, options: dict[str, Any]) -> UPTConfig:
    """One UPTConfig from either of the two ways to give options; a ValueError names unknown ones."""
    if config is not None and options:
        raise ValueError(f"config and {', '.join(options)} given; wanted one or the other")
    if isinstance(config, UPTAblationConfig) and not config.is_upt:
        raise ValueError(f"{config}: FastUPT computes no ablation in this version; ReferenceUPT does")
    if config is not None:
        return config
    known = [field.name for field in dataclasses.fields(UPTConfig)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)}; wanted some of {', '.join(known)}")
    return UPTConfig(**options)


def read_description(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """The JSON description in a learner file's metadata; a ValueError if it is not ours or of another format."""
    try:
        description = json.loads(metadata["upt_fast"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a learner saved by upt_fast (no description in its metadata)") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path} is not a learner saved by upt_fast (its description is no JSON object)")
    if description.get("format_version") != FORMAT_VERSION or description.get("method") != "upt":
        got = {key: description.get(key) for key in ("format_version", "method")}
        raise ValueError(f"{path} has {got}; this version reads format_version {FORMAT_VERSION} of method 'upt'")
    missing = [key for key in DESCRIPTION_KEYS if key not in description]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)} in its description")
    return description


def _in_file(path: Path, read: Callable[[], T]) -> T:
    """read(), its ValueError prefixed by the file it speaks of."""
    try:
        return read()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
