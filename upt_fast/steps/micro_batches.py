"""A training step in parts: micro-batches of images and groups of classes, with the gradients of the whole step.

Only the towers run in parts. Between them stand leaves, tensors at which a graph is cut:

    the learner, once, with its graph       text and visual prompts       (one draw of its dropout)
    groups of classes, without a graph      class features (C, e)
    images                                  image features (B, e)
    the loss of all of them                 d loss / d features
    images, then groups of classes, anew    d loss / d prompts, summed over the parts
    the learner's graph, once               d loss / d parameters

So any loss is exact, and what a method adds to it is there once and sees the whole batch. What runs anew costs a
forward pass. Class names that are one group keep their graph instead. Images need none anew where the loss is a mean
over them, as cross-entropy is: each micro-batch goes forward and backward, and adds to the class features' gradients.

Where texts depend on the image a part is some images and some classes: their logits are the leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upt_fast.common.checks import require_int
from upt_fast.engine.towers import groups
from upt_fast.prompts import Prompts

if TYPE_CHECKING:
    from upt_fast.model import FastPromptedCLIP

Loss = Callable[[Tensor, Tensor], Tensor]  # of logits (B, C) and labels (B,)
Scale = Callable[[Tensor], Tensor]  # of the loss
IGNORED = -100  # the label that F.cross_entropy leaves out


class MicroBatches(NamedTuple):
    """What runs at once in a step.

    Args:
        images: images; None: all of the batch.
        classes: classes; None: all.
    """

    images: int | None = None
    classes: int | None = None

    def check(self) -> MicroBatches:
        """The same; a ValueError where one of them is no number of at least 1."""
        for name, value in self._asdict().items():
            if value is not None:
                require_int(f"micro_batches.{name}", value, 1)
        return self


class StepInParts:
    """Forward and backward of a batch, in parts; see :meth:`FastPromptedCLIP.backward_in_parts`."""

    def __init__(self, model: FastPromptedCLIP, parts: MicroBatches) -> None:
        self.model, self.parts = model, parts.check()
        self._groups: tuple[Tensor, list[groups.ClassGroup]] | None = None

    def __call__(
        self, images: Tensor, labels: Tensor, loss: Loss = F.cross_entropy, scale: Scale | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add the loss's gradients to those of the parameters.

        Args:
            images: (B, 3, H, W), or their (B, e) features where no prompt changes them.
            labels: (B,) int64.
            loss: of logits (B, C) and labels (B,).
            scale: what the loss passes before backward, as GradScaler.scale.
        Returns:
            the loss () and the logits (B, C), without gradients.
        """
        run = self._by_image if self.model.texts_by_image else self._shared_texts
        return run(images, labels, loss, unscaled if scale is None else scale)

    def _shared_texts(self, images: Tensor, labels: Tensor, loss: Loss, scale: Scale) -> tuple[Tensor, Tensor]:
        model, scalars = self.model, self.model.logit_scale.dtype
        made = model._prompts()
        text, visual = cut_off(made.text), cut_off(made.visual)
        texts = _Texts(self, text)
        batch = groups.bounds(len(images), self.parts.images or len(images))

        def encode(part: tuple[int, int]) -> Tensor:
            return _features(model, images[slice(*part)], Prompts(visual=visual))

        def logits_of(features: Tensor) -> Tensor:
            return model._logits(features, F.normalize(texts.leaf.to(features.dtype), dim=-1)).to(scalars)

        summed = _summed(loss, labels)
        if summed is not None and model._loss_terms is None:
            parts = []
            for part in batch:
                logits = logits_of(encode(part))
                value = summed(logits, labels[slice(*part)])
                scale(value).backward()
                parts.append((value.detach(), logits.detach()))
                del logits, value  # and with them the graph
            total, found = torch.stack([value for value, _ in parts]).sum(), torch.cat([x for _, x in parts])
        else:
            with torch.set_grad_enabled(len(batch) == 1):
                features = torch.cat([encode(part) for part in batch])
            leaf = features.detach().to(scalars).requires_grad_(is_trained(visual))
            logits = logits_of(leaf.to(features.dtype))
            value = loss(logits, labels)
            if model._loss_terms is not None:
                normal = F.normalize(texts.leaf.to(features.dtype), dim=-1)
                value = value + self._added_terms(images, labels, leaf, normal, logits)
            scale(value).backward()
            total, found = value.detach(), logits.detach()
            if leaf.grad is not None:
                backward_parts(batch, encode, features, [leaf.grad[slice(*part)] for part in batch])
            del features, logits, value
        if len(texts.groups) > 1:
            model.vision_tower.blocks.release()
        texts.backward()
        through_learner([(made.text, text), (made.visual, visual)])
        return total, found

    def _by_image(self, images: Tensor, labels: Tensor, loss: Loss, scale: Scale) -> tuple[Tensor, Tensor]:
        model, scalars = self.model, self.model.logit_scale.dtype
        batch = groups.bounds(len(images), self.parts.images or len(images))
        with torch.no_grad():  # no prompt enters the image tower
            features = torch.cat([_features(model, images[slice(*part)], Prompts()) for part in batch])
        if len(batch) > 1 or self.parts.classes is not None:
            model.vision_tower.blocks.release()
        made = model.prompt_learner(features).text
        assert made is not None
        text = cut_off(made)
        assert text is not None
        own = [text[slice(*part)].detach().requires_grad_(text.requires_grad) for part in batch]
        classes = self.class_groups()

        def logits_of(place: tuple[int, groups.ClassGroup]) -> Tensor:
            i, group = place
            return model._logits_of_group(own[i], features[slice(*batch[i])], group.packed)

        def ordered(rows: list[Tensor]) -> Tensor:
            return model._with_bias(groups.in_given_order(rows, model._classes, 1)).to(scalars)

        summed = _summed(loss, labels)
        if summed is not None and model._loss_terms is None and len(classes) == 1:
            parts = []
            for i, part in enumerate(batch):
                logits = ordered([logits_of((i, classes[0]))])
                value = summed(logits, labels[slice(*part)])
                scale(value).backward()
                parts.append((value.detach(), logits.detach()))
                del logits, value
            total, found = torch.stack([value for value, _ in parts]).sum(), torch.cat([x for _, x in parts])
        else:
            places = [(i, group) for i in range(len(batch)) for group in classes]
            with torch.set_grad_enabled(len(places) == 1):
                blocks = [logits_of(place) for place in places]
            by_images = [torch.cat(blocks[i : i + len(classes)], dim=-1) for i in range(0, len(blocks), len(classes))]
            leaf = torch.cat(by_images).detach().to(scalars).requires_grad_()
            logits = ordered([leaf])
            value = loss(logits, labels)
            if model._loss_terms is not None:
                value = value + self._added_terms(images, labels, features, None, logits)
            scale(value).backward()
            assert leaf.grad is not None
            grads = [leaf.grad[slice(*batch[i]), group.first : group.end] for i, group in places]
            backward_parts(places, logits_of, blocks[0], grads)
            total, found = value.detach(), logits.detach()
        if text.requires_grad:
            text.grad = torch.cat([part.grad for part in own if part.grad is not None])
        through_learner([(made, text)])
        return total, found

    def _added_terms(
        self, images: Tensor, labels: Tensor, features: Tensor, texts: Tensor | None, logits: Tensor
    ) -> Tensor:
        """What the method adds to the loss; see FastPromptedCLIP._added_terms."""
        given = (None, images) if images.ndim == 2 else (images, None)
        of = labels, features, texts, logits, self.parts.images
        return self.model._added_terms(given[0], *of, image_features=given[1])

    def class_groups(self) -> list[groups.ClassGroup]:
        """The model's classes as they run."""
        packed, limit = self.model._classes, self.parts.classes
        if self._groups is None or self._groups[0] is not packed.rows:  # other classes, or elsewhere
            size = packed.layout.num_classes
            found = groups.split(packed, min(limit or size, size), self.model.text_tower.route.with_places)
            self._groups = packed.rows, found
        return self._groups[1]


class _Texts:
    """Class features as a leaf, and their way back to the text prompts."""

    def __init__(self, step: StepInParts, text: Tensor | None) -> None:
        model, scalars = step.model, step.model.logit_scale.dtype
        self.model, self.text, self.groups = model, text, []
        self.kept: Tensor | None = None
        if text is None and model.prompt_learner.templates is not None:
            self.leaf = model._class_features(None).detach().to(scalars)
            model.text_tower.blocks.release()
            return
        self.groups = step.class_groups()
        whole = len(self.groups) == 1
        with torch.set_grad_enabled(whole):
            features = [self._encode(group) for group in self.groups]
        if whole:
            self.kept = features[0]
        else:
            model.text_tower.blocks.release()
        self.leaf = groups.in_given_order(features, model._classes).detach().to(scalars)
        self.leaf.requires_grad_(is_trained(text))

    def _encode(self, group: groups.ClassGroup) -> Tensor:
        return self.model.text_tower(self.model._class_prompts(self.text), group.packed)

    def backward(self) -> None:
        """From the leaf's gradient to that of the prompts, group by group."""
        if self.leaf.grad is None:
            return
        packed = self.model._classes
        grad = torch.zeros_like(self.leaf).index_copy_(0, packed.inverse, self.leaf.grad)  # in packed order
        grads = [grad[group.first : group.end] for group in self.groups]
        backward_parts(self.groups, self._encode, self.kept, grads)
        if len(self.groups) > 1:
            self.model.text_tower.blocks.release()


def _features(model: FastPromptedCLIP, images: Tensor, prompts: Prompts) -> Tensor:
    """Normalised features (B, e) of images, or of their features."""
    if images.ndim == 2:
        return model._image_features(None, images, prompts)
    return model._encode_image(images, prompts)


def backward_parts(places: list, run: Callable[..., Tensor], kept: Tensor | None, grads: list[Tensor]) -> None:
    """Backward of each part: what there is of one is kept, those of several run anew."""
    for place, grad in zip(places, grads, strict=True):
        with torch.enable_grad():
            out = kept if len(places) == 1 and kept is not None else run(place)
        if out.requires_grad:
            out.backward(grad.to(out.dtype))


def unscaled(loss: Tensor) -> Tensor:
    return loss


def is_trained(prompts: Tensor | None) -> bool:
    return prompts is not None and prompts.requires_grad


def cut_off(prompts: Tensor | None) -> Tensor | None:
    """The same prompts, cut from the learner's graph."""
    return None if prompts is None else prompts.detach().requires_grad_(prompts.requires_grad)


def through_learner(made: list[tuple[Tensor | None, Tensor | None]]) -> None:
    """Backward through the learner: what it made, each with its leaf, whose gradient is there."""
    found = [(out, leaf.grad) for out, leaf in made if out is not None and leaf is not None and leaf.grad is not None]
    if found:
        outs, grads = zip(*found, strict=True)
        torch.autograd.backward(outs, grads)


def _summed(loss: Loss, labels: Tensor) -> Loss | None:
    """A loss that is a mean over the images, as a sum over some of them; None where that is not known of it."""
    known = isinstance(loss, functools.partial) and not loss.args and set(loss.keywords) <= {"label_smoothing"}
    function = loss.func if isinstance(loss, functools.partial) and known else loss
    if function is not F.cross_entropy or labels.ndim != 1:
        return None
    options = loss.keywords if isinstance(loss, functools.partial) else {}
    count = (labels != IGNORED).sum()

    def summed(logits: Tensor, some: Tensor) -> Tensor:
        return F.cross_entropy(logits, some, reduction="sum", **options) / count

    return summed
