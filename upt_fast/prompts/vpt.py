"""VPT of the image tower as released with UPT (arXiv 2203.12119, 2210.07225); the text is a fixed template."""

from __future__ import annotations

import torch
from torch import nn

from upt_fast.methods.vpt import VPTConfig
from upt_fast.prompts.base import LearnerSetting, Prompts
from upt_fast.prompts.zeroshot import FixedText


class ShallowVPT(FixedText):
    """``visual_ctx`` (n, w) at the input, through ln_pre."""

    method = "vpt_shallow"
    config_class = VPTConfig

    def __init__(self, config: VPTConfig, setting: LearnerSetting) -> None:
        super().__init__(config, setting)
        self.visual_ctx = nn.Parameter(torch.empty(config.n_ctx, setting.vision_width).normal_(std=0.02))

    def forward(self) -> Prompts:
        return Prompts(visual=self.visual_ctx[None, None])


class DeepVPT(FixedText):
    """``visual_ctx`` (12 n, w): token j of layer i is row j L + i; no prompt passes ln_pre."""

    method = "vpt_deep"
    config_class = VPTConfig
    visual_after_ln_pre = True

    def __init__(self, config: VPTConfig, setting: LearnerSetting) -> None:
        super().__init__(config, setting)
        self.num_layers, self.num_tokens = setting.vision_layers, config.tokens_per_layer(setting.vision_layers)
        self.visual_ctx = nn.Parameter(torch.empty(12 * config.n_ctx, setting.vision_width).normal_(std=0.02))

    def forward(self) -> Prompts:
        rows = self.visual_ctx.unflatten(0, (self.num_tokens, self.num_layers))
        return Prompts(visual=rows.transpose(0, 1)[None])
