"""Image features of a prompted CLIP: computed with its prompts, or given where no prompt can change them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.engine.towers.vision import VisionTower
from upt_fast.features.digests import tower_digest
from upt_fast.prompts import PromptLearner, Prompts


class PromptedImages(nn.Module):
    """What FastPromptedCLIP has of images and their features."""

    prompt_learner: PromptLearner
    vision_tower: VisionTower
    embed_dim: int  # e

    @property
    def images_are_fixed(self) -> bool:
        """Whether image features are the CLIP's own, which no prompt changes: they can be computed once, and given."""
        with torch.no_grad():
            return self._prompts().visual is None

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Image features.

        Args:
            images: (B, 3, H, W), normalised with the CLIP's mean and standard deviation.
            normalize: whether to scale each feature to L2 norm 1.
        Returns:
            (B, e)
        """
        return self._encode_image(images, self._prompts(), normalize)

    def vision_digest(self) -> str:
        """SHA-256 of all that the image tower computes with: its weights, as they are folded, and its numbers."""
        tower = self.vision_tower
        return tower_digest(tower, tower.pre_eps, tower.image_size, tower.pooling, tower.norm_after_pool)

    def _prompts(self) -> Prompts:
        """The prompts that do not depend on the image."""
        return Prompts() if self.prompt_learner.by_image else self.prompt_learner()

    def _image_features(
        self, images: Tensor | None, given: Tensor | None, prompts: Prompts, normalize: bool = True
    ) -> Tensor:
        """(B, e) of images, or those that are given in their place."""
        if (images is None) == (given is None):
            which = "neither images nor image_features" if given is None else "both images and image_features"
            raise ValueError(f"{which}; wanted one of them")
        if given is None:
            assert images is not None
            return self._encode_image(images, prompts, normalize)
        if prompts.visual is not None:
            raise ValueError("image_features given, but the method prompts images, so that they have none of their own")
        if given.ndim != 2 or given.shape[1] != self.embed_dim or not given.is_floating_point():
            got = f"shape {tuple(given.shape)} and {given.dtype}"
            raise ValueError(f"image_features of {got}; this CLIP's are floating-point (B, {self.embed_dim})")
        given = given.to(self.vision_tower.class_row.dtype)
        return F.normalize(given, dim=-1) if normalize else given

    def _encode_image(self, images: Tensor, prompts: Prompts, normalize: bool = True) -> Tensor:
        visual, set_index = self._visual_prompts(prompts, len(images))
        features = self.vision_tower(images, visual, set_index, self.prompt_learner.visual_after_ln_pre)
        return F.normalize(features, dim=-1) if normalize else features

    def _visual_prompts(self, prompts: Prompts, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """The visual prompts as the tower takes them, of one set or of each image; in that case each image's set."""
        visual = prompts.visual
        if visual is None or not self.prompt_learner.half_prompts:
            return visual, None
        # each image's prompts are rounded on their own, and so are their gradients before they are summed
        return visual.expand(batch, -1, -1, -1).half(), torch.arange(batch, device=visual.device)
