"""CoOp (arXiv 2109.01134): learned words around the class name, at the text tower's input."""

from __future__ import annotations

import torch
from torch import nn

from upt_fast.methods.coop import CoOpConfig
from upt_fast.prompts.base import LearnerSetting, PromptLearner, Prompts


class CoOp(PromptLearner):
    """``ctx`` (n, d), or (C, n, d) with contexts of each class's own."""

    method = "coop"
    config_class = CoOpConfig

    def __init__(self, config: CoOpConfig, setting: LearnerSetting) -> None:
        super().__init__(config, setting)
        self.n_text, self.prefix, self.text_per_class = config.n_text, config.prefix, config.per_class
        self.class_token_position = config.class_token_position
        if config.per_class:
            shape = len(setting.classnames), config.n_text, setting.text_width
            self.ctx = nn.Parameter(torch.empty(shape).normal_(std=0.02))
        else:
            self.ctx = nn.Parameter(setting.initial_context(config.n_text, config.prefix))

    def forward(self) -> Prompts:
        return Prompts(text=self.ctx[:, None] if self.text_per_class else self.ctx[None, None])

    def set_classnames(self, classnames: tuple[str, ...]) -> None:
        if self.text_per_class and len(classnames) != len(self.ctx):
            raise ValueError(
                f"{len(classnames)} class names for the class-specific contexts of {len(self.ctx)} classes; "
                "wanted as many names as contexts"
            )
