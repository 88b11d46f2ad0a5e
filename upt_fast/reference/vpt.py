"""VPT of a CLIP's image tower as released with UPT, in plain PyTorch (arXiv 2203.12119, 2210.07225).

shallow  [CLS+pos][V][patches+pos], then ln_pre
deep     [CLS+pos][patches+pos], ln_pre, then V_0 after CLS; before block i, V_i in the place of V_(i-1). Token j of
         layer i is row j L + i of the parameter, which has 12 n rows whatever the number of layers L.

The text is a fixed template.
"""

from __future__ import annotations

import torch
from torch import nn

from upt_fast.clip.frozen import FrozenCLIP
from upt_fast.methods.vpt import VPTConfig
from upt_fast.reference.base import Prompts
from upt_fast.reference.zeroshot import ReferenceZeroShot


class ReferenceShallowVPT(ReferenceZeroShot):
    """Visual prompts at the input; its options are the fields of :class:`VPTConfig`."""

    method = "vpt_shallow"
    config_class = VPTConfig
    config: VPTConfig

    def build(self, frozen: FrozenCLIP, classnames: tuple[str, ...]) -> None:
        self.visual_ctx = nn.Parameter(torch.empty(self.config.n_ctx, frozen.vision.width).normal_(std=0.02))

    def tower_prompts(self) -> Prompts:
        return Prompts(visual=(self.visual_ctx,))


class ReferenceDeepVPT(ReferenceZeroShot):
    """Visual prompts in every layer; its options are the fields of :class:`VPTConfig`."""

    method = "vpt_deep"
    config_class = VPTConfig
    config: VPTConfig
    visual_after_ln_pre = True

    def build(self, frozen: FrozenCLIP, classnames: tuple[str, ...]) -> None:
        self.num_layers = len(frozen.vision.blocks)
        self.num_tokens = self.config.tokens_per_layer(self.num_layers)
        self.visual_ctx = nn.Parameter(torch.empty(12 * self.config.n_ctx, frozen.vision.width).normal_(std=0.02))

    def tower_prompts(self) -> Prompts:
        rows = self.visual_ctx.view(self.num_tokens, self.num_layers, -1)
        return Prompts(visual=rows.unbind(dim=1))
