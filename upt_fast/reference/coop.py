"""CoOp in plain PyTorch (arXiv 2109.01134): learned words around the class name, at the text tower's input.

end     [SOS][V_1 ... V_n][name . EOT]
middle  [SOS][V_1 ... V_n/2][name][V_n/2+1 ... V_n][. EOT]
front   [SOS][name][V_1 ... V_n][. EOT]
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from upt_fast.clip.frozen import FrozenCLIP
from upt_fast.clip.tokens import clean_classnames, list_classnames
from upt_fast.methods.coop import CoOpConfig
from upt_fast.reference.base import Prompts, ReferencePromptedCLIP


class CoOpLearner(nn.Module):
    """The context V.

    Args:
        ctx: (n, d), or (C, n, d) with a context for each class.
    """

    def __init__(self, ctx: torch.Tensor) -> None:
        super().__init__()
        self.ctx = nn.Parameter(ctx)


class ReferenceCoOp(ReferencePromptedCLIP):
    """CoOp; its options are the fields of :class:`CoOpConfig`."""

    method = "coop"
    config_class = CoOpConfig
    config: CoOpConfig

    def build(self, frozen: FrozenCLIP, classnames: tuple[str, ...]) -> None:
        self.class_token_position = self.config.class_token_position
        self.n_text, self.prefix = self.config.n_text, self.config.prefix
        if self.config.per_class:
            ctx = torch.empty(len(classnames), self.n_text, frozen.text.width).normal_(std=0.02)
        else:
            ctx = self.initial_context(frozen)
        self.prompt_learner = CoOpLearner(ctx)

    def set_classnames(self, classnames: Iterable[str]) -> None:
        """Replace the classes; class-specific contexts want as many names as before, in the same order."""
        classnames = list_classnames(classnames)
        count = len(clean_classnames(classnames))
        if self.config.per_class and count != len(self.prompt_learner.ctx):
            raise ValueError(
                f"{count} class names for the class-specific contexts of {len(self.prompt_learner.ctx)} classes; "
                "wanted as many names as contexts"
            )
        super().set_classnames(classnames)

    def tower_prompts(self) -> Prompts:
        return Prompts(text=(self.prompt_learner.ctx,))
