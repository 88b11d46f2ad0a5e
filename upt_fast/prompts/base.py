"""What a prompt learner is: parameters -> prompts for both towers, and where those go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from upt_fast.clip.frozen import TextContext
from upt_fast.clip.tokens import Tokenizer, real_numbers, tokenize_words
from upt_fast.engine.autograd import composing
from upt_fast.methods.options import MethodConfig
from upt_fast.methods.release import Release


class Prompts(NamedTuple):
    """Prompts of S sets; [:, i] enters layer i, and after the last entry the rows propagate. None: none."""

    text: Tensor | None = None  # (S, depth_text, n_text, d); with text_per_class (C, depth_text, n_text, d)
    visual: Tensor | None = None  # (S, depth_vision, n_visual, w)


@dataclass(frozen=True)
class Features:
    """What a method's own terms of the loss may read of a batch; float32, or float64 in a float64 CLIP.

    Args:
        images: (B, e) features, L2-normalised.
        texts: (C, e) features of the classes, L2-normalised; None where they depend on the image.
        logits: (B, C).
        labels: (B,) int64.
        fixed_images: computes (B, e) features of the same images, without prompts and without gradients.
        fixed_texts: computes (C, e) features of templates with {} for the class name, without gradients: of several
            the mean; kept from one step to the next.
    """

    images: Tensor
    texts: Tensor | None
    logits: Tensor
    labels: Tensor
    fixed_images: Callable[[], Tensor]
    fixed_texts: Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class LearnerSetting:
    """What a learner may know of the CLIP and the classes that it is for.

    Args:
        text_layers: of the text tower.
        text_width: d.
        vision_layers: of the image tower.
        vision_width: w.
        embed_dim: e, of the features.
        classnames: the C classes.
        embed_words: (words, count) -> (count, d) token embeddings of some words' first tokens; raises a ValueError
            where they have fewer.
    """

    text_layers: int
    text_width: int
    vision_layers: int
    vision_width: int
    embed_dim: int = 512
    classnames: tuple[str, ...] = ()
    embed_words: Callable[[str, int], Tensor] | None = None

    @classmethod
    def of(
        cls,
        text: tuple[int, int],
        vision: tuple[int, int],
        embed_dim: int,
        classnames: tuple[str, ...],
        token_embedding: Tensor,
        context: TextContext,
        tokenizer: Tokenizer | None,
    ) -> LearnerSetting:
        """That of towers of so many layers and such a width, and of a tokenizer, None being CLIP's own."""

        def embed_words(words: str, count: int) -> Tensor:
            with real_numbers():
                ids = tokenize_words(words, count, context, tokenizer).tolist()
            return token_embedding[torch.tensor(ids, device=token_embedding.device)]

        return cls(*text, *vision, embed_dim, classnames, embed_words)

    def initial_context(self, count: int, words: str | None = None) -> Tensor:
        """(count, d): embeddings of the first tokens of some words, or N(0, 0.02) without words."""
        if words is None:
            return torch.empty(count, self.text_width).normal_(std=0.02)
        assert self.embed_words is not None
        return self.embed_words(words, count).clone()


class PromptLearner(nn.Module):
    """A method: its parameters, how prompts come of them, and where in the towers those go.

    A subclass has a name (``method``), a class for its options (``config_class``) and a constructor that creates the
    parameters from (config, setting) and sets those of the attributes below that differ; its ``forward`` returns
    :class:`Prompts`. ``@register_method`` makes it known (upt_fast/methods/registry.py). The model casts the
    parameters to float32, or float64 for a float64 CLIP, and everything else is the engine's.

    Args:
        config: the options.
        setting: the CLIP and the classes.
    """

    method: ClassVar[str]
    config_class: ClassVar[type[MethodConfig]]
    title: ClassVar[str] = ""  # in tables
    source: ClassVar[str] = ""  # the paper
    exact: ClassVar[str] = ""  # what it equals
    release: ClassVar[Release | None] = None  # its published code
    # (self, features: Features) -> (), what it adds to the cross-entropy of a batch; None: nothing
    loss_terms: ClassVar[Any] = None

    # of the names in the model's state dict
    state_prefix: ClassVar[str] = "prompt_learner."

    n_text: int = 0  # prompt tokens in each text
    prefix: str | None = None  # words in the text in whose place the prompts stand; None: "X"
    class_token_position: str = "end"  # of the class name among the text prompts
    text_per_class: bool = False  # each class has text prompts of its own
    templates: tuple[str, ...] | None = None  # fixed texts with {} for the class name, instead of text prompts
    visual_after_ln_pre: bool = False  # the input layer's visual prompts do not pass ln_pre
    by_image: bool = False  # forward takes normalised image features (B, e) and gives text prompts of B sets
    half_prompts: bool = False  # visual and deep text prompts are rounded to float16, as are their gradients

    def __init__(self, config: Any, setting: LearnerSetting) -> None:
        super().__init__()
        self.config = config

    def forward(self, *args: Any, **kwargs: Any) -> Prompts:
        """Prompts of one set; with ``by_image`` takes image_features (B, e) and gives text prompts of B sets."""
        raise NotImplementedError

    def named_prompts(self, image_features: Tensor | None = None) -> dict[str, Tensor]:
        """The prompts by name, as recorded vectors have them under ``mid.``.

        Args:
            image_features: (B, e) normalised; read by methods whose prompts depend on the image.
        Returns:
            "text_ctx" and "visual_ctx" of the input layers, "text_deep.i" and "visual_deep.i" of those after them.
        """
        found: dict[str, Tensor] = {}
        for tower, prompts in zip(("text", "visual"), self(), strict=True):
            if prompts is not None:
                layers = prompts.unbind(1) if self.text_per_class and tower == "text" else prompts[0]
                for i, layer in enumerate(layers):
                    found[f"{tower}_ctx" if i == 0 else f"{tower}_deep.{i - 1}"] = layer
        return found

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """:meth:`to`, also for parameters that are on the meta device or fake, which that does not take."""
        parameters = list(self.parameters())
        if composing.has_data(*parameters):
            self.to(device, dtype)
            return
        target = "meta" if device.type == "meta" or any(p.is_meta for p in parameters) else device
        for part in self.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = nn.Parameter(value.detach().to(target, dtype), value.requires_grad)

    def set_classnames(self, classnames: tuple[str, ...]) -> None:
        """Called before the classes change; a learner that cannot serve the new ones raises a ValueError."""
