"""Unified Prompt Tuning in plain PyTorch, to be read beside the paper (arXiv 2210.07225).

Both presets of :class:`UPTConfig` are here:

paper
    U'  = SA(U) + LN1(U)            self-attention over the prompts of a layer
    U^  = FFN(LN2(U')) + LN2(U')    the first n_text rows are the text prompts T, the others, projected, the visual V
    T_i and V_i replace the prompt rows before layer i of the towers.
released
    x   = LN1(U + SA(U)),  y = x + FFN(LN2(x))    self-attention over sequences of length one; input layer only.

and so are the learners that the paper compares itself with (the last options of :class:`UPTConfig`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.clip.frozen import FrozenCLIP
from upt_fast.methods.upt import UPTConfig
from upt_fast.reference.base import Prompts, ReferencePromptedCLIP


class ReferencePromptLearner(nn.Module):
    """The prompts U and the transform theta of UPT, with the released parameter names.

    Args:
        config: which preset, how many prompts.
        depth_text: text layers that get prompts.
        depth_vision: image layers that get prompts.
        text_width: d.
        vision_width: w.
    """

    def __init__(
        self, config: UPTConfig, depth_text: int, depth_vision: int, text_width: int, vision_width: int
    ) -> None:
        super().__init__()
        self.config = config
        if config.transform == "transformer" and text_width % config.attention_heads:
            raise ValueError(f"attention_heads={config.attention_heads} does not divide the text width {text_width}")
        self.depth_text, self.depth_vision = depth_text, depth_vision
        layers = max(depth_text, depth_vision) if config.layerwise else 1
        count = config.n_text if config.shared else config.n_text + config.n_visual
        self.uni_ctx = nn.Parameter(torch.empty(layers, count, text_width))
        nn.init.normal_(self.uni_ctx, std=0.02)
        if config.transform == "transformer":
            self.self_attn = nn.MultiheadAttention(
                text_width, config.attention_heads, dropout=config.dropout_p, batch_first=config.preset == "paper"
            )
        if config.transform != "none":
            self.norm1 = nn.LayerNorm(text_width)
            self.norm2 = nn.LayerNorm(text_width)
            self.linear1 = nn.Linear(text_width, text_width)
            self.linear2 = nn.Linear(text_width, text_width)
        self.mlp = nn.Linear(text_width, vision_width)
        self.dropout = nn.Dropout(config.dropout_p)

    def attend(self, u: Tensor) -> Tensor:
        """SA(U): between the prompts of a layer ("paper"), or of each prompt with itself ("released")."""
        return self.dropout(self.self_attn(u, u, u, need_weights=False)[0])

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x)))))

    def transform(self) -> Tensor:
        """(D, n, d) transformed prompts of the D sets."""
        u = self.uni_ctx
        if self.config.transform == "none":
            return u
        if self.config.preset == "released":
            x = self.norm1(u + self.attend(u))
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(u) if self.config.transform == "mlp" else self.attend(u) + self.norm1(u)
        x = self.norm2(x)
        return self.feed_forward(x) + x

    def forward(self) -> tuple[Tensor, Tensor]:
        """(depth_text, n_text, d) text prompts and (depth_vision, n_visual, w) visual prompts."""
        n_text, shared = self.config.n_text, self.config.shared
        transformed = self.transform()
        visual = self.mlp(transformed[: self.depth_vision, 0 if shared else n_text :])
        if self.config.preset == "released":
            # the released code runs the network once per modality, with masks of its own
            transformed = self.transform()
        text = transformed[: self.depth_text, :n_text]
        # with layerwise=False one set serves all layers
        return text.expand(self.depth_text, -1, -1), visual.expand(self.depth_vision, -1, -1)


class ReferenceJointLearner(nn.Module):
    """Independent prompts of both towers, trained together: the ablation ``joint=True``.

    Args:
        config: how many prompts.
        depth_text: text layers that get prompts.
        depth_vision: image layers that get prompts.
        text_width: d.
        vision_width: w.
    """

    def __init__(
        self, config: UPTConfig, depth_text: int, depth_vision: int, text_width: int, vision_width: int
    ) -> None:
        super().__init__()
        self.depth_text, self.depth_vision = depth_text, depth_vision
        layers_text, layers_vision = (depth_text, depth_vision) if config.layerwise else (1, 1)
        self.ctx = nn.Parameter(torch.empty(layers_text, config.n_text, text_width))
        self.visual_ctx = nn.Parameter(torch.empty(layers_vision, config.n_visual, vision_width))
        for prompts in (self.ctx, self.visual_ctx):
            nn.init.normal_(prompts, std=0.02)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(depth_text, n_text, d) text prompts and (depth_vision, n_visual, w) visual prompts."""
        return self.ctx.expand(self.depth_text, -1, -1), self.visual_ctx.expand(self.depth_vision, -1, -1)


class ReferenceUPT(ReferencePromptedCLIP):
    """Unified Prompt Tuning of a frozen CLIP, plain; its options are the fields of :class:`UPTConfig`."""

    method = "upt"
    config_class = UPTConfig
    config: UPTConfig

    def build(self, frozen: FrozenCLIP, classnames: tuple[str, ...]) -> None:
        self.n_text, self.class_token_position = self.config.n_text, self.config.class_token_position
        depths = self.config.depths(len(frozen.text.blocks), len(frozen.vision.blocks))
        self.depth_text, self.depth_vision = depths
        learner = ReferenceJointLearner if self.config.joint else ReferencePromptLearner
        self.prompt_learner = learner(self.config, *depths, frozen.text.width, frozen.vision.width)

    def tower_prompts(self) -> Prompts:
        text, visual = self.prompt_learner()
        return Prompts(text.unbind(), visual.unbind())

    def prompts(self, images: Tensor | None = None) -> dict[str, Tensor]:
        """ "paper": "text_prompts" (depth_text, n_text, d) and "visual_prompts" (depth_vision, n_visual, w);
        "released": "text_ctx" (n_text, d) and "visual_ctx" (n_visual, w)."""
        text, visual = self.prompt_learner()
        if self.config.preset == "released":
            return {"text_ctx": text[0], "visual_ctx": visual[0]}
        return {"text_prompts": text, "visual_prompts": visual}
