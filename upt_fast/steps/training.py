"""What FastPromptedCLIP has of steps in parts, and of the memory that they need by formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.engine.memory import peak
from upt_fast.engine.towers import TextTower, VisionTower
from upt_fast.prompts import PromptLearner
from upt_fast.steps.micro_batches import MicroBatches, StepInParts
from upt_fast.steps.planning import MemoryPlan, Step, plan

if TYPE_CHECKING:
    from upt_fast.model import FastPromptedCLIP


class StepsByPlan(nn.Module):
    """Of FastPromptedCLIP."""

    prompt_learner: PromptLearner
    text_tower: TextTower
    vision_tower: VisionTower
    text_batch: int | None
    classes_at_once: int | None
    _parts: StepInParts | None = None

    def backward_in_parts(
        self,
        images: Tensor,
        labels: Tensor,
        micro_batches: MicroBatches,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What ``loss_and_logits(...)[0].backward()`` does, with the memory of a part of it: the same gradients.

        Args:
            images: (B, 3, H, W), normalised with the CLIP's mean and standard deviation, or their (B, e) features where
                ``images_are_fixed``.
            labels: (B,) int64, indices of the class names.
            micro_batches: images and classes that run at once (micro_batches.py).
            loss: of logits (B, C) and labels (B,). Cross-entropy, also with label_smoothing by functools.partial, costs
                least: any other loss computes the images' features twice where there are several micro-batches.
            scale: what the loss passes before backward: ``scaler.scale``.
        Returns:
            the loss () and the logits (B, C), without gradients; those of the parameters were added to their ``grad``.
        """
        model = cast("FastPromptedCLIP", self)
        model._settle(*((None, images) if images.ndim == 2 else (images, None)))
        if self._parts is None or self._parts.parts != micro_batches:
            self._parts = StepInParts(model, micro_batches)
        return self._parts(images, labels, loss, scale)

    def predict_peak_memory(self, batch_size: int, from_features: bool = False) -> int:
        """Bytes that a training step is going to need at its peak, beside the weights and the images.

        By a formula (engine/memory.py) that holds to within 15 % for tensors alive; what the allocator holds back,
        and on a GPU the workspaces of its libraries, come on top.

        Args:
            batch_size: B.
            from_features: whether image features are given, so that no image tower runs.
        Raises:
            ValueError: batch_size below 1.
        """
        needs = Step(cast("FastPromptedCLIP", self), batch_size).needs()
        return peak(*needs[1:] if from_features else needs)

    def plan_memory(self, batch_size: int, max_bytes: int | None = None) -> MemoryPlan:
        """The fastest way to run a step that stays below a number of bytes beside the weights.

        Args:
            batch_size: B.
            max_bytes: the limit; None: no limit.
        Returns:
            the plan; :meth:`follow_plan` and ``make_graphed_step(micro_batches=plan.micro_batches)`` take it.
        Raises:
            ValueError: a number below 1, or nothing fits: the message says what the smallest plan needs.
        """
        return plan(cast("FastPromptedCLIP", self), batch_size, max_bytes)

    def follow_plan(self, plan: MemoryPlan) -> None:
        """Take a plan's memory level and groups of classes, and let go of the memory of earlier steps."""
        self.classes_at_once = plan.classes
        for tower in (self.text_tower, self.vision_tower):
            tower.blocks.memory = plan.memory
            tower.blocks.release()
        if self.prompt_learner.by_image:
            self.text_batch = plan.test_images
