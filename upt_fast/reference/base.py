"""What all methods share: the frozen towers with prompts in them, and the logits. Plain PyTorch, to be read.

Every class runs as a full text sequence, prompts are inserted with ``torch.cat``, and the blocks are open_clip's own.
A method is a subclass: which prompts it learns, and where they go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.clip.frozen import FrozenCLIP
from upt_fast.clip.open_clip import frozen_clip
from upt_fast.clip.tokens import (
    ClassTokens,
    Tokenizer,
    clean_classnames,
    list_classnames,
    tokenize_classnames,
    tokenize_words,
)
from upt_fast.common.checks import require_choice
from upt_fast.methods.options import MethodConfig

if TYPE_CHECKING:
    from typing import Self


class Prompts(NamedTuple):
    """Prompts of both towers; entry i enters layer i, and after the last entry the rows propagate. Empty: none."""

    text: Sequence[Tensor] = ()  # each (n_text, d), or (C, n_text, d) with prompts of each class's own
    visual: Sequence[Tensor] = ()  # each (n_visual, w)


TWINS: dict[str, type[ReferencePromptedCLIP]] = {}  # every method's plain form, by its name


class ReferencePromptedCLIP(nn.Module):
    """A frozen CLIP prompted by one of the published methods, plain: logits of images over class names.

    ``ReferencePromptedCLIP(..., method="coop")`` builds that method's class; a subclass that has a ``method`` of its
    own is known by it. Only prompts and their networks are parameters; their names in the state dict are those of the
    released code.

    Args:
        clip_model: open_clip ``CLIP`` or ``CustomTextCLIP`` with a ViT; frozen and put in eval mode in place.
        classnames: C class names; underscores become spaces.
        method: a name of TWINS, which has all of :func:`upt_fast.list_methods` that this package brings.
        tokenizer: the tokenizer of clip_model; None: CLIP's byte-pair tokenizer.
        config: all options at once, instead of the keywords.
        options: the fields of the method's config (upt_fast/methods).
    Raises:
        ValueError: unknown method, unsupported model, bad option or class name.
    """

    method: ClassVar[str]
    config_class: ClassVar[type[MethodConfig]]
    config: Any

    # what a method may set
    n_text: int = 0  # prompt tokens in each text
    prefix: str | None = None  # words in the text that prompts replace; None: "X"
    class_token_position: str = "end"  # of the class name among the text prompts
    visual_at_end: bool = False  # visual prompts stand behind the patches instead of after the class token
    visual_after_ln_pre: bool = False  # the input layer's visual prompts do not pass ln_pre
    half_prompts: bool = False  # visual and deep text prompts are rounded to float16, as are their gradients

    clip_model: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "method" in vars(cls):
            TWINS[cls.method] = cls

    def __new__(cls, *args: Any, method: str = "upt", **options: Any) -> Self:
        if cls is not ReferencePromptedCLIP:
            return super().__new__(cls)
        require_choice("method", method, tuple(TWINS))
        return super().__new__(TWINS[method])  # type: ignore[return-value]

    def __init__(
        self,
        clip_model: nn.Module,
        classnames: Iterable[str],
        *,
        method: str | None = None,
        tokenizer: Tokenizer | None = None,
        config: MethodConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if method not in (None, self.method):
            raise ValueError(f"method={method!r}; {type(self).__name__} is {self.method!r}")
        if config is not None and options:
            raise ValueError(f"config and {', '.join(options)} given; wanted one or the other")
        if config is not None and not isinstance(config, self.config_class):
            raise ValueError(
                f"config is {type(config).__name__}; method {self.method!r} wants {self.config_class.__name__}"
            )
        classnames = list_classnames(classnames)
        frozen = frozen_clip(clip_model)
        # out of state_dict() and parameters(): only the learner is trained and saved
        object.__setattr__(self, "clip_model", clip_model.eval().requires_grad_(False))
        self.tokenizer, self.text_context = tokenizer, frozen.text.context
        self.config = config if config is not None else self.config_class.from_options(options)
        self.build(frozen, clean_classnames(classnames))
        dtype = torch.float64 if frozen.dtype == torch.float64 else torch.float32
        super()._apply(lambda t: t.to(frozen.device, dtype))  # not the CLIP
        self.set_classnames(classnames)

    def build(self, frozen: FrozenCLIP, classnames: tuple[str, ...]) -> None:
        """Create the parameters, and set what differs from the values above."""
        raise NotImplementedError

    def tower_prompts(self) -> Prompts:
        """The prompts of both towers."""
        return Prompts()

    def prompts(self, images: Tensor | None = None) -> dict[str, Tensor]:
        """The prompts by name, as recorded vectors have them under ``mid.``; images are read by CoCoOp only.

        Returns:
            "text_ctx" (n_text, d) and "visual_ctx" (n_visual, w) of the input layers, and of the layers after them
            "text_deep.i" and "visual_deep.i"; some methods have others.
        """
        found: dict[str, Tensor] = {}
        for tower, layers in zip(("text", "visual"), self.tower_prompts(), strict=True):
            for i, layer in enumerate(layers):
                found[f"{tower}_ctx" if i == 0 else f"{tower}_deep.{i - 1}"] = layer
        return found

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        self.clip_model._apply(fn)
        return super()._apply(fn, recurse)

    @property
    def text_model(self) -> Any:
        return getattr(self.clip_model, "text", self.clip_model)

    def set_classnames(self, classnames: Iterable[str]) -> None:
        """Replace the classes; raises ValueError on an empty name or one that does not fit the context."""
        classnames = list_classnames(classnames)
        self.tokens = tokenize_classnames(classnames, self.n_text, self.text_context, self.tokenizer, self.prefix)
        self.classnames = clean_classnames(classnames)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C) logits of images (B, 3, H, W)."""
        return self.logits(*self.features(images))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised features of images (B, 3, H, W) and classes: (B, e), and (C, e) or, by image, (B, C, e)."""
        prompts = self.tower_prompts()
        return self._encode_image(images, prompts.visual), self._encode_text(prompts.text)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """(): mean cross-entropy of the logits of images (B, 3, H, W), plus what the method adds to it."""
        return self.loss_and_logits(images, labels)[0]

    def loss_and_logits(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`loss`, and the logits (B, C)."""
        image_features, text_features = self.features(images)
        logits = self.logits(image_features, text_features)
        loss = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)
        return loss + self.loss_terms(image_features, text_features), logits

    def loss_terms(self, image_features: Tensor, text_features: Tensor) -> Tensor | float:
        """What the method adds to the cross-entropy, of :meth:`features`."""
        return 0.0

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, e), and (C, e) or, by image, (B, C, e)."""
        scaled = self.clip_model.logit_scale.exp() * image_features
        if text_features.ndim == 2:
            logits = scaled @ text_features.t()
        else:
            logits = (scaled[:, None] @ text_features.transpose(1, 2))[:, 0]
        return logits if self.clip_model.logit_bias is None else logits + self.clip_model.logit_bias

    def encode_text(self, normalize: bool = True, images: Tensor | None = None) -> Tensor:
        """(C, e) features of the classes; images are read by methods whose texts depend on them."""
        return self._encode_text(self.tower_prompts().text, normalize)

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """(B, e) features of images (B, 3, H, W)."""
        return self._encode_image(images, self.tower_prompts().visual, normalize)

    # the text tower

    def initial_context(self, frozen: FrozenCLIP) -> Tensor:
        """(n_text, d): embeddings of the prefix's first tokens, or N(0, 0.02) without one."""
        if self.prefix is None:
            return torch.empty(self.n_text, frozen.text.width).normal_(std=0.02)
        ids = tokenize_words(self.prefix, self.n_text, self.text_context, self.tokenizer)
        return frozen.text.token_embedding[ids.to(frozen.text.token_embedding.device)]

    def _prompts_before_name(self) -> int:
        return {"end": self.n_text, "middle": self.n_text // 2, "front": 0}[self.class_token_position]

    def prompt_rows(self) -> Tensor:
        """(C, n_text) rows of each class's sequence in which its prompts stand."""
        lengths = torch.tensor(self.tokens.name_lengths)[:, None]  # (C, 1)
        j = torch.arange(self.n_text)[None]  # (1, n_text)
        return 1 + j + torch.where(j < self._prompts_before_name(), 0, lengths)

    def embed_classes(self) -> Tensor:
        """(C, T, d) token embeddings with zeros where prompts go, without positions."""
        n, before = self.n_text, self._prompts_before_name()
        ids = self.tokens.ids.to(self.text_model.token_embedding.weight.device)
        sequences = []
        for row, length in zip(ids, self.tokens.name_lengths, strict=True):
            sos, rest = (self.text_model.token_embedding(part) for part in (row[:1], row[1 + n :]))
            first, second = rest.new_zeros(before, rest.shape[1]), rest.new_zeros(n - before, rest.shape[1])
            sequences.append(torch.cat([sos, first, rest[:length], second, rest[length:]]))
        return torch.stack(sequences)

    def insert_text(self, x: Tensor, prompts: Tensor, rows: Tensor, half: bool = False) -> Tensor:
        """Replace the prompt rows of x (C, T, d) by prompts (n_text, d) or (C, n_text, d)."""
        prompts = _repeat(prompts, x, half)
        if self.class_token_position == "end":
            return torch.cat([x[:, :1], prompts, x[:, 1 + prompts.shape[1] :]], dim=1)
        return x.scatter(1, rows[:, :, None].expand(-1, -1, x.shape[2]), prompts)

    def _encode_text(self, prompts: Sequence[Tensor], normalize: bool = True) -> Tensor:
        with torch.no_grad():
            embedded = self.embed_classes()
        features = self.run_text_tower(embedded, self.tokens.pooled, prompts, self.prompt_rows().to(embedded.device))
        return F.normalize(features, dim=-1) if normalize else features

    def run_text_tower(
        self, embedded: Tensor, pooled: Sequence[int], prompts: Sequence[Tensor], rows: Tensor
    ) -> Tensor:
        """Text features, before normalisation.

        Args:
            embedded: (C, T, d) token embeddings without positions.
            pooled: the row of each class that becomes its feature.
            prompts: of layers 0, 1, ...
            rows: (C, n_text) where they stand.
        Returns:
            (C, e)
        """
        model = self.text_model
        x = embedded.to(model.transformer.get_cast_dtype())
        length = x.shape[1]
        if prompts:
            x = self.insert_text(x, prompts[0], rows)
        x = x + model.positional_embedding[:length].to(x.dtype)
        for i, block in enumerate(model.transformer.resblocks):
            if 1 <= i < len(prompts):
                x = self.insert_text(x, prompts[i], rows, self.half_prompts)
            x = block(x, attn_mask=model.attn_mask[:length, :length])
        x = model.ln_final(x)
        x = x[torch.arange(len(x), device=x.device), torch.tensor(pooled, device=x.device)]
        if isinstance(model.text_projection, nn.Linear):
            return model.text_projection(x)
        return x if model.text_projection is None else x @ model.text_projection

    def encode_fixed(self, texts: Sequence[ClassTokens]) -> Tensor:
        """(C, e) features of fixed texts of the classes; of several texts each the mean of the normalised ones."""
        embedding = self.text_model.token_embedding
        features = []
        # kept from one call to the next: computed as plain tensors in the CLIP's own precision wherever the first is
        device = embedding.weight.device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            for tokens in texts:
                ids = tokens.ids.to(embedding.weight.device)
                features.append(self.run_text_tower(embedding(ids), tokens.pooled, (), ids[:, :0]))
            if len(features) == 1:
                return features[0]
            return torch.stack([F.normalize(f, dim=-1) for f in features]).mean(0)

    # the image tower

    def insert_visual(self, x: Tensor, prompts: Tensor, replaced: int) -> Tensor:
        """Put prompts (n_visual, w) into x (B, N, w), in the place of as many as are replaced."""
        prompts = _repeat(prompts, x, self.half_prompts)
        if self.visual_at_end:
            return torch.cat([x[:, : x.shape[1] - replaced], prompts], dim=1)
        return torch.cat([x[:, :1], prompts, x[:, 1 + replaced :]], dim=1)

    def _encode_image(self, images: Tensor, prompts: Sequence[Tensor] = (), normalize: bool = True) -> Tensor:
        features = self.run_image_tower(images, prompts)
        return F.normalize(features, dim=-1) if normalize else features

    def run_image_tower(self, images: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
        """Image features, before normalisation.

        Args:
            images: (B, 3, H, W).
            prompts: of layers 0, 1, ...; they have no position.
        Returns:
            (B, e)
        """
        visual = self.clip_model.visual
        n = prompts[0].shape[0] if prompts else 0
        x = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)  # (B, G, w)
        cls = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1) + visual.positional_embedding.to(x.dtype)  # (B, 1 + G, w)
        if prompts and not self.visual_after_ln_pre:
            x = self.insert_visual(x, prompts[0], replaced=0)
        x = visual.ln_pre(x)
        if prompts and self.visual_after_ln_pre:
            x = self.insert_visual(x, prompts[0], replaced=0)
        for i, block in enumerate(visual.transformer.resblocks):
            if 1 <= i < len(prompts):
                x = self.insert_visual(x, prompts[i], replaced=n)
            x = block(x)
        # pooling must not see the prompts
        x = x[:, : x.shape[1] - n] if self.visual_at_end else torch.cat([x[:, :1], x[:, 1 + n :]], dim=1)
        x, _ = visual._pool(x)
        return x if visual.proj is None else x @ visual.proj


def _repeat(prompts: Tensor, x: Tensor, half: bool) -> Tensor:
    """Prompts (n, D), or (B, n, D), for each sequence of x (B, N, D), in its dtype; through float16 if half."""
    prompts = prompts.expand(len(x), -1, -1)
    # rounded after repeating, as released: each sequence's gradient is rounded before they are summed
    return prompts.half().to(x.dtype) if half else prompts.to(x.dtype)
