"""CoCoOp in plain PyTorch (arXiv 2203.05557): CoOp's context shifted by a vector that a network makes of the image.

    V_m(x) = V_m + h(f(x)),    h = Linear(e, e // 16), ReLU, Linear(e // 16, d),    f(x) the normalised image feature

Each image has class features of its own, so that B images run the text tower B times.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.clip.frozen import FrozenCLIP
from upt_fast.methods.cocoop import CoCoOpConfig
from upt_fast.reference.base import ReferencePromptedCLIP


class CoCoOpLearner(nn.Module):
    """The context V (n, d) and the network h.

    Args:
        ctx: (n, d).
        embed_dim: e.
    """

    def __init__(self, ctx: Tensor, embed_dim: int) -> None:
        super().__init__()
        if embed_dim < 16:
            raise ValueError(f"this CLIP's features have {embed_dim} entries; wanted at least 16, CoCoOp's reduction")
        self.ctx = nn.Parameter(ctx)
        self.meta_net = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(embed_dim, embed_dim // 16),
                relu=nn.ReLU(),
                linear2=nn.Linear(embed_dim // 16, ctx.shape[1]),
            )
        )

    def bias(self, image_features: Tensor) -> Tensor:
        """(B, d) from normalised features (B, e)."""
        return self.meta_net(image_features.to(self.ctx.dtype))

    def forward(self, image_features: Tensor) -> Tensor:
        """(B, n, d) contexts from normalised features (B, e)."""
        return self.ctx + self.bias(image_features)[:, None]


class ReferenceCoCoOp(ReferencePromptedCLIP):
    """CoCoOp; its options are the fields of :class:`CoCoOpConfig`."""

    method = "cocoop"
    config_class = CoCoOpConfig
    config: CoCoOpConfig

    def build(self, frozen: FrozenCLIP, classnames: tuple[str, ...]) -> None:
        self.n_text, self.prefix = self.config.n_text, self.config.prefix
        self.prompt_learner = CoCoOpLearner(self.initial_context(frozen), frozen.embed_dim)

    def prompts(self, images: Tensor | None = None) -> dict[str, Tensor]:
        """ "text_ctx" (n, d), and with images "bias" (B, d), h of each image."""
        found: dict[str, Tensor] = {"text_ctx": self.prompt_learner.ctx}
        if images is not None:
            found["bias"] = self.prompt_learner.bias(self.encode_image(images))
        return found

    def encode_text(self, normalize: bool = True, images: Tensor | None = None) -> Tensor:
        """(B, C, e) features of the classes, by image."""
        if images is None:
            raise ValueError("images=None; CoCoOp's class features depend on the image: pass images")
        return self._encode_by_image(self.encode_image(images), normalize)

    def _encode_by_image(self, image_features: Tensor, normalize: bool = True) -> Tensor:
        """(B, C, e) class features from normalised image features (B, e)."""
        with torch.no_grad():
            embedded = self.embed_classes()
        rows = self.prompt_rows().to(embedded.device)
        contexts = self.prompt_learner(image_features)
        features = torch.stack([self.run_text_tower(embedded, self.tokens.pooled, (ctx,), rows) for ctx in contexts])
        return F.normalize(features, dim=-1) if normalize else features

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, e) and (B, C, e) normalised features."""
        image_features = self.encode_image(images)
        return image_features, self._encode_by_image(image_features)
