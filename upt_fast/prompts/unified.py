"""Unified Prompt Tuning's learner (arXiv 2210.07225): one set of prompts per layer, one transform for all layers.

Parameters, their names and their initial values under a seed are those of reference/model.py. Here the transform runs
as few products over the prompts of all layers; in the released form attention over sequences of length one is the
linear map W_o (W_v u + b_v) + b_o, so queries and keys, whose gradients are zero, are not computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast import dispatch
from upt_fast.config import UPTConfig


class Prompts(NamedTuple):
    """Prompts of S sets; [:, i] enters layer i."""

    text: Tensor  # (S, depth_text, n_text, d)
    visual: Tensor  # (S, depth_vision, n_visual, w)


class UnifiedPromptLearner(nn.Module):
    """The prompts U and the transform theta of UPT.

    Args:
        config: preset, numbers of prompts, heads, dropout.
        depth_text: text layers that get prompts.
        depth_vision: image layers that get prompts.
        text_width: d.
        vision_width: w.
    Raises:
        ValueError: attention_heads does not divide text_width.
    """

    def __init__(
        self, config: UPTConfig, depth_text: int, depth_vision: int, text_width: int, vision_width: int
    ) -> None:
        super().__init__()
        if text_width % config.attention_heads:
            raise ValueError(f"attention_heads={config.attention_heads} does not divide the text width {text_width}")
        self.config, self.depth_text, self.depth_vision = config, depth_text, depth_vision
        self.backend = "torch"  # of the transform; the model that owns the learner sets its own
        self.uni_ctx = nn.Parameter(
            torch.empty(max(depth_text, depth_vision), config.n_text + config.n_visual, text_width)
        )
        nn.init.normal_(self.uni_ctx, std=0.02)
        self.self_attn = nn.MultiheadAttention(text_width, config.attention_heads)  # holds the parameters
        self.norm1 = nn.LayerNorm(text_width)
        self.norm2 = nn.LayerNorm(text_width)
        self.linear1 = nn.Linear(text_width, text_width)
        self.linear2 = nn.Linear(text_width, text_width)
        self.mlp = nn.Linear(text_width, vision_width)

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout_p, self.training)

    def _ffn(self, x: Tensor) -> Tensor:
        return self._dropout(self.linear2(self._dropout(F.relu(self.linear1(x)))))

    def transform_paper(self, u: Tensor) -> Tensor:
        """U' = SA(U) + LN1(U); FFN(LN2(U')) + LN2(U'), for prompts u (D, N, d) of D layers."""
        heads = self.config.attention_heads
        qkv = F.linear(u, self.self_attn.in_proj_weight, self.self_attn.in_proj_bias)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))  # (D, heads, N, K)
        dropout_p = self.config.dropout_p if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p).transpose(1, 2).flatten(2)
        x = self.norm2(self._dropout(self.self_attn.out_proj(attended)) + self.norm1(u))
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
        n_text = self.config.n_text
        dropout_p = self.config.dropout_p if self.training else 0.0
        if dispatch.choose("prompt_transform", self.backend, self.uni_ctx, dropout_p) == "triton":
            text, visual = self._transform_by_kernel()
            return Prompts(text[None, : self.depth_text], visual[None, : self.depth_vision])
        if self.config.preset == "paper":
            transformed = self.transform_paper(self.uni_ctx)
            text, visual = transformed[: self.depth_text, :n_text], transformed[: self.depth_vision, n_text:]
        elif dropout_p:
            # the released code runs the whole network once per modality, visual first, with masks of its own
            visual = self.transform_released(self.uni_ctx)[:, n_text:]
            text = self.transform_released(self.uni_ctx)[:, :n_text]
        else:
            transformed = self.transform_released(self.uni_ctx)
            text, visual = transformed[:, :n_text], transformed[:, n_text:]
        return Prompts(text[None], self.mlp(visual)[None])

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
