"""Forward and backward of a batch whose images and classes are divided over the processes of a run.

    the learner, on every process              text and visual prompts        (one draw of its dropout, the same on all)
    own classes, own images                    their features
    one all-gather                             features of all classes (C, e) and images (B, e), as leaves
    the loss of all of them, on every process  d loss / d features
    own rows of that, through own towers       d loss / d prompts: what own classes and images contribute
    the learner's graph                        d loss / d parameters, in part
    one all-reduce                             d loss / d parameters

The towers are nearly all of a step's work, and the loss of (B, C) products next to nothing. So each process takes the
loss of the whole batch: any loss is exact, also one that is no mean over images, and so is what a method adds to it.
Gathering is differentiated without a word between the processes: each has the whole gradient of all features, of which
it needs its own rows. What the loss has of the learner directly, past the features, is the same on all processes, and
counts on the first alone.

Where texts depend on the image, each process has its own images' logits (b, C), and these are gathered. The learner
sees the features of all images, as in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upt_fast.distributed.group import Group, join
from upt_fast.engine.towers import groups
from upt_fast.prompts import Prompts
from upt_fast.steps import MicroBatches
from upt_fast.steps.micro_batches import Loss, Scale, backward_parts, cut_off, is_trained, through_learner, unscaled

if TYPE_CHECKING:
    from upt_fast.model import FastPromptedCLIP

Part = tuple[int, int]  # the first and the end of some own images


class _Batch(NamedTuple):
    images: Tensor | None  # (b, 3, H, W), own ones
    given: Tensor | None  # (b, e), their features in their place
    labels: Tensor  # (B,)
    sizes: Sequence[int]  # b of each process


class DistributedStep:
    """What ``loss_and_logits(...)[0].backward()`` does, divided over the processes of a run.

    Each process has the whole model, and of a batch the images that are its own; the class names are divided by rows.
    Loss, logits and gradients are those of the whole batch, the same bits on all processes, so that equal optimizers
    keep equal parameters. The parameters of the first process are copied to the others here.

    A learner that draws random numbers (dropout) must draw the same on all processes: seed torch's default generators
    alike on all of them, and let data be drawn from generators of its own.

    Args:
        model: on this process's device, in the same state on all.
        micro_batches: what runs at once of a process's images and classes, as for
            :meth:`FastPromptedCLIP.backward_in_parts`; None: all.
        group: the processes; None: those that torchrun or accelerate launch has started (:func:`join`).
    Raises:
        ValueError: see :func:`join`; a number of micro_batches below 1.

    Example:
        >>> model = FastUPT.from_pretrained("ViT-B-16", "openai", classnames=names, device="cuda")
        >>> step = DistributedStep(model)
        >>> for images, labels in loader:  # this process's images of each batch, as many as it has
        ...     optimizer.zero_grad()
        ...     loss, logits = step.backward(images, labels)  # of the whole batch
        ...     optimizer.step()
    """

    def __init__(
        self, model: FastPromptedCLIP, micro_batches: MicroBatches | None = None, group: Group | None = None
    ) -> None:
        self.model, self.group = model, join(model.logit_scale.device) if group is None else group
        self.parts = (MicroBatches() if micro_batches is None else micro_batches).check()
        self._share: tuple[Tensor, list[int], list[groups.ClassGroup]] | None = None
        self._compared = False
        for tensor in (*model.parameters(), *model.prompt_learner.buffers()):
            self.group.copy_first(tensor.data)

    def backward(
        self,
        images: Tensor | None,
        labels: Tensor,
        loss: Loss = F.cross_entropy,
        *,
        image_features: Tensor | None = None,
        scale: Scale | None = None,
        sizes: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add the gradients of the whole batch's loss to those of the parameters.

        Args:
            images: (b, 3, H, W) of this process, normalised with the CLIP's mean and standard deviation; the batch is
                those of all processes, in their order, and some may have none.
            labels: (b,) int64, their classes.
            loss: of logits (B, C) and labels (B,).
            image_features: (b, e) in the place of the images, where the model's ``images_are_fixed``.
            scale: what the loss passes before backward: ``scaler.scale``.
            sizes: b of each process, where that is known; labels are then (B,), those of the whole batch. It saves the
                processes a question to each other.
        Returns:
            the loss () and the logits (B, C), without gradients.
        Raises:
            ValueError: not as many labels as images, no image on any process, other prompts on another process.
            OtherProcessError: another process has ended.
        """
        if (images is None) == (image_features is None):
            which = "neither images nor image_features" if images is None else "both images and image_features"
            raise ValueError(f"{which}; wanted one of them")
        own = images if image_features is None else image_features
        assert own is not None
        batch = self._batch(own, labels, images, image_features, sizes)
        parameters = list(self.model.parameters())
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        run = self._by_image if self.model.texts_by_image else self._shared_texts
        found = run(batch, loss, unscaled if scale is None else scale)
        self._reduce(parameters, before)
        return found

    def _batch(
        self, own: Tensor, labels: Tensor, images: Tensor | None, given: Tensor | None, sizes: Sequence[int] | None
    ) -> _Batch:
        count = len(own)
        if sizes is None:
            if labels.ndim == 0 or len(labels) != count:
                raise ValueError(f"labels of shape {tuple(labels.shape)} for {count} images; wanted as many")
            each = torch.tensor([count], device=own.device)
            sizes = self.group.gather(each, [1] * self.group.size).tolist()
            labels = self.group.gather(labels, sizes)
        if len(sizes) != self.group.size or sizes[self.group.rank] != count or sum(sizes) != len(labels):
            raise ValueError(
                f"sizes={list(sizes)} for {count} images of process {self.group.rank} of {self.group.size} and "
                f"{len(labels)} labels; wanted each process's images, and labels of the whole batch"
            )
        if len(labels) == 0:
            raise ValueError("no process has an image; wanted at least 1")
        return _Batch(images, given, labels, sizes)

    def _shared_texts(self, batch: _Batch, loss: Loss, scale: Scale) -> tuple[Tensor, Tensor]:
        model, scalars = self.model, self.model.logit_scale.dtype
        made = model._prompts()
        self._compare(made)
        text, visual = cut_off(made.text), cut_off(made.visual)
        fixed = text is None and model.prompt_learner.templates is not None
        class_sizes, own = ([0] * self.group.size, []) if fixed else self._classes()
        parts = self._parts(batch, self.parts.images)

        def encode(part: Part) -> Tensor:
            return self._encode(batch, part, Prompts(visual=visual))

        def encode_classes(group: groups.ClassGroup) -> Tensor:
            return model.text_tower(model._class_prompts(text), group.packed)

        with torch.set_grad_enabled(len(own) == 1):
            class_rows = [encode_classes(group) for group in own]
        if len(own) > 1:
            model.text_tower.blocks.release()
        with torch.set_grad_enabled(len(parts) == 1):
            image_rows = [encode(part) for part in parts]
        dtype = image_rows[0].dtype if image_rows else model.vision_tower.class_row.dtype
        class_features, image_features = self._gather_both(class_rows, image_rows, class_sizes, batch.sizes)
        if fixed:
            class_features = model._class_features(None).detach().to(scalars)
        else:
            class_features = groups.in_given_order([class_features], model._classes)
        class_leaf = class_features.requires_grad_(is_trained(text))
        image_leaf = image_features.requires_grad_(is_trained(visual))
        normal = F.normalize(class_leaf.to(dtype), dim=-1)
        logits = model._logits(image_leaf.to(dtype), normal).to(scalars)
        value = loss(logits, batch.labels) + self._terms(batch, image_leaf, normal, logits)
        self._loss_backward(value, scale)
        if image_leaf.grad is not None:
            grad = image_leaf.grad[self._place(batch)]
            kept = image_rows[0] if image_rows else None
            backward_parts(parts, encode, kept, [grad[slice(*part)] for part in parts])
            _fill(visual)
        if class_leaf.grad is not None:
            packed = model._classes
            grad = torch.zeros_like(class_leaf).index_copy_(0, packed.inverse, class_leaf.grad)  # in packed order
            kept = class_rows[0] if class_rows else None
            backward_parts(own, encode_classes, kept, [grad[group.first : group.end] for group in own])
            _fill(text)
        if len(own) > 1:
            model.text_tower.blocks.release()
        through_learner([(made.text, text), (made.visual, visual)])
        return value.detach(), logits.detach()

    def _by_image(self, batch: _Batch, loss: Loss, scale: Scale) -> tuple[Tensor, Tensor]:
        model, scalars, place = self.model, self.model.logit_scale.dtype, self._place(batch)
        with torch.no_grad():  # no prompt enters the image tower
            rows = [self._encode(batch, part, Prompts()) for part in self._parts(batch, self.parts.images)]
            features = self.group.gather(self._joined(rows), batch.sizes)
            features = features.to(rows[0].dtype if rows else model.vision_tower.class_row.dtype)
        made = model.prompt_learner(features).text
        self._compare(Prompts(text=made))
        text = cut_off(made)
        assert text is not None
        count = batch.sizes[self.group.rank]
        parts = self._parts(batch, self.parts.images or model._group(max(1, count)))
        own = [text[place][slice(*part)].detach().requires_grad_(text.requires_grad) for part in parts]
        classes = groups.split(
            model._classes, self.parts.classes or len(model.classnames), model.text_tower.route.with_places
        )

        def logits_of(of: tuple[int, groups.ClassGroup]) -> Tensor:
            i, group = of
            return model._logits_of_group(own[i], features[place][slice(*parts[i])], group.packed)

        places = [(i, group) for i in range(len(parts)) for group in classes]
        with torch.set_grad_enabled(len(places) == 1):
            blocks = [logits_of(of) for of in places]
        by_images = [torch.cat(blocks[i : i + len(classes)], dim=-1) for i in range(0, len(blocks), len(classes))]
        width = len(model.classnames)
        found = self.group.gather(self._joined(by_images, width), batch.sizes)  # (B, C), in packed order
        leaf = found.requires_grad_(text.requires_grad)
        logits = model._with_bias(groups.in_given_order([leaf], model._classes, 1)).to(scalars)
        value = loss(logits, batch.labels) + self._terms(batch, features, None, logits)
        self._loss_backward(value, scale)
        if leaf.grad is not None:
            grad = leaf.grad[place]
            grads = [grad[slice(*parts[i]), group.first : group.end] for i, group in places]
            backward_parts(places, logits_of, blocks[0] if blocks else None, grads)
            text.grad = torch.zeros_like(text)
            if own:
                text.grad[place] = torch.cat([part.grad for part in own if part.grad is not None])
        through_learner([(made, text)])
        return value.detach(), logits.detach()

    def _classes(self) -> tuple[list[int], list[groups.ClassGroup]]:
        """How many classes each process has, and this one's as they run."""
        packed = self.model._classes
        if self._share is None or self._share[0] is not packed.rows:  # other classes, or elsewhere
            shares = groups.shares(packed, self.group.size)
            limit = self.parts.classes or len(self.model.classnames)
            own = groups.split(packed, limit, self.model.text_tower.route.with_places, shares[self.group.rank])
            self._share = packed.rows, [end - first for first, end in shares], own
        return self._share[1:]

    def _parts(self, batch: _Batch, limit: int | None) -> list[Part]:
        """Own images that run at once."""
        count = batch.sizes[self.group.rank]
        return groups.bounds(count, limit or count) if count else []

    def _place(self, batch: _Batch) -> slice:
        """Of own images in the batch."""
        first = sum(batch.sizes[: self.group.rank])
        return slice(first, first + batch.sizes[self.group.rank])

    def _encode(self, batch: _Batch, part: Part, prompts: Prompts) -> Tensor:
        """Normalised features of own images."""
        some = slice(*part)
        images = None if batch.images is None else batch.images[some]
        return self.model._image_features(images, None if batch.given is None else batch.given[some], prompts)

    def _joined(self, rows: list[Tensor], width: int | None = None) -> Tensor:
        """Own rows as they are gathered: one behind the other, in the dtype of the loss, without a graph."""
        scalars = self.model.logit_scale
        none = scalars.new_zeros(0, self.model.embed_dim if width is None else width)
        return torch.cat([none, *(row.detach().to(scalars.dtype) for row in rows)])

    def _gather_both(
        self, classes: list[Tensor], images: list[Tensor], class_sizes: Sequence[int], sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Features of all classes, in packed order, and of all images, in one go."""
        each = [n for pair in zip(class_sizes, sizes, strict=True) for n in pair]
        together = [c + b for c, b in zip(class_sizes, sizes, strict=True)]
        rows = self.group.gather(self._joined([*classes, *images]), together).split(each)
        return torch.cat(rows[0::2]), torch.cat(rows[1::2])

    def _terms(self, batch: _Batch, features: Tensor, texts: Tensor | None, logits: Tensor) -> Tensor | float:
        """What the method adds to the loss of the whole batch."""
        if self.model._loss_terms is None:
            return 0.0

        def fixed_images() -> Tensor:
            with torch.no_grad():
                rows = [self._encode(batch, part, Prompts()) for part in self._parts(batch, self.parts.images)]
                return self.group.gather(self._joined(rows), batch.sizes)

        return self.model._added_terms(None, batch.labels, features, texts, logits, fixed_images=fixed_images)

    def _loss_backward(self, value: Tensor, scale: Scale) -> None:
        """To the leaves, and to what the loss has of the learner directly: that is on the first process alone."""
        if not value.requires_grad:
            return
        scale(value).backward()
        if not self.group.first:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()

    def _reduce(self, parameters: list[torch.nn.Parameter], before: list[Tensor | None]) -> None:
        """Sum the gradients of all processes, and add them to those of before; the same have none on all processes."""
        found = [parameter for parameter in parameters if parameter.grad is not None]
        if found:
            flat = torch.cat([parameter.grad.flatten() for parameter in found if parameter.grad is not None])
            self.group.sum(flat)
            for parameter, grad in zip(found, flat.split([p.numel() for p in found]), strict=True):
                parameter.grad = grad.view_as(parameter)
        for parameter, grad in zip(parameters, before, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else grad + parameter.grad

    def _compare(self, prompts: Prompts) -> None:
        """In the first step: that the learner made the same on all processes."""
        if self._compared:
            return
        self._compared = True
        own = [None if p is None else float(p.detach().double().sum()) for p in prompts]
        for place, theirs in enumerate(self.group.objects(own)):
            if any((a is None) != (b is None) or (a is not None and a != b) for a, b in zip(own, theirs, strict=True)):
                raise ValueError(
                    f"process {place} made other prompts than process {self.group.rank}: seed torch's default "
                    "generators alike on all processes, and leave the model in the same mode"
                )


def _fill(prompts: Tensor | None) -> None:
    """Gradients of zero where a process has nothing that uses the prompts."""
    if prompts is not None and prompts.grad is None and prompts.requires_grad:
        prompts.grad = torch.zeros_like(prompts)
