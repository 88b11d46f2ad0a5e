"""Independent vision-language prompting, MaPLe's baseline (arXiv 2210.03117), and its image part alone.

The names of the parameters are those of the released models, which keep each layer's prompts in its block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from upt_fast.methods.ivlp import IVLPConfig, MVPTConfig
from upt_fast.prompts.base import LearnerSetting, PromptLearner, Prompts
from upt_fast.prompts.zeroshot import FixedText


def _parameter(n: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(n, width).normal_(std=0.02))


class ContextPrompts(nn.Module):
    """``ctx`` (n, d), the text prompts of the input layer."""

    def __init__(self, ctx: Tensor) -> None:
        super().__init__()
        self.ctx = nn.Parameter(ctx)


class TowerPrompts(nn.Module):
    """``VPT`` (n, width) of the input layer if at_input, and ``transformer.resblocks.i.VPT_shallow`` of layer i > 0."""

    def __init__(self, n: int, width: int, depth: int, at_input: bool) -> None:
        super().__init__()
        if at_input:
            self.VPT = _parameter(n, width)
        layers = [nn.Module() for _ in range(depth)]
        for layer in layers[1:]:
            layer.VPT_shallow = _parameter(n, width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(layers)

    def deep(self) -> list[Tensor]:
        """(n, width) of layers 1, 2, ..."""
        return [layer.VPT_shallow for layer in list(self.transformer.resblocks)[1:]]  # type: ignore[arg-type]


def _stack(tower: TowerPrompts, first: Tensor) -> Tensor:
    """(1, depth, n, width) prompts of all layers."""
    return torch.stack([first, *tower.deep()])[None]


class IVLP(PromptLearner):
    """``prompt_learner.ctx`` (n_t, d), ``image_encoder.VPT`` (n_v, w), and one parameter for each layer after those."""

    method = "ivlp"
    config_class = IVLPConfig
    state_prefix = ""

    def __init__(self, config: IVLPConfig, setting: LearnerSetting) -> None:
        super().__init__(config, setting)
        self.n_text, self.prefix, self.half_prompts = config.n_text, config.prefix, config.half_prompts
        depth_text, depth_vision = config.depths(setting.text_layers, setting.vision_layers)
        self.has_visual = depth_vision > 0
        self.prompt_learner = ContextPrompts(setting.initial_context(config.n_text, config.prefix))
        self.text_encoder = TowerPrompts(config.n_text, setting.text_width, depth_text, at_input=False)
        self.image_encoder = TowerPrompts(config.n_visual, setting.vision_width, depth_vision, self.has_visual)

    def forward(self) -> Prompts:
        text = _stack(self.text_encoder, self.prompt_learner.ctx)
        return Prompts(text, _stack(self.image_encoder, self.image_encoder.VPT) if self.has_visual else None)


class MVPT(FixedText):
    """IVLP's visual prompts with a fixed text: VPT as released with MaPLe."""

    method = "mvpt"
    config_class = MVPTConfig

    def __init__(self, config: MVPTConfig, setting: LearnerSetting) -> None:
        super().__init__(config, setting)
        self.half_prompts = config.half_prompts
        depth = config.layers(setting.vision_layers)
        self.image_encoder = TowerPrompts(config.n_ctx, setting.vision_width, depth, at_input=True)

    def forward(self) -> Prompts:
        return Prompts(visual=_stack(self.image_encoder, self.image_encoder.VPT))
