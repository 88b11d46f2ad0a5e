"""CoCoOp (arXiv 2203.05557): CoOp's context, shifted by what a small network makes of the image.

    V_m(x) = V_m + h(f(x)),    h = Linear(e, e // 16), ReLU, Linear(e // 16, d),    f(x) the normalised image feature

Each image is a prompt set of its own: the packed class names run once per image, in as many images at once as memory
allows; the start token and the names' part of layer 0 are shared by all.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from upt_fast.methods.cocoop import CoCoOpConfig
from upt_fast.prompts.base import LearnerSetting, PromptLearner, Prompts


class CoCoOp(PromptLearner):
    """``ctx`` (n, d) and ``meta_net``, h."""

    method = "cocoop"
    config_class = CoCoOpConfig
    by_image = True

    def __init__(self, config: CoCoOpConfig, setting: LearnerSetting) -> None:
        super().__init__(config, setting)
        if setting.embed_dim < 16:
            raise ValueError(
                f"this CLIP's features have {setting.embed_dim} entries; wanted at least 16, CoCoOp's reduction"
            )
        self.n_text, self.prefix = config.n_text, config.prefix
        self.ctx = nn.Parameter(setting.initial_context(config.n_text, config.prefix))
        hidden = setting.embed_dim // 16
        layers = ("linear1", nn.Linear(setting.embed_dim, hidden)), ("relu", nn.ReLU())
        self.meta_net = nn.Sequential(OrderedDict([*layers, ("linear2", nn.Linear(hidden, setting.text_width))]))

    def forward(self, image_features: Tensor | None = None) -> Prompts:
        """Text prompts (B, 1, n, d) for normalised features (B, e)."""
        if image_features is None:
            raise ValueError("image_features=None; CoCoOp's prompts depend on the image: pass features")
        bias = self.meta_net(image_features.to(self.ctx.dtype))
        return Prompts(text=(self.ctx + bias[:, None])[:, None])

    def named_prompts(self, image_features: Tensor | None = None) -> dict[str, Tensor]:
        """ "text_ctx" (n, d), and with image features "bias" (B, d), h of each image."""
        found: dict[str, Tensor] = {"text_ctx": self.ctx}
        if image_features is not None:
            found["bias"] = self.meta_net(image_features.to(self.ctx.dtype))
        return found
