"""MaPLe in plain PyTorch (arXiv 2210.03117): text prompts, and visual prompts that are linear maps of them.

    text     [SOS][P_0][name . EOT] + positions; before block i < J, P_i in the place of P_(i-1)
    image    [CLS+pos][patches+pos][F_0(P_0)], then ln_pre; before block i < J, F_i(P_i) in the place of the prompts
    F_i      Linear d -> w, one for each layer

The released code keeps all initial words in the text: with "a photo of a" and two prompts the input is
[SOS][P_0 (two rows)]["of a" name . EOT].
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from upt_fast.clip.frozen import FrozenCLIP
from upt_fast.methods.maple import MaPLeConfig
from upt_fast.reference.base import Prompts, ReferencePromptedCLIP


class MaPLeLearner(nn.Module):
    """P_0 (ctx), F_0 (proj), and P_i and F_i of the layers after the first.

    Args:
        ctx: (n, d).
        depth: J.
        vision_width: w.
    """

    def __init__(self, ctx: Tensor, depth: int, vision_width: int) -> None:
        super().__init__()
        n, text_width = ctx.shape
        self.proj = nn.Linear(text_width, vision_width)
        self.ctx = nn.Parameter(ctx)
        self.compound_prompts_text = nn.ParameterList(
            nn.Parameter(torch.empty(n, text_width).normal_(std=0.02)) for _ in range(depth - 1)
        )
        # all start from the same values
        one = nn.Linear(text_width, vision_width)
        self.compound_prompt_projections = nn.ModuleList(copy.deepcopy(one) for _ in range(depth - 1))

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """J text prompts (n, d) and J visual prompts (n, w)."""
        deep = zip(self.compound_prompt_projections, self.compound_prompts_text, strict=True)
        visual = [self.proj(self.ctx), *(project(prompts) for project, prompts in deep)]
        return [self.ctx, *self.compound_prompts_text], visual


class ReferenceMaPLe(ReferencePromptedCLIP):
    """MaPLe; its options are the fields of :class:`MaPLeConfig`."""

    method = "maple"
    config_class = MaPLeConfig
    config: MaPLeConfig
    visual_at_end = True

    def build(self, frozen: FrozenCLIP, classnames: tuple[str, ...]) -> None:
        self.n_text, self.prefix = self.config.n_text, self.config.prefix
        self.half_prompts = self.config.half_prompts
        depth = self.config.layers(len(frozen.text.blocks), len(frozen.vision.blocks))
        self.prompt_learner = MaPLeLearner(self.initial_context(frozen), depth, frozen.vision.width)

    def tower_prompts(self) -> Prompts:
        return Prompts(*self.prompt_learner())
