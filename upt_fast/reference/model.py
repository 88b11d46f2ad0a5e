"""Unified Prompt Tuning in plain PyTorch, to be read beside the paper (arXiv 2210.07225).

Every class runs as a full text sequence (77 tokens), prompts are inserted with ``torch.cat``, and the blocks are
open_clip's own. Both presets of :class:`UPTConfig` are here:

paper
    U'  = SA(U) + LN1(U)            self-attention over the prompts of a layer
    U^  = FFN(LN2(U')) + LN2(U')    the first n_text rows are the text prompts T, the others, projected, the visual V
    T_i and V_i replace the prompt rows before layer i of the towers.
released
    x   = LN1(U + SA(U)),  y = x + FFN(LN2(x))    self-attention over sequences of length one; input layer only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.clip.open_clip import frozen_clip
from upt_fast.clip.tokens import Tokenizer, clean_classnames, tokenize_classnames
from upt_fast.config import UPTConfig


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
        if text_width % config.attention_heads:
            raise ValueError(f"attention_heads={config.attention_heads} does not divide the text width {text_width}")
        self.config, self.depth_text, self.depth_vision = config, depth_text, depth_vision
        depth = max(depth_text, depth_vision)
        self.uni_ctx = nn.Parameter(torch.empty(depth, config.n_text + config.n_visual, text_width))
        nn.init.normal_(self.uni_ctx, std=0.02)
        self.self_attn = nn.MultiheadAttention(
            text_width, config.attention_heads, dropout=config.dropout_p, batch_first=config.preset == "paper"
        )
        self.norm1 = nn.LayerNorm(text_width)
        self.norm2 = nn.LayerNorm(text_width)
        self.linear1 = nn.Linear(text_width, text_width)
        self.linear2 = nn.Linear(text_width, text_width)
        self.mlp = nn.Linear(text_width, vision_width)
        self.dropout = nn.Dropout(config.dropout_p)

    def transform(self) -> Tensor:
        """(D, n_text + n_visual, d) transformed prompts."""
        u = self.uni_ctx
        attended = self.dropout(self.self_attn(u, u, u, need_weights=False)[0])
        if self.config.preset == "paper":
            x = attended + self.norm1(u)
            x = self.norm2(x)
            return self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))) + x
        x = self.norm1(u + attended)
        return x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(self.norm2(x))))))

    def forward(self) -> tuple[Tensor, Tensor]:
        """(depth_text, n_text, d) text prompts and (depth_vision, n_visual, w) visual prompts."""
        n_text = self.config.n_text
        transformed = self.transform()
        visual = self.mlp(transformed[: self.depth_vision, n_text:])
        if self.config.preset == "released":
            transformed = (
                self.transform()
            )  # the released code runs the network once per modality, with masks of its own
        return transformed[: self.depth_text, :n_text], visual


class ReferenceUPT(nn.Module):
    """Unified Prompt Tuning of a frozen CLIP, plain.

    Args:
        clip_model: open_clip ``CLIP`` or ``CustomTextCLIP`` with a ViT; frozen and put in eval mode in place.
        classnames: C class names.
        tokenizer: the tokenizer of clip_model; None: CLIP's byte-pair tokenizer.
        config: all options at once, instead of the keywords.
        options: the fields of :class:`UPTConfig`.
    Raises:
        ValueError: unsupported model, bad option or class name.
    """

    def __init__(
        self,
        clip_model: nn.Module,
        classnames: Sequence[str],
        *,
        tokenizer: Tokenizer | None = None,
        config: UPTConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if config is not None and options:
            raise ValueError(f"config and {', '.join(options)} given; wanted one or the other")
        self.config = config if config is not None else UPTConfig(**options)
        frozen = frozen_clip(clip_model)
        # out of state_dict() and parameters(): only the learner is trained and saved
        object.__setattr__(self, "clip_model", clip_model.eval().requires_grad_(False))
        self.tokenizer, self.text_context = tokenizer, frozen.text.context
        depths = self.config.depths(len(frozen.text.blocks), len(frozen.vision.blocks))
        self.depth_text, self.depth_vision = depths
        self.prompt_learner = ReferencePromptLearner(self.config, *depths, frozen.text.width, frozen.vision.width)
        self.prompt_learner.to(frozen.device, torch.float64 if frozen.dtype == torch.float64 else torch.float32)
        self.set_classnames(classnames)

    clip_model: Any

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        self.clip_model._apply(fn)
        return super()._apply(fn, recurse)

    @property
    def text_model(self) -> Any:
        return getattr(self.clip_model, "text", self.clip_model)

    def set_classnames(self, classnames: Sequence[str]) -> None:
        """Replace the classes; raises ValueError on an empty name or one that does not fit the context."""
        self.tokens = tokenize_classnames(classnames, self.config.n_text, self.text_context, self.tokenizer)
        self.classnames = clean_classnames(classnames)

    def prompt_rows(self) -> Tensor:
        """(C, n_text) rows of each class's sequence in which its prompts stand."""
        n = self.config.n_text
        before = {"end": n, "middle": n // 2, "front": 0}[self.config.class_token_position]
        lengths = torch.tensor(self.tokens.name_lengths)[:, None]  # (C, 1)
        j = torch.arange(n)[None]  # (1, n)
        return 1 + j + torch.where(j < before, 0, lengths)

    def embed_classes(self) -> Tensor:
        """(C, T, d) token embeddings with zeros where prompts go, without positions."""
        n = self.config.n_text
        before = {"end": n, "middle": n // 2, "front": 0}[self.config.class_token_position]
        ids = self.tokens.ids.to(self.text_model.token_embedding.weight.device)
        sequences = []
        for row, length in zip(ids, self.tokens.name_lengths, strict=True):
            sos, rest = (self.text_model.token_embedding(part) for part in (row[:1], row[1 + n :]))
            first, second = rest.new_zeros(before, rest.shape[1]), rest.new_zeros(n - before, rest.shape[1])
            sequences.append(torch.cat([sos, first, rest[:length], second, rest[length:]]))
        return torch.stack(sequences)

    def insert_text(self, x: Tensor, prompts: Tensor, rows: Tensor) -> Tensor:
        """Replace the prompt rows of x (C, T, d) by prompts (n_text, d)."""
        prompts = prompts.to(x.dtype).expand(len(x), -1, -1)
        if self.config.class_token_position == "end":
            return torch.cat([x[:, :1], prompts, x[:, 1 + prompts.shape[1] :]], dim=1)
        return x.scatter(1, rows[:, :, None].expand(-1, -1, x.shape[2]), prompts)

    def encode_text(self, normalize: bool = True) -> Tensor:
        """(C, e) features of the classes."""
        return self._encode_text(self.prompt_learner()[0], normalize)

    def _encode_text(self, prompts: Tensor, normalize: bool = True) -> Tensor:
        model = self.text_model
        dtype = model.transformer.get_cast_dtype()
        with torch.no_grad():
            x = self.embed_classes().to(dtype)  # (C, T, d)
        rows = self.prompt_rows().to(x.device)
        length = x.shape[1]
        x = self.insert_text(x, prompts[0], rows) + model.positional_embedding[:length].to(dtype)
        for i, block in enumerate(model.transformer.resblocks):
            if 1 <= i < self.depth_text:
                x = self.insert_text(x, prompts[i], rows)
            x = block(x, attn_mask=model.attn_mask[:length, :length])
        x = model.ln_final(x)
        x = x[torch.arange(len(x), device=x.device), torch.tensor(self.tokens.pooled, device=x.device)]
        if isinstance(model.text_projection, nn.Linear):
            x = model.text_projection(x)
        elif model.text_projection is not None:
            x = x @ model.text_projection
        return F.normalize(x, dim=-1) if normalize else x

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """(B, e) features of images (B, 3, H, W)."""
        return self._encode_image(images, self.prompt_learner()[1], normalize)

    def _encode_image(self, images: Tensor, prompts: Tensor, normalize: bool = True) -> Tensor:
        visual = self.clip_model.visual
        n = self.config.n_visual
        x = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)  # (B, G, w)
        cls = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1) + visual.positional_embedding.to(x.dtype)
        prompts = prompts.to(x.dtype)[:, None].expand(-1, len(x), -1, -1)  # (depth, B, n, w)
        x = visual.ln_pre(torch.cat([x[:, :1], prompts[0], x[:, 1:]], dim=1))
        for i, block in enumerate(visual.transformer.resblocks):
            if 1 <= i < self.depth_vision:
                x = torch.cat([x[:, :1], prompts[i], x[:, 1 + n :]], dim=1)
            x = block(x)
        x = torch.cat([x[:, :1], x[:, 1 + n :]], dim=1)  # pooling must not see the prompts
        x, _ = visual._pool(x)
        if visual.proj is not None:
            x = x @ visual.proj
        return F.normalize(x, dim=-1) if normalize else x

    def forward(self, images: Tensor) -> Tensor:
        """(B, C) logits of images (B, 3, H, W)."""
        text_prompts, visual_prompts = self.prompt_learner()
        image_features = self._encode_image(images, visual_prompts)
        text_features = self._encode_text(text_prompts)
        logits = self.clip_model.logit_scale.exp() * image_features @ text_features.t()
        if self.clip_model.logit_bias is not None:
            logits = logits + self.clip_model.logit_bias
        return logits
