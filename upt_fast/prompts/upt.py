"""Unified Prompt Tuning's learner (arXiv 2210.07225): one set of prompts per layer, one transform for all layers.

Parameters, their names and their initial values under a seed are those of reference/upt.py. Here the transform runs
as few products over the prompts of all layers; in the released form attention over sequences of length one is the
linear map W_o (W_v u + b_v) + b_o, so queries and keys, whose gradients are zero, are not computed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.engine.backends import dispatch
from upt_fast.methods.upt import UPTConfig
from upt_fast.prompts.base import LearnerSetting, PromptLearner, Prompts


class UnifiedPromptLearner(PromptLearner):
    """The prompts U and the transform theta of UPT, or what an ablation of :class:`UPTConfig` leaves of them.

    Args:
        config: preset, numbers of prompts, heads, dropout, ablation.
        setting: layers and widths of the towers.
    Raises:
        ValueError: a depth is larger than its tower; attention_heads does not divide the text width.
    """

    method = "upt"
    config_class = UPTConfig

    def __init__(self, config: UPTConfig, setting: LearnerSetting) -> None:
        super().__init__(config, setting)
        self.n_text, self.class_token_position = config.n_text, config.class_token_position
        self.depth_text, self.depth_vision = config.depths(setting.text_layers, setting.vision_layers)
        self.backend = "torch"  # of the transform; the model that owns the learner sets that of its image tower
        width, vision_width = setting.text_width, setting.vision_width
        if config.joint:
            layers = (self.depth_text, self.depth_vision) if config.layerwise else (1, 1)
            self.ctx = nn.Parameter(torch.empty(layers[0], config.n_text, width).normal_(std=0.02))
            self.visual_ctx = nn.Parameter(torch.empty(layers[1], config.n_visual, vision_width).normal_(std=0.02))
            return
        if config.transform == "transformer" and width % config.attention_heads:
            raise ValueError(f"attention_heads={config.attention_heads} does not divide the text width {width}")
        count = config.n_text if config.shared else config.n_text + config.n_visual
        sets = max(self.depth_text, self.depth_vision) if config.layerwise else 1
        self.uni_ctx = nn.Parameter(torch.empty(sets, count, width).normal_(std=0.02))
        if config.transform == "transformer":
            self.self_attn = nn.MultiheadAttention(width, config.attention_heads)  # holds the parameters
        if config.transform != "none":
            self.norm1 = nn.LayerNorm(width)
            self.norm2 = nn.LayerNorm(width)
            self.linear1 = nn.Linear(width, width)
            self.linear2 = nn.Linear(width, width)
        self.mlp = nn.Linear(width, vision_width)

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout_p, self.training)

    def _ffn(self, x: Tensor) -> Tensor:
        return self._dropout(self.linear2(self._dropout(F.relu(self.linear1(x)))))

    def transform_paper(self, u: Tensor) -> Tensor:
        """U' = SA(U) + LN1(U); FFN(LN2(U')) + LN2(U'), for prompts u (D, N, d) of D layers; "mlp" has no SA(U)."""
        x = self.norm1(u)
        if self.config.transform == "transformer":
            heads = self.config.attention_heads
            qkv = F.linear(u, self.self_attn.in_proj_weight, self.self_attn.in_proj_bias)
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))  # (D, heads, N, K)
            # a handful of prompts: written out, so that it has second derivatives
            scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
            attended = torch.matmul(self._dropout(torch.softmax(scores, dim=-1)), v).transpose(1, 2).flatten(2)
            x = self._dropout(self.self_attn.out_proj(attended)) + x
        x = self.norm2(x)
        return self._ffn(x) + x

    def transform_released(self, u: Tensor) -> Tensor:
        """x = LN1(u + SA(u)); x + FFN(LN2(x)), each prompt of u (1, N, d) on its own."""
        width = u.shape[-1]
        value = F.linear(u, self.self_attn.in_proj_weight[2 * width :], self.self_attn.in_proj_bias[2 * width :])
        # attention's dropout acts on the one probability of a prompt and head, so it drops a head's whole value
        heads = value.unflatten(-1, (self.config.attention_heads, -1))
        heads = heads * self._dropout(torch.ones_like(heads[..., :1]))
        x = self.norm1(u + self._dropout(self.self_attn.out_proj(heads.flatten(-2))))
        return x + self._ffn(self.norm2(x))

    def forward(self) -> Prompts:
        """Prompts of one set: text (1, depth_text, n_text, d) and visual (1, depth_vision, n_visual, w)."""
        text, visual = (self.ctx, self.visual_ctx) if self.config.joint else self._transformed()
        # with layerwise=False one set serves all layers
        text, visual = (
            t.expand(depth, -1, -1) if len(t) == 1 else t[:depth]
            for t, depth in ((text, self.depth_text), (visual, self.depth_vision))
        )
        return Prompts(text[None], visual[None])

    def _transformed(self) -> tuple[Tensor, Tensor]:
        """(D, n_text, d) and (D, n_visual, w) prompts of D layers."""
        config = self.config
        u: Tensor = self.uni_ctx
        n_text, first_visual = config.n_text, 0 if config.shared else config.n_text
        dropout_p = config.dropout_p if self.training else 0.0
        has_kernel = config.transform == "transformer" and not config.shared
        if has_kernel and dispatch.choose("prompt_transform", self.backend, u, dropout_p) == "triton":
            return self._transform_by_kernel()
        if config.preset == "released" and dropout_p:
            # the released code runs the whole network once per modality, visual first, with masks of its own
            visual = self.transform_released(u)[:, n_text:]
            return self.transform_released(u)[:, :n_text], self.mlp(visual)
        if config.preset == "released":
            u = self.transform_released(u)
        elif config.transform != "none":
            u = self.transform_paper(u)
        return u[:, :n_text], self.mlp(u[:, first_visual:])

    def named_prompts(self, image_features: Tensor | None = None) -> dict[str, Tensor]:
        """ "paper": "text_prompts" (depth_text, n_text, d) and "visual_prompts" (depth_vision, n_visual, w);
        "released": "text_ctx" (n_text, d) and "visual_ctx" (n_visual, w)."""
        text, visual = (t[0] for t in self() if t is not None)
        if self.config.preset == "released":
            return {"text_ctx": text[0], "visual_ctx": visual[0]}
        return {"text_prompts": text, "visual_prompts": visual}

    def _transform_by_kernel(self) -> tuple[Tensor, Tensor]:
        from upt_fast.kernels.prompt_transform import prompt_transform

        return prompt_transform(
            self.uni_ctx,
            self.self_attn.in_proj_weight,
            self.self_attn.in_proj_bias,
            self.self_attn.out_proj.weight,
            self.self_attn.out_proj.bias,
            self.norm1.weight,
            self.norm1.bias,
            self.norm2.weight,
            self.norm2.bias,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            self.mlp.weight,
            self.mlp.bias,
            n_text=self.config.n_text,
            num_heads=self.config.attention_heads,
            eps1=self.norm1.eps,
            eps2=self.norm2.eps,
            released=self.config.preset == "released",
        )
