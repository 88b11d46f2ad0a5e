"""Class features of a prompted CLIP: computed, kept while they hold, or computed anew for each image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from upt_fast.clip.frozen import TextContext
from upt_fast.clip.tokens import Tokenizer, clean_classnames, list_classnames, tokenize_classnames, tokenize_template
from upt_fast.engine.autograd import composing
from upt_fast.engine.towers import groups
from upt_fast.engine.towers.packing import PackedClasses
from upt_fast.engine.towers.prompts import Packed
from upt_fast.engine.towers.text import TextTower
from upt_fast.features.digests import tower_digest
from upt_fast.prompts import PromptLearner, Prompts

# what the texts of one group of images may need at once, where they depend on the image
TEXT_BYTES = 512 << 20


# keeps features from one process to the next: is given packs, the classes that pass the tower together, None: all, and
# what computes the features (C, e), and returns the same (upt_fast/train/texts.py)
TextSource = Callable[[Sequence[PackedClasses], int | None, Callable[[], Tensor]], Tensor]


class PromptedTexts(nn.Module):
    """What FastPromptedCLIP has of class names and their features."""

    prompt_learner: PromptLearner
    text_tower: TextTower
    packed: nn.ModuleList  # of PackedClasses, one for each template or one
    classnames: tuple[str, ...]
    tokenizer: Tokenizer | None
    text_context: TextContext
    text_batch: int | None
    encode_image: Callable[..., Tensor]
    classes_at_once: int | None = None  # of passes without a graph; a plan sets it (upt_fast/steps)
    logit_scale: Tensor  # ()
    text_stream: torch.cuda.Stream | None = None  # upt_fast/engine/graphs.py
    text_source: TextSource | None = None  # of fixed texts; siblings share it

    @property
    def texts_by_image(self) -> bool:
        """Whether class features depend on the images."""
        return self.prompt_learner.by_image

    def set_classnames(self, classnames: Iterable[str]) -> None:
        """Replace the classes; the prompts stay as they are.

        Args:
            classnames: C names, each short enough for the CLIP's context.
        Raises:
            ValueError: no names, an empty name, or one that is too long; class-specific prompts of another number of
                classes. The classes stay as they were.
        """
        learner = self.prompt_learner
        classnames = list_classnames(classnames)
        names = clean_classnames(classnames)
        learner.set_classnames(names)
        if learner.templates is not None:
            packs = self._pack_templates(learner.templates, classnames)
        else:
            # in half precision each class's prompts are rounded on their own, as are their gradients
            per_class = learner.text_per_class or (learner.half_prompts and learner.n_text > 0)
            tokens = tokenize_classnames(classnames, learner.n_text, self.text_context, self.tokenizer, learner.prefix)
            packs = [self.text_tower.pack(tokens, learner.n_text, learner.class_token_position, per_class=per_class)]
        self.packed = nn.ModuleList(packs)
        self.classnames = names
        self._forget_features()

    def _pack_templates(self, templates: Sequence[str], classnames: Sequence[str] | None = None) -> list[PackedClasses]:
        """The texts of each template packed, without prompts; of the classes of today if none are given."""
        names = self.classnames if classnames is None else classnames
        tokens = [tokenize_template(names, template, self.text_context, self.tokenizer) for template in templates]
        return [self.text_tower.pack(t, 0, "end", per_class=False) for t in tokens]

    @property
    def _classes(self) -> PackedClasses:
        """The packed class names of a method with text prompts."""
        (packed,) = self.packed
        assert isinstance(packed, PackedClasses)
        return packed

    def encode_text(self, normalize: bool = True, images: Tensor | None = None) -> Tensor:
        """Class features; in eval mode without gradients they are kept until a parameter changes.

        Args:
            normalize: whether to scale each feature to L2 norm 1.
            images: (B, 3, H, W); read by methods whose texts depend on the image.
        Returns:
            (C, e), or (B, C, e) by image.
        """
        if not self.texts_by_image:
            features = self._class_features(None)
            return F.normalize(features, dim=-1) if normalize else features.clone()  # the cache stays ours
        if images is None:
            raise ValueError(f"images=None; the class features of {self.method!r} depend on the image: pass images")
        text = self.prompt_learner(self.encode_image(images)).text
        groups = [self.text_tower.for_sets(part, self._classes) for part in text.split(self._group(len(text)))]
        features = torch.cat(groups)
        return F.normalize(features, dim=-1) if normalize else features

    def text_digest(self) -> str:
        """SHA-256 of all that the text tower computes with, beside the texts; see :meth:`vision_digest`."""
        return tower_digest(self.text_tower)

    def _forget_features(self) -> None:
        self._text_cache: tuple[list[Tensor], Tensor] | None = None  # in eval mode, of these parameters
        self._kept_features: dict[tuple[str, ...], Tensor] = {}  # of texts without prompts, by their templates

    def _encode_classes(self, prompts: Prompts | None) -> Tensor:
        """(C, e) class features, computed now."""
        text = (self.prompt_learner() if prompts is None else prompts).text
        return self._in_groups(self._class_prompts(text), self._classes)

    def _in_groups(self, text: Tensor | None, packed: PackedClasses) -> Tensor:
        """(C, e) features; without a graph no more than classes_at_once pass the tower together."""
        if self.classes_at_once is None or torch.is_grad_enabled() or composing.composes(packed.rows):
            return self.text_tower(text, packed)
        found = groups.split(packed, self.classes_at_once, self.text_tower.route.with_places)
        return groups.in_given_order([self.text_tower(text, group.packed) for group in found], packed)

    def _class_prompts(self, text: Tensor | None) -> Tensor | None:
        """The learner's text prompts as they enter the tower: rounded for each class where the learner asks for it."""
        if text is None or not self.prompt_learner.half_prompts:
            return text
        text = text.expand(len(self.classnames), -1, -1, -1)
        return torch.cat([text[:, :1], text[:, 1:].half().to(text.dtype)], dim=1)

    def _class_features(self, prompts: Prompts | None) -> Tensor:
        """(C, e) class features: fixed ones once, others from the cache in eval mode without gradients."""
        if self.prompt_learner.templates is not None:
            return self._fixed_features(self.prompt_learner.templates)
        parameters = list(self.prompt_learner.parameters())
        if self.training or torch.is_grad_enabled() or composing.autocasts(self.logit_scale.device.type):
            return self._encode_classes(prompts)
        if composing.composes(self.logit_scale, *parameters):
            return self._encode_classes(prompts)
        # compared by value: a write through .data, which leaves no trace in version counters, is seen too
        if self._text_cache is not None:
            seen, features = self._text_cache
            if len(seen) == len(parameters) and all(map(_same, seen, parameters)):
                return features
        features = self._encode_classes(prompts)
        self._text_cache = ([p.detach().clone() for p in parameters], features)
        return features

    def fixed_text_features(self, templates: Sequence[str]) -> Tensor:
        """Class features of written texts, through the CLIP as it is; of several templates the mean.

        They are computed once for a set of classes.

        Args:
            templates: texts with one {} for the class name.
        Returns:
            (C, e), L2-normalised, without gradients.
        """
        return F.normalize(self._fixed_features(tuple(templates)), dim=-1)

    def _fixed_features(self, templates: tuple[str, ...]) -> Tensor:
        """(C, e) features of fixed texts; of several templates the mean of the normalised ones."""
        if templates in self._kept_features:
            return self._kept_features[templates]
        # kept from one call to the next: plain tensors in the CLIP's own precision wherever the first call is
        device = self.logit_scale.device.type
        precision = torch.autocast(device, enabled=False) if composing.autocasts(device) else contextlib.nullcontext()
        packs: Any = self.packed if templates == self.prompt_learner.templates else self._pack_templates(templates)

        def compute() -> Tensor:
            each = [self._in_groups(None, packed) for packed in packs]
            return each[0] if len(each) == 1 else torch.stack([F.normalize(f, dim=-1) for f in each]).mean(0)

        with torch.inference_mode(False), torch.no_grad(), precision:
            if self.text_source is None or composing.composes():
                features = compute()
            else:
                features = self.text_source(packs, self.classes_at_once, compute)
        if not composing.composes():  # what a transform sees is not to be kept
            self._kept_features[templates] = features
        if self.classes_at_once is not None:
            self.text_tower.blocks.release()
        return features

    @contextlib.contextmanager
    def _beside_images(self, given: Tensor | None) -> Iterator[None]:
        """Run the text tower on a stream of its own, where a captured step asks for it.

        Autograd runs each backward on its forward's stream, waits where gradients cross and tells the allocator of
        those. What crosses in forward it must be told here: memory goes back to the stream that it came from.

        Args:
            given: the text prompts, which the learner made on the other stream.
        """
        if self.text_stream is None:
            yield
            return
        self.text_stream.wait_stream(torch.cuda.current_stream(self.logit_scale.device))
        if given is not None:
            given.record_stream(self.text_stream)
        with torch.cuda.stream(self.text_stream):
            yield

    def _join_texts(self, features: Tensor) -> None:
        """Let the stream of the images wait for the class features, which it reads from here on."""
        if self.text_stream is not None:
            images_stream = torch.cuda.current_stream(self.logit_scale.device)
            images_stream.wait_stream(self.text_stream)
            features.record_stream(images_stream)

    def _group(self, batch: int) -> int:
        """Images whose texts run at once."""
        if self.text_batch is not None:
            return self.text_batch
        grad = torch.is_grad_enabled() and any(p.requires_grad for p in self.prompt_learner.parameters())
        fitting = max(1, TEXT_BYTES // sum(self.text_tower.need(self._classes, backward=grad)))
        groups = -(-batch // fitting)
        return max(1, -(-batch // max(1, groups)))  # of equal size

    def _logits_by_image(self, image_features: Tensor) -> Tensor:
        """(B, C) logits of normalised image features (B, e), each over class features of its own."""
        text = self.prompt_learner(image_features).text
        group = self._group(len(text))
        if len(text) <= group:
            return self._logits_of_group(text, image_features)
        again = torch.is_grad_enabled() and text.requires_grad and not composing.composes(text)
        return torch.cat(
            [
                checkpoint(self._logits_of_group, *part, use_reentrant=False, preserve_rng_state=False)
                if again
                else self._logits_of_group(*part)
                for part in zip(text.split(group), image_features.split(group), strict=True)
            ]
        )

    def _logits_of_group(self, text: Tensor, image_features: Tensor, packed: Packed | None = None) -> Tensor:
        found = self.text_tower.for_sets(text, self._classes if packed is None else packed)
        classes = F.normalize(found, dim=-1)  # (B, C, e)
        return torch.matmul(classes, (self.logit_scale.exp() * image_features)[..., None])[..., 0]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
