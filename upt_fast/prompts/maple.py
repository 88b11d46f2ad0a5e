"""MaPLe (arXiv 2210.03117): text prompts in the first layers, and visual prompts that are linear maps of them.

Attention over image tokens has no order: the released code's visual prompts stand behind the patches, here in front.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from upt_fast.methods.maple import MaPLeConfig
from upt_fast.prompts.base import LearnerSetting, PromptLearner, Prompts


def _copy(linear: nn.Linear) -> nn.Linear:
    """A linear of the same values; fake tensors cannot be deep-copied."""
    copied = nn.Linear(linear.in_features, linear.out_features, device="meta")
    copied.weight, copied.bias = (nn.Parameter(p.detach().clone()) for p in (linear.weight, linear.bias))
    return copied


class MaPLe(PromptLearner):
    """``ctx`` (n, d) and ``proj`` of the input layer, ``compound_*`` of the layers after it."""

    method = "maple"
    config_class = MaPLeConfig

    def __init__(self, config: MaPLeConfig, setting: LearnerSetting) -> None:
        super().__init__(config, setting)
        self.n_text, self.prefix, self.half_prompts = config.n_text, config.prefix, config.half_prompts
        deep, n, d = config.layers(setting.text_layers, setting.vision_layers) - 1, config.n_ctx, setting.text_width
        ctx = setting.initial_context(n, config.prefix)
        self.proj = nn.Linear(d, setting.vision_width)
        self.ctx = nn.Parameter(ctx)
        self.compound_prompts_text = nn.ParameterList(
            nn.Parameter(torch.empty(n, d).normal_(std=0.02)) for _ in range(deep)
        )
        one = nn.Linear(d, setting.vision_width)  # all start from the same values
        self.compound_prompt_projections = nn.ModuleList(_copy(one) for _ in range(deep))

    def forward(self) -> Prompts:
        # .parameters(): torch 2.10 cannot compile the unpacking of the list itself
        text: list[Tensor] = [self.ctx, *self.compound_prompts_text.parameters()]
        maps = [self.proj, *self.compound_prompt_projections]
        visual = [linear(prompts) for linear, prompts in zip(maps, text, strict=True)]
        return Prompts(torch.stack(text)[None], torch.stack(visual)[None])
