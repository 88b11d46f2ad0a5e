"""KgCoOp in plain PyTorch (arXiv 2303.13283): CoOp, and in the loss the distance to the features of written texts.

loss = cross-entropy + weight (1 - mean over the classes of cos(w, w_0))
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from upt_fast.clip.tokens import tokenize_template
from upt_fast.methods.kgcoop import KgCoOpConfig
from upt_fast.reference.coop import ReferenceCoOp


class ReferenceKgCoOp(ReferenceCoOp):
    """KgCoOp; its options are the fields of :class:`KgCoOpConfig`."""

    method = "kgcoop"
    config_class = KgCoOpConfig
    config: KgCoOpConfig

    def set_classnames(self, classnames: Iterable[str]) -> None:
        super().set_classnames(classnames)
        self._fixed: Tensor | None = None

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        self._fixed = None
        return super()._apply(fn, recurse)

    def fixed_features(self) -> Tensor:
        """(C, e) features of the fixed texts, w_0."""
        if self._fixed is None:
            templates = self.config.template_texts
            context = self.text_context, self.tokenizer
            self._fixed = self.encode_fixed([tokenize_template(self.classnames, t, *context) for t in templates])
        return self._fixed

    def loss_terms(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        dtype = torch.promote_types(text_features.dtype, torch.float32)
        cosines = F.cosine_similarity(text_features.to(dtype), self.fixed_features().to(dtype), dim=1)
        return self.config.weight * (1 - cosines.mean())
