"""Independent vision-language prompting in plain PyTorch: the baseline of MaPLe (arXiv 2210.03117), and its image part.

Prompts stand where MaPLe's do, but those of the image tower are parameters of their own. The names in the state dict
are those of the released models, which keep each layer's prompts in its block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from upt_fast.clip.frozen import FrozenCLIP
from upt_fast.methods.ivlp import IVLPConfig, MVPTConfig
from upt_fast.reference.base import Prompts, ReferencePromptedCLIP
from upt_fast.reference.coop import CoOpLearner
from upt_fast.reference.zeroshot import ReferenceZeroShot


class LayerPrompts(nn.Module):
    """The prompts of one layer after the first.

    Args:
        n: prompt tokens.
        width: of the tower.
    """

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.VPT_shallow = nn.Parameter(torch.empty(n, width).normal_(std=0.02))


class BlockPrompts(nn.Module):
    """The prompts of all layers, each in its layer's place; the first layer's are not here.

    Args:
        n: prompt tokens.
        width: of the tower.
        depth: layers with prompts.
    """

    def __init__(self, n: int, width: int, depth: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(nn.Module() if i == 0 else LayerPrompts(n, width) for i in range(depth))


class TowerPrompts(nn.Module):
    """One tower's prompts, at the released names ``VPT`` (images only) and ``transformer.resblocks.i.VPT_shallow``.

    Args:
        n: prompt tokens.
        width: of the tower.
        depth: layers with prompts.
        at_input: whether the input layer's prompts are here.
    """

    def __init__(self, n: int, width: int, depth: int, at_input: bool) -> None:
        super().__init__()
        if at_input:
            self.VPT = nn.Parameter(torch.empty(n, width).normal_(std=0.02))
        self.transformer = BlockPrompts(n, width, depth)

    def deep(self) -> list[Tensor]:
        """(n, width) of layers 1, 2, ..."""
        return [layer.VPT_shallow for layer in self.transformer.resblocks if isinstance(layer, LayerPrompts)]


class ReferenceIVLP(ReferencePromptedCLIP):
    """IVLP; its options are the fields of :class:`IVLPConfig`."""

    method = "ivlp"
    config_class = IVLPConfig
    config: IVLPConfig
    visual_at_end = True

    def build(self, frozen: FrozenCLIP, classnames: tuple[str, ...]) -> None:
        config = self.config
        self.n_text, self.prefix, self.half_prompts = config.n_text, config.prefix, config.half_prompts
        depth_text, depth_vision = config.depths(len(frozen.text.blocks), len(frozen.vision.blocks))
        self.prompt_learner = CoOpLearner(self.initial_context(frozen))
        self.text_encoder = TowerPrompts(config.n_text, frozen.text.width, depth_text, at_input=False)
        self.image_encoder = TowerPrompts(config.n_visual, frozen.vision.width, depth_vision, at_input=depth_vision > 0)

    def tower_prompts(self) -> Prompts:
        images = self.image_encoder
        visual = [images.VPT, *images.deep()] if hasattr(images, "VPT") else []
        return Prompts([self.prompt_learner.ctx, *self.text_encoder.deep()], visual)


class ReferenceMVPT(ReferenceZeroShot):
    """VPT as released with MaPLe: IVLP's visual prompts, fixed text; its options are the fields of MVPTConfig."""

    method = "mvpt"
    config_class = MVPTConfig
    config: MVPTConfig
    visual_at_end = True

    def build(self, frozen: FrozenCLIP, classnames: tuple[str, ...]) -> None:
        self.half_prompts = self.config.half_prompts
        depth = self.config.layers(len(frozen.vision.blocks))
        self.image_encoder = TowerPrompts(self.config.n_ctx, frozen.vision.width, depth, at_input=True)

    def tower_prompts(self) -> Prompts:
        return Prompts(visual=[self.image_encoder.VPT, *self.image_encoder.deep()])
