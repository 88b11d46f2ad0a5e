"""Independent vision-language prompting, MaPLe's baseline (arXiv 2210.03117), and its image part alone.

The names of the parameters are those of the released models, which keep each layer's prompts in its block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upt_fast.config import IVLPConfig, MVPTConfig
from upt_fast.prompts.base import LearnerSetting, PromptLearner, Prompts
from upt_fast.prompts.zeroshot import FixedText
from upt_fast.reference.coop import CoOpLearner
from upt_fast.reference.ivlp import TowerPrompts


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
        self.prompt_learner = CoOpLearner(setting.initial_context(config.n_text, config.prefix))
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
