"""What the engine needs to know of a CLIP: plain tensors and numbers, no modules, no library.

An adapter (clip/open_clip.py) turns a library's model into one :class:`FrozenCLIP`; the towers read nothing else.
Weights are the library's own tensors, detached and not copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
TEXT_POOLINGS = ("argmax", "eos", "last")
VISION_POOLINGS = ("tok", "avg")


@dataclass(frozen=True)
class FrozenNorm:
    """LayerNorm over D features: weight and bias (D,) or None, and eps."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class FrozenBlock:
    """One pre-LayerNorm residual block: x + ls_1 * attn(ln_1 x), then x + ls_2 * mlp(ln_2 x)."""

    ln_1: FrozenNorm
    in_proj_weight: Tensor  # (3D, D), rows q, k, v
    in_proj_bias: Tensor | None  # (3D,)
    out_proj_weight: Tensor  # (D, D)
    out_proj_bias: Tensor | None  # (D,)
    ls_1: Tensor | None  # (D,) LayerScale
    ln_2: FrozenNorm
    fc_weight: Tensor  # (M, D)
    fc_bias: Tensor | None  # (M,)
    proj_weight: Tensor  # (D, M)
    proj_bias: Tensor | None  # (D,)
    ls_2: Tensor | None  # (D,)


@dataclass(frozen=True)
class TextContext:
    """What a text tower wants of token ids: how many, below which id, and which row becomes the feature."""

    length: int  # T
    vocabulary: int  # V
    pooling: str  # one of TEXT_POOLINGS
    eos_id: int | None  # read by "eos" pooling only


@dataclass(frozen=True)
class FrozenText:
    """A causal text tower of width d, context length T, vocabulary V and output width e."""

    token_embedding: Tensor  # (V, d)
    positional_embedding: Tensor  # (T, d)
    blocks: tuple[FrozenBlock, ...]
    num_heads: int
    activation: str  # one of ACTIVATIONS
    ln_final: FrozenNorm
    projection: Tensor | None  # (d, e)
    projection_bias: Tensor | None  # (e,)
    pooling: str  # one of TEXT_POOLINGS
    eos_id: int | None  # read by "eos" pooling only

    @property
    def width(self) -> int:
        return self.positional_embedding.shape[1]

    @property
    def context(self) -> TextContext:
        return TextContext(len(self.positional_embedding), len(self.token_embedding), self.pooling, self.eos_id)


@dataclass(frozen=True)
class FrozenVision:
    """A ViT of width w with G = grid height x grid width patches."""

    conv_weight: Tensor  # (w, 3, patch height, patch width), stride = kernel
    conv_bias: Tensor | None  # (w,)
    class_embedding: Tensor  # (w,)
    positional_embedding: Tensor  # (G + 1, w)
    ln_pre: FrozenNorm | None
    blocks: tuple[FrozenBlock, ...]
    num_heads: int
    activation: str
    ln_post: FrozenNorm
    projection: Tensor | None  # (w, e)
    pooling: str  # one of VISION_POOLINGS; "avg" is over the patches only
    norm_after_pool: bool  # LayerNorm of the mean instead of the mean of LayerNorms: differs for "avg" only
    image_size: tuple[int, int]

    @property
    def width(self) -> int:
        return self.positional_embedding.shape[1]


@dataclass(frozen=True)
class FrozenCLIP:
    """A frozen dual encoder: logits = exp(logit_scale) * image_features @ text_features^T (+ logit_bias)."""

    text: FrozenText
    vision: FrozenVision
    logit_scale: Tensor  # () the logarithm
    logit_bias: Tensor | None  # ()

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the linear layers, in which the towers compute unless told otherwise."""
        return self.vision.blocks[0].in_proj_weight.dtype

    @property
    def embed_dim(self) -> int:
        """e, of the features."""
        return self.vision.width if self.vision.projection is None else self.vision.projection.shape[1]

    @property
    def device(self) -> torch.device:
        return self.vision.conv_weight.device
