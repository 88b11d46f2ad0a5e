"""Several prompted models on the same frozen towers, whose batches run through them together.

A task is a model: a learner, its classes, its batch of images. Images go through the image tower with a prompt set per
task, class names of all tasks through the text tower with a set per task; logits are formed, and losses taken, over
each task's own classes. Nothing in a tower mixes the rows of two sequences or the gradients of two sets, so that each
task's loss has the gradients that it would have alone; where one is not finite, the others are what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.engine.memory import peak
from upt_fast.engine.towers.packing import PackedClasses
from upt_fast.model import FastPromptedCLIP
from upt_fast.prompts import Prompts
from upt_fast.steps.planning import Step

Loss = Callable[[Tensor, Tensor], Tensor]  # of logits (B, C) and labels (B,)


class MultiTask(nn.Module):
    """Several models made by :meth:`FastPromptedCLIP.sibling` of one another, trained in one pass through the towers.

    Tasks whose prompts have one shape share a call of a tower; other shapes are further calls. Each model remains what
    it is: evaluated, saved and given to its own optimizer on its own.

    Args:
        models: the tasks.
    Raises:
        ValueError: no model, one that comes twice, or one on other towers.

    Example:
        >>> first = FastUPT.from_pretrained("ViT-B-16", "openai", classnames=["cat", "dog"])
        >>> tasks = MultiTask([first, first.sibling(["car", "train", "ship"]), first.sibling(["oak", "elm"])])
        >>> losses = [loss for loss, logits in tasks.losses([(images, labels)] * 3)]  # a batch of each task
        >>> sum(losses).backward()
    """

    def __init__(self, models: Iterable[FastPromptedCLIP]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        tasks = self.tasks
        if not tasks or len({id(model) for model in tasks}) < len(tasks):
            raise ValueError(f"{len(tasks)} models; wanted at least one, and none twice")
        first = tasks[0]
        for i, model in enumerate(tasks):
            if model.text_tower is not first.text_tower or model.vision_tower is not first.vision_tower:
                raise ValueError(f"model {i} is not on the towers of model 0; wanted its sibling: model.sibling(...)")
        self._packs: dict[tuple[int, ...], tuple[list[PackedClasses], PackedClasses]] = {}

    @property
    def tasks(self) -> list[FastPromptedCLIP]:
        """The models."""
        return list(self.models)  # type: ignore[arg-type]

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Logits (B_i, C_i) of each task's images (B_i, 3, H, W)."""
        prompts = [model._prompts() for model in self.tasks]
        texts, features = self._texts(prompts), self._images(images, prompts)
        return [model._logits(f, t) for model, f, t in zip(self.tasks, features, texts, strict=True)]

    def losses(
        self,
        batches: Sequence[tuple[Tensor, Tensor]],
        losses: Sequence[Loss] | None = None,
        learners: Callable[[int], Any] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """What each task's step minimises, with the method's own terms, and its logits.

        Args:
            batches: of each task (B_i, 3, H, W) images, or their (B_i, e) features where its
                ``images_are_fixed``, and (B_i,) labels.
            losses: of each task; None: mean cross-entropy.
            learners: gives a context in which task i's learner is run, for its random numbers; None: none.
        Returns:
            of each task the loss () and the logits (B_i, C_i), float32 (float64 in a float64 CLIP).
        Raises:
            ValueError: not one batch for each task.
        """
        tasks = self.tasks
        if len(batches) != len(tasks):
            raise ValueError(f"{len(batches)} batches for {len(tasks)} tasks; wanted one of each")
        prompts = []
        for i, model in enumerate(tasks):
            if learners is None:
                prompts.append(model._prompts())
            else:
                with learners(i):
                    prompts.append(model._prompts())
        texts = self._texts(prompts)
        features = self._images([images for images, _ in batches], prompts)
        found = []
        for i, (model, (images, labels)) in enumerate(zip(tasks, batches, strict=True)):
            logits = model._logits(features[i], texts[i]).to(model.logit_scale.dtype)
            loss = (F.cross_entropy if losses is None else losses[i])(logits, labels)
            if model._loss_terms is not None:
                given = (images, None) if images.ndim > 2 else (None, images)
                terms = model._added_terms(given[0], labels, features[i], texts[i], logits, image_features=given[1])
                loss = loss + terms
            found.append((loss, logits))
        return found

    def predict_peak_memory(self, batch_sizes: Sequence[int]) -> int:
        """Bytes that a step of so many images of each task needs at its peak; see
        :meth:`FastPromptedCLIP.predict_peak_memory`."""
        needs = [Step(model, size).needs() for model, size in zip(self.tasks, batch_sizes, strict=True)]
        return peak(*[need for task in needs for need in task])

    def _texts(self, prompts: Sequence[Prompts]) -> list[Tensor | None]:
        """Normalised class features (C_i, e) of each task; None where they depend on the image."""
        found: list[Tensor | None] = [None] * len(prompts)
        calls: dict[tuple[Any, ...], list[int]] = {}
        for i, model in enumerate(self.tasks):
            learner = model.prompt_learner
            if learner.by_image:
                continue
            if learner.templates is not None:
                found[i] = F.normalize(model._class_features(prompts[i]), dim=-1)
                continue
            packed, text = model._classes, prompts[i].text
            depth = None if text is None else text.shape[1]
            key = depth, packed.n_text, packed.class_token_position, packed.per_class
            calls.setdefault(key, []).append(i)
        for of_call in calls.values():
            sets = [s for s in (self.tasks[i]._class_prompts(prompts[i].text) for i in of_call) if s is not None]
            joined = torch.cat(sets) if sets else None
            features = F.normalize(self.tasks[0].text_tower(joined, self._joined(of_call)), dim=-1)
            parts = features.split([len(self.tasks[i].classnames) for i in of_call])
            for i, part in zip(of_call, parts, strict=True):
                found[i] = part
        return found

    def _joined(self, of_call: Sequence[int]) -> PackedClasses:
        """The classes of some tasks in one pack, made anew where one has other classes than before."""
        packs = [self.tasks[i]._classes for i in of_call]
        if len(packs) == 1:
            return packs[0]
        key = tuple(of_call)
        known = self._packs.get(key)
        if known is None or any(a is not b for a, b in zip(known[0], packs, strict=True)):
            self._packs[key] = known = packs, self.tasks[0].text_tower.join(packs)
        return known[1]

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self._packs.clear()
        return super()._apply(fn, recurse)

    def _images(self, images: Sequence[Tensor], prompts: Sequence[Prompts]) -> list[Tensor]:
        """Normalised features (B_i, e) of each task's images."""
        calls: dict[tuple[Any, ...] | None, list[int]] = {}
        found: list[Tensor] = [images[0]] * len(images)
        for i, model in enumerate(self.tasks):
            if images[i].ndim == 2:
                found[i] = model._image_features(None, images[i], prompts[i])
                continue
            visual = prompts[i].visual
            after = model.prompt_learner.visual_after_ln_pre
            key = None if visual is None else (visual.shape[1:], after, model.prompt_learner.half_prompts)
            calls.setdefault(key, []).append(i)
        for key, of_call in calls.items():
            together = torch.cat([images[i] for i in of_call])
            visual, set_index = (None, None) if key is None else self._sets(of_call, images, prompts)
            after = self.tasks[of_call[0]].prompt_learner.visual_after_ln_pre
            features = F.normalize(self.tasks[0].vision_tower(together, visual, set_index, after), dim=-1)
            for i, part in zip(of_call, features.split([len(images[i]) for i in of_call]), strict=True):
                found[i] = part
        return found

    def _sets(
        self, of_call: Sequence[int], images: Sequence[Tensor], prompts: Sequence[Prompts]
    ) -> tuple[Tensor, Tensor | None]:
        """Visual prompts of all sets of some tasks, and each image's set."""
        sets, index, count = [], [], 0
        for i in of_call:
            visual, own = self.tasks[i]._visual_prompts(prompts[i], len(images[i]))
            assert visual is not None
            own = torch.zeros(len(images[i]), dtype=torch.int64, device=visual.device) if own is None else own
            sets.append(visual)
            index.append(own + count)
            count += len(visual)
        return torch.cat(sets), None if count == 1 else torch.cat(index)
